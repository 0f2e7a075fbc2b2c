"""How the records of an index divide into strata: all that the order of training must know."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Strata:
    """The records of S shards, counted by the value of one column.

    Raises:
        ValueError: the counts are not [K, S], or one is negative.
    """

    names: tuple[str, ...]
    """The K values of the column as text, sorted; ("",) where there is one stratum."""
    counts: NDArray[np.int64]
    """[K, S], records of stratum k in shard s. Held as it is, never copied or changed."""

    def __post_init__(self) -> None:
        if self.counts.ndim != 2 or len(self.counts) != len(self.names):
            raise ValueError(
                f"counts must be [{len(self.names)}, S], a row a stratum, not {self.counts.shape}"
            )
        if self.counts.size and self.counts.min() < 0:
            raise ValueError(f"counts must not be negative, not {self.counts.min()}")

    @property
    def records(self) -> NDArray[np.int64]:
        """Records of each stratum, int64 [K]."""
        return np.asarray(self.counts.sum(1, dtype=np.int64), np.int64)
