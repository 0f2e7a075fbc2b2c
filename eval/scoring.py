"""From a probe's votes to scores and paired differences, as the results record them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eosin.eval.probe import Outcome
from eosin.eval.results import Difference, Score
from eosin.eval.statistics import METRICS, draw_groups, grouped_confusion, interval, resample


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A score with the resamples behind its interval, for comparing it."""

    score: Score
    resamples: npt.NDArray[np.float64]
    """The metric in every draw, [B]; draw b holds the same groups in every score of a task."""


def score(
    encoder: str,
    protocol: str,
    outcome: Outcome,
    labels: npt.NDArray[np.int64],
    groups: Sequence[str],
    draws: int,
    seed: int,
) -> list[Scored]:
    """Every metric of one outcome, in the order of `METRICS`.

    Args:
        encoder: name of its row.
        protocol: name and version.
        outcome: of a probe, on N test tiles.
        labels: of the test tiles, [N].
        groups: of the test tiles.
        draws: of the bootstrap.
        seed: of the bootstrap.
    """
    names, group_of = np.unique(np.asarray(groups), return_inverse=True)
    confusions = grouped_confusion(labels, outcome.votes, group_of, len(names))
    weights = draw_groups(len(names), draws, seed)
    scored = []
    for metric, function in METRICS.items():
        resamples = resample(confusions, weights, function)
        low, high = interval(resamples)
        record = Score(
            encoder=encoder,
            protocol=protocol,
            metric=metric,
            value=float(function(confusions.sum(axis=0))),
            low=low,
            high=high,
            chosen=outcome.chosen,
        )
        scored.append(Scored(score=record, resamples=resamples))
    return scored


def compare(ours: Scored, theirs: Scored) -> Difference:
    """Ours minus theirs, of the same protocol and metric, on the same draws."""
    low, high = interval(ours.resamples - theirs.resamples)
    return Difference(
        encoder=ours.score.encoder,
        baseline=theirs.score.encoder,
        protocol=ours.score.protocol,
        metric=ours.score.metric,
        value=ours.score.value - theirs.score.value,
        low=low,
        high=high,
    )
