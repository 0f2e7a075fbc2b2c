"""Opening a slide and reading regions of it at an exact physical scale, through OpenSlide.

Two things here differ from the usual `read_region` loop. A tile is cut by its exact (fractional)
rectangle and resampled once, so its mpp is the requested one on both axes and nothing is rounded to
whole level pixels. And a region that cannot be decoded, or that the scanner never visited, raises
`RegionError`: no pixel is made up.
"""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image

from eosin.configs.errors import EosinError
from eosin.data_curation.area_mean import area_mean
from eosin.data_curation.coded_tiles import CodedTiles, DecodedTiles
from eosin.data_curation.fastslide_reader import ALSO_FASTSLIDE, ONLY_FASTSLIDE, FastSlideHandle
from eosin.data_curation.manifest import Status
from eosin.data_curation.slide_metadata import (
    Level,
    SlideError,
    check_mpp,
    metadata_mpp,
    pyramid_levels,
    scanned_bounds_px,
    scanner_name,
)

SLIDE_SUFFIXES = ONLY_FASTSLIDE | frozenset(
    (
        ".bif",
        ".czi",
        ".dcm",
        ".mrxs",
        ".ndpi",
        ".scn",
        ".svs",
        ".svslide",
        ".tif",
        ".tiff",
        ".vms",
        ".vmu",
    )
)
"""Extensions of the formats that OpenSlide 4 reads; and of those that fastslide does."""

MPP_TOLERANCE = 1e-3
"""A level this much (relative) coarser than the request still serves it."""
MAX_UPSAMPLE = 0.25
"""And so does a scan, where the user says so, up to this much."""
_STRIP_PX = 1 << 22
"""Source pixels held at once when a region is large."""
_FINER = 2.9
"""Pixels of a level across one of a tile from which parts of pixels no longer matter."""
_WHOLE_PX = 1e-6
"""A rectangle this close to whole level pixels is read as it is."""
_SHRINKS = (8, 4, 2)
_HOLE_ALPHA = 64
"""Below this opacity a pixel was not scanned; above, OpenSlide blended a real one at an edge."""
_OVERVIEW_BLOCK_PX = 512
_SMALLEST_BLOCK_PX = 32

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""
Decoding = Literal["exact", "scaled"]
"""``scaled``: where a tile lies on pixels of two, four or eight of the level that it is read from
(or is much coarser than those), the level's JPEGs are decoded at 1/2, 1/4 or 1/8 of their size.
That is quicker, close to the exact mean (45 dB and more on sharp tissue), and not equal to it."""


class RegionError(EosinError):
    """A region that could not be decoded or was never scanned; the message is the reason."""


