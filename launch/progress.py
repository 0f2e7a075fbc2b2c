"""Progress of long work: a bar in a terminal, plain lines elsewhere, always rate and time left."""

import math
import sys
import time
from collections.abc import Mapping
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
        shown: False on the ranks that do not print.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str,
        done: int = 0,
        stream: TextIO | None = None,
        shown: bool = True,
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self._start_done = done
        self.note = ""
        self._stream, self._shown = stream or sys.stderr, shown
        self._started = self._printed = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        if self._shown and self._stream.isatty():
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

    def seconds_left(self) -> float:
        """At the rate so far; NaN while there is none."""
        rate = self.rate()
        return (self.total - self.done) / rate if rate > 0 else math.nan

    def line(self) -> str:
        """One line: done of total, rate, time left, note."""
        rate = _three_digits(self.rate())
        text = f"{self.done}/{self.total} {self.unit} · {rate} {self.unit}/s · {self._left()}"
        return f"{text} · {self.note}" if self.note else text

    def _left(self) -> str:
        seconds = self.seconds_left()
        return f"{'?' if math.isnan(seconds) else format_seconds(seconds)} left"

    def _print(self) -> None:
        self._printed = time.monotonic()
        if self._shown:
            print(f"{self.label}: {self.line()}", file=self._stream, flush=True)


class StepMeter(Meter):
    """Steps of a training, with the figures of the last log step in the line.

    The first step of a process compiles and starts workers: the rate is counted from its end on.

    Args:
        label: as of `Meter`.
        steps: in all.
        done: steps that earlier processes took.
        stream: as of `Meter`.
        shown: as of `Meter`.
    """

    def __init__(
        self,
        label: str,
        steps: int,
        done: int = 0,
        stream: TextIO | None = None,
        shown: bool = True,
    ) -> None:
        super().__init__(label, steps, "steps", done, stream, shown)
        self.figures: Mapping[str, float] = {}
        """``loss`` and what `pretrain.rate.Lap.values` gives; of these, those that there are."""
        self._settled = False

    def advance(self, units: int = 1, note: str = "") -> None:
        """Counts `units` more steps as done."""
        super().advance(units, note)
        if not self._settled:
            self._started, self._start_done, self._settled = time.monotonic(), self.done, True

    def line(self) -> str:
        """One line: step, loss, tiles a second, MFU, data wait, memory, time left, note."""
        parts = [f"step {self.done}/{self.total}"]
        known = self.figures
        parts += [show(known[name]) for name, show in _FIGURES.items() if name in known]
        parts += [self._left(), *([self.note] if self.note else [])]
        return " · ".join(parts)


_FIGURES = {
    "loss": lambda value: f"loss {value:.3f}",
    "tiles_per_s": lambda value: f"{_three_digits(value)} tiles/s",
    "slides_per_s": lambda value: f"{_three_digits(value)} slides/s",
    "cases_per_s": lambda value: f"{_three_digits(value)} cases/s",
    "mfu": lambda value: f"MFU {value:.1%}",
    "data_wait": lambda value: f"data wait {value:.0%}",
    "memory_gib": lambda value: f"{_three_digits(value)} GiB",
}


def _three_digits(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def format_seconds(seconds: float) -> str:
    """Seconds as ``42s``, ``3m10s`` or ``2h05m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
