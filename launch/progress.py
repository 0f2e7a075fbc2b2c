"""Progress of long work: a bar in a terminal, plain lines elsewhere, always rate and time left."""

import sys
import time
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

PLAIN_INTERVAL_S = 10.0
"""Seconds between two lines where there is no terminal."""


class Meter:
    """Counts done units of `total`; use as a context manager and call `advance`.

    Args:
        label: what is being done, e.g. ``tile``.
        total: units in all, the ones done in an earlier call included.
        unit: plural noun of what is counted, e.g. ``slides``.
        done: units that an earlier call had finished; they count, but not towards the rate.
        stream: where lines go; standard error by default.
    """

    def __init__(
        self, label: str, total: int, unit: str, done: int = 0, stream: TextIO | None = None
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self._start_done = done
        self.note = ""
        self._stream = stream or sys.stderr
        self._started = self._printed = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        if self._stream.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[line]}"),
            )
            self._bar = Progress(*columns, console=Console(file=self._stream))
            self._task = self._bar.add_task(self.label, total=self.total, line="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._print()

    def advance(self, units: int = 1, note: str = "") -> None:
        """Counts `units` more as done and shows `note` (losses, a slide's name) beside them."""
        self.done += units
        self.note = note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, line=self.line())
        elif time.monotonic() - self._printed >= PLAIN_INTERVAL_S:
            self._print()

    def rate(self) -> float:
        """Units per second since this meter was made."""
        return (self.done - self._start_done) / max(time.monotonic() - self._started, 1e-9)

    def line(self) -> str:
        """One line: done of total, rate, time left, note."""
        rate = self.rate()
        left = format_seconds((self.total - self.done) / rate) if rate > 0 else "?"
        shown = f"{rate:.1f}" if rate < 100 else f"{rate:.0f}"
        text = f"{self.done}/{self.total} {self.unit} · {shown} {self.unit}/s · {left} left"
        return f"{text} · {self.note}" if self.note else text

    def _print(self) -> None:
        self._printed = time.monotonic()
        print(f"{self.label}: {self.line()}", file=self._stream, flush=True)


def format_seconds(seconds: float) -> str:
    """Seconds as ``42s``, ``3m10s`` or ``2h05m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
