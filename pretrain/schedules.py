"""Schedules as pure functions of the step.

With T steps in all and W = round(warmup · T) of warm-up, step i = 0 … T - 1 has

    i < W:  start + (peak - start) · i / W            linspace(start, peak, W, endpoint=False)
    i ≥ W:  end + (peak - end) · ½(1 + cos(π · p))    cosine, p = (i - W) / (T - W)
            peak + (end - peak) · p                   linear
            peak                                      constant

so the peak is reached at step W, and `end` at step T, one after the last. DINOv3's code warms up
like this. DINOv2's runs linspace(start, peak, W) with the peak included: it is at the peak one step
earlier, at step W - 1, and stays there for two steps; behind the warm-up the two are the same.
"""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up from `start` to `peak`, then a cosine, a line or nothing down to `end`."""

    peak: float
    """Value at the end of the warm-up."""
    end: float
    """Value that the last step comes one step short of; unused by ``constant``."""
    start: float = 0.0
    """Value at step 0 of the warm-up; unused without one."""
    warmup: float = 0.0
    """Share of all steps that the warm-up takes."""
    shape: Literal["cosine", "linear", "constant"] = "cosine"
    """What follows the warm-up."""

    def __post_init__(self) -> None:
        """Refuses a warm-up that is no share, and values that are no numbers."""
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup={self.warmup} is a share of all steps, in [0, 1]")
        for name in ("peak", "end", "start"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number")

    def at(self, step: int, total_steps: int) -> float:
        """Value at `step` of `total_steps`; from step `total_steps` on, the end value."""
        warmup_steps = round(self.warmup * total_steps)
        if step < warmup_steps:
            return self.start + (self.peak - self.start) * step / warmup_steps
        if self.shape == "constant":
            return self.peak
        span = max(total_steps - warmup_steps, 1)
        progress = min((step - warmup_steps) / span, 1.0)
        left = 1 - progress if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.end + (self.peak - self.end) * left
