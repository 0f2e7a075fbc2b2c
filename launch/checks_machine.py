"""Cores, memory, shared memory, open files, clock and text encoding, as limits leave them."""

import locale
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from eosin.data_curation.worker_pool import count_workers
from eosin.launch.checks import Finding

AREA = "machine"
GIB = 1 << 30

_UNLIMITED = 1 << 60  # bytes; version 1 of control groups has a number for "no limit"
_LEAST_MEMORY_GIB = 2.0
_LITTLE_MEMORY_GIB = 8.0
_LITTLE_SHARED_GIB = 1.0
_LEAST_OPEN_FILES = 1024
_DAY_S = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the operating system says of itself and of this process's limits."""

    cores: int
    """That this process may run on."""
    installed: int
    """Cores of the machine."""
    quota: float | None
    """Cores' worth of time that the control group gets; None without a limit."""
    memory_gib: float
    available_gib: float
    memory_limit_gib: float | None
    """Of the control group."""
    shared_gib: float | None
    """Free in /dev/shm; None where it is missing."""
    open_files: int
    """Soft limit."""
    most_open_files: int
    """Hard limit."""
    behind_s: float
    """Seconds by which the clock stands before the newest file of eosin; not above 0 is sound."""
    encoding: str
    """Of text files and names."""
    python: str


def check(folder: Path) -> list[Finding]:
    """Looks at this machine."""
    return judge(look())


def look() -> Machine:
    """The facts."""
    memory = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    quota, limit = cgroup_limits(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup"))
    shared = Path("/dev/shm")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    newest = max(file.stat().st_mtime for file in Path(__file__).parent.glob("*.py"))
    return Machine(
        cores=count_workers(0),
        installed=os.cpu_count() or 1,
        quota=quota,
        memory_gib=int(memory["MemTotal"].split()[0]) / (1 << 20),
        available_gib=int(memory["MemAvailable"].split()[0]) / (1 << 20),
        memory_limit_gib=None if limit is None else limit / GIB,
        shared_gib=shutil.disk_usage(shared).free / GIB if shared.is_dir() else None,
        open_files=soft,
        most_open_files=hard,
        behind_s=newest - time.time(),
        encoding=locale.getpreferredencoding(False),
        python=sys.version.split()[0],
    )


def cgroup_limits(membership: str, root: Path) -> tuple[float | None, int | None]:
    """(cores, bytes) that the control groups of a process allow it; None without a limit.

    Args:
        membership: content of ``/proc/self/cgroup``, of version 1, 2, or both.
        root: where control groups are mounted.
    """
    quotas: list[float] = []
    limits: list[int] = []
    for folder in _groups(membership, root):
        version_1 = _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        for words in (_words(folder / "cpu.max"), version_1):
            if len(words) == 2 and words[0].isdigit() and int(words[1]) > 0:
                quotas.append(int(words[0]) / int(words[1]))
        for file in ("memory.max", "memory.limit_in_bytes"):
            words = _words(folder / file)
            if words and words[0].isdigit() and int(words[0]) < _UNLIMITED:
                limits.append(int(words[0]))
    return min(quotas, default=None), min(limits, default=None)


def _groups(membership: str, root: Path) -> Iterator[Path]:
    """The folders of the groups of a process and of all above them, for CPU and memory."""
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        own = PurePosixPath(path.lstrip("/"))
        for controller in controllers.split(","):
            if controller in ("", "cpu", "memory"):
                mount = root / controller
                yield from (mount / group for group in (own, *own.parents))


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:  # not there, or hidden from a container
        return []


def judge(machine: Machine) -> list[Finding]:
    """The rows."""
    return [
        _cores(machine),
        _memory(machine),
        _shared(machine),
        _open_files(machine),
        _clock(machine),
        _encoding(machine),
    ]


def _cores(machine: Machine) -> Finding:
    found = f"{machine.cores} of {machine.installed}"
    choice = f"tile, shard, curate: {machine.cores} workers; training: loader.workers=0"
    if machine.quota is None or machine.quota > machine.cores - 0.5:
        return Finding(AREA, "cores", found, choice)
    least = max(int(machine.quota), 1)
    found += f", of which a limit of the control group gives the time of {machine.quota:g}"
    return Finding(
        AREA, "cores", found, choice, "note",
        f"eosin counts {machine.cores}: give workers={least}, or ask for more CPU time",
    )  # fmt: skip


def _memory(machine: Machine) -> Finding:
    found = f"{machine.memory_gib:.1f} GiB, {machine.available_gib:.1f} free"
    usable = machine.available_gib
    if machine.memory_limit_gib is not None and machine.memory_limit_gib < machine.memory_gib:
        found += f"; a limit of {machine.memory_limit_gib:.1f} GiB for this control group"
        usable = min(usable, machine.memory_limit_gib)
    if usable < _LEAST_MEMORY_GIB:
        return Finding(
            AREA, "memory", found, "", "mend",
            f"{usable:.1f} GiB are too few: end other programs, or ask for {_LITTLE_MEMORY_GIB:g} "
            "GiB (Slurm: --mem)",
        )  # fmt: skip
    if usable < _LITTLE_MEMORY_GIB:
        return Finding(
            AREA, "memory", found, "", "note",
            "enough for a small model: keep workers and batch_size low, or ask for more",
        )  # fmt: skip
    return Finding(AREA, "memory", found)


def _shared(machine: Machine) -> Finding:
    advice = "loader.workers hold their batches there: give the container --shm-size=8g"
    if machine.shared_gib is None:
        return Finding(AREA, "/dev/shm", "missing", "loader.workers=0", "note", advice)
    found = f"{machine.shared_gib:.2f} GiB free"
    if machine.shared_gib < _LITTLE_SHARED_GIB:
        return Finding(AREA, "/dev/shm", found, "loader.workers=0", "note", advice)
    return Finding(AREA, "/dev/shm", found)


def _open_files(machine: Machine) -> Finding:
    found = f"{machine.open_files}, at most {machine.most_open_files}"
    if 0 <= machine.open_files < _LEAST_OPEN_FILES:
        return Finding(
            AREA, "open files", found, "", "note",
            "a loader holds 128 shards open, and slides besides: ulimit -n 4096, or a smaller "
            "loader.max_open",
        )  # fmt: skip
    return Finding(AREA, "open files", found)


def _clock(machine: Machine) -> Finding:
    if machine.behind_s > _DAY_S:
        return Finding(
            AREA, "clock", f"{machine.behind_s / _DAY_S:.0f} days before eosin's own files", "",
            "note", "set the clock (NTP): certificates and the age of files will be misread",
        )  # fmt: skip
    return Finding(AREA, "clock", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))


def _encoding(machine: Machine) -> Finding:
    found = f"{machine.encoding}, Python {machine.python}"
    if machine.encoding.lower().replace("-", "") != "utf8":
        return Finding(
            AREA, "encoding", found, "", "mend",
            "names outside ASCII would be misread: export LANG=C.UTF-8, or PYTHONUTF8=1",
        )  # fmt: skip
    return Finding(AREA, "encoding", found)
