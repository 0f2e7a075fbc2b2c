"""The JPEG tiles that a TIFF slide is made of, from the file itself: several times as quick.

Only for what gives exactly OpenSlide's pixels, which is tried on tiles of each level before it is
used; whatever is odd about a tile is left to OpenSlide to read or to refuse.
"""

import contextlib
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from eosin.data_curation.image_metadata import without_metadata
from eosin.data_curation.slide_metadata import Level

RGB = NDArray[np.uint8]
Key = tuple[object, int, int]
Place = tuple[int, int, int, int]
"""Left, top, width, height, in pixels of a level."""

MAX_CODED_BYTES = 1 << 26
"""Of one tile in the file."""
_JPEG, _YCBCR, _AS_RGB = 7, 6, 2  # of TIFF's tags Compression and PhotometricInterpretation
_ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
"""Says that the three components are red, green and blue, where a decoder would take YCbCr."""
_END_OF_IMAGE = b"\xff\xd9"
_PROBES = 2
_CLOSE = 12.0  # grey values, on average: half a pixel's shift of sharp tissue is less
_CACHE_MB = 8


class DecodedTiles:
    """The tiles that were decoded last, up to so many MB."""

    def __init__(self, max_mb: int = _CACHE_MB) -> None:
        self._left = max_mb * 1_000_000
        self._tiles: OrderedDict[Key, RGB] = OrderedDict()

    def get(self, key: Key) -> RGB | None:
        """The tile, or None."""
        found = self._tiles.get(key)
        if found is not None:
            self._tiles.move_to_end(key)
        return found

    def put(self, key: Key, pixels: RGB) -> None:
        """Keeps a tile, and drops those that were not asked for the longest."""
        self._tiles[key] = pixels
        self._left -= pixels.nbytes
        while self._left < 0:
            self._left += self._tiles.popitem(last=False)[1].nbytes


@dataclass(frozen=True, eq=False)
class _CodedLevel:
    """A level whose tiles are JPEGs."""

    size_px: tuple[int, int]
    tile_px: tuple[int, int]
    columns: int
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    head: bytes
    """Of every tile, from the start of image on: tables, and what says which colours."""

    def inside(self, index: int) -> tuple[int, int, int, int]:
        """The place of a tile in the level, cut at its edges."""
        row, column = divmod(index, self.columns)
        x, y = column * self.tile_px[0], row * self.tile_px[1]
        return (
            x,
            y,
            min(self.tile_px[0], self.size_px[0] - x),
            min(self.tile_px[1], self.size_px[1] - y),
        )


