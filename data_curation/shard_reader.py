"""Reading shards by position: one `pread` a record, checked against its checksum.

`eosin.data_curation.shards` writes the folder that is read here; `shard_index` says where a record
lies, `shard_store` where the shards are.
"""

import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from eosin.configs.errors import EosinError, printable
from eosin.data_curation.codec import MAX_BYTES, ImageError, decode_image, reduce_pixels
from eosin.data_curation.shard_cache import CacheConfig
from eosin.data_curation.shard_index import CACHE_MB, Place, ShardIndex
from eosin.data_curation.shard_store import open_store
from eosin.data_curation.slide import RegionError
from eosin.data_curation.slide_metadata import SlideError
from eosin.data_curation.slide_pool import SlidePool

RETRY_WAITS_S = (0.5, 2.0)
"""Before each further attempt to read a shard or slide that cannot be read: a network that is away
for a moment damages no record."""

_LONGEST_PATH = 4096  # of Linux


class RecordError(EosinError):
    """A record that is not what the index says; names shard and key."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Payload(NamedTuple):
    """What was read of a record, checked and not yet decoded."""

    place: Place
    data: bytes
    """The encoded image; empty where there are pixels."""
    pixels: NDArray[np.uint8] | None
    """RGB [H, W, 3] of a record that points into a slide."""


def open_index(shards: Path) -> pa.Table:
    """The whole index of a local folder, after a check that every shard is there in its full size.

    Raises:
        InputError: see `ShardReader`.
    """
    return ShardIndex(open_store(shards)).table()


def read_record(descriptor: int, offset: int, size: int) -> bytes:
    """`size` bytes at `offset` of an open file; fewer where the file ends before."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size:  # seldom: some network file systems give less than is there
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


