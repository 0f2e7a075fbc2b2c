"""How the records of an index divide into strata: all that the order of training must know."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from eosin.configs.errors import InputError

MAX_CELLS = 2**27
"""Strata times shards: 1 GB of counts."""


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
    digest: str = ""
    """XXH3-128 (hex) of which record has which value, see `count_strata`; "" where there is one
    stratum of all."""

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


def count_strata(
    column: str, shards: Iterable[tuple[list[str], NDArray[np.int32]]], n_shards: int
) -> Strata:
    """Counts the records of each value; only one shard's cells are in memory.

    The digest is of each record's number of its value, int32 little-endian, in the order of the
    index, followed by the column's name and the values as JSON. Values are numbered as they first
    come, so that it is known after one pass.

    Args:
        column: whose values they are.
        shards: of each, some values as text, which may repeat or not occur, and each record's
            number in them.
        n_shards: how many shards there are.

    Raises:
        InputError: there are so many values that their counts would not fit into memory.
    """
    state, number = xxhash.xxh3_128(), dict[str, int]()
    counted: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []  # of a shard: numbers, records
    for values, codes in shards:
        first = np.full(len(values), len(codes))
        first[codes[::-1]] = np.arange(len(codes))[::-1]  # of equal places the last is kept
        present = np.flatnonzero(first < len(codes))
        present = present[np.argsort(first[present])]
        numbers = [number.setdefault(values[code], len(number)) for code in present.tolist()]
        if len(number) * n_shards > MAX_CELLS:
            raise InputError(
                f"column '{column}' has {len(number)} values or more in {n_shards} shards: too "
                f"many to be strata (values times shards must not be more than {MAX_CELLS}); group "
                "the values"
            )
        number_of = np.zeros(len(values), np.int64)
        number_of[present] = numbers
        state.update(number_of[codes].astype("<i4").tobytes())
        counted.append((number_of[present], np.bincount(codes, minlength=len(values))[present]))
    state.update(json.dumps([column, list(number)]).encode())
    names = tuple(sorted(number))
    stratum = np.empty(len(names), np.int64)  # of each number
    stratum[[number[name] for name in names]] = np.arange(len(names))
    counts = np.zeros((len(names), n_shards), np.int64)
    for shard, (seen, records) in enumerate(counted):
        np.add.at(counts[:, shard], stratum[seen], records)
    return Strata(names, counts, state.hexdigest())
