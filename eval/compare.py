"""The verb `eval compare`: encoders held against each other on the tasks that they share.

Everything is read from what `eosin eval` wrote: predictions and results; no tile is opened and no
probe fitted again. Every pair of encoders is compared on every task and protocol that both have, by
the paired 95 % interval of the difference and, for what is counted from votes, by a permutation
test; p-values are adjusted by Holm over all tasks and pairs of a protocol.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from eosin.configs.errors import InputError
from eosin.eval.discrimination import is_discriminative
from eosin.eval.metrics import LOWER_IS_BETTER, Metric, SummedMetric, metrics_of
from eosin.eval.permutation import holm, permutation_p
from eosin.eval.predictions import outcome_from, read_predictions, rows_of
from eosin.eval.probe import Outcome
from eosin.eval.results import Difference, EncoderRecord, Results, load_results
from eosin.eval.scoring import Draws, compare, draw, score
from eosin.launch.artefacts import SCHEMA_VERSION, write_json, write_text


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compares the encoders of several evaluations."""

    results: list[Path]
    """Folders that `eosin eval` wrote, of any encoders and tasks."""
    metric: str = "balanced_accuracy"
    n_bootstrap: int = 2000
    """Resamples of the groups of each task."""
    swaps: int = 10_000
    """Of the permutation test, where not all can be made."""
    seed: int = 0
    out: Path | None = None
    """Folder for compare.json and compare.csv; null: only the table is shown."""

    def __post_init__(self) -> None:
        if not self.results:
            raise ValueError("results=[]: name folders that 'eosin eval' wrote")
        if self.n_bootstrap < 100 or self.swaps < 100:
            raise ValueError(
                f"n_bootstrap={self.n_bootstrap} and swaps={self.swaps} must be at least 100"
            )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One encoder minus another on one task under one protocol."""

    task: str
    protocol: str
    metric: str
    encoder: str
    baseline: str
    value: float
    low: float
    high: float
    """Paired 95 % interval."""
    p: float | None
    """Of the permutation test; None where there is none."""
    p_holm: float | None = None
    """Adjusted for all tasks and pairs of the protocol."""
    groups: int
    discriminative: bool
    """Whether the task tells encoders from floors; see `discrimination`."""

    @property
    def better(self) -> bool:
        """Better by more than the interval."""
        return self.high < 0 if self.metric in LOWER_IS_BETTER else self.low > 0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One folder of `eosin eval`."""

    folder: Path
    results: Results
    predictions: pa.Table
    encoders: list[EncoderRecord] = field(default_factory=list)
    """The trained ones."""


def compare_encoders(config: CompareConfig) -> list[Comparison]:
    """Compares, shows a table, and writes what `out` asks for.

    Raises:
        InputError: a folder is none of `eosin eval`, or no two encoders share a task.
    """
    evaluations = [load_evaluation(folder) for folder in config.results]
    found = _adjusted(list(_all_pairs(evaluations, config)))
    if not found:
        raise InputError(
            f"no two encoders of {', '.join(map(str, config.results))} share a task and a "
            f"protocol with the metric '{config.metric}'"
        )
    Console().print(_table(found, config.metric))
    for line in mean_lines(found):
        print(line)
    if config.out is not None:
        rows = [asdict(comparison) for comparison in found]
        write_json(
            config.out / "compare.json",
            {
                "schema_version": SCHEMA_VERSION,
                "n_bootstrap": config.n_bootstrap,
                "swaps": config.swaps,
                "seed": config.seed,
                "comparisons": rows,
            },
        )
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(config.out / "compare.csv", text.getvalue())
    return found


def load_evaluation(folder: Path) -> Evaluation:
    """What `eosin eval` wrote to a folder.

    Raises:
        InputError: it is not there, or damaged.
    """
    results = load_results(folder / "results.json")
    return Evaluation(
        folder=folder,
        results=results,
        predictions=read_predictions(folder / "predictions.parquet"),
        encoders=[e for e in results.encoders if e.kind == "encoder"],
    )


def _all_pairs(evaluations: Sequence[Evaluation], config: CompareConfig) -> Iterator[Comparison]:
    tasks: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        tasks.setdefault(evaluation.results.task.digest, []).append(evaluation)
    names = _names(evaluations)
    for same_task in tasks.values():
        held: dict[str, tuple[Evaluation, EncoderRecord]] = {}
        for evaluation in same_task:
            for encoder in evaluation.encoders:
                held.setdefault(encoder.digest, (evaluation, encoder))
        discriminative = is_discriminative([e.results for e in same_task])
        for (ours, a), (theirs, b) in combinations(held.values(), 2):
            for protocol in ours.results.protocols:
                if protocol not in theirs.results.protocols:
                    continue
                found = _one(ours, a, theirs, b, protocol, config)
                if found is not None:
                    difference, p = found
                    yield Comparison(
                        task=ours.results.task.name,
                        protocol=protocol,
                        metric=config.metric,
                        encoder=names[a.digest],
                        baseline=names[b.digest],
                        value=difference.value,
                        low=difference.low,
                        high=difference.high,
                        p=p,
                        groups=ours.results.task.groups["test"],
                        discriminative=discriminative[protocol],
                    )


