"""Remote shards: fetched whole into a folder of this machine that all its processes share.

Files in the cache are named by the hash of their content, which is checked while they are fetched,
so that the cache can hold shards of many places, and never an outdated one.
"""

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import fsspec.core
import xxhash

from eosin.configs.errors import ConfigError, EosinError, InputError
from eosin.data_curation.shard_marker import INDEX_NAME, MARKER_NAME, POINTING, parse_marker
from eosin.launch.artefacts import file_digest

T = TypeVar("T")

TRIES = 3
"""Attempts to read a remote file before the run stops."""
FIRST_WAIT_S = 1.0
"""Before the second attempt; each further wait is four times as long."""

_CHUNK_BYTES = 8 << 20
_STALE_S = 3600.0  # a partial file that nobody has written to for this long belongs to nobody
_CACHED = re.compile(r"[0-9a-f]{32}\.tar")
_PARTIAL = re.compile(r"\.[0-9a-f]{32}\.(tar|parquet)\.partial")
_WRAPPERS = re.compile(
    r"async_?wrapper|(block|file|simple)cache|cached|dask|data|dir|generic|git|jlab|jupyter|"
    r"libarchive|pyscript|reference|tar|zip"
)
"""Protocols of fsspec that are no places but ways through other protocols."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where shards of a URL are kept on this machine."""

    folder: Path
    """Of the cache, on a disk of this machine; all processes of a machine share it."""
    max_gb: float = 100.0
    """Size of the shards in it, GB (10⁹ bytes): beyond it, those unused for longest are removed.
    The index is kept besides."""

    def __post_init__(self) -> None:
        if not self.max_gb > 0:
            raise ValueError(f"max_gb must be positive, not {self.max_gb}")


