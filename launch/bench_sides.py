"""The two sides of `eosin bench step`: the trainer's step, and the plain one.

Both take the same batches from the same state, and report the same parts. `FastStep` is the one
place that follows the trainer's loop; nothing of the step itself is written here. Legend: B
samples, V global views, N patches of a global crop.
"""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from eosin.launch.process import World
from eosin.launch.stopwatch import NoWatch, Watch, watched
from eosin.pretrain.batch import Batch, Inputs
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.distill import Losses
from eosin.pretrain.gradients import forward
from eosin.pretrain.optim import (
    build_optimizer,
    clip_gradients,
    forget_gradients,
    hand_gradients,
    set_rates,
    step_unless_bad,
)
from eosin.pretrain.plain_step import PlainDistiller, clip
from eosin.pretrain.positions import Jitter
from eosin.pretrain.rates import Rates
from eosin.pretrain.setup import set_up
from eosin.pretrain.step_guard import StepGuard

INPUTS = "inputs"
TEACHER = "teacher"
STUDENT = "student"
LOSSES = "heads and losses"
BACKWARD = "backward"
OPTIMISER = "optimiser"
EMA = "EMA"
PARTS = (INPUTS, TEACHER, STUDENT, LOSSES, BACKWARD, OPTIMISER, EMA)
"""Of a step; the networks are their backbones, and our health figures count among the losses."""


class Side(Protocol):
    """A step that can be taken again and again."""

    @property
    def model(self) -> nn.Module:
        """Student and teacher."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of the student."""

    def take(self, batch: Batch, watch: Watch) -> torch.Tensor:
        """One whole step; the total loss, not yet waited for."""


class FastStep:
    """The product: model, optimiser, guard and moving averages as `pretrain.train.train` has them.

    Args:
        config: of the training.
        device: see `launch.process`.
        dtype: of the matrix products.
        folder: where bad steps are written down.
        world: the ranks.
    """

    def __init__(
        self,
        config: PretrainConfig,
        device: torch.device,
        dtype: torch.dtype,
        folder: Path,
        world: World | None = None,
    ) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.inputs = Inputs(device, config.mean, config.std)
        self.training = set_up(config, device, dtype, world)
        self.model, self.optimizer = self.training.model, self.training.optimizer
        self.choices = self.training.choices
        self.parts = dict(self.model.student.named_children())
        self.guard = StepGuard(
            folder / "bad_steps.jsonl",
            limit=config.max_bad_steps,
            count=0,
            first_step=0,
            terms=Losses._fields,
            modules=list(self.parts),
        )
        self.watch: Watch = NoWatch()
        _watch_forward(self, "rows")

    def take(self, batch: Batch, watch: Watch) -> torch.Tensor:
        """See `Side`; the body of the trainer's loop, without its files."""
        self.watch = watch
        watch.switch(INPUTS)
        rates = Rates.at(self.config, batch.step)
        step, over_shards = self.training.layout.step, self.training.layout.over_shards
        losses, outputs = forward(self.config, step, batch, rates, self.inputs, self.dtype)
        watch.switch(BACKWARD)
        losses.total.backward()
        watch.switch(OPTIMISER)
        optim = self.config.optim
        norms = clip_gradients(self.parts.values(), optim.clip_norm, optim.clip, over_shards)
        bad = self.guard.judge(batch.step, batch.rows, torch.stack(losses), norms)
        set_rates(self.optimizer, rates.lr, rates.weight_decay, freeze_last=rates.freeze_last)
        hand_gradients(self.model.student)
        step_unless_bad(self.optimizer, bad)
        forget_gradients(self.model.student)
        watch.switch(EMA)
        self.model.update_teacher(outputs, rates.momentum, bad)
        if (batch.step + 1) % self.config.log_every == 0:
            watch.switch(LOSSES)
            self.model.record_use(batch.step, outputs, bad)
            self.guard.look()
        watch.stop()
        return losses.total.detach()


class PlainStep:
    """The baseline: `pretrain.plain_step` in eager torch, from the weights of a `FastStep`.

    Args:
        fast: the other side, untouched by this one.
    """

    def __init__(self, fast: FastStep) -> None:
        self.config, self.device, self.dtype = fast.config, fast.device, fast.dtype
        config, self.inputs = self.config, fast.inputs
        self.model = PlainDistiller(config.model, config.objective, config.group)
        self.model.student.load_state_dict(fast.model.student.state_dict())
        self.model.teacher.load_state_dict(fast.model.teacher.state_dict())
        self.model.to(self.device)
        self.optimizer = build_optimizer(self.model.student, config.model.depth, config.optim)
        self.watch: Watch = NoWatch()
        _watch_forward(self, "forward")

    def take(self, batch: Batch, watch: Watch) -> torch.Tensor:
        """See `Side`."""
        self.watch = watch
        config, step = self.config, batch.step
        watch.switch(INPUTS)
        rates = Rates.at(config, step)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            crops = self.inputs(batch.images)
            jitter = Jitter(config.seed, step)
            losses = self.model(*crops, batch.masks, rates.temperature, jitter)
        watch.switch(BACKWARD)
        losses.total.backward()
        watch.switch(OPTIMISER)
        clip(self.model.student, config.optim)
        set_rates(self.optimizer, rates.lr, rates.weight_decay, freeze_last=rates.freeze_last)
        self.optimizer.step()
        self.optimizer.zero_grad()
        watch.switch(EMA)
        self.model.update_teacher(rates.momentum)
        watch.stop()
        total: torch.Tensor = losses.total.detach()
        return total


def _watch_forward(side: FastStep | PlainStep, encodes: str) -> None:
    """Wraps the methods of these very networks, so that a side's watch sees where its forward is.

    Args:
        side: whose networks.
        encodes: the backbones' method that the losses call.
    """
    model: Any = side.model
    for backbone, part in ((model.teacher.backbone, TEACHER), (model.student.backbone, STUDENT)):
        method = getattr(backbone, encodes)
        setattr(backbone, encodes, watched(lambda: side.watch, part, method))
    model.forward = watched(lambda: side.watch, LOSSES, model.forward, goes_on=True)