class Slide:
    """A slide at level 0, with tiles on request at any mpp not finer than the scan's.

    A context manager. The handle belongs to the process that opened it: open it in the worker.

    Args:
        path: any file that OpenSlide opens.
        mpp: µm per level-0 pixel (x, y) that replaces the file's own.
        cache: of decoded tiles, which many slides may share; one of its own by default.
        decoding: see `Decoding`; of `read_tile` alone.
        max_upsample: how much coarser (relative) than a tile the scan may be. A tile's pixel then
            is the mean over its exact area all the same: part of one pixel of the scan, or two.

    Raises:
        SlideError: not a slide, damaged, or without a plausible mpp.
    """

    def __init__(
        self,
        path: Path,
        mpp: tuple[float, float] | None = None,
        cache: DecodedTiles | None = None,
        decoding: Decoding = "exact",
        max_upsample: float = 0.0,
    ) -> None:
        self.path = path
        self.decoding, self._max_upsample = decoding, max(max_upsample, MPP_TOLERANCE)
        self._cache = cache
        self._coded: CodedTiles | None = None
        self._handle = _open(path)
        try:
            self._properties: dict[str, str] = dict(self._handle.properties)
            self.size_px: tuple[int, int] = self._handle.dimensions
            self.levels = pyramid_levels(
                self._properties, self._handle.level_dimensions, self._handle.level_downsamples
            )
            self.mpp_source = "metadata" if mpp is None else "table"
            self.mpp = mpp or metadata_mpp(self._properties)
            check_mpp(self.mpp, self.mpp_source)
        except BaseException:
            self._handle.close()
            raise
        self.scanner = scanner_name(self._properties)
        self.quickhash = self._properties.get(openslide.PROPERTY_NAME_QUICKHASH1)
        self.bounds_px = scanned_bounds_px(self._properties, self.size_px)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the handle."""
        self._handle.close()
        if self._coded is not None:
            self._coded.close()

    def level_for(self, mpp: float) -> Level:
        """The coarsest level that is not coarser than `mpp`.

        Raises:
            SlideError: the scan is coarser than `mpp` (status `upsampling`).
        """
        scan_mpp = max(self.mpp)
        if scan_mpp > mpp * (1 + self._max_upsample):
            smallest = math.ceil(scan_mpp / (1 + MPP_TOLERANCE) * 1e4) / 1e4
            raise SlideError(
                Status.UPSAMPLING,
                f"scanned at {scan_mpp:g} µm/px, coarser than the {mpp:g} asked for; "
                f"mpp={smallest:g} is the smallest that would admit it without max_upsample",
            )
        serving = [lv for lv in self.levels if self._level_mpp(lv) <= mpp * (1 + MPP_TOLERANCE)]
        return max(serving, key=self._level_mpp) if serving else self.levels[0]

    def _tile_level(self, mpp: float) -> Level:
        """The level that a tile is averaged from: coarse for speed, yet as good as level 0.

        A mean over parts of coarse pixels is not that over what they were made of. So a level
        serves that is as fine as the tile, or whole times finer, or `_FINER` times; else a finer.
        """
        coarsest = self.level_for(mpp)
        finer = sorted(
            (lv for lv in self.levels if self._level_mpp(lv) <= self._level_mpp(coarsest)),
            key=self._level_mpp,
            reverse=True,
        )
        for level in finer:
            factors = [mpp / (m * d) for m, d in zip(self.mpp, level.downsample, strict=True)]
            if all(f >= _FINER or abs(f - round(f)) <= MPP_TOLERANCE * f for f in factors):
                return level
        return finer[-1]

    def read_tile(
        self, level0_x: float, level0_y: float, size_px: int, mpp: float
    ) -> NDArray[np.uint8]:
        """The tile whose exact top left corner is (level0_x, level0_y), in level-0 pixels.

        Returns:
            RGB uint8 [size_px, size_px, 3]; level pixels untouched where they coincide with the
            tile's, else the mean of the level over each pixel's exact area (`area_mean`).

        Raises:
            RegionError: not decodable, outside the slide, or touching an area never scanned.
            SlideError: `mpp` is finer than the scan.
        """
        level = self._tile_level(mpp)
        width, height = (size_px * mpp / axis for axis in self.mpp)
        box = (level0_x, level0_y, level0_x + width, level0_y + height)
        left, top, right, bottom = self._bounds_box()
        slack = 0.5  # of a level-0 pixel: rounding of a cell that ends on the edge
        if (
            box[0] < left - slack
            or box[1] < top - slack
            or box[2] > right + slack
            or box[3] > bottom + slack
        ):
            raise RegionError("the tile reaches beyond the slide")
        if self.decoding == "scaled":
            scaled = self._read_scaled(level, box, size_px)
            if scaled is not None:
                return scaled
        return self._resample(level, box, (size_px, size_px), holes_are_white=False)

    def _read_scaled(self, level: Level, box0: Box, size_px: int) -> NDArray[np.uint8] | None:
        """The tile from JPEGs decoded at a part of their size; None where that does not serve.

        As in `_tile_level`, parts of shrunk pixels matter unless they are `_FINER` than the tile's.
        """
        dx, dy = level.downsample
        for shrink in _SHRINKS:
            x0, y0, x1, y1 = (
                side / d / shrink for side, d in zip(box0, (dx, dy, dx, dy), strict=True)
            )
            steps = ((x1 - x0) / size_px, (y1 - y0) / size_px)
            parts = (x0, y0, *steps)
            whole = min(steps) > 0.5 and all(abs(v - round(v)) * size_px < _WHOLE_PX for v in parts)
            if not whole and min(steps) < _FINER:
                continue
            left, top = math.floor(x0 + _WHOLE_PX), math.floor(y0 + _WHOLE_PX)
            width, height = math.ceil(x1 - _WHOLE_PX) - left, math.ceil(y1 - _WHOLE_PX) - top
            pixels = self._coded_tiles().pixels(level, (left, top, width, height), shrink)
            if pixels is None or (width, height) == (size_px, size_px):
                return pixels
            share = np.linspace(0, 1, size_px + 1)
            columns, rows = x0 - left + share * (x1 - x0), y0 - top + share * (y1 - y0)
            return area_mean(pixels, _inside(columns, width), _inside(rows, height))
        return None

    def coded_tile(
        self, level0_x: float, level0_y: float, size_px: int, mpp: float
    ) -> bytes | None:
        """The file's own JPEG of a tile, where the tile is one of those that the slide is made of.

        Arguments are those of `read_tile`, whose pixels it holds. None where there is none.
        """
        level = self._tile_level(mpp)
        dx, dy = level.downsample
        width, height = (size_px * mpp / axis for axis in self.mpp)
        box = (level0_x / dx, level0_y / dy, (level0_x + width) / dx, (level0_y + height) / dy)
        x, y = round(box[0]), round(box[1])
        whole = (x, y, x + size_px, y + size_px)
        if max(abs(a - b) for a, b in zip(box, whole, strict=True)) >= _WHOLE_PX:
            return None
        return self._coded_tiles().jpeg(level, (x, y, size_px, size_px))

    def overview(self, mpp: float) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """The whole scanned area (`bounds_px`) at about `mpp` µm/px, read in bounded memory.

        Returns:
            RGB uint8 [h, w, 3], areas never scanned in white; and bool [h, w], False where a
            region could not be decoded.
        """
        level = self.level_for(max(mpp, *self.mpp))
        left, top, right, bottom = self._bounds_box()
        width = max(1, round((right - left) * self.mpp[0] / mpp))
        height = max(1, round((bottom - top) * self.mpp[1] / mpp))
        rgb = np.full((height, width, 3), 255, np.uint8)
        readable = np.ones((height, width), np.bool_)
        step = ((right - left) / width, (bottom - top) / height)
        blocks = [
            (x, y, min(x + _OVERVIEW_BLOCK_PX, width), min(y + _OVERVIEW_BLOCK_PX, height))
            for y in range(0, height, _OVERVIEW_BLOCK_PX)
            for x in range(0, width, _OVERVIEW_BLOCK_PX)
        ]
        while blocks:
            x0, y0, x1, y1 = blocks.pop()
            box = (
                left + x0 * step[0],
                top + y0 * step[1],
                left + x1 * step[0],
                top + y1 * step[1],
            )
            try:
                block = self._resample(level, box, (x1 - x0, y1 - y0), holes_are_white=True)
            except RegionError:
                if max(x1 - x0, y1 - y0) <= _SMALLEST_BLOCK_PX:
                    readable[y0:y1, x0:x1] = False
                else:
                    blocks += _quarters(x0, y0, x1, y1)
                continue
            rgb[y0:y1, x0:x1] = block
        return rgb, readable

    def _level_mpp(self, level: Level) -> float:
        return max(m * d for m, d in zip(self.mpp, level.downsample, strict=True))

    def _bounds_box(self) -> Box:
        x, y, width, height = self.bounds_px
        return (x, y, x + width, y + height)

    def _resample(
        self, level: Level, box0: Box, size: tuple[int, int], *, holes_are_white: bool
    ) -> NDArray[np.uint8]:
        """The level-0 rectangle `box0` as RGB of `size`, averaged over the pixels of `level`."""
        dx, dy = level.downsample
        box = (box0[0] / dx, box0[1] / dy, box0[2] / dx, box0[3] / dy)
        x, y = round(box[0]), round(box[1])
        whole = (x, y, x + size[0], y + size[1])
        if max(abs(a - b) for a, b in zip(box, whole, strict=True)) < _WHOLE_PX:
            return self._read(level, x, y, *size, holes_are_white)[0]
        step = ((box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1])
        x0, x1 = self._span(level, 0, box[0], box[2])
        x_edges = box[0] + step[0] * np.arange(size[0] + 1, dtype=np.float64)
        rows = max(1, int(_STRIP_PX / (x1 - x0) / step[1]))
        parts = []
        for first in range(0, size[1], rows):
            last = min(first + rows, size[1])
            y_edges = box[1] + step[1] * np.arange(first, last + 1, dtype=np.float64)
            y0, y1 = self._span(level, 1, y_edges[0], y_edges[-1])
            strip, (left, top) = self._read(level, x0, y0, x1 - x0, y1 - y0, holes_are_white)
            columns, rows_at = _inside(x_edges - left, x1 - x0), _inside(y_edges - top, y1 - y0)
            parts.append(area_mean(strip, columns, rows_at))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _span(self, level: Level, axis: int, low: float, high: float) -> tuple[int, int]:
        """The level pixels to read for [low, high): one more where locations are not exact."""
        first, end = math.floor(low + _WHOLE_PX), math.ceil(high - _WHOLE_PX)
        if level.openslide_downsample % 1:
            first, end = first - 1, end + 1
        edge, downsample = self._bounds_box(), level.downsample[axis]
        last = min(math.ceil(edge[axis + 2] / downsample), level.size_px[axis])
        return max(first, math.floor(edge[axis] / downsample)), min(end, last)

    def _read(
        self, level: Level, x: int, y: int, width: int, height: int, holes_are_white: bool
    ) -> tuple[NDArray[np.uint8], tuple[float, float]]:
        """Level pixels [x, x + width) × [y, y + height) as RGB, and where they really begin."""
        pixels = self._coded_tiles().pixels(level, (x, y, width, height))
        if pixels is not None:
            return pixels, (x, y)
        begin = tuple(_location(side, level) / level.openslide_downsample for side in (x, y))
        pixels = self._read_openslide(level, x, y, width, height, holes_are_white)
        return pixels, (begin[0], begin[1])

    def _coded_tiles(self) -> CodedTiles:
        if self._coded is None:
            cache = self._cache or DecodedTiles()
            self._coded = CodedTiles(self.path, self.levels, self._openslide_pixels, cache)
        return self._coded

    def _openslide_pixels(
        self, level: Level, place: tuple[int, int, int, int]
    ) -> NDArray[np.uint8] | None:
        try:
            return self._read_openslide(level, *place, holes_are_white=False)
        except RegionError:
            return None

    def _read_openslide(
        self, level: Level, x: int, y: int, width: int, height: int, holes_are_white: bool
    ) -> NDArray[np.uint8]:
        location = (_location(x, level), _location(y, level))
        try:
            region: Image.Image = self._handle.read_region(location, level.index, (width, height))
        except openslide.OpenSlideError as error:
            # After an error OpenSlide refuses every further call.
            broken, self._handle = self._handle, _open(self.path)
            broken.close()
            raise RegionError(f"not decodable: {_one_line(error, self.path)}") from error
        if np.asarray(region.getchannel("A")).min() < _HOLE_ALPHA:
            if not holes_are_white:
                raise RegionError("touches an area that was never scanned (transparent)")
            white = Image.new("RGBA", region.size, (255, 255, 255, 255))
            region = Image.alpha_composite(white, region)
        return np.asarray(region.convert("RGB"))


def _location(position: int, level: Level) -> int:
    """The whole level-0 position nearest to a level pixel: the only kind OpenSlide takes.

    Where a pyramid's factor is not whole (2.0002, from an odd width) that is off by up to half a
    level-0 pixel; OpenSlide then interpolates. The caller corrects for where it really read.
    """
    return round(position * level.openslide_downsample)


def _inside(edges: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Ascending edges shifted (by less than a pixel, at a border) into [0, size]."""
    shift = min(max(0.0, -edges[0]), 1.0) - min(max(0.0, edges[-1] - size), 1.0)
    shifted: NDArray[np.float64] = np.clip(edges + shift, 0.0, size)
    return shifted


def _quarters(x0: int, y0: int, x1: int, y1: int) -> list[tuple[int, int, int, int]]:
    xm, ym = (x0 + x1 + 1) // 2, (y0 + y1 + 1) // 2
    quarters = [(x0, y0, xm, ym), (xm, y0, x1, ym), (x0, ym, xm, y1), (xm, ym, x1, y1)]
    return [q for q in quarters if q[0] < q[2] and q[1] < q[3]]


def _open(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix in ONLY_FASTSLIDE:
        return FastSlideHandle(path)
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        if suffix in ALSO_FASTSLIDE and find_spec("fastslide") is not None:
            return FastSlideHandle(path)
        raise SlideError(
            Status.UNREADABLE, "not a slide format that OpenSlide reads, or cut off"
        ) from error
    except openslide.OpenSlideError as error:
        raise SlideError(Status.UNREADABLE, f"not readable: {_one_line(error, path)}") from error


def _one_line(error: Exception, path: Path) -> str:
    return " ".join(str(error).replace(str(path), "the file").split())
