"""The columns that a sample is drawn by: of tiles, their slides and their clusters, as codes.

A column is never held as text: its values are numbered, and a column of the slides is held once a
slide. So a hundred million tiles take some gigabytes. Shapes: N rows of tiles.parquet, S slides.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from eosin.configs.errors import ConfigError, InputError
from eosin.data_curation.manifest import CLUSTERS, SLIDES, TILES, open_table, read_table

MISSING = "unknown"
"""The value of a row that has none."""
BATCH_ROWS = 1 << 20


@dataclass(frozen=True, eq=False)
class Codes:
    """A column as numbers."""

    codes: NDArray[np.int32]
    """[N], indices into `values`."""
    values: list[str]
    """Every value once, sorted as text."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """Rows of each value, int64."""
        return np.bincount(self.codes, minlength=len(self.values))


class TileColumns:
    """Reads columns of a curated set's tables, by name.

    Args:
        tiles: ``tiles.parquet``.
        slides: ``slides.parquet``; None where there is none.
        clusters: ``clusters.parquet``; None where tiles are not clustered.

    Raises:
        InputError: a table is missing or lacks a column.
    """

    def __init__(self, tiles: Path, slides: Path | None, clusters: Path | None) -> None:
        self.tiles = open_table(tiles, TILES)
        self.path = tiles
        self.n_rows = int(self.tiles.metadata.num_rows)
        self.slides = read_table(slides, SLIDES) if slides is not None else None
        self.clusters = open_table(clusters, CLUSTERS) if clusters is not None else None
        self._of_slide = self._encode(self.tiles, "slide_id")
        self._cluster_rows: NDArray[np.int64] | None = None

    @property
    def slide(self) -> Codes:
        """The slide of each tile."""
        return self._of_slide

    @property
    def names(self) -> list[str]:
        """All columns that there are, without those of several numbers a row."""
        schemas = [self.tiles.schema_arrow]
        if self.slides is not None:
            schemas.append(self.slides.schema)
        if self.clusters is not None:
            schemas.append(self.clusters.schema_arrow)
        fields = [f.name for s in schemas for f in s if not pa.types.is_fixed_size_list(f.type)]
        return list(dict.fromkeys(fields))

    def codes(self, name: str) -> Codes:
        """A column's values as text, numbered; null is `MISSING`.

        Raises:
            ConfigError: there is no such column.
        """
        if name not in self.names:
            raise ConfigError(f"no column '{name}'; there are: {', '.join(self.names)}")
        if name == "slide_id":
            return self._of_slide
        if name in self.tiles.schema_arrow.names:
            return self._encode(self.tiles, name)
        if self.slides is not None and name in self.slides.column_names:
            return self._from_slides(name)
        assert self.clusters is not None
        found = self._encode(self.clusters, name)
        values = [*found.values, MISSING]  # of tiles that are not clustered
        rows = self.cluster_rows()
        spread = np.append(found.codes, np.int32(len(found.values)))[rows]
        return _sorted_values(spread, values)

    def numbers(self, name: str) -> NDArray[np.float32]:
        """A column of numbers, float32 [N], NaN where there is none.

        Raises:
            ConfigError: there is no such column, or it does not hold numbers.
        """
        in_tiles = name in self.tiles.schema_arrow.names
        file = self.tiles if in_tiles else self.clusters
        if file is None or name not in file.schema_arrow.names:
            raise ConfigError(f"no column '{name}' of tiles or clusters; there are: {self.names}")
        kind = file.schema_arrow.field(name).type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            raise ConfigError(f"column '{name}' holds {kind}, not numbers")
        found = np.empty(int(file.metadata.num_rows), np.float32)
        for start, batch in _batches(file, [name]):
            values = pc.fill_null(batch[name].cast(pa.float32()), float("nan"))
            found[start : start + len(batch)] = values.to_numpy()
        return found if in_tiles else np.append(found, np.float32("nan"))[self.cluster_rows()]

    def batches(self, names: list[str]) -> Iterator[tuple[int, pa.Table]]:
        """The number of the first row and the columns `names` of tiles, batch by batch."""
        yield from _batches(self.tiles, names)

    def tickets(self, seed: int) -> NDArray[np.uint64]:
        """A uniform 64-bit number for each tile, uint64 [N], of (seed, slide_id, place) alone.

        Of the slide's name XXH3-64 is taken, and mixed with the tile's column, row and mpp in nm
        by the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014). Which other tiles there
        are, and in what order, does not matter.
        """
        salts = [xxhash.xxh3_64_intdigest(name.encode(), seed) for name in self.slide.values]
        found = np.array(salts, np.uint64)[self.slide.codes]
        for start, batch in _batches(self.tiles, ["column", "row", "requested_mpp"]):
            span = slice(start, start + len(batch))
            place = batch["column"].to_numpy().astype(np.uint64) << np.uint64(32)
            place |= batch["row"].to_numpy().astype(np.uint64) & np.uint64(0xFFFFFFFF)
            nm = np.round(batch["requested_mpp"].to_numpy() * 1000).astype(np.uint64)
            found[span] = _mix(_mix(found[span] ^ _mix(place)) ^ nm)
        return found

    def cluster_rows(self) -> NDArray[np.int64]:
        """The row of clusters.parquet of each tile, int64 [N]; their number where there is none.

        Clusters stand in the order of the tiles, so both are read once, side by side.

        Raises:
            InputError: the clusters are of other tiles.
        """
        if self._cluster_rows is None:
            assert self.clusters is not None
            self._cluster_rows = _align(self.tiles, self.clusters, self.path)
        return self._cluster_rows

    def _from_slides(self, name: str) -> Codes:
        assert self.slides is not None
        position = pc.index_in(
            pa.array(self.slide.values, pa.string()), self.slides["slide_id"].combine_chunks()
        )
        if position.null_count:
            lost = self.slide.values[position.is_null().index(True).as_py()]
            raise InputError(f"slides.parquet has no slide '{lost}' of {self.path}")
        text = pc.fill_null(self.slides[name].cast(pa.string()), MISSING).take(position)
        values = sorted(set(text.to_pylist()))
        number = {value: code for code, value in enumerate(values)}
        of_slide = np.array([number[value] for value in text.to_pylist()], np.int32)
        return Codes(of_slide[self.slide.codes], values)

    @staticmethod
    def _encode(file: pq.ParquetFile, name: str) -> Codes:
        codes = np.empty(int(file.metadata.num_rows), np.int32)
        number: dict[Any, int] = {}
        for start, batch in _batches(file, [name]):
            column = batch[name].combine_chunks().dictionary_encode(null_encoding="encode")
            if isinstance(column, pa.ChunkedArray):
                column = column.combine_chunks()
            local = [number.setdefault(v, len(number)) for v in column.dictionary.to_pylist()]
            indices = column.indices.to_numpy()
            codes[start : start + len(batch)] = np.array(local, np.int32)[indices]
        return _sorted_values(codes, [MISSING if v is None else str(v) for v in number])


def _sorted_values(codes: NDArray[np.int32], values: list[str]) -> Codes:
    """The same column with its values sorted, equal ones made one, unused ones dropped."""
    used = np.bincount(codes, minlength=len(values)) > 0
    ordered = sorted({value for value, is_used in zip(values, used, strict=True) if is_used})
    number = {value: code for code, value in enumerate(ordered)}
    renumbered = np.array([number.get(value, 0) for value in values], np.int32)
    return Codes(renumbered[codes], ordered)


def _batches(file: pq.ParquetFile, names: list[str]) -> Iterator[tuple[int, pa.Table]]:
    start = 0
    for batch in file.iter_batches(BATCH_ROWS, columns=names):
        table = pa.Table.from_batches([batch])
        yield start, table
        start += table.num_rows


def _align(tiles: pq.ParquetFile, clusters: pq.ParquetFile, path: Path) -> NDArray[np.int64]:
    n_clusters = int(clusters.metadata.num_rows)
    found = np.full(int(tiles.metadata.num_rows), n_clusters, np.int64)
    waiting: pa.Array = pa.array([], pa.string())
    first, done = 0, False  # row of the first waiting one
    ids = _batches(clusters, ["tile_id"])
    for start, batch in _batches(tiles, ["tile_id"]):
        while len(waiting) < BATCH_ROWS and not done:
            more = next(ids, None)
            if more is None:
                done = True
            else:
                waiting = pa.concat_arrays([waiting, more[1]["tile_id"].combine_chunks()])
        hit = pc.index_in(batch["tile_id"], waiting)
        known = hit.is_valid().to_numpy()
        rows = hit.drop_null().to_numpy().astype(np.int64)
        found[start : start + len(batch)][known] = first + rows
        if len(rows):
            last = int(rows.max()) + 1
            waiting, first = waiting.slice(last), first + last
    if len(waiting) or not done:
        raise InputError(
            f"the clusters name '{waiting[0].as_py()}', which is not in {path}, or stands "
            "elsewhere there; embed and cluster again"
        )
    return found


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        mixed = values + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
