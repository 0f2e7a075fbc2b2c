"""Reading shards by position: one `pread` a record, checked against its checksum.

`eosin.data_curation.shards` writes the folder that is read here.
"""

import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from eosin.configs.errors import EosinError, InputError
from eosin.data_curation.codec import ImageError, decode_image
from eosin.data_curation.manifest import INDEX, read_table
from eosin.launch.artefacts import SCHEMA_VERSION, file_digest, read_json, stamp_of

INDEX_NAME = "index.parquet"
FAILED_NAME = "failed.parquet"
MARKER_NAME = "shards.json"
PARTS_NAME = "parts"
SHARD_NAME = re.compile(r"\d{6}\.tar")

DESCRIBED = {"count": int, "bytes": int, "xxh3_128": str}
"""What the marker says of each shard, and the type that it has."""
_SIDECAR = {**DESCRIBED, "part_xxh3_128": str, "failed": list, "with_metadata": int}
_FAILED = dict.fromkeys(("key", "source", "status", "reason"), str)
_MARKER = {
    "stamp": str,
    "shards": dict,
    "failed": int,
    "with_metadata": int,
    "index_xxh3_128": str,
    "failed_xxh3_128": str,
}
_DAMAGED = "{} is damaged; run the same 'eosin shard' again"


class RecordError(EosinError):
    """A record that is not what the index says; names shard and key."""


def read_marker(shards: Path) -> dict[str, Any]:
    """The marker that ends the writing of `shards`.

    Its ``shards`` hold, by file name: ``count``, ``bytes`` and ``xxh3_128`` of each tar.

    Raises:
        InputError: there is none, or it is not readable, or of a newer version.
    """
    path = shards / MARKER_NAME
    if not path.is_file():
        why = "the folder does not exist" if not shards.is_dir() else f"it has no {MARKER_NAME}"
        raise InputError(f"{shards} holds no finished shards: {why}; run 'eosin shard' to the end")
    marker = _read_object(path)
    version = marker["schema_version"]
    if version > SCHEMA_VERSION:
        raise InputError(f"{path} was written by a newer eosin (schema_version {version})")
    if not (_has(marker, _MARKER) and all(_has(s, DESCRIBED) for s in marker["shards"].values())):
        raise InputError(_DAMAGED.format(path))
    if not all(SHARD_NAME.fullmatch(name) for name in marker["shards"]):
        raise InputError(f"{path} names shards that are not of the form 000000.tar")
    return marker


