"""What a head is to say of a bag, and by what it is stopped: classes, or survival.

Legend: S slides, V bags of val, C outputs.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eosin.configs.errors import InputError
from eosin.eval.heads.head import Criterion
from eosin.eval.heads.losses import balanced_weights, cross_entropy
from eosin.eval.heads.survival import (
    cox_loss,
    cut_times,
    hazard_loss,
    interval_of,
    risk_of_hazards,
)
from eosin.eval.ranking import Ranking

Rows: TypeAlias = npt.NDArray[np.int64]
SurvivalLoss: TypeAlias = Literal["cox", "hazard"]


class Aim(Protocol):
    """Everything that is fitted of it is fitted on the rows that a member learns from."""

    @property
    def n_outputs(self) -> int:
        """C."""

    def of(self, train: Rows) -> "FittedAim":
        """What follows from the bags that are learnt from, and no others."""


class FittedAim(Protocol):
    """For one member."""

    def criterion(self, device: torch.device) -> Criterion:
        """The loss of outputs [B, C] and targets."""

    def targets(self, rows: Rows) -> Tensor:
        """Of some bags, [B, …]."""

    def judge(self, outputs: Tensor, rows: Rows) -> tuple[float, float]:
        """How good outputs [V, C] are, and by what equals are told apart; higher is better."""


@dataclass(frozen=True)
class Classes:
    """Balanced cross-entropy; stopped by AUROC, of equals by the loss."""

    labels: npt.NDArray[np.int64]
    """[S]"""
    n_outputs: int

    def of(self, train: Rows) -> "FittedClasses":
        """With the weights of classes in `train`."""
        counts = np.bincount(self.labels[train], minlength=self.n_outputs)
        return FittedClasses(self.labels, balanced_weights(torch.from_numpy(counts)))


@dataclass(frozen=True)
class FittedClasses:
    """See `Classes`."""

    labels: npt.NDArray[np.int64]
    weights: Tensor

    def criterion(self, device: torch.device) -> Criterion:
        """Balanced cross-entropy."""
        return cross_entropy(self.weights.to(device))

    def targets(self, rows: Rows) -> Tensor:
        """Classes, int64 [B]."""
        return torch.from_numpy(self.labels[rows])

    def judge(self, outputs: Tensor, rows: Rows) -> tuple[float, float]:
        """AUROC, and minus the cross-entropy."""
        found, labels = outputs.softmax(dim=1).cpu().numpy(), self.labels[rows]
        own = np.zeros(len(labels), np.int64)
        area = float(Ranking(found, labels, own, 1)(np.ones((1, 1)))[0])
        own_class = found[np.arange(len(labels)), labels]
        return area, float(np.log(np.maximum(own_class, 1e-12)).mean())


@dataclass(frozen=True)
class Survival:
    """Log risks by Cox's partial likelihood, or hazards of intervals; stopped by the loss."""

    times: npt.NDArray[np.float64]
    """[S]"""
    events: npt.NDArray[np.bool_]
    """[S]: whether the event came then; else the patient was lost to sight."""
    loss: SurvivalLoss = "cox"
    n_intervals: int = 4

    @property
    def n_outputs(self) -> int:
        """One log risk, or the hazards' logits."""
        return 1 if self.loss == "cox" else self.n_intervals

    def of(self, train: Rows) -> "FittedSurvival":
        """With time cut at the events in `train`."""
        cuts = np.empty(0)
        if self.loss == "hazard":
            try:
                cuts = cut_times(self.times[train], self.events[train], self.n_intervals)
            except ValueError as error:
                raise InputError(f"{error}: give n_intervals= or folds= lower") from error
        return FittedSurvival(self, cuts)

    def risks(self, outputs: Tensor) -> Tensor:
        """Of outputs [B, C], [B]: high where death is early."""
        return outputs[:, 0] if self.loss == "cox" else risk_of_hazards(outputs)


@dataclass(frozen=True)
class FittedSurvival:
    """See `Survival`."""

    aim: Survival
    cuts: npt.NDArray[np.float64]

    def criterion(self, device: torch.device) -> Criterion:
        """Cox with Efron's ties, or the likelihood of discrete hazards."""
        return cox_loss if self.aim.loss == "cox" else hazard_loss

    def targets(self, rows: Rows) -> Tensor:
        """Time and event, float [B, 2]; or interval and event, int64 [B, 2]."""
        times, events = self.aim.times[rows], self.aim.events[rows]
        if self.aim.loss == "cox":
            return torch.from_numpy(np.column_stack([times, events]))
        return torch.from_numpy(np.column_stack([interval_of(times, self.cuts), events]))

    def judge(self, outputs: Tensor, rows: Rows) -> tuple[float, float]:
        """Minus the loss."""
        loss = self.criterion(outputs.device)(outputs, self.targets(rows).to(outputs.device))
        return -float(loss), 0.0
