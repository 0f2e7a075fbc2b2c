"""Tiles read from slides in any order: a bounded number of slides stay open between reads.

Records of an index that was written with ``pixels=slides`` hold a tile's place and not its bytes;
this reads what they point at.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import openslide
from numpy.typing import NDArray

from eosin.data_curation.coded_tiles import DecodedTiles
from eosin.data_curation.manifest import Status
from eosin.data_curation.records import file_identity
from eosin.data_curation.slide import MAX_UPSAMPLE, RegionError, Slide
from eosin.data_curation.slide_metadata import SlideError

_CACHE_MB = 64  # of decoded pixels, one cache for all slides; OpenSlide's own is 32 MB a slide


_NUMBERS = ("source_mpp_x", "source_mpp_y", "requested_mpp", "level0_x", "level0_y")


class _Source(NamedTuple):
    """What a slide is opened by."""

    path: str
    identity: str
    mpp_x: float
    mpp_y: float


class SlidePool:
    """Open slides, the least recently used closed first.

    For one thread: give each its own pool. Cheap to send to another process, where slides are
    opened anew; do not carry an open one through a fork.

    Args:
        max_open: slides held open at most.
        cache_mb: decoded pixels held for all of them together, MB.
    """

    def __init__(self, max_open: int = 64, cache_mb: int = _CACHE_MB) -> None:
        if max_open < 1:
            raise ValueError(f"max_open must be 1 or more, not {max_open}")
        self.max_open, self.cache_mb = max_open, cache_mb
        self._open: OrderedDict[_Source, _CachedSlide] = OrderedDict()
        self._cache = openslide.OpenSlideCache(cache_mb * 1_000_000)
        self._decoded = DecodedTiles(cache_mb)

    def __reduce__(self) -> tuple[type[Self], tuple[int, int]]:
        return type(self), (self.max_open, self.cache_mb)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, row: Mapping[str, Any]) -> NDArray[np.uint8]:
        """The tile that `row` points at: RGB, uint8 [size_px, size_px, 3], as `Slide.read_tile`.

        The file's size and time are compared when it is opened, not at every read. After an error
        the pool serves other tiles, of the same slide too.

        Args:
            row: the columns of `manifest.REFERENCE`.

        Raises:
            SlideError: the slide is missing, not the file that was indexed, or cannot be opened;
                the message names it.
            RegionError: the tile cannot be decoded, or was never scanned.
        """
        source = _Source(*(row[f"source_{name}"] for name in _Source._fields))
        place = [row[name] for name in _NUMBERS]
        if not all(map(math.isfinite, place)) or min(place[:3]) <= 0 or row["size_px"] < 1:
            raise RegionError(f"{row['source_path']}: no tile has such a place: {place}")
        slide = self._slide(source)
        try:
            return slide.read_tile(
                row["level0_x"], row["level0_y"], row["size_px"], row["requested_mpp"]
            )
        except RegionError as error:
            slide.use(self._cache)  # it was opened again
            raise RegionError(f"{source.path}: {error}") from error
        except SlideError as error:
            del self._open[source]  # not closed: it may be so already
            raise SlideError(error.status, f"{source.path}: {error.reason}") from error

    def close(self) -> None:
        """Closes all slides; a later read opens them again."""
        while self._open:
            self._open.popitem()[1].close()

    def _slide(self, source: _Source) -> "_CachedSlide":
        if source in self._open:
            self._open.move_to_end(source)
            return self._open[source]
        check_identity(source.path, source.identity)
        while len(self._open) >= self.max_open:
            self._open.popitem(last=False)[1].close()
        try:
            mpp = (source.mpp_x, source.mpp_y)
            slide = _CachedSlide(Path(source.path), mpp, self._decoded, max_upsample=MAX_UPSAMPLE)
        except SlideError as error:
            raise SlideError(error.status, f"{source.path}: {error.reason}") from error
        slide.use(self._cache)
        self._open[source] = slide
        return slide


class _CachedSlide(Slide):
    """A slide that shares its cache of decoded pixels with others."""

    def use(self, cache: openslide.OpenSlideCache) -> None:
        """Keeps decoded pixels in `cache` from now on."""
        self._handle.set_cache(cache)


def check_identity(path: str, identity: str) -> None:
    """Raises SlideError where the file is gone, or not of the size and time that were indexed."""
    found = file_identity(Path(path))
    if not found:
        raise SlideError(
            Status.UNREADABLE, f"{path} is missing; bring it back, or run 'eosin shard' again"
        )
    if found != identity:
        raise SlideError(
            Status.UNREADABLE,
            f"{path} changed since the index was made (size:time {found}, was {identity}); "
            "run the same 'eosin shard' again, or restore it with its time",
        )
