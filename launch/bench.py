"""What all subjects of `eosin bench` share: rows, runs in turn, the table and the JSON.

A subject is a module with a config and a function that returns rows, and a row in `cli.VERBS`,
such as ``bench step`` (`bench_step`). Every row compares ours with a named baseline on the same
work, and a ratio above 1 is in our favour.
"""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO, TypeVar

from rich.console import Console
from rich.table import Table

from eosin.launch.artefacts import write_text

T = TypeVar("T")

COLUMNS = ("name", "unit", "ours", "baseline", "ratio")


@dataclass(frozen=True)
class Row:
    """One comparison, as it stands in the JSON."""

    name: str
    unit: str
    ours: float
    baseline: float
    ratio: float
    """Above 1 where ours is better: faster, or smaller."""


def more_is_better(name: str, unit: str, ours: float, baseline: float) -> Row:
    """A row of rates, above zero."""
    return Row(name, unit, ours, baseline, ours / baseline)


def less_is_better(name: str, unit: str, ours: float, baseline: float) -> Row:
    """A row of times or sizes, above zero."""
    return Row(name, unit, ours, baseline, baseline / ours)


def in_turn(
    ours: Callable[[], T], baseline: Callable[[], T], repeats: int
) -> tuple[list[T], list[T]]:
    """Runs both `repeats` times, one after the other, so that a slow spell hits both."""
    pairs = [(ours(), baseline()) for _ in range(repeats)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def median_by_part(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each part over runs that have the same parts."""
    return {part: statistics.median(run[part] for run in runs) for part in runs[0]}


def report(
    title: str, rows: Sequence[Row], file: Path | None, stream: TextIO | None = None
) -> None:
    """Shows the rows, in a table on a terminal and as plain lines elsewhere, and writes the JSON.

    Args:
        title: what was compared, on one line.
        rows: in the order in which they are shown.
        file: the JSON, a list of objects with the fields of `Row`; None for none.
        stream: standard output by default.
    """
    stream = stream or sys.stdout
    cells = [(r.name, r.unit, _shown(r.ours), _shown(r.baseline), f"{r.ratio:.2f}") for r in rows]
    if stream.isatty():
        table = Table(title=title, title_justify="left")
        for column in COLUMNS:
            table.add_column(column, justify="left" if column in ("name", "unit") else "right")
        for row in cells:
            table.add_row(*row)
        Console(file=stream).print(table)
    else:
        print(title, file=stream)
        widths = [max(map(len, column)) for column in zip(COLUMNS, *cells, strict=True)]
        for name, unit, *figures in (COLUMNS, *cells):
            left = f"{name:<{widths[0]}}  {unit:<{widths[1]}}"
            right = (f"{c:>{w}}" for c, w in zip(figures, widths[2:], strict=True))
            print("  ".join((left, *right)), file=stream)
    if file is not None:
        write_text(file, json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _shown(value: float) -> str:
    """Three significant digits or all before the point."""
    digits = max(2 - len(str(int(abs(value)))) + 1, 0)
    return f"{value:,.{digits}f}"
