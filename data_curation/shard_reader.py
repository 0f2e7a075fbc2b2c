"""Reading shards by position: one `pread` a record, checked against its checksum.

`eosin.data_curation.shards` writes the folder that is read here; `shard_index` says where a record
lies, `shard_store` where the shards are.
"""

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from eosin.configs.errors import EosinError, printable
from eosin.data_curation.codec import MAX_BYTES, ImageError, decode_image, reduce_pixels
from eosin.data_curation.shard_cache import CacheConfig
from eosin.data_curation.shard_index import Place, ShardIndex
from eosin.data_curation.shard_store import open_store
from eosin.data_curation.slide import RegionError
from eosin.data_curation.slide_metadata import SlideError
from eosin.data_curation.slide_pool import SlidePool


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
    return os.pread(descriptor, size, offset)


class ShardReader:
    """Random access to the records of a folder of shards.

    Cheap to send to another process (it is opened anew there) and safe to use after a fork, since
    reads carry their position. `fetch` and `decode` may be called from several threads at once,
    the rest from one.

    Args:
        shards: the folder, or its URL.
        cache: where shards of a URL are kept.
        max_open: tars, and slides of a thread, that are held open at most.

    Raises:
        InputError: the shards were not finished, one is missing or of another size than was
            written, or the index is not theirs.
        ConfigError: see `shard_store.open_store`.
    """

    def __init__(
        self, shards: str | Path, cache: CacheConfig | None = None, max_open: int = 64
    ) -> None:
        self._set_up(shards, cache, max_open, ShardIndex(open_store(shards, cache)))

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
            RecordError: the bytes do not have the index's checksum, or cannot be read; or the
                record points into a slide.
        """
        place = self.index.locate(row)
        if place.reference is not None:
            raise RecordError(f"{self.where(place)}: it points into a slide and has no bytes")
        return self._read(place)

    def payload(self, row: int) -> Payload:
        """What `decode` needs of the record in `row`.

        Raises:
            RecordError: see `fetch`.
        """
        return self.fetch(self.index.locate(row))

    def fetch(self, place: Place) -> Payload:
        """What `decode` needs of the record at `place`, see `ShardIndex.locate`.

        Raises:
            RecordError: the bytes do not have the index's checksum, or cannot be read; the slide
                that they are in is gone, another, or unreadable there.
            EosinError: the shard cannot be fetched.
        """
        if place.reference is not None:
            return Payload(place, b"", self._read_slide(place))
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
            tar = self._tars.get(place.shard)  # held, or another thread may close it meanwhile
            data = read_record(tar.number, offset, size)
        except OSError as error:
            raise RecordError(f"{self.where(place)}: {error.strerror}") from error
        if len(data) != size:
            raise RecordError(f"{self.where(place)}: the shard ends within the record")
        if xxhash.xxh3_128_digest(data) != place.checksum:
            raise RecordError(f"{self.where(place)}: checksum mismatch, the record is damaged")
        return data

    def _read_slide(self, place: Place) -> NDArray[np.uint8]:
        if place.reference is None:
            raise RecordError(f"{self.where(place)}: the index does not say which slide it is of")
        slides: dict[str, SlidePool] = self._slides.__dict__  # of this thread
        if "pool" not in slides:
            slides["pool"] = SlidePool(self.max_open)
        try:
            return slides["pool"].read(place.reference)
        except (RegionError, SlideError) as error:
            raise RecordError(f"{self.where(place)}: {error}") from error


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
