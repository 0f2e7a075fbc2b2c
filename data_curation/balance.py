"""How evenly a set is spread over the values of a column."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Of counts of K values."""

    entropy: float
    """Of Shannon, in nats: ln K at most."""
    evenness: float
    """The entropy's share of ln K: 1 where all values are equally frequent, and for one value."""
    gini: float
    """0 where all values are equally frequent, (K - 1) / K where one has everything."""
    largest_share: float
    """Of the most frequent value."""
    values: int
    """K: values that occur."""
    total: int
    """Tiles in all."""


def measure_balance(counts: NDArray[np.int64]) -> Balance:
    """The balance of counts, int64 [K]; zeros are values that do not occur and are left out.

    The Gini coefficient is Σ (2 i - K - 1) c_i / (K Σ c), counts in rising order, i from 1.

    Raises:
        ValueError: a count is negative, or all are 0.
    """
    if (counts < 0).any():
        raise ValueError("a count is negative")
    present = np.sort(counts[counts > 0]).astype(np.float64)
    if not len(present):
        raise ValueError("there is nothing to balance: every count is 0")
    total, k = present.sum(), len(present)
    share = present / total
    entropy = float(-(share * np.log(share)).sum())
    ranks = np.arange(1, k + 1)
    return Balance(
        entropy=entropy,
        evenness=entropy / float(np.log(k)) if k > 1 else 1.0,
        gini=float(((2 * ranks - k - 1) * present).sum() / (k * total)),
        largest_share=float(share[-1]),
        values=k,
        total=int(total),
    )
