"""Which checkpoints of a run are kept: the newest, every k-th for good, and the best."""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from eosin.configs.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Retention:
    """When checkpoints are written, and which of them stay."""

    every: int = 500
    """Steps between two checkpoints."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of this are kept for good; 0: none."""
    keep_best: bool = True
    """Whether the best checkpoint by the live probe is kept, where there is a probe."""
    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written; it takes a copy in host memory."""

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("keep", 1), ("keep_every", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"checkpoints.{name} must be at least {least}")
        if self.keep_every % self.every:
            raise ConfigError(
                f"checkpoints.keep_every={self.keep_every} must be a multiple of "
                f"checkpoints.every={self.every}, or no checkpoint is made at most of its steps"
            )

    def kept(self, steps: Collection[int], probes: Path) -> set[int]:
        """Those of `steps` whose checkpoints stay.

        Args:
            steps: of the checkpoints that there are.
            probes: ``probes.jsonl`` of the run.
        """
        newest = set(sorted(steps)[-self.keep :])
        for_good = {step for step in steps if self.keep_every and step % self.keep_every == 0}
        best = best_step(probes, steps) if self.keep_best else None
        return newest | for_good | ({best} if best is not None else set())


def best_step(probes: Path, steps: Collection[int]) -> int | None:
    """The one of `steps` with the highest score on the validation split.

    The score of a step is the last that was written for it; of equal ones the earlier step wins.

    Args:
        probes: ``probes.jsonl``, a line ``{"step": …, "split": "val", "score": …}`` per probe;
            lines that are no such thing, e.g. one cut by a kill, count for nothing.
        steps: of the checkpoints that there are.

    Returns:
        The step; None where none has a score.
    """
    scores: dict[int, float] = {}
    try:
        lines = probes.read_text(errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        try:
            row = json.loads(line)
            if row["split"] == "val" and row["step"] in steps and math.isfinite(row["score"]):
                scores[row["step"]] = row["score"]
        except (ValueError, TypeError, KeyError):
            continue
    return max(sorted(scores), key=scores.__getitem__, default=None)
