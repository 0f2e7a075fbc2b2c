"""Slurm: whether it is there and answers, and what of it bounds a job."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from eosin.configs.errors import printable
from eosin.launch.checks import Finding

AREA = "Slurm"

_ANSWER_S = 20
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A line of ``sinfo``."""

    name: str
    nodes: int
    gres: str
    """``gpu:h100:8``, or empty."""
    limit: str
    """Longest job, as Slurm writes it."""
    default: bool


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """What Slurm says of itself."""

    installed: bool
    """Whether its commands are there."""
    version: str = ""
    """Empty where its controller does not answer; the rest is then not known."""
    silence: str = ""
    """What the command said instead."""
    max_array: int = 0
    """MaxArraySize: one above the highest index of an array's task."""
    accounting: bool = False
    """Whether ``sacct`` can tell how jobs ended."""
    partitions: tuple[Partition, ...] = ()
    job: str = ""
    """SLURM_JOB_ID, where this runs in a job."""


def check(folder: Path) -> list[Finding]:
    """Asks Slurm."""
    return judge(look())


def look() -> Slurm:
    """The facts."""
    job = printable(os.environ.get("SLURM_JOB_ID", ""))
    if shutil.which("scontrol") is None or shutil.which("sinfo") is None:
        return Slurm(installed=False, job=job)
    code, config = _ask("scontrol", "show", "config")
    if code != 0:
        return Slurm(installed=True, silence=_last_line(config), job=job)
    settings = parse_config(config)
    _, listing = _ask("sinfo", "--noheader", "--format=%P|%D|%G|%l")
    return Slurm(
        installed=True,
        version=settings.get("SLURM_VERSION", "?"),
        max_array=int(settings.get("MaxArraySize", "0")),
        accounting=settings.get("AccountingStorageType", "") == "accounting_storage/slurmdbd",
        partitions=parse_partitions(listing),
        job=job,
    )


def _ask(*command: str) -> tuple[int, str]:
    """(exit code, what it printed)."""
    try:
        done = subprocess.run(
            command, text=True, timeout=_ANSWER_S, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {_ANSWER_S} s"
    return done.returncode, done.stdout


def _last_line(text: str) -> str:
    lines = text.strip().splitlines() or ["no answer"]
    return printable(lines[-1])


def parse_config(text: str) -> dict[str, str]:
    """``Name = value`` of ``scontrol show config``."""
    pairs = re.findall(r"^(\w+)\s+= (.*?)\s*$", text, re.MULTILINE)
    return {name: printable(value) for name, value in pairs}


def parse_partitions(text: str) -> tuple[Partition, ...]:
    """The lines of ``sinfo --format=%P|%D|%G|%l``; of kinds of nodes of one partition, each."""
    rows = (line.split("|") for line in printable_lines(text))
    return tuple(
        Partition(
            name=row[0].rstrip("*"),
            nodes=int(row[1]),
            gres="" if row[2] == "(null)" else row[2],
            limit=row[3],
            default=row[0].endswith("*"),
        )
        for row in rows
        if len(row) == 4 and row[1].isdigit()
    )


def printable_lines(text: str) -> list[str]:
    """Lines of a command's answer, fit to be shown."""
    return [printable(line.strip()) for line in text.splitlines()]


def judge(slurm: Slurm) -> list[Finding]:
    """The rows."""
    if not slurm.installed:
        return [Finding(AREA, "Slurm", "not here", "torchrun, or one process")]
    if not slurm.version:
        return [
            Finding(
                AREA, "Slurm", f"its commands are here, but: {slurm.silence}",
                "torchrun, or one process", "note",
                "for jobs, go to a login node, or set SLURM_CONF",
            )
        ]  # fmt: skip
    inside = f"inside job {slurm.job}" if slurm.job else "outside any job"
    rows = [
        Finding(
            AREA, "Slurm", f"{slurm.version}, {inside}, arrays of up to {slurm.max_array} tasks",
            "eosin launch",
        )
    ]  # fmt: skip
    rows.append(_partitions(slurm))
    rows.append(_accounting(slurm))
    return rows


def _partitions(slurm: Slurm) -> Finding:
    if not slurm.partitions:
        return Finding(
            AREA, "partitions", "none that you may see", "", "note",
            "ask which account and partition are yours",
        )  # fmt: skip
    shown = [
        f"{p.name}{' (default)' if p.default else ''}: {p.nodes} nodes, up to {p.limit}"
        f"{', ' + p.gres if p.gres else ''}"
        for p in slurm.partitions[:_SHOWN]
    ]
    more = len(slurm.partitions) - _SHOWN
    found = "; ".join(shown) + (f"; and {more} more" if more > 0 else "")
    if not any("gpu" in p.gres for p in slurm.partitions):
        return Finding(
            AREA, "partitions", found, "nodes without GPUs", "note",
            "no partition names a GPU (GRES): train where one does",
        )  # fmt: skip
    return Finding(AREA, "partitions", found)


def _accounting(slurm: Slurm) -> Finding:
    if slurm.accounting:
        return Finding(AREA, "accounting", "present: sacct tells how jobs ended")
    return Finding(AREA, "accounting", "none: jobs are forgotten minutes after their end")
