"""The verb `eval`: an encoder and its floors on one task, by every protocol, with intervals."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.console import Console

from eosin.configs.errors import InputError
from eosin.data_curation.embed import embed_images
from eosin.data_curation.embed_config import NormaliseConfig
from eosin.data_curation.encoder import DescriptorEncoder, Encoder, load_encoder
from eosin.data_curation.features import features_stamp, has_features
from eosin.data_curation.manifest import FEATURE_ROWS, PREDICTIONS, make_id, write_table
from eosin.data_curation.normalised_encoder import load_normalised
from eosin.eval.console import differences_table, scores_table
from eosin.eval.intervals import FEW_GROUPS
from eosin.eval.predictions import predictions_table
from eosin.eval.probe import Labelled, Outcome
from eosin.eval.protocols import DESCRIPTIONS, choose, run_protocols
from eosin.eval.report import write_report
from eosin.eval.results import EncoderRecord, Results, save_results
from eosin.eval.scoring import compare, draw, score
from eosin.eval.tasks import Task, TaskConfig, load_task
from eosin.launch.artefacts import write_json
from eosin.launch.device_names import DeviceName
from eosin.launch.process import choose_device
from eosin.launch.progress import Meter, format_seconds

FLOORS = ("builtin:mean-colour", "builtin:colour-histogram")
"""What every table holds beside the encoder and its random-weights twin."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Scores an encoder, the same network at random weights and two colour floors."""

    encoder: str
    """A run folder, an encoder folder, timm:NAME, published:NAME[:FOLDER]; with @cls, @mean or
    @clsmean for the pooling."""
    task: TaskConfig
    out: Path
    """Folder for results.json, predictions.parquet, report.html and the cached features."""
    extra_encoders: list[str] = field(default_factory=list)
    """More encoders for the same table, named like `encoder`."""
    normalise: NormaliseConfig = field(default_factory=NormaliseConfig)
    """With a library, the encoder stands in the table a second time, with tiles moved to one
    staining before it sees them."""
    protocols: list[str] = field(default_factory=lambda: ["usual"])
    """Names, patterns such as 'knn/*' or '*' for all, and 'usual' for the three of every table."""
    seed: int = 0
    """Of carved splits, random weights, few-shot episodes and the bootstrap."""
    device: DeviceName = "auto"
    batch_size: int = 64
    """Tiles a forward pass."""
    n_bootstrap: int = 1000
    """Resamples of the test groups."""

    def __post_init__(self) -> None:
        choose(self.protocols)
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")
        if self.n_bootstrap < 100:
            raise ValueError(f"n_bootstrap={self.n_bootstrap}: a 95 % interval needs at least 100")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One row of the table."""

    encoder: Encoder
    record: EncoderRecord


def evaluate(config: EvalConfig, *, with_report: bool = True) -> None:
    """Scores everything and writes results, predictions, timings and the report to ``out``.

    Args:
        config: of the evaluation.
        with_report: False where the caller writes a page of its own.

    Raises:
        InputError: the encoder or the task cannot be used; what was embedded before is kept.
    """
    console, notices = Console(), Console(stderr=True)
    task = load_task(config.task, config.seed)
    for note in _notes(task):
        notices.print(f"note: {note}", highlight=False, markup=False)
    rows = _load_rows(config)
    timings: dict[str, dict[str, float]] = {}
    outcomes: dict[str, dict[str, Outcome]] = {}
    for row in rows:
        name = row.record.name
        outcomes[name], timings[name] = _run_probes(config, task, row)
    results = _results(config, task, [row.record for row in rows], outcomes)
    predictions = predictions_table(task, outcomes)
    write_table(predictions, config.out / "predictions.parquet", PREDICTIONS)
    write_json(config.out / "timings.json", timings)
    save_results(results, config.out / "results.json")
    console.print(scores_table(results), differences_table(results), sep="\n")
    if not with_report:
        return
    write_report(config.out / "report.html", results, predictions)
    console.print(f"report: {config.out / 'report.html'}", highlight=False, soft_wrap=True)


def plan(config: EvalConfig) -> str:
    """What `evaluate` would embed, and how long that takes by the time of one batch."""
    task = load_task(config.task, config.seed)
    record = task.record()
    lines = [
        f"task {task.name}: {len(task.paths)} tiles, classes {', '.join(task.classes)}",
        *(f"  {s}: {record.tiles[s]} tiles of {record.groups[s]} groups" for s in record.tiles),
        *(f"  note: {note}" for note in _notes(task)),
    ]
    for row in _load_rows(config):
        name, encoder = row.record.label, row.encoder
        if has_features(_cache(config, row), features_stamp(encoder.digest, task.data_digest)):
            lines.append(f"{name}: features are cached")
            continue
        px = encoder.input_px or 224
        batch = np.zeros((min(config.batch_size, len(task.paths)), px, px, 3), np.uint8)
        started = time.perf_counter()
        encoder.embed(batch)
        seconds = (time.perf_counter() - started) * len(task.paths) / len(batch)
        megabytes = len(task.paths) * encoder.dim * 2 / 1e6
        lines.append(
            f"{name}: {len(task.paths)} tiles to embed, about {format_seconds(seconds)} and the "
            f"decoding, {megabytes:.1f} MB"
        )
    return "\n".join([*lines, f"then {', '.join(choose(config.protocols))} for each"])


def _notes(task: Task) -> list[str]:
    notes = list(task.notes)
    n_groups = task.record().groups["test"]
    if n_groups < FEW_GROUPS:
        notes.append(
            f"test has {n_groups} groups, fewer than {FEW_GROUPS}: take the intervals as too narrow"
        )
    return notes


def _load_rows(config: EvalConfig) -> list[_Row]:
    """The encoder, its twin, the floors and the extra encoders, under names that are unique."""
    device = choose_device(config.device)
    main = load_encoder(config.encoder, device)
    if isinstance(main, DescriptorEncoder):
        raise InputError(f"{config.encoder} is a floor of every table; name a network to score")
    twin = main.random_twin(config.seed)
    rows = [
        _row(main, "encoder", f"{main.name} ({main.pooling})"),
        _row(twin, "random", f"{main.name}, random weights"),
    ]
    if config.normalise.library is not None:
        moved = load_normalised(config.encoder, device, config.normalise)
        label = f"{main.name} ({main.pooling}), {config.normalise.method} to "
        rows.append(_row(moved, "encoder", label + config.normalise.condition))
    for spec in FLOORS:
        floor = load_encoder(spec, device)
        rows.append(_row(floor, "floor", floor.name.replace("-", " ")))
    for spec in config.extra_encoders:
        extra = load_encoder(spec, device)
        rows.append(_row(extra, "encoder", f"{extra.name} ({extra.pooling})"))
    names = [row.record.name for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"two encoders are called '{twice[0]}'; rename the folder of one")
    return rows


def _row(encoder: Encoder, kind: str, label: str) -> _Row:
    name = make_id(encoder.name if kind == "floor" else f"{encoder.name}-{encoder.pooling}")
    record = EncoderRecord(
        name=name,
        label=label,
        kind=kind,
        pooling=encoder.pooling,
        dim=encoder.dim,
        digest=encoder.digest,
    )
    return _Row(encoder=encoder, record=record)


def _cache(config: EvalConfig, row: _Row) -> Path:
    return config.out / "features" / row.record.name


def _run_probes(
    config: EvalConfig, task: Task, row: _Row
) -> tuple[dict[str, Outcome], dict[str, float]]:
    """Every protocol's outcome for one encoder, and seconds by part."""
    seconds = {}
    started = time.perf_counter()
    store = embed_images(
        row.encoder,
        task.paths,
        _feature_rows(task),
        task.data_digest,
        _cache(config, row),
        batch_size=config.batch_size,
    )
    seconds["embed"] = time.perf_counter() - started
    features, test = store.features.astype(np.float32), task.splits == "test"
    labelled = Labelled(
        features=features[~test],
        labels=task.labels[~test],
        is_val=task.splits[~test] == "val",
        device=choose_device(config.device),
    )
    outcomes = {}
    names = choose(config.protocols)
    ran = run_protocols(names, labelled, features[test], len(task.classes), config.seed)
    with Meter(f"probe {row.record.name}", len(names), "protocols") as meter:
        for protocol, outcome, took in ran:
            outcomes[protocol], seconds[protocol] = outcome, took
            meter.advance(1)
    return outcomes, seconds


