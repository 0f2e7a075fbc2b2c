"""When work that ended is started again: the exit codes' contract, and what a crash loop is."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from eosin.configs.errors import ConfigError, InterruptedRunError

AGAIN = InterruptedRunError.exit_code
USAGE = ConfigError.exit_code
_BY_HAND = 130
"""Exit code after Ctrl-C."""

What: TypeAlias = Literal["done", "again", "failed"]


@dataclass(frozen=True)
class Ending:
    """How a process ended, and what that calls for."""

    what: What
    reason: str
    """Completes the sentence “pretrain …”."""
    crash: bool = False
    """Whether nobody asked it to end: too many of these without progress are a crash loop."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How often work comes back."""

    restarts: int
    """In all."""
    stuck: int
    """After crashes with no newer checkpoint in between."""
    retry_failures: bool = False
    """Whether an exit code 1 is tried again too, as a crash (parts of an array)."""


def read_ending(code: int, asked: bool, limits: Limits) -> Ending:
    """What the exit code of a verb calls for.

    Args:
        code: as `subprocess` gives it: negative for a signal; above 128 as shells and containers
            tell of a signal.
        asked: whether the process had been sent a signal to end by its supervisor.
        limits: for `retry_failures`.
    """
    number = -code if code < 0 else code - 128 if code > 128 and code != _BY_HAND else 0
    if code == 0:
        return Ending("done", "is done")
    if code == AGAIN:
        return Ending("again", "ended early and can go on", crash=not asked)
    if number:
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        return Ending("again", f"was killed ({name})", crash=not asked)
    if limits.retry_failures and code != USAGE:
        return Ending("again", f"failed (exit code {code})", crash=True)
    return Ending("failed", f"failed (exit code {code}): its last line says why")


def limit(ending: Ending, restarts: int, stuck: int, limits: Limits) -> Ending:
    """The ending after the limits: what would come back too often has failed.

    Args:
        ending: of the last process.
        restarts: before it.
        stuck: earlier crashes at the same progress.
        limits: how often work comes back.
    """
    if ending.what != "again":
        return ending
    if ending.crash and stuck >= limits.stuck:
        return Ending(
            "failed",
            f"{ending.reason}, {stuck + 1} times without a newer checkpoint: not started again; "
            "the end of its log says why",
        )
    if restarts >= limits.restarts:
        return Ending(
            "failed", f"{ending.reason} after {restarts} restarts; raise max_restarts to go on"
        )
    return ending


def progress_of(arguments: Sequence[str]) -> str:
    """Name of the newest checkpoint under the ``out=`` of a verb's arguments; empty without."""
    out = [a.removeprefix("out=") for a in arguments if a.startswith("out=")]
    if not out:
        return ""
    return max((path.name for path in Path(out[-1]).glob("checkpoints/step_*")), default="")