class RemoteFolder:
    """A folder of shards at a URL; its files are fetched when they are first opened.

    Args:
        url: of a protocol that fsspec knows.
        cache: where fetched files are kept.

    Raises:
        ConfigError: the protocol is unknown, or its package is not installed.
        InputError: there are no finished shards, or a listed one has another size than was written.
        EosinError: the place cannot be read.
    """

    def __init__(self, url: str, cache: CacheConfig, check_sizes: bool = True) -> None:
        self.url, self.cache = url.rstrip("/"), cache
        self._files, self._root = _file_system(self.url)
        cache.folder.mkdir(parents=True, exist_ok=True)
        self.marker: Mapping[str, Any] = self._read_marker()
        if check_sizes:
            self._check_sizes()

    def __reduce__(self) -> tuple[type["RemoteFolder"], tuple[str, CacheConfig, bool]]:
        return type(self), (self.url, self.cache, False)

    def where(self, name: str) -> str:
        """The file `name`, as messages name it."""
        return f"{self.url}/{name}"

    def index(self) -> Path:
        """The index in the cache; fetched where it is not there.

        Raises:
            InputError: it is missing, or not what the marker says.
            EosinError: it cannot be fetched.
        """
        digest = self.marker["index_xxh3_128"]
        path = self.cache.folder / f"{digest}.parquet"
        with self._locked(digest):
            if not path.is_file():
                self._fetch(INDEX_NAME, path, digest)
        return path

    def open(self, name: str) -> int:
        """A descriptor of the shard `name`; fetches it where it is not in the cache.

        The descriptor stays valid when the file is removed from the cache.

        Raises:
            InputError: it is missing, or not what the marker says.
            EosinError: it cannot be fetched.
        """
        described = self.marker["shards"][name]
        digest = described["xxh3_128"]
        path = self.cache.folder / f"{digest}.tar"
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                with self._locked(digest):
                    if not path.is_file():  # another process may just have fetched it
                        self._make_room(described["bytes"], path)
                        self._fetch(name, path, digest, described["bytes"])
                continue  # it may be removed again in between, where the cache is far too small
            if os.fstat(descriptor).st_size != described["bytes"]:
                os.close(descriptor)
                path.unlink(missing_ok=True)  # of a machine that stopped, or somebody's edit
                continue
            with suppress(PermissionError):  # another user's
                os.utime(descriptor)  # when it was last used
            return descriptor

    def discard(self, name: str) -> bool:
        """Removes the copy of the file `name` if it is not what was written: a disk may lie.

        Returns:
            True: it is a copy, and `open` or `index` gives one that is as it should be.
        """
        if name == INDEX_NAME:
            digest, suffix = self.marker["index_xxh3_128"], "parquet"
        else:
            digest, suffix = self.marker["shards"][name]["xxh3_128"], "tar"
        path = self.cache.folder / f"{digest}.{suffix}"
        with self._locked(digest):
            try:
                sound = file_digest(path) == digest
            except OSError:  # a bad sector, or it is gone
                sound = False
            if not sound:
                with suppress(PermissionError):  # another user's
                    path.unlink(missing_ok=True)
        return True

    def _read_marker(self) -> dict[str, Any]:
        where = self.where(MARKER_NAME)
        try:
            text = _retrying(lambda: self._files.cat_file(f"{self._root}/{MARKER_NAME}"), where)
        except FileNotFoundError as error:
            raise InputError(f"{where} does not exist: no finished shards are there") from error
        return parse_marker(text, where)

    def _check_sizes(self) -> None:
        """Compares the sizes with one listing, where the place gives one."""
        try:
            listing = _retrying(lambda: self._files.ls(self._root, detail=True), self.url)
        except FileNotFoundError as error:
            raise InputError(f"{self.url} cannot be listed") from error
        sizes = {entry["name"].rstrip("/").rpartition("/")[2]: entry["size"] for entry in listing}
        listed = MARKER_NAME in sizes  # a web server may list nothing
        for name, described in self.marker["shards"].items():
            if name.endswith(POINTING):
                raise InputError(f"{self.where(name)} points into slides; use it where they are")
            if not listed:
                continue
            if name not in sizes:
                raise InputError(f"{self.where(name)} is missing")
            if sizes[name] is not None and sizes[name] != described["bytes"]:
                raise InputError(
                    f"{self.where(name)} has {sizes[name]} bytes where {described['bytes']} were "
                    "written"
                )

    def _fetch(self, name: str, path: Path, digest: str, n_bytes: int | None = None) -> None:
        """Brings a remote file to `path` whole and checked; the caller holds its lock."""
        where, partial = self.where(name), _partial_of(path)
        partial.touch()

        def copy() -> None:
            state, size = xxhash.xxh3_128(), 0
            with (
                self._files.open(f"{self._root}/{name}", "rb", block_size=_CHUNK_BYTES) as source,
                partial.open("r+b") as target,
            ):
                while chunk := source.read(_CHUNK_BYTES):
                    state.update(chunk)
                    target.write(chunk)
                    size += len(chunk)
                target.truncate()
                target.flush()
                os.fsync(target.fileno())
            if n_bytes is not None and size != n_bytes:
                raise _DifferentError(f"{size} bytes where {n_bytes} were written")
            if state.hexdigest() != digest:
                raise _DifferentError("not what was written: checksum mismatch")

        try:
            _retrying(copy, where)
            partial.replace(path)
        except FileNotFoundError as error:
            raise InputError(f"{where} is missing") from error
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, n_bytes: int, wanted: Path) -> None:
        """Removes what was unused for longest until `n_bytes` more stay within the bound.

        The partial file of `wanted` then has that size, so that others who make room count it.
        """
        partial = _partial_of(wanted)
        with self._locked("room"):
            found: list[tuple[float, int, Path]] = []
            total = n_bytes
            with os.scandir(self.cache.folder) as entries:
                for entry in entries:
                    try:
                        facts = entry.stat()
                    except FileNotFoundError:
                        continue  # renamed or removed by another process
                    if entry.name in (wanted.name, partial.name):
                        continue
                    if _CACHED.fullmatch(entry.name):
                        total += facts.st_size
                        found.append((facts.st_mtime, facts.st_size, Path(entry.path)))
                    elif _PARTIAL.fullmatch(entry.name):
                        if time.time() - facts.st_mtime > _STALE_S:
                            Path(entry.path).unlink(missing_ok=True)
                        else:
                            total += facts.st_size
            for _, size, path in sorted(found):
                if total <= self.cache.max_gb * 1e9:
                    break
                path.unlink(missing_ok=True)
                total -= size
            with partial.open("wb") as reserved:
                reserved.truncate(n_bytes)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Holds one of the cache's locks; no other process or thread of this machine then does.

        There are 257 of them, by the first two characters of a hash, so that they need no removal.
        """
        stem = name if name == "room" else name[:2]
        path = self.cache.folder / f".{stem}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class _DifferentError(Exception):
    """What was fetched is not what was written; perhaps the next attempt brings it whole."""


def _partial_of(path: Path) -> Path:
    """What a file of the cache is called until it is whole."""
    return path.with_name(f".{path.name}.partial")


def _file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    protocol = url.partition("://")[0]
    if _WRAPPERS.fullmatch(protocol) or protocol not in fsspec.available_protocols():
        raise ConfigError(
            f"shards: {url}: '{protocol}' is no place that shards can be read from; "
            "there are s3, gs, az, http, file and others that fsspec knows"
        )
    try:
        files, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ConfigError(f"shards: {url} needs another package: {error}") from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"shards: {url} cannot be opened: {error}") from error
    return files, str(root).rstrip("/")


def _retrying(action: Callable[[], T], where: str) -> T:
    """The result of `action`, after another attempt or two where it fails.

    Raises:
        FileNotFoundError: `action` raised it: that will not change.
        EosinError: it failed `TRIES` times, or access is denied.
    """
    wait_s = FIRST_WAIT_S
    for attempt in range(1, TRIES + 1):
        try:
            return action()
        except FileNotFoundError:
            raise
        except Exception as error:  # each protocol's package has errors of its own
            if attempt == TRIES or isinstance(error, PermissionError):
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                raise EosinError(
                    f"{where} cannot be read ({attempt} attempts): {reason}"
                ) from error
            time.sleep(wait_s)
            wait_s *= 4
    raise AssertionError("unreachable: the last attempt returns or raises")