def _feature_rows(task: Task) -> pa.Table:
    n = len(task.tile_ids)
    known = {"tile_id": task.tile_ids, "group": task.groups}
    return pa.table(
        {f.name: pa.array(known.get(f.name, [None] * n), f.type) for f in FEATURE_ROWS},
        schema=FEATURE_ROWS,
    )


def _results(
    config: EvalConfig,
    task: Task,
    records: list[EncoderRecord],
    outcomes: dict[str, dict[str, Outcome]],
) -> Results:
    draws = draw(
        task.labels[task.splits == "test"],
        task.groups_of("test"),
        len(task.classes),
        config.n_bootstrap,
        config.seed,
    )
    protocols = list(outcomes[records[0].name])
    scored = {
        (record.name, protocol): score(
            record.name, protocol, outcomes[record.name][protocol], draws
        )
        for record in records
        for protocol in protocols
    }
    main, *others = records
    return Results(
        task=task.record(),
        encoders=records,
        scores=[entry.score for entries in scored.values() for entry in entries],
        differences=[
            compare(ours, theirs)
            for other in others
            for protocol in protocols
            for ours, theirs in zip(
                scored[main.name, protocol], scored[other.name, protocol], strict=True
            )
        ],
        bootstrap_draws=config.n_bootstrap,
        seed=config.seed,
        protocols={name: DESCRIPTIONS[name] for name in protocols},
    )
