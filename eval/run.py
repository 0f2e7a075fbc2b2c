"""The verb `eval`: an encoder and its floors on one task, by every protocol, with intervals."""

import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from rich.console import Console

from eosin.configs.load import to_yaml
from eosin.data_curation.manifest import PREDICTIONS, write_table
from eosin.eval.config import EvalConfig
from eosin.eval.confounding import confounding
from eosin.eval.console import differences_table, insight_lines, scores_table
from eosin.eval.discrimination import is_discriminative
from eosin.eval.export_tables import scores_csv, scores_latex
from eosin.eval.intervals import few_groups_note
from eosin.eval.label_free import label_free, lidar
from eosin.eval.leakage import leakage
from eosin.eval.predictions import predictions_table
from eosin.eval.probe import Labelled, Outcome
from eosin.eval.protocols import DESCRIPTIONS, choose, run_protocols
from eosin.eval.report import write_report
from eosin.eval.report_sections import report_sections
from eosin.eval.results import (
    ConditionRange,
    ConditionScore,
    EncoderRecord,
    Insight,
    Results,
    save_results,
)
from eosin.eval.scoring import Draws, draw, score_rows
from eosin.eval.sensitivity import PLAIN, mean_cosine, score_conditions, split_outcome
from eosin.eval.shortcut import shortcut
from eosin.eval.table_rows import TableRow, load_rows
from eosin.eval.task_features import STAIN_PREFIX, embed_task, embed_under_conditions, is_cached
from eosin.eval.tasks import Task, load_task
from eosin.launch.artefacts import write_json, write_text
from eosin.launch.process import choose_device, join_world
from eosin.launch.progress import Meter, format_seconds

CONFIG_NAME = "config.yaml"
_WAIT_S = 24 * 3600.0  # for the first, which probes while the others are done
LIDAR_TILES = 1000
"""Test tiles of which LiDAR is taken, as in its paper."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found of one encoder."""

    outcomes: dict[str, Outcome]
    """By protocol."""
    features: npt.NDArray[np.float32]
    """Of all tiles, [N, D]."""
    conditions: list[ConditionScore]
    ranges: list[ConditionRange]
    insight: Insight
    seconds: dict[str, float] = field(default_factory=dict)
    """By part."""


def evaluate(config: EvalConfig, *, with_report: bool = True) -> None:
    """Scores everything and writes results, predictions, timings and the report to ``out``.

    Several processes share the embedding; the first does the rest.

    Args:
        config: of the evaluation.
        with_report: False where the caller writes a page of its own.

    Raises:
        InputError: the encoder or the task cannot be used; what was embedded before is kept.
    """
    with join_world(choose_device(config.device), timeout_s=_WAIT_S) as world:
        task, rows = load_task(config.task, config.seed), load_rows(config)
        if world.size > 1:
            for row in rows:
                embed_task(config, task, row, world)
                embed_under_conditions(config, task, row, world)
        if world.leads:
            _score_all(config, task, rows, with_report)
        world.barrier()


def _score_all(config: EvalConfig, task: Task, rows: list[TableRow], with_report: bool) -> None:
    """Everything but embedding with others, by one process."""
    console, notices = Console(), Console(stderr=True)
    for note in _notes(task):
        notices.print(f"note: {note}", highlight=False, markup=False)
    draws = draw(
        task.labels[task.splits == "test"],
        task.groups_of("test"),
        len(task.classes),
        config.n_bootstrap,
        config.seed,
    )
    found = {row.record.name: _examine(config, task, row, draws) for row in rows}
    results = _results(config, task, [row.record for row in rows], found, draws)
    predictions = predictions_table(task, {name: f.outcomes for name, f in found.items()})
    write_table(predictions, config.out / "predictions.parquet", PREDICTIONS)
    write_text(config.out / CONFIG_NAME, to_yaml(config))
    write_text(config.out / "scores.csv", scores_csv(results))
    write_text(config.out / "scores.tex", scores_latex(results))
    write_json(config.out / "timings.json", {name: f.seconds for name, f in found.items()})
    save_results(results, config.out / "results.json")
    console.print(scores_table(results), differences_table(results), sep="\n")
    for line in insight_lines(results):
        console.print(line, highlight=False, markup=False)
    told = is_discriminative([results])
    if not all(told.values()):
        blind = [protocol for protocol, tells in told.items() if not tells]
        notices.print(
            f"note: under {len(blind)} of {len(told)} protocols ({', '.join(blind[:3])}"
            f"{', …' if len(blind) > 3 else ''}) a floor lies within the best encoder's interval: "
            "there this task does not tell encoders from floors",
            highlight=False,
            markup=False,
        )
    if not with_report:
        return
    main = found[rows[0].record.name]
    sections = report_sections(
        task,
        results,
        main.outcomes,
        main.features,
        config.out / "figures",
        choose_device(config.device),
    )
    write_report(config.out / "report.html", results, predictions, sections)
    console.print(f"report: {config.out / 'report.html'}", highlight=False, soft_wrap=True)


