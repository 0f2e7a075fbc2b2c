"""What the schedules give for one step, and what of a step is logged."""

from dataclasses import replace
from typing import NamedTuple

from eosin.pretrain.trainer_config import TrainerConfig


class Rates(NamedTuple):
    """What the schedules give for one step."""

    lr: float
    weight_decay: float
    momentum: float
    temperature: float
    spread: float
    freeze_last: bool
    backbone: float
    """Factor on the backbone's learning rate."""

    @classmethod
    def at(cls, config: TrainerConfig, step: int) -> "Rates":
        """The rates of `step`, a pure function of it."""
        optim, total = config.optim, config.steps
        reference = optim.lr_reference_batch or config.batch_size
        scale = (config.batch_size / reference) ** 0.5  # of the peak, not of the end (DINOv2)
        lr = replace(optim.lr, start=optim.lr.start * scale, peak=optim.lr.peak * scale)
        return cls(
            lr=lr.at(step, total),
            weight_decay=optim.weight_decay.at(step, total),
            momentum=config.momentum.at(step, total),
            temperature=config.temperature.at(step, total),
            spread=_ramp(step / total, *config.spread_ramp),
            freeze_last=optim.last_layer_frozen(step, total),
            backbone=config.start.backbone_rate(step),
        )


def _ramp(progress: float, low: float, high: float) -> float:
    """0 up to `low`, 1 from `high` on, a line between them."""
    return min(max((progress - low) / (high - low), 0.0), 1.0) if low < high else 1.0


def step_values(config: TrainerConfig, figures: dict[str, float], rates: Rates) -> dict[str, float]:
    """The scalars of one step for metrics.jsonl, without terms that the objective has not."""
    off = {"total", *config.off}
    return {
        **{name: value for name, value in figures.items() if name not in off},
        "lr": rates.lr,
        "weight_decay": rates.weight_decay,
        "momentum": rates.momentum,
        "temperature": rates.temperature,
    }
