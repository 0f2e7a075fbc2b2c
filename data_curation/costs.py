"""What each stage of a curation cost: core-seconds, and what they were spent on.

Measured as processor time of this process and of its workers, so that the figure does not depend on
how many there were or on what else the machine did. A stage that was killed and went on is charged
for both parts, but for what the killed part had not written down.
"""

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from eosin.configs.errors import InputError
from eosin.launch.artefacts import read_json, write_json

COSTS_NAME = "costs.json"
_WAIT_S = 10.0  # for workers that were told to end


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one stage took, over all calls that had a part in it."""

    core_s: float
    """Processor time in seconds, of all processes."""
    wall_s: float
    """Time that went by meanwhile, in seconds."""
    items: int
    """Tiles that it was spent on."""
    stamp: str
    """Of the stage's marker: a stage that is done anew is charged anew."""

    @property
    def core_h_per_million(self) -> float:
        """Core-hours for a million tiles."""
        return self.core_s / max(self.items, 1) * 1e6 / 3600


def read_costs(folder: Path) -> dict[str, StageCost]:
    """The costs that `folder` tells of by stage; {} without the file.

    Raises:
        InputError: the file is not what `charged` writes.
    """
    path = folder / COSTS_NAME
    if not path.is_file():
        return {}
    try:
        return {name: StageCost(**entry) for name, entry in read_json(path)["stages"].items()}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is not a table of costs; remove it: {error}") from error


@contextmanager
def charged(folder: Path, stage: str, marker: Path, count: Callable[[], int]) -> Iterator[None]:
    """Adds what the block takes to the costs of `stage`, if it wrote `marker` anew.

    Args:
        folder: of the curated set.
        stage: its name.
        marker: the file that ends the stage; unchanged means that there was nothing to do.
        count: tiles that the finished stage worked on; asked only where it did something.
    """
    before, started, clock = _stamp_and_time(marker), _core_seconds(), time.monotonic()
    try:
        yield
    finally:
        stamp, changed = _stamp_and_time(marker)
        if (stamp, changed) != before or not stamp:
            wall_s, core_s = time.monotonic() - clock, _core_seconds() - started
            stages = read_costs(folder)
            earlier = stages.get(stage)
            if earlier is not None and earlier.stamp in ("", stamp):
                core_s, wall_s = core_s + earlier.core_s, wall_s + earlier.wall_s
            stages[stage] = StageCost(
                core_s=round(core_s, 3),
                wall_s=round(wall_s, 3),
                items=count() if stamp else 0,
                stamp=stamp,
            )
            write_json(
                folder / COSTS_NAME, {"stages": {name: asdict(c) for name, c in stages.items()}}
            )


def cost_lines(costs: dict[str, StageCost]) -> list[str]:
    """A line a stage: core-seconds and core-hours a million tiles."""
    lines = [
        f"  {name:<9}{cost.core_s:>10,.1f} core-s for {cost.items:>9,} tiles"
        f"{cost.core_h_per_million:>9.2f} core-h a million"
        for name, cost in costs.items()
        if cost.items
    ]
    return ["curate: what it cost", *lines] if lines else []


def _stamp_and_time(marker: Path) -> tuple[str, int]:
    try:
        return str(read_json(marker).get("stamp", "")), marker.stat().st_mtime_ns
    except (OSError, ValueError, AttributeError):
        return "", 0


def _core_seconds() -> float:
    """Processor time of this process and of all workers that have ended, in seconds."""
    for child in multiprocessing.active_children():
        child.join(_WAIT_S)
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
