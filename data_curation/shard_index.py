"""The index of shards: opened in a moment at any size, its rows read shard by shard when needed.

``index.parquet`` has one row group a shard, so that a record's place is found without the rows of
other shards: opening reads the marker and the file's footer alone. A 10,000-shard footer costs
0.2 s and 120 MB.
"""

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from eosin.data_curation.codec import MAX_PIXELS
from eosin.data_curation.index_file import IndexFile
from eosin.data_curation.index_rows import DIGEST_BYTES, RowBlock, compact_rows, possible_hw
from eosin.data_curation.manifest import INDEX, REFERENCE, check_table, full_schema
from eosin.data_curation.shard_marker import POINTING, digest_of
from eosin.data_curation.shard_store import ShardStore
from eosin.data_curation.strata import Strata, count_strata
from eosin.launch.artefacts import replacing

CACHE_MB = 256
"""Rows of the index that a process holds; 10,000 records take 0.5 MB."""

_COLUMNS = ("suffix", "offset", "size", "checksum", "height_px", "width_px", "mpp")
_PLAIN = ("key", "offset", "size", "checksum")  # hardly a value occurs twice: no dictionary
_BOUNDED = ["shard", "mpp", "height_px", "width_px"]  # the footer has their extremes
_KIND = ["height_px", "width_px", "mpp"]


class _Places(Protocol):
    """`eosin.pretrain.order.Places`: each the rank-th record of a stratum in a shard."""

    @property
    def stratum(self) -> NDArray[np.int64]: ...
    @property
    def shard(self) -> NDArray[np.int64]: ...
    @property
    def rank(self) -> NDArray[np.int64]: ...


class Place(NamedTuple):
    """All that is needed to read one record."""

    row: int
    """Of the whole index."""
    shard: int
    local: int
    """Row within the shard."""
    offset: int
    size: int
    checksum: bytes
    """XXH3-128, 16 bytes."""
    suffix: str
    height_px: int
    width_px: int
    reference: Mapping[str, Any] | None
    """Columns of `manifest.REFERENCE` of a record that points into a slide."""