class CodedTiles:
    """The coded tiles of one slide.

    Args:
        path: of the slide.
        levels: OpenSlide's; tiles are found for those that the file holds as they are.
        read: OpenSlide's pixels of a place in a level, or None: what ours must equal.
        cache: of decoded tiles; one may serve many slides.
    """

    def __init__(
        self,
        path: Path,
        levels: Sequence[Level],
        read: Callable[[Level, Place], RGB | None],
        cache: DecodedTiles,
    ) -> None:
        self._read_openslide, self._cache = read, cache
        self._slide = object()  # in the cache, where tiles of others are too
        self._known: dict[int, _CodedLevel | None] = {}
        self._coded = _coded_levels(path, levels)
        self._file: int | None = None
        if self._coded:
            with contextlib.suppress(OSError):  # without it there are no bytes: OpenSlide reads
                self._file = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def pixels(self, level: Level, place: Place, shrink: int = 1) -> RGB | None:
        """RGB [height, width, 3] of a place, or None where OpenSlide must read it.

        With `shrink` 2, 4 or 8 all is in pixels so many times larger, which the JPEG decoder makes
        of its coefficients: almost their mean, in less time. None too where tiles do not divide.
        """
        coded = self._of(level)
        x, y, width, height = place
        if coded is None or x < 0 or y < 0 or any(side % shrink for side in coded.tile_px):
            return None
        if x + width > coded.size_px[0] // shrink or y + height > coded.size_px[1] // shrink:
            return None
        tile_w, tile_h = coded.tile_px[0] // shrink, coded.tile_px[1] // shrink
        columns = range(x // tile_w, -(-(x + width) // tile_w))
        rows = range(y // tile_h, -(-(y + height) // tile_h))
        if (width, height) == (tile_w, tile_h) and len(columns) == len(rows) == 1:
            return self._decode(coded, rows[0] * coded.columns + columns[0], shrink)
        out = np.empty((height, width, 3), np.uint8)
        for row in rows:
            for column in columns:
                tile = self._decoded(level.index, coded, row * coded.columns + column, shrink)
                if tile is None:
                    return None
                left, top = column * tile_w - x, row * tile_h - y
                x0, y0 = max(0, left), max(0, top)
                x1, y1 = min(width, left + tile_w), min(height, top + tile_h)
                out[y0:y1, x0:x1] = tile[y0 - top : y1 - top, x0 - left : x1 - left]
        return out

    def jpeg(self, level: Level, place: Place) -> bytes | None:
        """The file's own JPEG of a place, where it is exactly one coded tile; None elsewhere.

        It is a whole JPEG file without metadata, of the right size. It is not decoded here: whoever
        has read the place before knows that it can be.
        """
        coded = self._of(level)
        if coded is None:
            return None
        x, y, width, height = place
        if (width, height) != coded.tile_px or x % width or y % height:
            return None
        if x + width > coded.size_px[0] or y + height > coded.size_px[1] or x < 0 or y < 0:
            return None
        data = self._bytes(coded, y // height * coded.columns + x // width)
        if data is None or not _is_whole(data, coded.tile_px):
            return None
        plain = without_metadata(data, "jpg")
        return plain if plain.endswith(_END_OF_IMAGE) else None

    def _of(self, level: Level) -> _CodedLevel | None:
        """The level, once some of its tiles have given OpenSlide's pixels."""
        if level.index not in self._known:
            coded = self._coded.get(level.index)
            same = coded is not None and self._same(level, coded)
            self._known[level.index] = coded if same else None
        return self._known[level.index]

    def _same(self, level: Level, coded: _CodedLevel) -> bool:
        """Whether some tiles are OpenSlide's.

        Where the level's factor is not whole (2.0002), OpenSlide gives a level's own pixels from
        its corner alone, and interpolates between them elsewhere: there they must only be close.
        """
        exact = level.openslide_downsample % 1 == 0
        present = np.flatnonzero(coded.counts > 0)
        probes = present[np.linspace(0, len(present) - 1, _PROBES + 2).astype(int)[1:-1]]
        for index in probes if exact else [0, *probes]:
            place = coded.inside(int(index))
            theirs, ours = self._read_openslide(level, place), self._decode(coded, int(index))
            if theirs is None or ours is None:
                return False
            apart = np.abs(theirs.astype(np.int16) - ours[: place[3], : place[2]])
            if apart.mean() > (0 if exact or index == 0 else _CLOSE):
                return False
        return len(present) > 0

    def _decoded(self, level: int, coded: _CodedLevel, index: int, shrink: int) -> RGB | None:
        key = (self._slide, level * 16 + shrink, index)
        found = self._cache.get(key)
        if found is None:
            found = self._decode(coded, index, shrink)
            if found is not None:
                self._cache.put(key, found)
        return found

    def _decode(self, coded: _CodedLevel, index: int, shrink: int = 1) -> RGB | None:
        data = self._bytes(coded, index)
        if data is None:
            return None
        try:
            if not _is_whole(data, coded.tile_px):
                return None
            width, height = coded.tile_px
            pixels: RGB = simplejpeg.decode_jpeg(
                data,
                "RGB",
                strict=True,
                min_width=width // shrink,
                min_height=height // shrink,
                min_factor=shrink,
            )
        except ValueError:
            return None
        return pixels

    def _bytes(self, coded: _CodedLevel, index: int) -> bytes | None:
        """A tile as a whole JPEG file."""
        offset, count = int(coded.offsets[index]), int(coded.counts[index])
        if self._file is None or offset < 8 or not 4 < count <= MAX_CODED_BYTES:
            return None
        try:
            data = os.pread(self._file, count, offset)
        except OSError:
            return None
        if len(data) < count or data[:2] != b"\xff\xd8":
            return None
        return data[:2] + coded.head + data[2:] if coded.head else data


def _is_whole(data: bytes, tile_px: tuple[int, int]) -> bool:
    """Whether the JPEG's header is sound and says the size that a tile has."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return False
    return (width, height) == tile_px and colours not in ("CMYK", "YCCK")


def _coded_levels(path: Path, levels: Sequence[Level]) -> dict[int, _CodedLevel]:
    """By index, the levels that the file holds as one picture of JPEG tiles each."""
    import tifffile  # takes 0.15 s, and whoever opens no slide should not wait

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    found: dict[int, _CodedLevel] = {}
    try:
        with tifffile.TiffFile(path) as tiff:
            for page in tiff.pages:
                page = page.aspage()
                for level in levels:
                    size_px = (page.imagewidth, page.imagelength)
                    if level.index not in found and size_px == level.size_px and _serves(page):
                        found[level.index] = _coded_level(page)
                        break
    except Exception:  # no TIFF, or one that tifffile cannot parse: OpenSlide reads it
        return {}
    return found


def _serves(page: Any) -> bool:
    return bool(
        page.is_tiled
        and page.compression == _JPEG
        and page.photometric in (_YCBCR, _AS_RGB)
        and page.bitspersample == 8
        and page.samplesperpixel == 3
        and page.planarconfig == 1
        and page.imagedepth == 1
        and min(page.tilewidth, page.tilelength) > 0
    )


def _coded_level(page: Any) -> _CodedLevel:
    tables = page.jpegtables or b""
    head = tables[2:-2] if tables else b""
    if page.photometric == _AS_RGB:
        head = _ADOBE_RGB + head
    columns = -(-page.imagewidth // page.tilewidth)
    needed = columns * -(-page.imagelength // page.tilelength)
    offsets, counts = (
        np.array(values, np.int64) for values in (page.dataoffsets, page.databytecounts)
    )
    if min(len(offsets), len(counts)) < needed:
        raise ValueError("fewer tiles than the size needs")
    return _CodedLevel(
        size_px=(page.imagewidth, page.imagelength),
        tile_px=(page.tilewidth, page.tilelength),
        columns=columns,
        offsets=offsets,
        counts=counts,
        head=head,
    )
