"""Endless passes over the records of each stratum, entered anywhere.

A pass visits each record of a stratum once: the shards in a shuffled order, the records of a shard
one after another. The shuffle follows from (seed, pass) and is the same for all strata, so that
strata which keep pace with each other meet in the same shards.
"""

import numpy as np
from numpy.typing import NDArray

from eosin.pretrain.shuffle import nth_key, seed_key

SHARD_STREAM = 0x7368617264
"""Keeps the shuffles of shards apart from every other use of the seed ("shard" in ASCII)."""

SPARE_CELLS = 2**18
"""Room beyond what two windows take."""

MAX_CELLS = 2**25
"""Room at most (400 MB), unless two passes of each stratum take more."""


class Passes:
    """Shard and rank of any record of any pass.

    A pass of a stratum is held as the count of its records before each shard that has some, in the
    order of the pass: 12 bytes a shard. There is room for all passes that two neighbouring windows
    touch: two of a stratum, and more of one that is seen often. What is full is emptied, and what
    is asked for is made again, by sorting the stratum's shards (about 0.5 ms for 10,000). Not for
    several threads at once.

    Args:
        counts: int64 [K, S], records of a stratum in a shard.
        seed: of the run.
        tiles: int64 [K], records of each stratum that an epoch takes; its records where not given.
        windows: that an epoch is cut into.
    """

    def __init__(
        self,
        counts: NDArray[np.int64],
        seed: int,
        tiles: NDArray[np.int64] | None = None,
        windows: int = 1,
    ) -> None:
        self._counts, self._key = counts, seed_key(seed, SHARD_STREAM)
        self._records = counts.sum(1, dtype=np.int64)  # [K]
        self._shards = np.count_nonzero(counts, axis=1)  # [K], with records of the stratum
        least = 2 * int(self._shards.sum())
        span = 2 * -(-(self._records if tiles is None else tiles) // windows)  # ranks, of a stratum
        touched = (span + self._records - 2) // np.maximum(self._records, 1) + 1  # passes, at most
        wanted = int((touched * self._shards).sum())
        self._room = max(least, min(wanted, MAX_CELLS)) + SPARE_CELLS
        self._starts = np.empty(self._room, np.int64)  # running over all passes that are held
        self._shard = np.empty(self._room, np.int32)
        self._used, self._base = 0, 0  # cells, and records in them
        self._codes = np.empty(0, np.int64)  # of the passes held, sorted: pass · K + stratum
        self._bases = np.empty(0, np.int64)  # and where their records begin in `_starts`

    def at(
        self, stratum: NDArray[np.int64], rank: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the records of the streams lie.

        Args:
            stratum: int64 [B], none without records.
            rank: int64 [B], from 0, in the endless stream of the stratum.

        Returns:
            The shard, int64 [B], and the rank among the records of the stratum in that shard, in
            the order of the index, int64 [B].
        """
        turn, within = np.divmod(rank, self._records[stratum])
        turn[self._shards[stratum] == 1] = 0  # one shard: all passes are alike
        code = turn * len(self._counts) + stratum
        held = self._find(code)
        if (held >= 0).all():
            return self._search(held, within)
        shard, local = np.empty_like(code), np.empty_like(code)
        wanted = np.unique(code)
        cells = self._shards[wanted % len(self._counts)]
        part = np.cumsum(cells) // (self._room // 2)  # each part fits into the room
        for these in np.split(wanted, np.flatnonzero(np.diff(part)) + 1):
            self._hold(these)
            inside = np.flatnonzero((code >= these[0]) & (code <= these[-1]))
            found = self._search(self._find(code[inside]), within[inside])
            shard[inside], local[inside] = found
        return shard, local

    def _find(self, code: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index of each pass among those held; -1 where it is not."""
        if not len(self._codes):
            return np.full_like(code, -1)
        place = np.searchsorted(self._codes, code)
        place[place == len(self._codes)] = 0
        return np.where(self._codes[place] == code, place, -1)

    def _search(
        self, held: NDArray[np.int64], within: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard and rank in it of the record `within` a pass that is held."""
        record = self._bases[held] + within
        cell = np.searchsorted(self._starts[: self._used], record, "right") - 1
        return self._shard[cell].astype(np.int64), record - self._starts[cell]

    def _hold(self, codes: NDArray[np.int64]) -> None:
        """Makes the passes that are not held yet; all of them fit into the room."""
        missing = codes[self._find(codes) < 0]
        if self._used + self._shards[missing % len(self._counts)].sum() > self._room:
            self._used, self._base = 0, 0
            self._codes, self._bases = np.empty(0, np.int64), np.empty(0, np.int64)
            missing = codes
        bases = np.empty_like(missing)
        for index, code in enumerate(missing.tolist()):
            bases[index] = self._base
            self._append(*divmod(code, len(self._counts)))
        codes = np.concatenate([self._codes, missing])
        order = np.argsort(codes)
        self._codes, self._bases = codes[order], np.concatenate([self._bases, bases])[order]

    def _append(self, turn: int, stratum: int) -> None:
        shards = np.flatnonzero(self._counts[stratum])
        key = int(nth_key(self._key, np.array([turn]))[0])
        shards = shards[np.argsort(nth_key(key, shards))]  # no two keys alike: stable by itself
        ends = np.cumsum(self._counts[stratum, shards])
        cells = slice(self._used, self._used + len(shards))
        self._starts[cells.start] = self._base
        self._starts[cells.start + 1 : cells.stop] = self._base + ends[:-1]
        self._shard[cells] = shards
        self._used, self._base = cells.stop, self._base + int(ends[-1])
