"""What `eosin doctor` finds: typed rows, from checks that run in processes of their own.

A check is a function from a folder to findings. It looks at the machine, and a pure function judges
what it saw, so that the judgement can be tested with a machine that nobody has. A check may crash,
hang or raise: that costs its own findings alone.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal, TypeAlias

from eosin.configs.errors import printable
from eosin.data_curation.isolation import Lost, run_isolated

Verdict: TypeAlias = Literal["ok", "note", "mend"]
"""``note``: worth knowing, eosin works; ``mend``: eosin, or what it was asked for, will not."""


@dataclass(frozen=True)
class Finding:
    """One row of the report."""

    area: str
    """Which rows belong together."""
    name: str
    """What was looked at."""
    found: str
    """What there is."""
    choice: str = ""
    """What eosin would choose on this ground."""
    verdict: Verdict = "ok"
    advice: str = ""
    """What to do about it, in one sentence; empty where it is ok."""

    def __post_init__(self) -> None:
        if (self.verdict == "ok") == bool(self.advice):
            raise ValueError(f"{self.area}, {self.name}: advice if, and only if, it is not ok")


@dataclass(frozen=True)
class Check:
    """A function that finds, by name: its module is imported where it runs."""

    area: str
    module: str
    function: str = "check"
    """In `module`; takes a folder and returns findings of `area`."""
    needed: bool = True
    """Whether eosin does not work where this check cannot be made."""


@dataclass(frozen=True)
class Visit:
    """A check and the folder it is made in."""

    check: Check
    folder: Path


def run_checks(
    checks: Sequence[Check], folder: Path, limit_s: float, workers: int = 2
) -> Iterator[tuple[Check, list[Finding]]]:
    """Yields each check with its findings, as it is done; never raises for what a check does.

    Args:
        checks: started in this order.
        folder: for those that write.
        limit_s: seconds after which a check is given up.
        workers: processes at once.
    """
    visits = [Visit(check, folder) for check in checks]
    for visit, result in run_isolated(_visit, visits, workers=workers, timeout_s=limit_s):
        if isinstance(result, Lost):
            result = [lost(visit.check, result.reason)]
        yield visit.check, result


def lost(check: Check, reason: str) -> Finding:
    """The row of a check that came to no end of its own."""
    return Finding(
        check.area,
        "this check",
        printable(reason),
        verdict="mend" if check.needed else "note",
        advice=f"to see where: python -m eosin.launch.checks {check.module} {check.function}",
    )


def _visit(visit: Visit) -> list[Finding]:
    """Makes a check in this process, whose output nobody reads: libraries print what they like."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)
    check = visit.check
    try:
        return _function(check.module, check.function)(visit.folder)
    except Exception as error:  # whatever it is, the other checks go on
        return [lost(check, f"{type(error).__name__}: {error}")]


def _function(module: str, name: str) -> Callable[[Path], list[Finding]]:
    function: Callable[[Path], list[Finding]] = getattr(import_module(module), name)
    return function


if __name__ == "__main__":
    import sys

    for finding in _function(sys.argv[1], sys.argv[2])(Path()):
        print(finding)
