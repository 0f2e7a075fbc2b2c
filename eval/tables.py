"""The tables of a report: rows under headings, and the numbers that stand in them."""

from dataclasses import dataclass

from eosin.eval.figures import KINDS, find_score
from eosin.eval.results import Difference, Results, Score

MAIN_METRIC = "balanced_accuracy"
MOST_COLUMNS = 6
"""Of a table."""
METRICS = {
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "kappa": "κ",
    "auroc": "AUROC",
    "ece": "calibration error",
    "brier": "Brier score",
    "nll": "log-loss",
}
"""Names of the metrics in words, in the order of the columns."""
FAMILIES = {
    "knn": "kNN",
    "linear": "linear probe",
    "fewshot": "few-shot",
    "ratio": "few labels",
}
"""What the part of a protocol's name before the slash is called in words."""


@dataclass(frozen=True)
class Cell:
    """One number of a table with its interval."""

    value: str
    interval: str
    best: bool = False
    better: bool | None = None
    """Of a difference: whether its interval lies above zero."""


@dataclass(frozen=True)
class Row:
    """One line of a table; a cell is None where there is no such number."""

    label: str
    note: str
    cells: list[Cell | None]


@dataclass(frozen=True)
class Band:
    """Lines of a table under one heading."""

    kind: str
    """A kind of encoder, ``difference`` or ``protocol``."""
    title: str
    rows: list[Row]


def show_score(score: Score, best: float | None = None) -> Cell:
    """A score as it is printed everywhere; `best` is the value that is to stand out."""
    interval = f"[{score.low:.3f},\N{NO-BREAK SPACE}{score.high:.3f}]"
    return Cell(f"{score.value:.3f}", interval, best=score.value == best)


def show_difference(difference: Difference) -> Cell:
    """A difference as it is printed everywhere, signed."""
    interval = f"[{difference.low:+.3f},\N{NO-BREAK SPACE}{difference.high:+.3f}]"
    return Cell(f"{difference.value:+.3f}", interval, better=difference.better)


def protocol_in_words(protocol: str) -> tuple[str, str]:
    """What a protocol is called in words, and the rest of its name."""
    family, slash, recipe = protocol.partition("/")
    return (FAMILIES.get(family, family), recipe) if slash else (protocol, "")


def protocol_groups(results: Results) -> list[list[str]]:
    """The protocols in groups that fit beside each other: all where they are few, else by kind."""
    protocols = list(dict.fromkeys(score.protocol for score in results.scores))
    if len(protocols) <= MOST_COLUMNS:
        return [protocols]
    kinds: dict[str, list[str]] = {}
    for protocol in protocols:
        kinds.setdefault(protocol.partition("/")[0], []).append(protocol)
    alone = [names[0] for names in kinds.values() if len(names) == 1]
    together = [*(names for names in kinds.values() if len(names) > 1), alone]
    return [
        names[start : start + MOST_COLUMNS]
        for names in together
        for start in range(0, len(names), MOST_COLUMNS)
    ]


def metrics_in_words(results: Results) -> dict[str, str]:
    """Every metric that was scored → its name in words, in the order of the columns."""
    used = {score.metric for score in results.scores}
    names = [m for m in METRICS if m in used] + sorted(used - METRICS.keys())
    return {name: METRICS.get(name, name) for name in names}


def score_bands(results: Results, protocols: list[str]) -> list[Band]:
    """Balanced accuracy by protocol: a band a kind of encoder."""
    main = [score for score in results.scores if score.metric == MAIN_METRIC]
    best = {p: max((s.value for s in main if s.protocol == p), default=None) for p in protocols}
    bands = []
    for kind, title in KINDS.items():
        rows = []
        for encoder in (e for e in results.encoders if e.kind == kind):
            found = {p: find_score(results, encoder.name, p) for p in protocols}
            cells = [show_score(s, best[p]) if s else None for p, s in found.items()]
            rows.append(Row(encoder.label, f"{encoder.dim:,} features", cells))
        if rows:
            bands.append(Band(kind, title, rows))
    return bands


def difference_bands(results: Results, protocols: list[str]) -> list[Band]:
    """By how much an encoder is better than each baseline: a band an encoder."""
    labels = {encoder.name: encoder.label for encoder in results.encoders}
    found = {
        (d.encoder, d.baseline, d.protocol): show_difference(d)
        for d in results.differences
        if d.metric == MAIN_METRIC
    }
    bands = []
    for name in dict.fromkeys(encoder for encoder, _, _ in found):
        rows = []
        for baseline in dict.fromkeys(b for e, b, _ in found if e == name):
            cells = [found.get((name, baseline, protocol)) for protocol in protocols]
            rows.append(Row(f"minus {labels[baseline]}", "", cells))
        bands.append(Band("difference", f"Paired differences: {labels[name]}", rows))
    return bands


def metric_bands(results: Results, protocols: list[str]) -> list[Band]:
    """Every metric of each encoder, then every difference: a band a protocol."""
    metrics = metrics_in_words(results)
    labels = {encoder.name: encoder.label for encoder in results.encoders}
    scores = {(s.encoder, s.protocol, s.metric): s for s in results.scores}
    differences = {(d.encoder, d.baseline, d.protocol, d.metric): d for d in results.differences}
    bands = []
    for protocol in protocols:
        rows = []
        for name, label in labels.items():
            found = [scores.get((name, protocol, metric)) for metric in metrics]
            chosen = next((s.chosen for s in found if s), {})
            note = ", ".join(f"{key} = {value:g}" for key, value in chosen.items())
            rows.append(Row(label, note, [show_score(s) if s else None for s in found]))
        for name, baseline in dict.fromkeys(key[:2] for key in differences):
            drawn = [differences.get((name, baseline, protocol, metric)) for metric in metrics]
            cells = [show_difference(d) if d else None for d in drawn]
            rows.append(Row(f"{labels[name]} minus {labels[baseline]}", "", cells))
        bands.append(Band("protocol", protocol, [row for row in rows if any(row.cells)]))
    return bands
