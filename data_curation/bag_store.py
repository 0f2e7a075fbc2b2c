"""Bags: the feature store grown to sets of tokens, a crop of which is one short read.

A feature store (`features`) whose rows lie slide by slide, and within a slide in square blocks of
tiles along a Z-shaped curve, so that the tiles of a window stand in few runs of rows.
``tokens.parquet`` beside it holds what a feature alone does not say: its cell, its piece of tissue,
its sizes. What is in a bag is a tile; there are no rows that stand for nothing. Legend: N tokens of
a slide or window, D features.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from eosin.configs.errors import InputError
from eosin.data_curation.features import META, FeatureStore, as_half, join_features, open_features
from eosin.data_curation.manifest import BAG_TOKENS, FEATURE_ROWS, read_table, write_table

TOKENS = "tokens.parquet"
BLOCK = 16
"""Side of a block, in tiles."""
GAP = 64
"""Rows between two runs that are read along rather than skipped."""


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """Tiles of one slide as a set."""

    slide_id: str
    group: str
    """Patient, else the slide."""
    stain: str | None
    features: npt.NDArray[np.float16]
    """[N, D]"""
    corner_px: npt.NDArray[np.float64]
    """Top left in level-0 pixels, [N, 2]."""
    centre_um: npt.NDArray[np.float64]
    """[N, 2], from the slide's corner."""
    cells: npt.NDArray[np.int32]
    """Column and row on the lattice of its origin, [N, 2]."""
    origin: npt.NDArray[np.int32]
    """Of its lattice, [N], from 1."""
    section: npt.NDArray[np.int32]
    """Piece of tissue, [N], from 1; 0: none."""
    mpp: npt.NDArray[np.float64]
    """Of the tiles, [N]."""
    tile_ids: list[str]

    def __len__(self) -> int:
        """N."""
        return len(self.features)


@dataclass(frozen=True, kw_only=True)
class SlideBag:
    """What a store is made of: all tiles of one slide, in any order."""

    slide_id: str
    group: str
    stain: str | None
    features: npt.NDArray[np.floating]
    """[N, D], finite."""
    corner_px: npt.NDArray[np.float64]
    cells: npt.NDArray[np.int32]
    origin: npt.NDArray[np.int32]
    section: npt.NDArray[np.int32]
    tile_ids: list[str]
    mpp: float
    size_px: int
    footprint_px: float
    level0_mpp: float


