"""Is one encoder better than another? A permutation test that swaps whole groups, and Holm's rule.

If two encoders are worth the same, it makes no difference which of them said what: the predictions
for a group (a patient's tiles, all together) may be swapped. The p-value is the share of swaps
whose difference is at least as large as the one found, on either side. With up to `EXACT_GROUPS`
groups all swaps are made, else as many as are asked for, drawn from the seed.

Swapping works on sums over tiles (`SummedMetric`); scores of two encoders have no common scale, so
there is no such test of an AUROC. Shapes: G groups, P swaps.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from eosin.eval.metrics import SummedMetric

EXACT_GROUPS = 13
"""2^13 swaps are made one by one."""
_AT_ONCE = 2048
_SAME = 1e-12
"""Differences within this of each other are equal but for rounding."""


def permutation_p(ours: SummedMetric, theirs: SummedMetric, swaps: int, seed: int) -> float:
    """The two-sided p-value of the difference of two encoders on the same groups.

    Args:
        ours: the metric of one encoder.
        theirs: the same of the other.
        swaps: drawn where there are too many groups for all; the p-value is at least
            1 / (swaps + 1).
        seed: of the draws.
    """
    n_groups = len(ours.sums)
    whole = np.ones((1, n_groups))
    found = abs(float(ours(whole)[0] - theirs(whole)[0]))
    exact = n_groups <= EXACT_GROUPS
    total = 2**n_groups if exact else swaps
    generator = np.random.Generator(np.random.Philox(key=seed))
    as_large = 0
    for start in range(0, total, _AT_ONCE):
        count = min(_AT_ONCE, total - start)
        if exact:
            numbers = np.arange(start, start + count)[:, None]
            kept = (numbers >> np.arange(n_groups) & 1).astype(np.float64)
        else:
            kept = generator.integers(0, 2, (count, n_groups)).astype(np.float64)
        apart = _mixed(ours, theirs, kept) - _mixed(theirs, ours, kept)
        as_large += int((np.abs(apart) >= found - _SAME).sum())
    return as_large / total if exact else (as_large + 1) / (total + 1)


def _mixed(
    ours: SummedMetric, theirs: SummedMetric, kept: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The metric where groups are ours as far as `kept` [P, G] is 1, and theirs elsewhere."""
    shape = ours.sums.shape[1:]
    a, b = (metric.sums.reshape(len(kept[0]), -1) for metric in (ours, theirs))
    return ours.function((kept @ a + (1 - kept) @ b).reshape(-1, *shape))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for how many there are (Holm 1979): each may be held against 0.05."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return [float(p) for p in adjusted]