def plan(config: EvalConfig) -> str:
    """What `evaluate` would embed, and how long that takes by the time of one batch."""
    task = load_task(config.task, config.seed)
    record = task.record()
    lines = [
        f"task {task.name}: {len(task.images)} tiles, classes {', '.join(task.classes)}",
        *(f"  {s}: {record.tiles[s]} tiles of {record.groups[s]} groups" for s in record.tiles),
        *(f"  note: {note}" for note in _notes(task)),
    ]
    for row in load_rows(config):
        name, encoder = row.record.label, row.encoder
        if is_cached(config, task, row):
            lines.append(f"{name}: features are cached")
            continue
        px = encoder.input_px or 224
        batch = np.zeros((min(config.batch_size, len(task.images)), px, px, 3), np.uint8)
        started = time.perf_counter()
        encoder.embed(batch)
        seconds = (time.perf_counter() - started) * len(task.images) / len(batch)
        megabytes = len(task.images) * encoder.dim * 2 / 1e6
        lines.append(
            f"{name}: {len(task.images)} tiles to embed, about {format_seconds(seconds)} and the "
            f"decoding, {megabytes:.1f} MB"
        )
    return "\n".join([*lines, f"then {', '.join(choose(config.protocols))} for each"])


def _notes(task: Task) -> list[str]:
    return [*task.notes, *few_groups_note(task.record().groups["test"])]


def _examine(config: EvalConfig, task: Task, row: TableRow, draws: Draws) -> Found:
    """Embeds, probes, plain and under conditions, and looks at the features themselves."""
    name, device, seconds = row.record.name, choose_device(config.device), {}
    began = time.perf_counter()
    features, test = embed_task(config, task, row), task.splits == "test"
    changed = embed_under_conditions(config, task, row)
    seconds["embed"] = time.perf_counter() - began
    labelled = Labelled(
        features=features[~test],
        labels=task.labels[~test],
        is_val=task.splits[~test] == "val",
        device=device,
    )
    names, n = choose(config.protocols), int(test.sum())
    asked = np.concatenate([features[test], *changed.values()])  # a probe is fitted once for all
    outcomes, conditions, ranges = {}, list[ConditionScore](), list[ConditionRange]()
    with Meter(f"probe {name}", len(names), "protocols") as meter:
        ran = run_protocols(names, labelled, asked, len(task.classes), config.seed)
        for protocol, outcome, took in ran:
            parts = dict(zip((PLAIN, *changed), split_outcome(outcome, n), strict=True))
            outcomes[protocol], seconds[protocol] = parts[PLAIN], took
            if changed:
                scores, spans = score_conditions(name, protocol, parts, draws)
                conditions, ranges = conditions + scores, ranges + spans
            meter.advance(1)
    began = time.perf_counter()
    insight = Insight(
        label_free=label_free(features),
        leakage=leakage(features, task.groups, config.seed, device),
        confounding=None
        if task.origins is None
        else confounding(
            features,
            task.labels,
            task.origins,
            task.groups,
            draws=config.n_bootstrap,
            seed=config.seed,
            device=device,
        ),
        shortcut=None
        if task.origins is None
        else shortcut(features, task.labels, task.origins, test, config.seed, device),
        lidar=_lidar(features[test], changed),
        cosines={c: mean_cosine(features[test], x) for c, x in changed.items()},
    )
    seconds["insight"] = time.perf_counter() - began
    return Found(
        outcomes=outcomes,
        features=features,
        conditions=conditions,
        ranges=ranges,
        insight=insight,
        seconds=seconds,
    )


def _lidar(
    plain: npt.NDArray[np.float32], changed: dict[str, npt.NDArray[np.float32]]
) -> float | None:
    """LiDAR of test tiles [N, D] with their transforms, not their stainings, as views."""
    views = [x for name, x in changed.items() if not name.startswith(STAIN_PREFIX)]
    if len(views) < 2 or len(plain) < 2:
        return None
    rows = np.unique(np.linspace(0, len(plain) - 1, LIDAR_TILES).round().astype(int))
    stacked = np.stack([x[rows] for x in (plain, *views)], axis=1)  # [N, V, D]
    return lidar(stacked.astype(np.float64))


def _results(
    config: EvalConfig,
    task: Task,
    records: list[EncoderRecord],
    found: dict[str, Found],
    draws: Draws,
) -> Results:
    scores, differences = score_rows({name: f.outcomes for name, f in found.items()}, draws)
    return Results(
        task=task.record(),
        encoders=records,
        scores=scores,
        differences=differences,
        bootstrap_draws=config.n_bootstrap,
        seed=config.seed,
        protocols={name: DESCRIPTIONS[name] for name in found[records[0].name].outcomes},
        insights={name: f.insight for name, f in found.items()},
        conditions=[c for f in found.values() for c in f.conditions],
        ranges=[r for f in found.values() for r in f.ranges],
    )