def _names(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    """Encoder digest → a name that no other has."""
    names: dict[str, str] = {}
    for evaluation in evaluations:
        for encoder in evaluation.encoders:
            taken = set(names.values())
            name, number = encoder.label, 2
            while encoder.digest not in names and name in taken:
                name, number = f"{encoder.label} #{number}", number + 1
            names.setdefault(encoder.digest, name)
    return names


def _one(
    ours: Evaluation,
    a: EncoderRecord,
    theirs: Evaluation,
    b: EncoderRecord,
    protocol: str,
    config: CompareConfig,
) -> tuple[Difference, float | None] | None:
    """One difference and its p; None where the protocol lacks the metric."""
    n_classes = len(ours.results.task.classes)
    rows = rows_of(ours.predictions, a.name, protocol)
    others = rows_of(theirs.predictions, b.name, protocol)
    for column in ("tile_id", "group", "label"):
        if not rows[column].equals(others[column]):
            raise InputError(
                f"{ours.folder} and {theirs.folder} say that they are of one task, but differ in "
                f"the {column} of test tiles; run 'eosin eval' again for one of them"
            )
    draws = draw(
        rows["label"].to_numpy().astype(np.int64),
        rows["group"].to_pylist(),
        n_classes,
        config.n_bootstrap,
        config.seed,
    )
    outcomes = [
        outcome_from(evaluation.predictions, n_classes, encoder.name, protocol)
        for evaluation, encoder in ((ours, a), (theirs, b))
    ]
    scored = [
        {s.score.metric: s for s in score("", protocol, outcome, draws)} for outcome in outcomes
    ]
    if config.metric not in scored[0] or config.metric not in scored[1]:
        return None
    difference = compare(scored[0][config.metric], scored[1][config.metric])
    metrics = [_metric(outcome, draws, config.metric) for outcome in outcomes]
    p = None
    if isinstance(metrics[0], SummedMetric) and isinstance(metrics[1], SummedMetric):
        p = permutation_p(metrics[0], metrics[1], config.swaps, config.seed)
    return difference, p


def _metric(outcome: Outcome, draws: Draws, name: str) -> Metric:
    return metrics_of(outcome, draws.labels, draws.groups, draws.n_groups)[name]


def _adjusted(found: Sequence[Comparison]) -> list[Comparison]:
    """The same with `p_holm`, over all tasks and pairs of a protocol."""
    adjusted: dict[int, float] = {}
    for protocol in dict.fromkeys(c.protocol for c in found):
        of_it = [i for i, c in enumerate(found) if c.protocol == protocol and c.p is not None]
        values = holm([found[i].p or 0.0 for i in of_it])
        adjusted |= dict(zip(of_it, values, strict=True))
    return [replace(c, p_holm=adjusted.get(i)) for i, c in enumerate(found)]


def mean_lines(found: Sequence[Comparison]) -> list[str]:
    """The mean difference of each pair over the tasks that tell encoders apart, in words."""
    lines = []
    for protocol, a, b in dict.fromkeys((c.protocol, c.encoder, c.baseline) for c in found):
        pair = [c for c in found if (c.protocol, c.encoder, c.baseline) == (protocol, a, b)]
        told = [c.value for c in pair if c.discriminative]
        left_out = len(pair) - len(told)
        if len(pair) < 2 or not told:
            continue
        note = f"; {left_out} left out, where a floor is as good" if left_out else ""
        lines.append(
            f"{protocol}: {a} minus {b}: {np.mean(told):+.3f} over {len(told)} tasks{note}"
        )
    return lines


def _table(found: Sequence[Comparison], metric: str) -> Table:
    table = Table(title=f"{metric}: paired difference [95 % interval], p by Holm")
    for column in ("task", "protocol", "encoder", "minus"):
        table.add_column(column)
    for column in ("difference", "p", "better?"):
        table.add_column(column, justify="right")
    for c in found:
        p = "–" if c.p_holm is None else f"{c.p_holm:.4f}"
        mark = "" if c.discriminative else " (a floor is as good)"
        table.add_row(
            c.task + mark, c.protocol, c.encoder, c.baseline,
            f"{c.value:+.3f} \\[{c.low:+.3f}, {c.high:+.3f}]", p, "yes" if c.better else "no",
        )  # fmt: skip
    return table
