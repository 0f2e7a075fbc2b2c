"""What the loop asks of what it trains: tiles' encoders and slides' ones are the same to it."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from eosin.launch.process import World
from eosin.pretrain.diagnostics import Measured
from eosin.pretrain.local_part import like, local
from eosin.pretrain.parallel import Layout
from eosin.pretrain.prototype_loss import TargetFigures
from eosin.pretrain.trainer_config import TrainerConfig


class Sampled(Protocol):
    """One rank's share of a step."""

    @property
    def step(self) -> int:
        """Its number."""

    @property
    def rows(self) -> Tensor:
        """Which samples they are, int64 [b]."""

    @property
    def damaged(self) -> Mapping[int, str]:
        """Row and reason of each that was found to be damaged."""


B = TypeVar("B", bound=Sampled)


class Learner(Protocol):
    """Student and teacher, with what follows a step."""

    @property
    def student(self) -> nn.Module:
        """What is trained."""

    @property
    def teacher(self) -> nn.Module:
        """Its moving average."""

    def update_teacher(self, outputs: Any, momentum: float, bad: Tensor | None = None) -> None:
        """What follows the student, after a step."""

    def record_use(
        self, step: int, outputs: Any, bad: Tensor | None = None
    ) -> TargetFigures | None:
        """Figures of the targets of a step, if there are any."""

    def health(
        self,
        step: int,
        outputs: Any,
        found: TargetFigures | None,
        window_steps: int,
        recorded: int,
    ) -> Measured:
        """Health figures of a step."""


class Trained(Protocol):
    """A training, put together on one rank."""

    @property
    def config(self) -> TrainerConfig:
        """Of it."""

    @property
    def world(self) -> World:
        """The ranks."""

    @property
    def device(self) -> torch.device:
        """Of this rank."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""

    @property
    def model(self) -> Learner:
        """What learns."""

    @property
    def layout(self) -> Layout:
        """Over the ranks."""

    @property
    def optimizer(self) -> torch.optim.AdamW:
        """Of the student."""

    @property
    def choices(self) -> str:
        """What was chosen for this hardware, in words."""

    @property
    def flops_of(self) -> Callable[[Any], float] | None:
        """Operations of a batch; None where they are not counted."""

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes, by name."""


def trained_tensors(
    model: nn.Module, student: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """All that training changes, by name; they share the memory of what is trained.

    Args:
        model: whose state is meant, but for what its own files hold (``frozen.``).
        student: what the optimiser steps.
        optimizer: with moments for every parameter that is trained.
    """
    named = {
        f"model.{name}": tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("frozen.")
    }
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        for key, tensor in optimizer.state[local(parameter)].items():
            lies = tensor if key == "step" else like(parameter, tensor)
            named[f"optimizer.{name}.{key}"] = lies
    return named