def read_sidecar(path: Path) -> dict[str, Any]:
    """What was written of one shard: `DESCRIBED`, its part's hash and its failures.

    Raises:
        FileNotFoundError: there is none.
        InputError: it is damaged.
    """
    sidecar = _read_object(path)
    if not (_has(sidecar, _SIDECAR) and all(_has(row, _FAILED) for row in sidecar["failed"])):
        raise InputError(_DAMAGED.format(path))
    return sidecar


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, which has a ``schema_version``."""
    try:
        value = read_json(path)
    except ValueError as error:  # neither JSON nor UTF-8
        raise InputError(_DAMAGED.format(path)) from error
    if not _has(value, {"schema_version": int}):
        raise InputError(_DAMAGED.format(path))
    return dict(value)


def _has(value: object, types: Mapping[str, type]) -> bool:
    """Whether `value` is a JSON object with all these keys, each of its type."""
    if not isinstance(value, dict):
        return False
    return all(type(value.get(key)) is kind for key, kind in types.items())


def index_digest(shards: Path) -> str:
    """XXH3-128 (hex) of the hashes of all shards: names the data that a run trained on.

    Raises:
        InputError: the shards were not finished.
    """
    described = read_marker(shards)["shards"]
    return stamp_of(shards={name: described[name]["xxh3_128"] for name in sorted(described)})


def open_index(shards: Path) -> pa.Table:
    """The index, after a check that every shard is there in its full size.

    It costs one `stat` a shard and a read of the index; `eosin shard verify` reads every byte.

    Raises:
        InputError: the shards were not finished, one is missing or of another size than its
            sidecar says, or the index is damaged.
    """
    marker = read_marker(shards)
    for name, described in marker["shards"].items():
        path = shards / name
        if not path.is_file():
            raise InputError(f"{path} is missing; run the same 'eosin shard' again to remake it")
        size = path.stat().st_size
        if size != described["bytes"]:
            raise InputError(
                f"{path} has {size} bytes where {described['bytes']} were written; "
                f"see 'eosin shard verify {shards}'"
            )
    index_path = shards / INDEX_NAME
    if index_path.is_file() and file_digest(index_path) != marker["index_xxh3_128"]:
        raise InputError(
            f"{index_path} is not what was written with these shards; remove it and run the same "
            "'eosin shard' again"
        )
    index = read_table(index_path, INDEX)
    strangers = set(pc.unique(index["shard"]).to_pylist()) - set(marker["shards"])
    if strangers:
        raise InputError(f"{index_path} names unknown shards: {', '.join(sorted(strangers)[:3])}")
    return index


def read_record(descriptor: int, offset: int, size: int) -> bytes:
    """`size` bytes at `offset` of an open file; fewer where the file ends before."""
    return os.pread(descriptor, size, offset)


class ShardReader:
    """Random access to the records of a folder of shards.

    Cheap to send to another process (it is opened anew there) and safe to use after a fork, since
    reads carry their position.

    Args:
        shards: the folder.
        max_open: tars that are held open at most.

    Raises:
        InputError: see `open_index`.
    """

    def __init__(self, shards: Path, max_open: int = 64) -> None:
        self.shards, self.max_open = shards, max_open
        self.index = open_index(shards)
        """One row a record, columns as in `manifest.INDEX` and the user's own behind."""
        self.digest = index_digest(shards)
        """See `index_digest`."""
        self._names = pc.unique(self.index["shard"]).to_pylist()
        codes = pc.index_in(self.index["shard"], pa.array(self._names, pa.string()))
        self._name_of_row: NDArray[np.int32] = codes.to_numpy()
        self._offset: NDArray[np.int64] = self.index["offset"].to_numpy()
        self._size: NDArray[np.int64] = self.index["size"].to_numpy()
        self._checksum = self.index["checksum"]
        self._suffix = self.index["suffix"]
        self._key = self.index["key"]
        self._open: OrderedDict[str, int] = OrderedDict()

    def __reduce__(self) -> tuple[type[Self], tuple[Path, int]]:
        return type(self), (self.shards, self.max_open)

    def __len__(self) -> int:
        return len(self._offset)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, row: int) -> bytes:
        """The encoded image of the record in `row`.

        Raises:
            RecordError: the bytes do not have the index's checksum, or cannot be read.
        """
        name = self._names[self._name_of_row[row]]
        size = int(self._size[row])
        try:
            data = read_record(self._descriptor(name), int(self._offset[row]), size)
        except OSError as error:
            raise RecordError(f"{self._where(row)}: {error.strerror}") from error
        if len(data) != size:
            raise RecordError(f"{self._where(row)}: the shard ends within the record")
        if xxhash.xxh3_128_hexdigest(data) != self._checksum[row].as_py():
            raise RecordError(f"{self._where(row)}: checksum mismatch, the record is damaged")
        return data

    def image(self, row: int) -> NDArray[np.uint8]:
        """The decoded record in `row`: RGB, uint8 [H, W, 3].

        Raises:
            RecordError: see `read`; or the image does not decode.
        """
        try:
            return decode_image(self.read(row), self._suffix[row].as_py())
        except ImageError as error:
            raise RecordError(f"{self._where(row)}: {error}") from error

    def close(self) -> None:
        """Closes all tars; a later read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, name: str) -> int:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        while len(self._open) >= self.max_open:
            os.close(self._open.popitem(last=False)[1])
        descriptor = os.open(self.shards / name, os.O_RDONLY)
        self._open[name] = descriptor
        return descriptor

    def _where(self, row: int) -> str:
        shard = self.shards / self._names[self._name_of_row[row]]
        return f"{shard}, record '{self._key[row].as_py()}'"
