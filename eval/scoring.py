"""From a probe's outcome to scores and paired differences, as the results record them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eosin.eval.intervals import draw_groups, index_groups, interval, stratify, tail_of
from eosin.eval.metrics import OF_VOTES, confusion_of_runs, metrics_of
from eosin.eval.probe import Outcome
from eosin.eval.results import Difference, Score


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The test tiles of a task and the resamples that all of its scores share."""

    labels: npt.NDArray[np.int64]
    """[N]"""
    groups: npt.NDArray[np.int64]
    """[N], indices."""
    n_groups: int
    weights: npt.NDArray[np.float64]
    """[B, G]"""
    tail: float
    """See `tail_of`."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A score with the resamples behind its interval, for comparing it."""

    score: Score
    resamples: npt.NDArray[np.float64]
    """The metric in every draw, [B]; draw b holds the same groups in every score of a task."""
    tail: float


def draw(
    labels: npt.NDArray[np.int64], groups: Sequence[str], n_classes: int, draws: int, seed: int
) -> Draws:
    """Resamples of the groups of N test tiles; the same for equal arguments."""
    index, n_groups = index_groups(groups)
    strata = stratify(labels, index, n_groups, n_classes)
    return Draws(
        labels=labels,
        groups=index,
        n_groups=n_groups,
        weights=draw_groups(strata, draws, seed),
        tail=tail_of(strata),
    )


def score(encoder: str, protocol: str, outcome: Outcome, draws: Draws) -> list[Scored]:
    """Every metric of one outcome, in the order of `metrics_of`.

    Args:
        encoder: name of its row.
        protocol: name and version.
        outcome: of a probe, on N test tiles.
        draws: of the same tiles.
    """
    spreads = _spread_of_runs(outcome, draws.labels)
    scored = []
    found = metrics_of(outcome, draws.labels, draws.groups, draws.n_groups)
    for name, metric in found.items():
        resamples = metric(draws.weights)
        low, high = interval(resamples, draws.tail)
        record = Score(
            encoder=encoder,
            protocol=protocol,
            metric=name,
            value=float(metric(np.ones((1, draws.n_groups)))[0]),
            low=low,
            high=high,
            spread=spreads.get(name),
            chosen=outcome.chosen,
        )
        scored.append(Scored(score=record, resamples=resamples, tail=draws.tail))
    return scored


def score_rows(
    outcomes: dict[str, dict[str, Outcome]], draws: Draws
) -> tuple[list[Score], list[Difference]]:
    """All scores of a table, and what its first row has more than each other one.

    Args:
        outcomes: by row, the first first, and protocol; all rows have the same protocols.
        draws: of the tiles that all of them are of.
    """
    scored = {
        (row, protocol): score(row, protocol, outcome, draws)
        for row, by_protocol in outcomes.items()
        for protocol, outcome in by_protocol.items()
    }
    main, *others = outcomes
    differences = [
        compare(ours, theirs)
        for other in others
        for protocol in outcomes[main]
        for ours, theirs in zip(scored[main, protocol], scored[other, protocol], strict=True)
    ]
    return [entry.score for entries in scored.values() for entry in entries], differences


def compare(ours: Scored, theirs: Scored) -> Difference:
    """Ours minus theirs, of the same protocol and metric, on the same draws."""
    low, high = interval(ours.resamples - theirs.resamples, ours.tail)
    return Difference(
        encoder=ours.score.encoder,
        baseline=theirs.score.encoder,
        protocol=ours.score.protocol,
        metric=ours.score.metric,
        value=ours.score.value - theirs.score.value,
        low=low,
        high=high,
    )


def _spread_of_runs(outcome: Outcome, labels: npt.NDArray[np.int64]) -> dict[str, float]:
    """The standard deviation of each metric over runs (seeds, episodes); {} with fewer than two."""
    if outcome.runs is None or len(outcome.runs) < 2:
        return {}
    n_classes = outcome.votes.shape[1]
    confusions = confusion_of_runs(outcome.runs, labels, n_classes)
    return {name: float(function(confusions).std(ddof=1)) for name, function in OF_VOTES.items()}