class ShardIndex:
    """Which records there are, and where.

    Rows are numbered through all shards in the order of their names: `row`, `place`. Only `key`
    may be called from several threads at once. Cheap to send to another process, which opens the
    file anew.

    Args:
        store: of the shards.
        cache_mb: see `CACHE_MB`.

    Raises:
        InputError: the index is missing, damaged, of an older layout or of other shards.
    """

    def __init__(self, store: ShardStore, cache_mb: float = CACHE_MB) -> None:
        self.store, self.cache_mb = store, cache_mb
        described: Mapping[str, Mapping[str, Any]] = store.marker["shards"]
        self.names: tuple[str, ...] = tuple(sorted(described))
        """Of the shards; the row groups are in this order."""
        self.counts: NDArray[np.int64] = np.array(
            [described[name]["count"] for name in self.names], np.int64
        )
        """int64 [S], records of each shard."""
        self.digest = digest_of(store.marker)
        """See `shard_marker.digest_of`."""
        self._bytes = [described[name]["bytes"] for name in self.names]
        self._starts: list[int] = [0, *np.cumsum(self.counts).tolist()]
        self._file = IndexFile(store, self.names, self.counts)
        self._blocks: OrderedDict[int, RowBlock] = OrderedDict()
        self._block_bytes = 0
        self._values: dict[str, tuple[str, ...]] = {}  # of the columns that were asked for
        self._strata: dict[str, Strata] = {}
        self._kinds: list[tuple[int, int, float]] | None = None
        self._sorted: OrderedDict[tuple[str, int], _Sorted] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.store, self.cache_mb, self._values)

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, shard: int, local: int) -> int:
        """The row in the index of the record `local` of `shard`."""
        return self._starts[shard] + local

    def place(self, row: int) -> tuple[int, int]:
        """The shard that a row of the index lies in, and its row there.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of an index of {len(self)}")
        shard = bisect_right(self._starts, row) - 1
        return shard, row - self._starts[shard]

    def locate(self, row: int) -> Place:
        """Where the record in `row` lies, and what it must be.

        Raises:
            IndexError: there is no such row.
            InputError: the index is damaged there.
        """
        shard, local = self.place(row)
        block = self._block(shard)
        start = local * DIGEST_BYTES
        height, width = block.hw[local].tolist()
        return Place(
            row,
            shard,
            local,
            int(block.offset[local]),
            int(block.size[local]),
            block.checksum[start : start + DIGEST_BYTES],
            block.suffixes[block.suffix[local]],
            height,
            width,
            block.reference.slice(local, 1).to_pylist()[0] if block.reference else None,
        )

    def shard_bytes(self, shard: int) -> int:
        """Length of a shard's tar."""
        return int(self._bytes[shard])

    def key(self, row: int) -> str:
        """The key of the record in `row`; slow, for messages."""
        shard, local = self.place(row)
        return str(self._file.read(shard, ["key"])["key"][local].as_py())

    def hw(self, rows: ArrayLike) -> NDArray[np.int32]:
        """Height and width of tiles, px: int32 [B, 2]."""
        found = np.empty((np.size(rows), 2), np.int32)
        for block, at, locals_ in self._by_shard(rows):
            found[at] = block.hw[locals_]
        return found

    def mpp(self, rows: ArrayLike) -> NDArray[np.float64]:
        """µm per pixel of tiles: float64 [B], NaN where it is unknown."""
        found = np.empty(np.size(rows), np.float64)
        for block, at, locals_ in self._by_shard(rows):
            found[at] = block.mpp[locals_]
        return found

    def single_mpp(self) -> float | None:
        """The scale of all records, µm/px; None where they differ or one is unknown."""
        seen: set[float] = set()
        for shard in np.flatnonzero(self.counts).tolist():
            found = self._file.bounds(shard, "mpp")
            if found is None or found.low is None or found.n_null:
                return None
            seen |= {found.low, found.high}
            if len(seen) > 1:
                return None
        return float(seen.pop()) if seen else None

    def strata(self, column: str) -> Strata:
        """How the records divide by the values of `column`, as text; an empty cell is ``""``.

        Streams that one column through all shards, the first time: about 0.1 s a million records.

        Args:
            column: of the index; ``""`` for one stratum of all.

        Raises:
            InputError: there is no such column, or it has too many values; see `count_strata`.
        """
        if column not in self._strata:
            if column:
                shards = (self._file.codes(shard, column) for shard in range(len(self.names)))
                found = count_strata(column, shards, len(self.names))
            else:
                found = Strata(names=("",), counts=self.counts[None, :].copy())
            self._strata[column], self._values[column] = found, found.names
        return self._strata[column]

    def tile_kinds(self) -> list[tuple[int, int, float]]:
        """The distinct (height px, width px, µm/px or NaN) of all records, sorted.

        Shards of which the footer says that all records are alike are not read; of others three
        columns, the first time: about 0.2 s a million records.

        Raises:
            InputError: the index is damaged.
        """
        if self._kinds is None:
            found: set[tuple[int, int, float | None]] = set()
            for shard in np.flatnonzero(self.counts).tolist():
                found |= self._kinds_in(shard)
            heights, widths, scales = zip(*found, strict=True) if found else ((), (), ())
            hw = possible_hw(heights, widths).tolist()
            known = {(*size, -1.0 if m is None else m) for size, m in zip(hw, scales, strict=True)}
            self._kinds = [(h, w, math.nan if m == -1 else m) for h, w, m in sorted(known)]
        return list(self._kinds)

    def largest_hw(self) -> tuple[int, int]:
        """The greatest height and the greatest width of all tiles, px; (0, 0) where there are none.

        Taken from the footer, but for shards of which it does not say.

        Raises:
            InputError: the index is damaged.
        """
        largest = np.zeros(2, np.int64)
        for shard in np.flatnonzero(self.counts).tolist():
            sides = [self._file.bounds(shard, column) for column in ("height_px", "width_px")]
            told = [(side.low, side.high) for side in sides if side and side.low is not None]
            likely = len(told) == 2 and min(told)[0] >= 1 and told[0][1] * told[1][1] <= MAX_PIXELS
            hw = [high for _, high in told] if likely else self._block(shard).hw.max(0)
            largest = np.maximum(largest, hw)
        return int(largest[0]), int(largest[1])

    def rows_at(self, column: str, places: _Places) -> NDArray[np.int64]:
        """Rows of the index of the records at `places`, of the same shape.

        Args:
            column: as it was given to `strata`.
            places: stratum, shard, and rank among the records of both, in the order of the index.
        """
        shards = np.asarray(places.shard, np.int64)
        ranks = np.asarray(places.rank, np.int64)
        starts = np.asarray(self._starts, np.int64)[shards]
        if not column:
            return starts + ranks
        ranks = ranks.ravel()
        flat, strata = shards.ravel(), np.asarray(places.stratum, np.int64).ravel()
        found = np.empty(flat.size, np.int64)
        for shard, at in _groups(flat):
            sorted_ = self._sorted_rows(column, shard)
            found[at] = sorted_.rows[sorted_.starts[strata[at]] + ranks[at]]
        return starts + found.reshape(shards.shape)

    def table(self) -> pa.Table:
        """All rows, columns as in `manifest.INDEX` and the others behind."""
        return self._file.table()

    def _kinds_in(self, shard: int) -> set[tuple[int, int, float | None]]:
        """As `tile_kinds`, of one shard; None for an unknown scale."""
        told = [self._file.bounds(shard, column) for column in _KIND]
        known = [side for side in told if side is not None and side.low == side.high]
        n_null = (0, 0, 0 if known and known[-1].low is not None else self.counts[shard])
        if len(known) == 3 and all(side.n_null == n for side, n in zip(known, n_null, strict=True)):
            return {(known[0].low, known[1].low, known[2].low)}
        rows = self._file.read(shard, _KIND).group_by(_KIND, use_threads=False).aggregate([])
        cells = zip(*(rows[column].to_pylist() for column in _KIND), strict=True)
        return {(h, w, None if m is None or math.isnan(m) else m) for h, w, m in cells}

    def _block(self, shard: int) -> RowBlock:
        block = self._blocks.get(shard)
        if block is not None:
            self._blocks.move_to_end(shard)
            return block
        points = self.names[shard].endswith(POINTING)
        table = self._file.read(shard, [*_COLUMNS, *(REFERENCE.names if points else ())])
        block = compact_rows(table, points)
        self._block_bytes += block.n_bytes()
        while self._blocks and self._block_bytes > self.cache_mb * 1e6:
            self._block_bytes -= self._blocks.popitem(last=False)[1].n_bytes()
        self._blocks[shard] = block
        return block

    def _by_shard(
        self, rows: ArrayLike
    ) -> Iterator[tuple[RowBlock, NDArray[np.int64], NDArray[np.int64]]]:
        """Each shard that holds some of `rows`: its rows, where they stand in `rows`, their own."""
        wanted = np.asarray(rows, np.int64)
        starts = np.asarray(self._starts, np.int64)
        shards = np.searchsorted(starts, wanted, side="right") - 1
        for shard, at in _groups(shards):
            yield self._block(shard), at, wanted[at] - starts[shard]

    def _sorted_rows(self, column: str, shard: int) -> "_Sorted":
        key = (column, shard)
        if key in self._sorted:
            self._sorted.move_to_end(key)
            return self._sorted[key]
        if column not in self._values:
            self.strata(column)
        values, codes = self._file.codes(shard, column)
        number = {name: k for k, name in enumerate(self._values[column])}
        strata = np.array([number.get(value, -1) for value in values], np.int64)[codes]
        if strata.min(initial=0) < 0:
            value = values[int(codes[np.argmin(strata)])]
            raise self._file.damaged(ValueError(f"{column} '{value}' was not there at the start"))
        counts = np.bincount(strata, minlength=len(number))
        starts = np.cumsum(counts) - counts
        found = _Sorted(np.argsort(strata, kind="stable").astype(np.int32), starts)
        limit = max(
            1, int(self.cache_mb * 1e6 / 4 / (4 * int(self.counts.max()) + 8 * len(number)))
        )
        while len(self._sorted) >= limit:
            self._sorted.popitem(last=False)
        self._sorted[key] = found
        return found


