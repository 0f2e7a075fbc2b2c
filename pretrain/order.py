"""Which record stands where: the order of training as a pure function of (seed, epoch, position).

Each stratum of the index has an endless stream of passes over its records (`passes`). An epoch
takes from each stream the share that the mixture gives it, and is cut into windows: one holds an
equal part of every stratum's share, which lies in few shards, and is shuffled whole (`shuffle`).
No order is stored: any position can be asked for alone, whoever asks.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eosin.configs.errors import ConfigError
from eosin.data_curation.strata import Strata
from eosin.pretrain.passes import Passes
from eosin.pretrain.shuffle import nth_key, seed_key, shuffle

ORDER_STREAM = 0x6F72646572
"""Keeps the keys of the order apart from every other use of the same seed ("order" in ASCII)."""

TABLE_CELLS = 2**20
"""Cells (windows x strata) of a table that is made to look positions up in: 8 MiB."""


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """How often the values of one column are seen; by default every record once an epoch."""

    column: str = ""
    """Column of the index whose values are balanced, e.g. organ or source; empty for none."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of each value, in any positive unit; 0 leaves its records out. All values of the column
    must be named. Empty: the shares follow from `power`."""
    power: float = 1.0
    """Without weights, a value's share grows with its records to this power: 1 as they come, 0.5 as
    their root, 0 all values alike."""

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if not (weight >= 0 and math.isfinite(weight)):
                raise ValueError(f"weights[{name}] must be finite and >= 0, not {weight}")
        if self.weights and not any(self.weights.values()):
            raise ValueError("weights must not all be 0")
        if not 0 <= self.power <= 1:
            raise ValueError(f"power must lie in [0, 1], not {self.power}")
        if self.power != 1 and self.weights:
            raise ValueError(
                f"power must be 1 beside weights, which it would not touch: {self.power}"
            )
        if not self.column and (self.weights or self.power != 1):
            raise ValueError("weights and power need a column: the one whose values are weighted")


class Places(NamedTuple):
    """Where records stand: the rank-th record, in index order, of a stratum in a shard."""

    stratum: NDArray[np.int64]
    shard: NDArray[np.int64]
    rank: NDArray[np.int64]


@dataclass(frozen=True)
class StratumShare:
    """What an epoch takes of one stratum."""

    name: str
    """Value of the column; empty where there is no mixture."""
    records: int
    """Records that the stratum has."""
    tiles: int
    """Positions of an epoch that show one of them; 0 where it is left out."""

    @property
    def times_seen(self) -> float:
        """How often an epoch shows each record, on average."""
        return self.tiles / self.records if self.records else 0.0


class Order:
    """The order of all epochs of a run.

    It holds a count a window and what `Passes` holds: 12 bytes for each stratum and shard that has
    records of it, and as much again for each further pass that a window shows of a stratum (400 MB
    at most), beside the 8 bytes of `Strata.counts`.

    Raises:
        ConfigError: the weights leave a value out or name one that is none; a value with a weight
            has no record, or so small a share that an epoch has no place for it; nothing is left.
    """

    def __init__(
        self, strata: Strata, mixture: MixtureConfig, seed: int, window_shards: int
    ) -> None:
        """`window_shards`: shards that are shuffled together; 0 for all of them."""
        if window_shards < 0:
            raise ValueError(f"window_shards must not be negative, not {window_shards}")
        self._arguments = (strata, mixture, seed, window_shards)
        self._names, self._records = strata.names, strata.records
        self._tiles = _tiles(strata.names, self._records, mixture)  # [K], of an epoch
        self._seed = seed
        self.n = int(self._tiles.sum())
        """Positions in an epoch: the records of the strata that take part."""
        per_shard = strata.counts.sum(0, where=(self._tiles > 0)[:, None])
        used = np.count_nonzero(per_shard)  # shards with records that take part
        self._windows = math.ceil(used / window_shards) if window_shards else 1
        self._passes = Passes(strata.counts, seed, self._tiles, self._windows)
        self._starts = self._window_starts()  # [windows + 1], positions

    def at(self, epoch: int, positions: ArrayLike) -> Places:
        """The records at some positions of an epoch.

        Args:
            epoch: from 0.
            positions: int, of any shape, each in [0, n).

        Returns:
            int64 of the shape of `positions`. Over an epoch each stratum comes as often as
            `describe` says. Where that is a multiple of its records (without weights: once), each
            record comes equally often. Else an epoch starts where the last one stopped, inside a
            pass: from the start of the run to the end of any window, no record comes more than
            once more than another of its stratum; in one epoch alone, up to twice more.

        Raises:
            ValueError: a position lies outside [0, n).
        """
        asked = np.asarray(positions, np.int64)
        if asked.size and (asked.min() < 0 or asked.max() >= self.n):
            raise ValueError(
                f"position must lie in [0, {self.n}), not {asked.min()} … {asked.max()}"
            )
        flat = asked.reshape(-1)
        window = np.searchsorted(self._starts, flat, "right") - 1
        start, end = self._starts[window], self._starts[window + 1]
        keys = nth_key(seed_key(self._seed, epoch, ORDER_STREAM), window)
        place = start + shuffle(flat - start, end - start, keys)
        order = np.argsort(place)  # what is looked up in turn lies close together
        stratum, rank = self._ranks(window[order], place[order])
        shard, local = self._passes.at(stratum, epoch * self._tiles[stratum] + rank)
        places = np.empty((3, flat.size), np.int64)
        places[:, order] = stratum, shard, local
        return Places(*places.reshape(3, *asked.shape))

    def describe(self) -> list[StratumShare]:
        """What an epoch takes of each stratum, in the order of their names."""
        rows = zip(self._names, self._records.tolist(), self._tiles.tolist(), strict=True)
        return [StratumShare(*row) for row in rows]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments  # a worker makes its own tables

    def _window_starts(self) -> NDArray[np.int64]:
        """First position of each window, and n: int64 [windows + 1]."""
        bounds = np.arange(self._windows + 1)
        parts = math.ceil(len(bounds) * len(self._tiles) / TABLE_CELLS)
        sums = [self._cuts(part).sum(1) for part in np.array_split(bounds, parts)]
        return np.concatenate(sums)

    def _cuts(self, window: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tiles of each stratum before a window: [W] → [W, K]."""
        return np.asarray(window[:, None] * self._tiles // self._windows, np.int64)

    def _ranks(
        self, window: NDArray[np.int64], place: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Stratum, and rank in its share of the epoch, of shuffled places: all [B], rising.

        A window's places are those of its first stratum, then those of its second, …
        """
        if len(self._tiles) == 1:
            return np.zeros_like(place), place
        stratum, rank = np.empty_like(place), np.empty_like(place)
        firsts = np.flatnonzero(np.diff(window, prepend=-1))
        bounds, step = [*firsts.tolist(), len(window)], max(1, TABLE_CELLS // len(self._tiles))
        for begin in range(0, firsts.size, step):
            these = window[firsts[begin : begin + step]]
            inside = slice(bounds[begin], bounds[begin + len(these)])
            first = self._cuts(these).reshape(-1)  # [W · K], ranks
            count = self._cuts(these + 1).reshape(-1) - first
            ends = np.cumsum(count.reshape(len(these), -1), axis=1)
            ends += self._starts[these, None]  # rising over the windows as well
            cell = np.searchsorted(ends.reshape(-1), place[inside], "right")
            stratum[inside] = cell % len(self._tiles)
            rank[inside] = place[inside] - (ends.reshape(-1) - count - first)[cell]
        return stratum, rank


def locate(step: int, batch_size: int, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Epoch and position of each sample of a step, both int64 [B].

    Epochs follow one another without a gap: a batch may straddle two, and no sample is dropped.
    """
    running = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epoch, position = np.divmod(running, n)
    return epoch, position


def _tiles(
    names: tuple[str, ...], records: NDArray[np.int64], mixture: MixtureConfig
) -> NDArray[np.int64]:
    """Positions of an epoch that each stratum gets, int64 [K]: the largest remainders of its share.

    In rational numbers: no share is off by a rounding.
    """
    if mixture.weights:
        shares = _weights(names, records, mixture)
    else:
        shares = [Fraction(m**mixture.power) if m else Fraction(0) for m in records.tolist()]
    total, taking = sum(shares, Fraction(0)), np.array([share > 0 for share in shares], bool)
    n = int(records[taking].sum())
    if not n:
        raise ConfigError("the index has no record: there is nothing to train on")
    quotas = [n * share / total for share in shares]
    tiles = [math.floor(quota) for quota in quotas]
    by_rest = sorted(range(len(tiles)), key=lambda k: (tiles[k] - quotas[k], k))
    for k in by_rest[: n - sum(tiles)]:
        tiles[k] += 1
    lost = [k for k in np.flatnonzero(taking).tolist() if not tiles[k]]
    if lost:
        rows = (f"{names[k]!r} ({float(shares[k] / total):.3g} of {n} tiles)" for k in lost)
        raise ConfigError(
            f"too small a share of {mixture.column!r} for one tile an epoch: {_listed(rows)}; "
            "raise the weight, or make it 0"
        )
    return np.array(tiles, np.int64)


def _weights(
    names: tuple[str, ...], records: NDArray[np.int64], mixture: MixtureConfig
) -> list[Fraction]:
    """Weight of each stratum; ConfigError where the names or the records do not bear them out."""
    weights, counts = mixture.weights, dict(zip(names, records.tolist(), strict=True))
    wrong = []
    if missing := [repr(name) for name in names if name not in weights]:
        wrong.append(f"no weight for {_listed(missing)}")
    if unknown := [repr(name) for name in weights if name not in counts]:
        wrong.append(f"no such value: {_listed(unknown)}")
    if empty := [repr(name) for name in names if weights.get(name) and not counts[name]]:
        wrong.append(f"a weight, but no record: {_listed(empty)}")
    if wrong:
        raise ConfigError(f"mixture.weights of column {mixture.column!r}: {'; '.join(wrong)}")
    return [Fraction(weights[name]) for name in names]


def _listed(items: Iterable[str], at_most: int = 20) -> str:
    """Names for a message; the first of them where there are many."""
    held = list(items)
    rest = len(held) - at_most
    return ", ".join(held[:at_most]) + (f" and {rest} more" if rest > 0 else "")
