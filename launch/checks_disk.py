"""A folder's disk: room, speed, and whether it keeps the promises that eosin's files rest on.

Artefacts are written beside and renamed, runs are bounded by `fsync`, and processes that share a
cache of shards exclude each other by file locks. Each of these is tried, not looked up.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from eosin.configs.errors import printable
from eosin.launch.checks import Finding

AREA = "disk"

_BLOCK_BYTES = 4 << 20
_MOST_BYTES = 64 << 20
_MOST_S = 2.0
_LEAST_FREE_GB = 1.0
_LITTLE_FREE_GB = 20.0
_LEAST_FREE_FILES = 10_000
_SLOW_MB_S = 50.0
_SLOW_SYNC_MS = 200.0
_SKEW_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Disk:
    """What was seen of the disk under a folder."""

    folder: Path
    kind: str
    """Of the file system: ext4, nfs4, lustre, tmpfs …"""
    free_gb: float
    free_files: int | None
    """Names that can still be made; None where there is no such limit."""
    trouble: str = ""
    """Why nothing could be written; the rest is then not known."""
    write_mb_s: float = 0.0
    """Of one file, synced at its end."""
    read_mb_s: float = 0.0
    """Of the same, asked to be dropped from the page cache."""
    sync_ms: float = 0.0
    """Median of a small file written and synced."""
    renames: bool = False
    """A file renamed onto another takes its place."""
    locks: bool = False
    """A lock that one descriptor holds is refused to another."""
    skew_s: float = 0.0
    """Clock of the file system less that of this machine."""


def check(folder: Path) -> list[Finding]:
    """Looks at `folder`, or the nearest above it that exists."""
    return judge(look(folder))


def look(folder: Path) -> Disk:
    """The facts; what is written is removed again."""
    folder = folder.resolve()
    while not folder.is_dir():
        folder = folder.parent
    room = os.statvfs(folder)
    known = Disk(
        folder=folder,
        kind=file_system(folder, Path("/proc/self/mounts").read_text()),
        free_gb=shutil.disk_usage(folder).free / 1e9,
        free_files=room.f_favail if room.f_files else None,
    )
    try:
        with tempfile.TemporaryDirectory(prefix=".eosin-doctor-", dir=folder) as scratch:
            return _tried(known, Path(scratch))
    except OSError as error:
        why = {errno.ENOSPC: "it is full", errno.EDQUOT: "your quota is used up"}
        trouble = why.get(error.errno or 0, error.strerror or str(error))
        return Disk(**{**vars(known), "trouble": printable(trouble)})


def file_system(folder: Path, mounts: str) -> str:
    """The kind of file system that `folder` lies on.

    Args:
        folder: absolute.
        mounts: content of ``/proc/self/mounts``.
    """
    best, kind = -1, "unknown"
    for line in mounts.splitlines():
        _, place, name, *_ = line.split()
        point = Path(place.replace("\\040", " "))
        if folder.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), name
    return kind


def _tried(known: Disk, scratch: Path) -> Disk:
    write_mb_s, read_mb_s = _speeds(scratch / "big")
    return Disk(
        **{
            **vars(known),
            "write_mb_s": write_mb_s,
            "read_mb_s": read_mb_s,
            "sync_ms": statistics.median(_sync_ms(scratch / f"small{i}") for i in range(5)),
            "renames": _renames(scratch),
            "locks": _locks(scratch / "lock"),
            "skew_s": _skew_s(scratch / "now"),
        }
    )


def _speeds(path: Path) -> tuple[float, float]:
    """(write, read) in MB/s of a file of random bytes, at most `_MOST_BYTES` or `_MOST_S` each."""
    block, written = os.urandom(_BLOCK_BYTES), 0
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        while written < _MOST_BYTES and time.perf_counter() - start < _MOST_S:
            written += file.write(block)
            os.fsync(file.fileno())
        write_s = time.perf_counter() - start
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start, read = time.perf_counter(), 0
        while (chunk := file.read(_BLOCK_BYTES)) and time.perf_counter() - start < _MOST_S:
            read += len(chunk)
        read_s = time.perf_counter() - start
    return written / 1e6 / write_s, read / 1e6 / read_s


def _sync_ms(path: Path) -> float:
    start = time.perf_counter()
    with path.open("wb") as file:
        file.write(b"x" * 4096)
        file.flush()
        os.fsync(file.fileno())
    return 1000 * (time.perf_counter() - start)


def _renames(scratch: Path) -> bool:
    old, new = scratch / "old", scratch / ".old.partial"
    old.write_bytes(b"old")
    new.write_bytes(b"new")
    new.replace(old)
    return old.read_bytes() == b"new" and not new.exists()


def _locks(path: Path) -> bool:
    with path.open("wb") as mine, path.open("wb") as other, contextlib.suppress(OSError):
        fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _skew_s(path: Path) -> float:
    before = time.time()
    path.write_bytes(b"now")
    stamp, after = path.stat().st_mtime, time.time()
    return stamp - min(max(stamp, before), after)


def judge(disk: Disk) -> list[Finding]:
    """The rows."""
    room = _room(disk)
    if disk.trouble:
        return [
            room,
            Finding(
                AREA, "writing", f"{disk.folder}: {disk.trouble}", "", "mend",
                "give folder= one that you may write to and that has room, and write runs there",
            ),
        ]  # fmt: skip
    return [room, _speed(disk), _promises(disk), _file_clock(disk)]


def _room(disk: Disk) -> Finding:
    found = f"{disk.free_gb:,.1f} GB on {disk.kind}, {disk.folder}"
    if disk.free_files is not None and disk.free_files < _LEAST_FREE_FILES:
        return Finding(
            AREA, "free", f"{found}; {disk.free_files} more files", "", "mend",
            "remove files, or write elsewhere: no names are left, however much room there is",
        )  # fmt: skip
    if disk.free_gb < _LEAST_FREE_GB:
        return Finding(AREA, "free", found, "", "mend", "make room, or write runs elsewhere")
    if disk.free_gb < _LITTLE_FREE_GB:
        return Finding(
            AREA, "free", found, "", "note",
            "enough for a small model: a checkpoint of a ViT-L takes 6 GB, and some are kept",
        )  # fmt: skip
    return Finding(AREA, "free", found)


def _speed(disk: Disk) -> Finding:
    found = (
        f"write {disk.write_mb_s:,.0f} MB/s, read {disk.read_mb_s:,.0f} MB/s, "
        f"a sync {disk.sync_ms:.1f} ms"
    )
    if disk.write_mb_s < _SLOW_MB_S or disk.sync_ms > _SLOW_SYNC_MS:
        return Finding(
            AREA, "speed", found, "", "note",
            "checkpoints and shards will wait for this disk: write them to a faster one",
        )  # fmt: skip
    return Finding(AREA, "speed", found)


def _promises(disk: Disk) -> Finding:
    kept = {"rename": disk.renames, "file locks": disk.locks}
    found = ", ".join(f"{name} {'works' if works else 'fails'}" for name, works in kept.items())
    if not disk.renames:
        return Finding(
            AREA, "promises", found, "", "mend",
            "a file cannot take another's place here, so no artefact would be whole: write "
            "elsewhere",
        )  # fmt: skip
    if not disk.locks:
        return Finding(
            AREA, "promises", found, "", "note",
            "put loader.cache on a local disk: its processes exclude each other by locks",
        )  # fmt: skip
    return Finding(AREA, "promises", f"fsync works, {found}")


def _file_clock(disk: Disk) -> Finding:
    found = f"{abs(disk.skew_s):.0f} s from this machine's"
    if abs(disk.skew_s) > _SKEW_S:
        return Finding(
            AREA, "file clock", found, "", "note",
            "set the clocks of this machine and the file server (NTP): ages of files are compared",
        )  # fmt: skip
    return Finding(AREA, "file clock", found)
