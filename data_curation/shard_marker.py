"""What a finished folder of shards says of itself: its marker, its sidecars, their digest."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eosin.configs.errors import InputError
from eosin.launch.artefacts import SCHEMA_VERSION, stamp_of

INDEX_NAME = "index.parquet"
FAILED_NAME = "failed.parquet"
MARKER_NAME = "shards.json"
PARTS_NAME = "parts"
SHARD_NAME = re.compile(r"[0-9]{6}\.(tar|slides)")
"""A tar; or ``.slides``, no file at all: its records point into slides."""
POINTING = ".slides"
"""How the name of a shard ends whose records point into slides."""

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
_DIGEST = re.compile(r"[0-9a-f]{32}")
_DAMAGED = "{} is damaged; run the same 'eosin shard' again"


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
    return parse_marker(path.read_bytes(), str(path))


def parse_marker(text: bytes, name: str) -> dict[str, Any]:
    """The marker in `text`, read from the file `name`.

    Raises:
        InputError: it is of a newer version, damaged, or names shards as none are named.
    """
    marker = _parse_object(text, name)
    version = marker["schema_version"]
    if version > SCHEMA_VERSION:
        raise InputError(f"{name} was written by a newer eosin (schema_version {version})")
    if not (_has(marker, _MARKER) and _DIGEST.fullmatch(marker["index_xxh3_128"])):
        raise InputError(_DAMAGED.format(name))
    if not all(SHARD_NAME.fullmatch(shard) for shard in marker["shards"]):
        raise InputError(f"{name} names shards that are not of the form 000000.tar")
    if not all(_is_described(described) for described in marker["shards"].values()):
        raise InputError(_DAMAGED.format(name))
    return marker


def read_sidecar(path: Path) -> dict[str, Any]:
    """What was written of one shard: `DESCRIBED`, its part's hash and its failures.

    Raises:
        FileNotFoundError: there is none.
        InputError: it is damaged.
    """
    if not path.is_file():  # a named pipe would never end
        raise FileNotFoundError(path)
    sidecar = _parse_object(path.read_bytes(), str(path))
    if not (_has(sidecar, _SIDECAR) and all(_has(row, _FAILED) for row in sidecar["failed"])):
        raise InputError(_DAMAGED.format(path))
    return sidecar


def digest_of(marker: Mapping[str, Any]) -> str:
    """XXH3-128 (hex) of the hashes of all shards: names the data that a run trained on."""
    described = marker["shards"]
    return stamp_of(shards={name: described[name]["xxh3_128"] for name in sorted(described)})


def index_digest(shards: Path) -> str:
    """`digest_of` the marker of a folder.

    Raises:
        InputError: the shards were not finished.
    """
    return digest_of(read_marker(shards))


def _is_described(described: object) -> bool:
    if not (isinstance(described, dict) and _has(described, DESCRIBED)):
        return False
    if not (0 <= described["count"] < 1 << 31 and 0 <= described["bytes"] < 1 << 62):
        return False
    return _DIGEST.fullmatch(described["xxh3_128"]) is not None


def _parse_object(text: bytes, name: str) -> dict[str, Any]:
    """The JSON object in `text`, which has a ``schema_version``."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # neither JSON nor UTF-8, or nested without end
        raise InputError(_DAMAGED.format(name)) from error
    if not _has(value, {"schema_version": int}):
        raise InputError(_DAMAGED.format(name))
    return dict(value)


def _has(value: object, types: Mapping[str, type]) -> bool:
    """Whether `value` is a JSON object with all these keys, each of its type."""
    if not isinstance(value, dict):
        return False
    return all(type(value.get(key)) is kind for key, kind in types.items())
