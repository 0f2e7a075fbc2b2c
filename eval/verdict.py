"""What the scores come to: the numbers to read first, and one paragraph in words."""

from dataclasses import dataclass

from eosin.eval.figures import find_score
from eosin.eval.results import Difference, EncoderRecord, Results
from eosin.eval.tables import (
    MAIN_METRIC,
    Cell,
    protocol_in_words,
    show_difference,
    show_score,
)

ORDER = ("random", "floor", "encoder")
"""Kinds of baseline in the order in which an encoder is held against them."""


@dataclass(frozen=True)
class KeyFigure:
    """A number at the top of the page."""

    kind: str
    """A kind of encoder, or ``difference``."""
    heading: str
    cell: Cell
    note: str


@dataclass(frozen=True)
class Claim:
    """Whether the encoder is better by more than the interval than one baseline."""

    baseline: str
    cell: Cell


@dataclass(frozen=True)
class Verdict:
    """What is said of the main encoder under the headline protocol."""

    encoder: EncoderRecord
    protocol: str
    twin: str | None
    """Name of the same network at random weights, when it was scored."""
    figures: list[KeyFigure]
    lead: str
    claims: list[Claim]


def reach_verdict(results: Results) -> Verdict:
    """The verdict on the first trained encoder, under kNN where that was run."""
    protocols = [score.protocol for score in results.scores]
    protocol = next((p for p in protocols if p.startswith("knn/")), protocols[0])
    encoder = next((e for e in results.encoders if e.kind == "encoder"), results.encoders[0])
    by_name = {e.name: e for e in results.encoders}
    differences = sorted(
        (
            d
            for d in results.differences
            if (d.encoder, d.protocol, d.metric) == (encoder.name, protocol, MAIN_METRIC)
        ),
        key=lambda d: ORDER.index(by_name[d.baseline].kind),
    )
    twin = next((d for d in differences if by_name[d.baseline].kind == "random"), None)
    claims = []
    for difference in differences:
        level = find_score(results, difference.baseline, protocol)
        baseline = by_name[difference.baseline].label + (f" ({level.value:.3f})" if level else "")
        claims.append(Claim(baseline, show_difference(difference)))
    return Verdict(
        encoder=encoder,
        protocol=protocol,
        twin=twin.baseline if twin else None,
        figures=_figures(results, encoder, twin, protocol),
        lead=_lead(results, encoder, protocol),
        claims=claims,
    )


def _figures(
    results: Results, encoder: EncoderRecord, twin: Difference | None, protocol: str
) -> list[KeyFigure]:
    """The encoder, its random twin, the strongest floor, and what training gained."""
    labels = {e.name: e.label for e in results.encoders}
    floors = [e.name for e in results.encoders if e.kind == "floor"]
    figures = []
    for kind, heading, names in (
        ("encoder", "trained", [encoder.name]),
        ("random", "random weights", [twin.baseline] if twin else []),
        ("floor", "best floor", floors),
    ):
        scores = [s for name in names if (s := find_score(results, name, protocol)) is not None]
        if scores:
            best = max(scores, key=lambda score: score.value)
            figures.append(KeyFigure(kind, heading, show_score(best), labels[best.encoder]))
    if twin is not None:
        note = f"better by more than the interval: {'yes' if twin.better else 'no'}"
        figures.append(KeyFigure("difference", "gained by training", show_difference(twin), note))
    return figures


def _lead(results: Results, encoder: EncoderRecord, protocol: str) -> str:
    task = results.task
    score = find_score(results, encoder.name, protocol)
    reached = f"{show_score(score).value} {show_score(score).interval}" if score else "no"
    return (
        f"On {task.tiles.get('test', 0):,} test {task.unit} of {task.groups.get('test', 0):,} "
        f"groups in {len(task.classes)} classes, {encoder.label} reaches "
        f"{reached} {protocol_in_words(protocol)[0]} "
        f"balanced accuracy; chance is {1 / len(task.classes):.3f}."
    )