class BagStore:
    """Slides as sets of tokens, read by slide or by window.

    Args:
        folder: that `write_bags` filled.

    Raises:
        InputError: it holds no bags.
    """

    def __init__(self, folder: Path) -> None:
        self.store: FeatureStore = open_features(folder)
        if not (folder / TOKENS).is_file() or self.store.offsets is None:
            raise InputError(f"{folder} holds features and no bags; make some with 'eosin bags'")
        tokens, rows = read_table(folder / TOKENS, BAG_TOKENS), self.store.rows
        if tokens.num_rows != rows.num_rows:
            raise InputError(f"{folder}: {TOKENS} and the features do not belong together")
        self.offsets = self.store.offsets
        starts = self.offsets[:-1].tolist()
        self.slide_ids: list[str] = rows["slide_id"].take(starts).to_pylist()
        self.groups: list[str] = rows["group"].take(starts).to_pylist()
        self.stains: list[str | None] = rows["stain"].take(starts).to_pylist()
        self._places = {name: at for at, name in enumerate(self.slide_ids)}
        self._tile_ids = rows["tile_id"]
        self._corners = np.column_stack([rows["level0_x"], rows["level0_y"]])
        self._mpp = rows["mpp"].to_numpy()
        self._cells = np.column_stack([tokens["column"], tokens["row"]]).astype(np.int32)
        self._origin, self._section = (tokens[n].to_numpy() for n in ("origin", "section"))
        level0, footprint = (tokens[n].to_numpy() for n in ("level0_mpp", "footprint_px"))
        self._sizes_px, self._footprint_px, self._level0_mpp = tokens["size_px"], footprint, level0
        self._centres = (self._corners + footprint[:, None] / 2) * level0[:, None]
        self.tile_um = float(np.median(footprint * level0))
        """Side of a tile."""

    def __contains__(self, slide_id: object) -> bool:
        """Whether it holds the slide."""
        return slide_id in self._places

    def owner(self, slide_id: str) -> tuple[str, str | None]:
        """Group and stain of a slide.

        Raises:
            InputError: no such slide.
        """
        at = self._at(slide_id)
        return self.groups[at], self.stains[at]

    @property
    def dim(self) -> int:
        """D."""
        return int(self.store.features.shape[1])

    @property
    def meta(self) -> dict[str, Any]:
        """Of the encoder."""
        return self.store.meta

    def read(self, slide_id: str) -> TokenSet:
        """All tokens of a slide.

        Raises:
            InputError: no such slide.
        """
        at = self._at(slide_id)
        return self._take(at, np.arange(self.offsets[at], self.offsets[at + 1]))

    def centres(self, slide_id: str) -> npt.NDArray[np.float64]:
        """Of all its tokens, in micrometres, [N, 2]; no feature is read."""
        at = self._at(slide_id)
        found: npt.NDArray[np.float64] = self._centres[self.offsets[at] : self.offsets[at + 1]]
        return found

    def cells(self, slide_id: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Cells [N, 2] and origins [N] of all its tokens; no feature is read."""
        at = self._at(slide_id)
        rows = slice(self.offsets[at], self.offsets[at + 1])
        return self._cells[rows], self._origin[rows]

    def with_features(self, slide_id: str, features: npt.NDArray[np.floating]) -> "SlideBag":
        """The tiles of a slide with other features, [N, D'], in the order of `read`.

        Raises:
            InputError: no such slide.
        """
        own, start = self.read(slide_id), int(self.offsets[self._at(slide_id)])
        return SlideBag(
            slide_id=slide_id,
            group=own.group,
            stain=own.stain,
            features=features,
            corner_px=own.corner_px,
            cells=own.cells,
            origin=own.origin,
            section=own.section,
            tile_ids=own.tile_ids,
            mpp=float(own.mpp[0]),
            size_px=int(self._sizes_px[start].as_py()),
            footprint_px=float(self._footprint_px[start]),
            level0_mpp=float(self._level0_mpp[start]),
        )

    def window(
        self, slide_id: str, corner_um: tuple[float, float], size_um: tuple[float, float]
    ) -> TokenSet:
        """The tokens whose centres lie in a rectangle; maybe none.

        Args:
            slide_id: of the slide.
            corner_um: top left of the rectangle, which belongs to it.
            size_um: its sides, whose far ends do not.

        Raises:
            InputError: no such slide.
        """
        at = self._at(slide_id)
        away = self.centres(slide_id) - np.asarray(corner_um)
        inside = ((away >= 0) & (away < np.asarray(size_um))).all(axis=1)
        return self._take(at, self.offsets[at] + np.flatnonzero(inside))

    def _at(self, slide_id: str) -> int:
        if slide_id not in self._places:
            raise InputError(f"no bag of slide '{slide_id}'; there are {len(self.slide_ids)}")
        return self._places[slide_id]

    def _take(self, at: int, rows: npt.NDArray[np.int64]) -> TokenSet:
        parts = [
            np.asarray(self.store.features[start:stop])[rows[first:last] - start]
            for first, last, start, stop in runs_of(rows)
        ]
        none = np.empty((0, self.dim), np.float16)
        return TokenSet(
            slide_id=self.slide_ids[at],
            group=self.groups[at],
            stain=self.stains[at],
            features=np.concatenate(parts) if parts else none,
            corner_px=self._corners[rows],
            centre_um=self._centres[rows],
            cells=self._cells[rows],
            origin=self._origin[rows],
            section=self._section[rows],
            mpp=self._mpp[rows],
            tile_ids=self._tile_ids.take(rows).to_pylist(),
        )


def side_by_side(
    cells: npt.NDArray[np.int32], origin: npt.NDArray[np.int32], gap: int = 8
) -> npt.NDArray[np.int64]:
    """Cells of one grid, [N, 2], from 0: lattices of other origins stand beside each other.

    Neighbours on a lattice stay neighbours, and no two tiles come to one cell, as they do where
    corners of several lattices are rounded to one.

    Args:
        cells: column and row on the lattice of the origin, [N, 2].
        origin: [N].
        gap: empty columns between two lattices.
    """
    found = np.zeros(cells.shape, np.int64)
    start = 0
    for number in np.unique(origin).tolist():
        own = origin == number
        found[own] = cells[own] - cells[own].min(axis=0)
        found[own, 0] += start
        start = int(found[own, 0].max()) + 1 + gap
    return found


def runs_of(rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, int, int, int]]:
    """Runs of sorted rows that are read at once.

    Yields:
        First and last + 1 of the places in `rows`, then of the rows that are read.
    """
    if not len(rows):
        return
    breaks = np.flatnonzero(np.diff(rows) > GAP) + 1
    for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
        yield first, last, int(rows[first]), int(rows[last - 1]) + 1


def block_order(corner_px: npt.NDArray[np.float64], footprint_px: float) -> npt.NDArray[np.int64]:
    """The order in which a slide's tiles are stored: by blocks along a Z curve, then as one reads.

    Args:
        corner_px: [N, 2].
        footprint_px: side of a tile.
    """
    blocks = np.floor((corner_px - corner_px.min(axis=0)) / (BLOCK * footprint_px)).astype(np.int64)
    curve = np.zeros(len(blocks), np.int64)
    for bit in range(31):
        for axis in (0, 1):
            curve |= ((blocks[:, axis] >> bit) & 1) << (2 * bit + axis)
    return np.lexsort((corner_px[:, 0], corner_px[:, 1], curve))


def write_bags(
    folder: Path, bags: Iterable[SlideBag], dim: int, stamp: str, meta: dict[str, Any]
) -> BagStore:
    """Writes a store; the marker last.

    Args:
        folder: where it lies; what is in it is replaced.
        bags: one slide after another; one is in memory at a time.
        dim: D.
        stamp: of all that it depends on.
        meta: of the encoder, for ``meta.json``.

    Raises:
        InputError: a slide comes twice, or a feature is not finite in float16.
    """
    halves = folder.with_name(f".{folder.name}.features")
    halves.parent.mkdir(parents=True, exist_ok=True)
    try:
        rows, tokens = _write_halves(halves, bags, folder)
        (folder / META).unlink(missing_ok=True)  # what follows belongs together or is not there
        write_table(tokens, folder / TOKENS, BAG_TOKENS)
        written = np.memmap(halves, np.float16, "r", shape=(rows.num_rows, dim))
        parts = (written[start : start + 65536] for start in range(0, rows.num_rows, 65536))
        join_features(folder, rows=rows, dim=dim, stamp=stamp, parts=parts, meta=meta)
    finally:
        halves.unlink(missing_ok=True)
    return BagStore(folder)


def _write_halves(path: Path, bags: Iterable[SlideBag], folder: Path) -> tuple[pa.Table, pa.Table]:
    """Features of all bags into one file; the tables that go with them."""
    tables: list[tuple[pa.Table, pa.Table]] = []
    seen: set[str] = set()
    total = 0
    with path.open("wb") as file:
        for bag in bags:
            if bag.slide_id in seen:
                raise InputError(f"slide '{bag.slide_id}' comes twice")
            seen.add(bag.slide_id)
            order = block_order(bag.corner_px, bag.footprint_px)
            file.write(as_half(np.asarray(bag.features, np.float32)[order], total).tobytes())
            tables.append(_tables(bag, order))
            total += len(order)
    if not tables:
        raise InputError(f"{folder}: no slides, so no bags")
    rows, tokens = (pa.concat_tables(parts) for parts in zip(*tables, strict=True))
    return rows, tokens


def _tables(bag: SlideBag, order: npt.NDArray[np.int64]) -> tuple[pa.Table, pa.Table]:
    n = len(order)
    rows = {
        "tile_id": [bag.tile_ids[i] for i in order.tolist()],
        "group": [bag.group] * n,
        "slide_id": [bag.slide_id] * n,
        "level0_x": bag.corner_px[order, 0],
        "level0_y": bag.corner_px[order, 1],
        "mpp": np.full(n, bag.mpp),
        "stain": pa.array([bag.stain] * n, pa.string()),
    }
    tokens = {
        "column": bag.cells[order, 0],
        "row": bag.cells[order, 1],
        "origin": bag.origin[order],
        "section": bag.section[order],
        "size_px": np.full(n, bag.size_px, np.int32),
        "footprint_px": np.full(n, bag.footprint_px),
        "level0_mpp": np.full(n, bag.level0_mpp),
    }
    return (
        pa.table(rows).select(FEATURE_ROWS.names).cast(FEATURE_ROWS),
        pa.table(tokens).select(BAG_TOKENS.names).cast(BAG_TOKENS),
    )
