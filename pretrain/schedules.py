"""Schedules as pure functions of the step."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up from `start` to `peak`, then a cosine (or nothing) down to `end`."""

    peak: float
    """Value at the end of the warm-up."""
    end: float
    """Value at the last step; unused by ``constant``."""
    start: float = 0.0
    """Value at step 0 of the warm-up."""
    warmup: float = 0.0
    """Share of all steps that the warm-up takes."""
    shape: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up."""

    def __post_init__(self) -> None:
        """Refuses a warm-up that is no share."""
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup={self.warmup} is a share of all steps, in [0, 1]")

    def at(self, step: int, total_steps: int) -> float:
        """Value at `step` of `total_steps`; beyond the last step, the end value."""
        warmup_steps = round(self.warmup * total_steps)
        if step < warmup_steps:
            return self.start + (self.peak - self.start) * step / warmup_steps
        if self.shape == "constant":
            return self.peak
        span = max(total_steps - warmup_steps, 1)
        progress = min((step - warmup_steps) / span, 1.0)
        return self.end + (self.peak - self.end) * 0.5 * (1 + math.cos(math.pi * progress))
