"""`eosin doctor`: what this machine has, what eosin would choose on it, and what to mend.

Each check runs in a process of its own (see `checks`), so that a broken driver costs its rows and
no others. Areas are shown in the order of `CHECKS`.
"""

import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from socket import gethostname
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from eosin.configs.errors import EosinError
from eosin.launch.artefacts import SCHEMA_VERSION, write_json
from eosin.launch.checks import Check, Finding, run_checks

CHECKS = (
    Check("machine", "eosin.launch.checks_machine"),
    Check("devices", "eosin.launch.checks_devices"),
    Check("kernels", "eosin.launch.checks_kernels"),
    Check("compile", "eosin.launch.checks_compile", needed=False),
    Check("processes", "eosin.launch.checks_processes", needed=False),
    Check("images", "eosin.launch.checks_images"),
    Check("disk", "eosin.launch.checks_disk"),
    Check("Slurm", "eosin.launch.checks_slurm", needed=False),
    Check("packages", "eosin.launch.checks_packages"),
)

_FIRST = ("compile", "processes")
"""Areas that take longest; they are begun first."""
_STYLES = {"ok": "green", "note": "yellow", "mend": "bold red"}
_PLAIN_WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What is looked at."""

    folder: Path = Path(".")
    """Where runs or shards would be written: its disk is tried with 64 MB."""
    limit_s: float = 120.0
    """Seconds after which a single check is given up. On a slow file system importing torch alone
    may take that long."""
    json: Path | None = None
    """Where the findings are written, too; ``--json FILE`` is the same."""

    def __post_init__(self) -> None:
        if not 0 < self.limit_s < float("inf"):
            raise ValueError(f"limit_s must be positive, not {self.limit_s}")


def doctor(config: DoctorConfig) -> None:
    """Looks, prints, and writes the JSON.

    Raises:
        EosinError: something is to be mended before eosin works.
    """
    start = time.monotonic()
    findings = examine(CHECKS, config.folder, config.limit_s)
    show(findings, sys.stdout)
    print(f"{summary(findings)}; looked for {time.monotonic() - start:.0f} s")
    if config.json is not None:
        document = {"host": gethostname(), "findings": [asdict(f) for f in findings]}
        write_json(config.json, {"schema_version": SCHEMA_VERSION, **document})
    mend = [f"{f.area}, {f.name}" for f in findings if f.verdict == "mend"]
    if mend:
        raise EosinError(f"to be mended: {'; '.join(mend)}")


def examine(checks: Sequence[Check], folder: Path, limit_s: float) -> list[Finding]:
    """The findings of all checks, in the order of `checks`."""
    order = sorted(checks, key=lambda check: check.area not in _FIRST)
    found = dict(run_checks(order, folder, limit_s))
    return [finding for check in checks for finding in found[check]]


def summary(findings: Sequence[Finding]) -> str:
    """How many findings there are of each verdict."""
    counts = {verdict: sum(f.verdict == verdict for f in findings) for verdict in _STYLES}
    return f"{counts['ok']} ok, {counts['note']} to note, {counts['mend']} to mend"


def show(findings: Sequence[Finding], stream: TextIO) -> None:
    """Prints the findings by area: a table in a terminal, aligned lines elsewhere."""
    if stream.isatty() and (stream.encoding or "").lower().replace("-", "") == "utf8":
        Console(file=stream).print(_table(findings))
        return
    encoding = stream.encoding or "utf-8"
    for line in plain_lines(findings):
        print(line.encode(encoding, "replace").decode(encoding), file=stream)


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    for overflow in ("ellipsis", "fold", "ellipsis", "fold"):
        table.add_column(overflow=overflow, no_wrap=overflow == "ellipsis")
    for area, rows in groupby(findings, key=lambda f: f.area):
        for i, row in enumerate(rows):
            said = Text("\n").join(map(Text, (row.found, *_more(row))))
            if row.advice:
                said.stylize(_STYLES[row.verdict], said.plain.rindex("→ "))
            table.add_row(
                Text(area if i == 0 else "", "bold"),
                Text(row.name),
                Text(row.verdict, _STYLES[row.verdict]),
                said,
            )
    return table


def plain_lines(findings: Sequence[Finding]) -> list[str]:
    """The findings as text: verdict, name, what was found, and what follows beneath it."""
    width = max((len(f.name) for f in findings), default=0)
    lines = []
    for area, rows in groupby(findings, key=lambda f: f.area):
        lines.append(area)
        for row in rows:
            head = f"  {row.verdict:<4}  {row.name:<{width}}  "
            margin = " " * len(head)
            for i, text in enumerate((row.found, *_more(row))):
                lines += textwrap.wrap(
                    text,
                    _PLAIN_WIDTH,
                    initial_indent=margin if i else head,
                    subsequent_indent=margin,
                    break_on_hyphens=False,
                )
    return lines


def _more(row: Finding) -> list[str]:
    """What follows from a finding."""
    chosen = [f"eosin takes: {row.choice}"] if row.choice else []
    return [*chosen, *([f"→ {row.advice}"] if row.advice else [])]