class ShardReader:
    """Random access to the records of a folder of shards.

    Cheap to send to another process (it is opened anew there) and safe to use after a fork, since
    reads carry their position. `fetch` and `decode` may be called from several threads at once,
    the rest from one.

    Args:
        shards: the folder, or its URL.
        cache: where shards of a URL are kept.
        max_open: tars, and slides of a thread, that are held open at most.
        index_cache_mb: see `shard_index.CACHE_MB`.

    Raises:
        InputError: the shards were not finished, one is missing or of another size than was
            written, or the index is not theirs.
        ConfigError: see `shard_store.open_store`.
    """

    def __init__(
        self,
        shards: str | Path,
        cache: CacheConfig | None = None,
        max_open: int = 64,
        index_cache_mb: float = CACHE_MB,
    ) -> None:
        index = ShardIndex(open_store(shards, cache), index_cache_mb)
        self._set_up(shards, cache, max_open, index)

    def _set_up(
        self, shards: str | Path, cache: CacheConfig | None, max_open: int, index: ShardIndex
    ) -> None:
        self.shards, self.cache, self.max_open, self.index = shards, cache, max_open, index
        self.digest = index.digest
        """See `shard_marker.digest_of`."""
        self._tars = _OpenFiles(index, max_open)
        self._slides = threading.local()

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (type(self), self.shards, self.cache, self.max_open, self.index)

    def __len__(self) -> int:
        return len(self.index)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, row: int) -> bytes:
        """The encoded image of the record in `row`.

        Raises:
            RecordError: the bytes do not have the index's checksum, or the disk cannot read them;
                or the record points into a slide.
            EosinError: the shard cannot be fetched or opened.
        """
        place = self.index.locate(row)
        if place.reference is not None:
            raise RecordError(f"{self.where(place)}: it points into a slide and has no bytes")
        return self._read(place)

    def payload(self, row: int) -> Payload:
        """What `decode` needs of the record in `row`.

        Raises:
            RecordError: see `fetch`.
            EosinError: likewise.
        """
        return self.fetch(self.index.locate(row))

    def fetch(self, place: Place) -> Payload:
        """What `decode` needs of the record at `place`, see `ShardIndex.locate`.

        Raises:
            RecordError: the bytes do not have the index's checksum, or the disk cannot read them;
                the slide that they are in is another, or unreadable there.
            EosinError: the shard cannot be fetched, or it or the slide cannot be opened.
        """
        if place.reference is not None:
            return Payload(place, b"", self._read_slide(place, place.reference))
        return Payload(place, self._read(place), None)

    def decode(
        self, payload: Payload, factor: int = 1, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """The pixels of `payload`: RGB, uint8 [ceil(H / factor), ceil(W / factor), 3].

        Args:
            payload: of `payload` or `fetch`.
            factor: see `codec.decode_image`.
            out: likewise.

        Raises:
            RecordError: the image does not decode, or is of another size than the index says.
        """
        place = payload.place
        try:
            if payload.pixels is not None:
                pixels = reduce_pixels(payload.pixels, factor, out)
            else:
                pixels = decode_image(payload.data, place.suffix, factor, out)
        except ImageError as error:
            raise RecordError(f"{self.where(place)}: {error}") from error
        expected = (-(-place.height_px // factor), -(-place.width_px // factor))
        if pixels.shape[:2] != expected:
            raise RecordError(
                f"{self.where(place)}: {pixels.shape[1]}×{pixels.shape[0]} pixels where the index "
                f"says {expected[1]}×{expected[0]}"
            )
        return pixels

    def image(self, row: int, factor: int = 1) -> NDArray[np.uint8]:
        """The decoded record in `row`: RGB, uint8 [H, W, 3].

        Raises:
            RecordError: see `fetch` and `decode`.
            EosinError: see `fetch`.
        """
        return self.decode(self.payload(row), factor)

    def where(self, place: Place) -> str:
        """The record, as messages name it."""
        shard = self.index.store.where(self.index.names[place.shard])
        return f"{shard}, record '{self.index.key(place.row)}'"

    def close(self) -> None:
        """Closes all tars and this thread's slides; a later read opens them again."""
        self._tars.close()
        self.close_slides()

    def close_slides(self) -> None:
        """Closes the slides that the calling thread holds open."""
        pool = self._slides.__dict__.pop("pool", None)
        if pool is not None:
            pool.close()

    def _read(self, place: Place) -> bytes:
        offset, size = place.offset, place.size
        end = self.index.shard_bytes(place.shard)
        if not (0 <= offset <= offset + size <= end and size <= MAX_BYTES):
            raise RecordError(f"{self.where(place)}: the shard ends within the record")
        try:
            return self._read_checked(place)
        except RecordError:
            if not self.index.store.discard(self.index.names[place.shard]):
                raise
        self._tars.drop(place.shard)
        return self._read_checked(place)

    def _read_checked(self, place: Place) -> bytes:
        data = self._read_bytes(place)
        if len(data) != place.size:
            raise RecordError(f"{self.where(place)}: the shard ends within the record")
        if xxhash.xxh3_128_digest(data) != place.checksum:
            raise RecordError(f"{self.where(place)}: checksum mismatch, the record is damaged")
        return data

    def _read_bytes(self, place: Place) -> bytes:
        """What is read at the place of a record, after another attempt or two where it fails."""
        waits_s = iter(RETRY_WAITS_S)
        while True:
            try:
                tar = self._tars.get(place.shard)  # held, or another thread may close it meanwhile
                return read_record(tar.number, place.offset, place.size)
            except OSError as error:
                self._tars.drop(place.shard)  # its server may know it no longer
                wait_s = next(waits_s, None)
                if wait_s is None and error.errno == errno.EIO:  # a bad sector
                    raise RecordError(f"{self.where(place)}: {error.strerror}") from error
                if wait_s is None:
                    shard = self.index.store.where(self.index.names[place.shard])
                    raise _unreadable(shard, str(error.strerror)) from error
            time.sleep(wait_s)

    def _read_slide(self, place: Place, reference: Mapping[str, Any]) -> NDArray[np.uint8]:
        slides: dict[str, SlidePool] = self._slides.__dict__  # of this thread
        if "pool" not in slides:
            slides["pool"] = SlidePool(self.max_open)
        path, waits_s = reference["source_path"], iter(RETRY_WAITS_S)
        while True:
            try:
                return slides["pool"].read(reference)
            except (RegionError, SlideError, OSError) as error:
                if not _may_come_back(path):
                    raise RecordError(f"{self.where(place)}: {error}") from error
                wait_s = next(waits_s, None)
                if wait_s is None:
                    raise _unreadable(path, str(error)) from error
            time.sleep(wait_s)


def _may_come_back(path: str) -> bool:
    """Whether nothing can be opened at `path` now, but another time: no record is damaged."""
    try:
        return not os.access(path, os.R_OK) and len(path) < _LONGEST_PATH
    except ValueError:  # a zero in the name: no file is ever there
        return False


def _unreadable(what: str, reason: str) -> EosinError:
    n_tries = 1 + len(RETRY_WAITS_S)
    return EosinError(printable(f"{what} cannot be read ({n_tries} attempts): {reason}"))


class _OpenFile:
    """An open tar; closed when the last one that holds it lets go."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class _OpenFiles:
    """At most `max_open` open tars of a store; a thread that still reads one keeps it open."""

    def __init__(self, index: ShardIndex, max_open: int) -> None:
        self._index, self._max_open = index, max_open
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, shard: int) -> _OpenFile:
        """The open tar of a shard."""
        with self._lock:
            file = self._open.get(shard)
            if file is not None:
                self._open.move_to_end(shard)
                return file
        # Outside of the lock: the store may have to fetch it first. Two threads may both open it.
        file = _OpenFile(self._index.store.open(self._index.names[shard]))
        with self._lock:
            self._open[shard] = file
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
        return file

    def drop(self, shard: int) -> None:
        """Lets go of a shard's tar: the next `get` opens it anew."""
        with self._lock:
            self._open.pop(shard, None)

    def close(self) -> None:
        """Lets go of all."""
        with self._lock:
            self._open.clear()


def _reopen(
    kind: type[ShardReader],
    shards: str | Path,
    cache: CacheConfig | None,
    max_open: int,
    index: ShardIndex,
) -> ShardReader:
    reader = kind.__new__(kind)
    reader._set_up(shards, cache, max_open, index)
    return reader
