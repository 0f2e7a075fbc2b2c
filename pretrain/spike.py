"""Loss spikes: told from noise, and undone by going back and passing over the data that did it."""

import math
import statistics
from collections import deque
from dataclasses import dataclass

FEW = 10
"""Losses that are needed to know what is usual."""


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """When a rise of the loss is a spike; looked for at log steps."""

    threshold: float = 0.0
    """Deviations above the median of the last losses, each 1.4826 times their median absolute
    deviation (a standard deviation, were they normal); 0: spikes are not looked for."""
    least: float = 0.05
    """Rise above the median that any spike has, as a share of it: noise of a loss that hardly moves
    is none."""
    window: int = 50
    """Last losses that are compared with."""
    patience: int = 2
    """Log steps in a row above the threshold that make a spike."""
    rollbacks: int = 3
    """Spikes after which the run stops."""

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        for name, low in (("threshold", 0), ("least", 0), ("rollbacks", 0)):
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and at least {low}")
        if self.window < FEW or self.patience < 1:
            raise ValueError(f"window must be at least {FEW} and patience at least 1")


@dataclass
class LossSpikeError(Exception):
    """The loss rose and stayed up; never seen by a user."""

    good_steps: int
    """Steps that were done when it was last as usual."""
    steps: int
    """Steps that are done."""
    loss: float
    usual: float


class SpikeWatch:
    """Compares each logged loss with those before it.

    Args:
        config: what a spike is.
        steps: that are done, and were good.
    """

    def __init__(self, config: SpikeConfig, steps: int) -> None:
        self.config, self._good_steps = config, steps
        self._usual: deque[float] = deque(maxlen=config.window)
        self._above = 0

    def see(self, steps: int, loss: float) -> None:
        """One more logged loss.

        Args:
            steps: that are done.
            loss: of the last of them, averaged over ranks, so that all ranks decide alike.

        Raises:
            LossSpikeError: it is a spike.
        """
        if self.config.threshold == 0:
            return
        if len(self._usual) >= FEW and self._is_above(loss):
            self._above += 1
            if self._above >= self.config.patience:
                raise LossSpikeError(self._good_steps, steps, loss, statistics.median(self._usual))
            return
        self._above, self._good_steps = 0, steps
        self._usual.append(loss)

    def _is_above(self, loss: float) -> bool:
        median = statistics.median(self._usual)
        spread = 1.4826 * statistics.median(abs(x - median) for x in self._usual)
        return loss - median > max(self.config.threshold * spread, self.config.least * abs(median))


def passed_over(skips: tuple[tuple[int, int], ...], step: int) -> int:
    """Steps of data that are passed over before that of step `step`.

    Args:
        skips: (from this step on, so many more).
        step: of the optimiser.
    """
    return sum(count for start, count in skips if start <= step)
