"""How far scores move when test tiles look otherwise while the probe stays as it was fitted.

All conditions share the resamples of groups, so a range or a change is paired. The range of a probe
is its best less its worst score over plain tiles and conditions, in every draw anew (CTPLab,
arXiv 2603.12886): small is robust. A range is never below zero, and noise alone makes it positive:
hold it against that of another encoder on the same tiles.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from eosin.eval.intervals import interval
from eosin.eval.probe import Outcome, normalise
from eosin.eval.results import ConditionRange, ConditionScore
from eosin.eval.scoring import Draws, Scored, compare, score

METRICS = ("balanced_accuracy", "auroc")
PLAIN = "plain"


def split_outcome(outcome: Outcome, n: int) -> list[Outcome]:
    """The outcomes of K stacked copies of n test tiles, [K · n] tiles together."""
    found = []
    for start in range(0, len(outcome.votes), n):
        rows = slice(start, start + n)
        found.append(
            replace(
                outcome,
                votes=outcome.votes[rows],
                scores=None if outcome.scores is None else outcome.scores[rows],
                values={name: values[rows] for name, values in outcome.values.items()},
                runs=None if outcome.runs is None else outcome.runs[:, rows],
            )
        )
    return found


def score_conditions(
    encoder: str, protocol: str, outcomes: dict[str, Outcome], draws: Draws
) -> tuple[list[ConditionScore], list[ConditionRange]]:
    """Scores under each condition with their change from plain, and the range over all.

    Args:
        encoder: name of its row.
        protocol: name and version.
        outcomes: by condition, `PLAIN` first.
        draws: of the test tiles.
    """
    scored: dict[str, dict[str, Scored]] = {
        condition: {s.score.metric: s for s in score(encoder, protocol, outcome, draws)}
        for condition, outcome in outcomes.items()
    }
    scores, ranges = [], []
    for metric in METRICS:
        if metric not in scored[PLAIN]:
            continue
        for condition, found in scored.items():
            if condition == PLAIN:
                continue
            now = found[metric].score
            change = compare(found[metric], scored[PLAIN][metric])
            scores.append(
                ConditionScore(
                    encoder=encoder, protocol=protocol, condition=condition, metric=metric,
                    value=now.value, low=now.low, high=now.high,
                    change=change.value, change_low=change.low, change_high=change.high,
                )
            )  # fmt: skip
        values = np.array([found[metric].score.value for found in scored.values()])
        resamples = np.stack([found[metric].resamples for found in scored.values()])  # [K, B]
        low, high = interval(np.ptp(resamples, axis=0), draws.tail)
        ranges.append(
            ConditionRange(
                encoder=encoder, protocol=protocol, metric=metric, value=float(np.ptp(values)),
                low=low, high=high, conditions=len(scored),
            )
        )  # fmt: skip
    return scores, ranges


def mean_cosine(plain: npt.NDArray[np.float32], changed: npt.NDArray[np.float32]) -> float:
    """Of each tile's features [N, D] before and after, averaged."""
    return float((normalise(plain) * normalise(changed)).sum(axis=1).mean())