class _Sorted(NamedTuple):
    """The rows of a shard, stratum after stratum."""

    rows: NDArray[np.int32]
    starts: NDArray[np.int64]
    """Of each stratum in `rows`."""


def _groups(shards: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each shard that occurs, ascending, and where it stands."""
    order = np.argsort(shards, kind="stable")
    present, first = np.unique(shards[order], return_index=True)
    ends = [*first[1:].tolist(), len(order)]
    for shard, start, end in zip(present.tolist(), first.tolist(), ends, strict=True):
        yield shard, order[start:end]


def write_index(parts: Iterable[pa.Table], path: Path) -> None:
    """Writes an index atomically, one row group a part; only one part is in memory at a time.

    Equal parts give equal bytes.

    Args:
        parts: the rows of each shard, in the order of the shards' names; see `manifest.INDEX`.
            Columns beyond those are kept behind them.
        path: of the file.

    Raises:
        ValueError: a column is missing, of another type, or null where it must not be; or a part
            has other columns than the first.
    """
    rest = iter(parts)
    first = next(rest, None)
    schema = full_schema(INDEX if first is None else first.schema, INDEX)
    plain = [name for name in schema.names if name not in _PLAIN]
    with (
        replacing(path) as partial,
        pq.ParquetWriter(
            partial,
            schema,
            compression="zstd",
            use_dictionary=plain,
            write_statistics=_BOUNDED,
            write_page_checksum=True,
        ) as writer,
    ):
        part = first
        while part is not None:
            strangers = [name for name in part.column_names if name not in schema.names]
            if strangers:
                raise ValueError(f"{path.name}: only some shards have {', '.join(strangers)}")
            writer.write_table(check_table(part, schema, path.name), max(1, part.num_rows))
            part = next(rest, None)


def _reopen(store: ShardStore, cache_mb: float, values: dict[str, tuple[str, ...]]) -> ShardIndex:
    index = ShardIndex(store, cache_mb)
    index._values.update(values)
    return index
