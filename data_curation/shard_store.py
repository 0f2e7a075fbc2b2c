"""Where shards lie: a local folder, or a remote one of which whole shards are kept in a cache."""

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from eosin.configs.errors import ConfigError, InputError
from eosin.data_curation.shard_cache import CacheConfig, RemoteFolder
from eosin.data_curation.shard_marker import (
    INDEX_NAME,
    POINTING,
    read_marker,
)

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(.*)")  # a Path keeps one of two slashes
_FORBIDDEN = re.compile(r"::|[|`${}\x00-\x1f]|^pipe:")


class ShardStore(Protocol):
    """A folder of shards, wherever it is; cheap to send to another process."""

    marker: Mapping[str, Any]
    """See `shard_marker.read_marker`."""

    def where(self, name: str) -> str:
        """The file `name`, as messages name it."""

    def index(self) -> Path:
        """A local file that holds the index."""

    def open(self, name: str) -> int:
        """A descriptor of the shard `name` for reading; it may take the time to fetch it."""

    def discard(self, name: str) -> bool:
        """Removes a copy of the file `name` that was damaged; whether it is a copy at all."""


class LocalFolder:
    """Shards in a folder of this machine.

    Args:
        folder: that `eosin shard` wrote.
        check_sizes: compares each shard's size with the marker.

    Raises:
        InputError: the shards were not finished, or one is missing or of another size than was
            written.
    """

    def __init__(self, folder: Path, check_sizes: bool = True) -> None:
        self.folder = folder
        self.marker: Mapping[str, Any] = read_marker(folder)
        if check_sizes:
            self._check_sizes()

    def __reduce__(self) -> tuple[type["LocalFolder"], tuple[Path, bool]]:
        return type(self), (self.folder, False)  # they were compared here

    def where(self, name: str) -> str:
        """The file `name`, as messages name it."""
        return str(self.folder / name)

    def index(self) -> Path:
        """The index.

        Raises:
            InputError: it is missing.
        """
        path = self.folder / INDEX_NAME
        if not path.is_file():
            raise InputError(f"{path} does not exist; run the same 'eosin shard' again")
        return path

    def open(self, name: str) -> int:
        """A descriptor of the shard `name` for reading."""
        return os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)

    def discard(self, name: str) -> bool:
        """False: what lies here is no copy, and is left alone."""
        return False

    def _check_sizes(self) -> None:
        """Compares the sizes in one pass over the folder, not with a look-up for each shard."""
        shards = self.marker["shards"]
        with os.scandir(self.folder) as entries:
            sizes = {e.name: _file_size(e) for e in entries if e.name in shards}
        for name, described in shards.items():
            if name.endswith(POINTING):
                continue
            if sizes.get(name) is None:
                raise InputError(
                    f"{self.where(name)} is missing; run the same 'eosin shard' again to remake it"
                )
            if sizes[name] != described["bytes"]:
                raise InputError(
                    f"{self.where(name)} has {sizes[name]} bytes where {described['bytes']} were "
                    f"written; see 'eosin shard verify {self.folder}'"
                )


def _file_size(entry: os.DirEntry[str]) -> int | None:
    """Bytes; None for what is no file, such as a link to itself."""
    try:
        found = entry.stat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def open_store(shards: str | Path, cache: CacheConfig | None = None) -> ShardStore:
    """The folder of shards at a path or URL.

    Args:
        shards: a path; or a URL of a protocol that fsspec knows (``s3://…``, ``gs://…``,
            ``file://…``), whose shards are fetched whole as they are needed.
        cache: where fetched shards are kept; needed for a URL, without effect for a path.

    Raises:
        ConfigError: the URL is chained, holds a command or variable, or has a protocol that is
            unknown; or there is a URL and no cache.
        InputError: the shards were not finished, or one is missing or of another size.
    """
    text = str(shards)
    if "://" not in text and Path(text).exists():
        return LocalFolder(Path(text))
    if _FORBIDDEN.search(text):
        raise ConfigError(
            f"shards: {text!r} is refused: commands (pipe:), chains (::), variables and control "
            "characters are not read; give a folder or a plain URL such as s3://bucket/shards"
        )
    match = _URL.fullmatch(text)
    if match is None:
        return LocalFolder(Path(text))
    protocol, rest = match[1].lower(), match[2].lstrip("/")
    if protocol == "file":
        rest = f"/{rest}"  # of an absolute path, whether a Path took slashes away or not
    if cache is None and protocol == "file":
        return LocalFolder(Path(rest))
    if cache is None:
        raise ConfigError(f"shards: {text} needs a cache on this machine; set cache.folder")
    return RemoteFolder(f"{protocol}://{rest}", cache)
