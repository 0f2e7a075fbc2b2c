"""Concordance of risks with survival: Harrell's C and Uno's, over pairs that can be compared.

Patient i is compared with j where i's event came first, or at the time at which j was lost to
sight. Risks of different heads have no common scale, so pairs are taken within a fold. A resample
is a weight a patient, and a pair counts by the product of its two. Legend: P patients, B resamples.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
TIED = 1e-8
"""Risks that differ by no more are equal (as scikit-survival has it): half a point."""


@dataclass(frozen=True)
class Pairs:
    """Of one fold."""

    rows: npt.NDArray[np.int64]
    """Its patients among all."""
    points: Array
    """What each ordered pair adds, [p, p]."""
    counts: Array
    """What it adds at most."""


def pairs_of(
    times: Array,
    events: npt.NDArray[np.bool_],
    risks: Array,
    folds: npt.NDArray[np.int64],
    weights: Array | None = None,
) -> list[Pairs]:
    """The comparable pairs of each fold.

    Args:
        times: [P].
        events: [P].
        risks: high where death is early, [P].
        folds: whose head spoke of each patient, [P].
        weights: of the patient whose event came first (Uno: 1 / G(t)²), [P]; None: 1.
    """
    found = []
    for fold in np.unique(folds).tolist():
        rows = np.flatnonzero(folds == fold)
        t, e, r = times[rows], events[rows], risks[rows]
        later = (t[:, None] < t) | ((t[:, None] == t) & ~e)
        counts = (later & e[:, None]).astype(np.float64)
        if weights is not None:
            counts *= weights[rows][:, None]
        apart = r[:, None] - r
        points = counts * np.where(np.abs(apart) <= TIED, 0.5, apart > 0)
        found.append(Pairs(rows, points, counts))
    return found


def concordance(pairs: list[Pairs], weights: Array) -> Array:
    """C for each row of weights [B, P], [B]; NaN where nothing can be compared."""
    points = sum(_total(fold.points, weights[:, fold.rows]) for fold in pairs)
    counts = sum(_total(fold.counts, weights[:, fold.rows]) for fold in pairs)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = np.asarray(points) / np.asarray(counts)
    return found


def uno_weights(
    times: Array,
    train_times: Array,
    train_events: npt.NDArray[np.bool_],
) -> Array:
    """1 / G(t)² of each time (Uno et al. 2011), [P]; 0 where nobody is left to judge it by.

    G is the Kaplan-Meier estimate of not being lost to sight, of the patients that were learnt
    from; at a time it counts those that were lost before.

    Args:
        times: of test patients, [P].
        train_times: of those that were learnt from.
        train_events: likewise.
    """
    at = np.unique(train_times)
    alive = (train_times >= at[:, None]).sum(axis=1)
    events = ((train_times == at[:, None]) & train_events).sum(axis=1)
    lost = ((train_times == at[:, None]) & ~train_events).sum(axis=1)
    at_risk = alive - events  # at one time, events come before losses
    with np.errstate(invalid="ignore", divide="ignore"):
        stays = np.where(at_risk > 0, 1 - lost / at_risk, 1.0)
    curve = np.append(1.0, stays.cumprod())
    g = curve[np.searchsorted(at, times, side="right")]
    with np.errstate(divide="ignore"):
        return np.where(g > 0, 1 / g**2, 0.0)


def _total(table: Array, weights: Array) -> Array:
    """Σ_ij w_i w_j table_ij for each row of weights, [B]."""
    found: Array = np.einsum("bi,bi->b", weights @ table, weights)
    return found
