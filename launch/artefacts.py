"""Artefacts on disk: written beside and renamed, stamped, and remade only when an input changed.

A stage ends by writing a marker (`mark_done`) that holds the stamp of everything the stage depends
on; the stage is done when its marker exists and holds the stamp it would get today (`is_done`).
Temporary names are fixed (``.NAME.partial``), so a rerun after a kill leaves nothing behind.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from eosin.configs.errors import InputError

SCHEMA_VERSION = 1
"""Version of the layout of every marker and table; readers of tables refuse a newer one."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and renamed onto `path`.

    On any exception the temporary file is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        _name(error, path)
        raise


@contextmanager
def replacing_folder(path: Path, known_by: str) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success its files are synced and it takes over.

    Args:
        path: the folder. One that is there is replaced if it is empty or holds `known_by`.
        known_by: name of a file by which such a folder is told from anything else.

    Raises:
        InputError: `path` is a file, or a folder of something else.
    """
    path = path.resolve()
    ours = (path / known_by).is_file()
    if path.exists() and not ours and (not path.is_dir() or any(path.iterdir())):
        raise InputError(
            f"{path} is not empty and holds no {known_by}: not replaced; give another out="
        )
    partial, old = (path.with_name(f".{path.name}.{word}") for word in ("partial", "old"))
    for leftover in (partial, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        _name(error, path)
        raise
    for file in partial.rglob("*"):
        if file.is_file():
            with file.open("rb+") as written:
                os.fsync(written.fileno())
    if path.exists():
        path.rename(old)
    partial.rename(path)
    if old.exists():
        shutil.rmtree(old)


def _name(error: BaseException, path: Path) -> None:
    """Says where: a write that finds the disk full does not."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `content` to `path` atomically."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8 to `path` atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON with sorted keys to `path` atomically."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in `path`."""
    return json.loads(path.read_text("utf-8"))


def stamp_of(**parts: Any) -> str:
    """XXH3-128 (hex) of the parts as canonical JSON: a stage's FORMAT, config subset and inputs."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def file_digest(path: Path) -> str:
    """XXH3-128 (hex) of a file's content."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()


def mark_done(marker: Path, stamp: str, **record: Any) -> None:
    """Writes the marker that ends a stage; write it last."""
    write_json(marker, {"schema_version": SCHEMA_VERSION, "stamp": stamp, **record})


def is_done(marker: Path, stamp: str) -> bool:
    """Whether the stage that `marker` ends was finished with exactly this stamp."""
    if not marker.is_file():
        return False
    try:
        value = read_json(marker)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
    return isinstance(value, dict) and value.get("stamp") == stamp
