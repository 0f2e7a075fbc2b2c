"""Intervals from a bootstrap over groups.

Tiles of one patient resemble each other: resampling tiles would make intervals far too narrow. So
the groups (patients, else slides) of the test split are drawn with replacement, within strata by
their most frequent class, and every score of every encoder sees the same draws, which makes
differences paired. A draw is no more than a weight a group; see `metrics`.

A stratum of n groups is drawn n - 1 times, each counting n / (n - 1): so the spread of the draws is
that of the estimate also where n is small (Rao and Wu 1988). The interval takes quantiles as far
out as Student's t with the degrees of freedom that the strata leave, not the normal, has its 2.5 %
(Hesterberg 2015, section 3: the expanded percentile interval). Both matter below some 30 groups.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.stats import norm, t

FEW_GROUPS = 20
"""Below this many groups in the test split, intervals deserve a word of caution."""
LEVEL = 0.95

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


def few_groups_note(n_groups: int) -> list[str]:
    """What to say of so many groups in the test split; nothing where they are enough."""
    if n_groups >= FEW_GROUPS:
        return []
    return [f"test has {n_groups} groups, fewer than {FEW_GROUPS}: take the intervals with caution"]


def index_groups(groups: Sequence[str]) -> tuple[Indices, int]:
    """The index of each tile's group among the sorted names, and how many there are."""
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    return index.astype(np.int64), len(names)


def stratify(labels: Indices, groups: Indices, n_groups: int, n_classes: int) -> Indices:
    """The stratum of each group [G], 0 and up: the groups that share their most frequent class.

    A stratum of one group would never vary, so such groups go to the largest stratum.
    """
    counts = np.zeros((n_groups, n_classes), np.int64)
    np.add.at(counts, (groups, labels), 1)
    strata = counts.argmax(axis=1)
    sizes = np.bincount(strata, minlength=n_classes)
    strata = np.where(sizes[strata] < 2, sizes.argmax(), strata)
    return np.unique(strata, return_inverse=True)[1].astype(np.int64)


def draw_groups(strata: Indices, draws: int, seed: int) -> Array:
    """The weight of each group in each resample, [B, G]; rows sum to G.

    With a single group there is nothing to draw, and every weight is 1.
    """
    generator = np.random.Generator(np.random.Philox(key=seed))
    weights = np.ones((draws, len(strata)))
    for stratum in range(int(strata.max()) + 1):
        members = np.flatnonzero(strata == stratum)
        n = len(members)
        if n > 1:
            drawn = generator.multinomial(n - 1, np.full(n, 1 / n), draws)
            weights[:, members] = drawn * (n / (n - 1))
    return weights


def tail_of(strata: Indices) -> float:
    """The share of draws that the interval leaves out on each side."""
    freedom = max(len(strata) - int(strata.max()) - 1, 1)
    return float(norm.cdf(t.ppf((1 - LEVEL) / 2, freedom)))


def interval(values: Array, tail: float) -> tuple[float, float]:
    """The resampled values but for the share `tail` on either side."""
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
