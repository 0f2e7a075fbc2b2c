"""``status.json``: what a run does, in one small file that scripts and `eosin launch status` poll.

Rank 0 replaces it whole, at most every few seconds and at each change of state. A killed process
cannot say so: a file whose `updated` is old belongs to a run that is gone, or stuck.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from eosin.configs.errors import EosinError, InputError, InterruptedRunError, printable
from eosin.launch.artefacts import SCHEMA_VERSION, read_json, write_json
from eosin.launch.process import World

State: TypeAlias = Literal[
    "starting", "preflight", "training", "checkpointing", "interrupted", "failed", "finished"
]

STATES: tuple[str, ...] = get_args(State)

INTERVAL_S = 5.0
"""Seconds between two writes in the same state, at least."""

FILE = "status.json"


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """The content of the file. What is not known (yet) is null."""

    state: State = "starting"
    """What the run does; ``interrupted``, ``failed`` and ``finished`` are ends."""
    step: int = 0
    """Steps that are done."""
    steps: int = 0
    """Steps of the whole run."""
    loss: float | None = None
    """The sum that is optimised, at the last log step."""
    tiles_per_s: float | None = None
    """Of all ranks together."""
    slides_per_s: float | None = None
    """Likewise, where slides are what is learnt from; or cases."""
    cases_per_s: float | None = None
    mfu: float | None = None
    """Share of the devices' peak; none on a CPU or an unknown GPU."""
    data_wait: float | None = None
    """Share of its time that rank 0 waits for batches."""
    memory_gib: float | None = None
    """Peak of rank 0: of its GPU, else of its process."""
    seconds_left: float | None = None
    """To the last step, at the present rate."""
    eta: str | None = None
    """When that is, UTC in ISO 8601."""
    checkpoint_step: int | None = None
    """Of the newest checkpoint."""
    checkpoint_time: str | None = None
    """When it was finished, UTC."""
    bad_steps: int = 0
    """Steps with a NaN or Inf, of the whole run."""
    damaged: int = 0
    """Damaged records that this process met."""
    alarms: list[str] = field(default_factory=list)
    """What is wrong at the last log step, in words."""
    hosts: list[str] = field(default_factory=list)
    """Names of the nodes, in the order of their ranks."""
    ranks: int = 1
    """Processes in all."""
    pid: int = 0
    """Of rank 0, on the first of `hosts`."""
    started: str = ""
    """When this process started, UTC."""
    updated: str = ""
    """When this file was written, UTC."""
    reason: str | None = None
    """Why the run ended, in words."""


class Status:
    """Keeps ``status.json`` of a run. Made on every rank; only rank 0 writes.

    Args:
        folder: the run folder.
        world: whose host names are gathered, so every rank must come here.
        clock: seconds since 1970.
    """

    def __init__(self, folder: Path, world: World, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock, self._leads = folder / FILE, clock, world.leads
        self._written, self._warned = -math.inf, False
        self.now = RunStatus(
            hosts=list(dict.fromkeys(world.all_hosts())),
            ranks=world.size,
            pid=os.getpid(),
            started=_utc(clock()),
        )
        if self._leads:
            self._write()

    def update(self, **changes: Any) -> None:
        """Takes over the named fields of `RunStatus`, and writes them when it is time to.

        `eta` follows from `seconds_left`, and `checkpoint_time` from `checkpoint_step`.
        """
        before, now = self.now, self._clock()
        if changes.get("state", before.state) not in STATES:
            raise ValueError(f"no state '{changes['state']}'; there are: {', '.join(STATES)}")
        left = changes.get("seconds_left")
        if left is not None:
            changes["eta"] = _utc(now + left) if math.isfinite(left) else None
        if changes.get("checkpoint_step", before.checkpoint_step) != before.checkpoint_step:
            changes["checkpoint_time"] = _utc(now)
        self.now = replace(before, **changes)
        due = self.now.state != before.state or now - self._written >= INTERVAL_S
        if self._leads and due:
            self._write()

    def _write(self) -> None:
        self._written = self._clock()
        self.now = replace(self.now, updated=_utc(self._written))
        values = {name: _finite(value) for name, value in asdict(self.now).items()}
        try:
            write_json(self._path, {"schema_version": SCHEMA_VERSION, **values})
        except OSError as error:  # a full disk ends a run at its checkpoint, not here
            if not self._warned:
                print(
                    f"warning: {self._path} cannot be written ({error.strerror})", file=sys.stderr
                )
            self._warned = True


def read_status(folder: Path) -> RunStatus | None:
    """The status of the run in `folder`; None where none was ever written.

    Raises:
        InputError: the file is not one that `Status` writes.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        value = read_json(path)
        known = {f.name for f in fields(RunStatus)}
        return RunStatus(**{name: item for name, item in value.items() if name in known})
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a status of eosin: {error}") from error


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _finite(value: Any) -> Any:
    """NaN and Inf are no JSON."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def end_status(folder: Path, world: World, error: BaseException) -> None:
    """Writes why a run ended into its status; nothing where it had not begun."""
    try:
        status = read_status(folder)
        if status is None or not world.leads or status.pid != os.getpid():
            return
        state: State = "interrupted" if isinstance(error, InterruptedRunError) else "failed"
        reason = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
        ended = replace(status, state=state, reason=reason, updated=_utc(time.time()))
        write_json(folder / FILE, {"schema_version": SCHEMA_VERSION, **asdict(ended)})
    except (OSError, EosinError):  # the error itself is what the user must see
        return
