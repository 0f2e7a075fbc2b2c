"""What every probe takes and gives.

A family of protocols is a function ``(labelled, test_features, n_classes, seed, wanted)`` to one
`Outcome` for each wanted protocol: what several protocols share (neighbours, episodes) is computed
once. It is never given the test labels, so nothing can be chosen on them.

Shapes: N tiles, D features, C classes, R runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """The tiles that a probe may learn from: train and val."""

    features: npt.NDArray[np.float32]
    """[N, D]"""
    labels: npt.NDArray[np.int64]
    """[N], indices of classes."""
    is_val: npt.NDArray[np.bool_]
    """[N]: True for the tiles set aside for choosing hyper-parameters."""
    device: torch.device = torch.device("cpu")
    """Where a probe computes what is worth it."""

    def only(self, rows: npt.NDArray[np.bool_] | npt.NDArray[np.intp]) -> "Labelled":
        """Some of the tiles."""
        return replace(
            self, features=self.features[rows], labels=self.labels[rows], is_val=self.is_val[rows]
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a probe says about the test tiles."""

    votes: npt.NDArray[np.float64]
    """[N, C], rows sum to 1: a one-hot prediction, or the share of runs for each class."""
    scores: npt.NDArray[np.float32] | None = None
    """[N, C]: how much speaks for each class, for what is read off a ranking; None: no more than
    `votes`."""
    probabilities: bool = False
    """Whether `scores` are meant as probabilities, whose calibration can be asked for."""
    values: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    """Name of a metric → what each tile adds to it were it of this or that class [N, C]: the
    metric is the mean over tiles, each with its own class. A probe does not know the classes."""
    runs: npt.NDArray[np.int16] | None = None
    """[R, N]: predictions of each seed or episode; None where there is but one."""
    chosen: dict[str, float] = field(default_factory=dict)
    """Hyper-parameters that were chosen on val, and what the data allowed (shots, neighbours)."""

    @property
    def predictions(self) -> npt.NDArray[np.int64]:
        """[N]: the class with the most votes; among equals, the lowest."""
        predictions: npt.NDArray[np.int64] = self.votes.argmax(axis=1)
        return predictions


Run = Callable[[Labelled, npt.NDArray[np.float32], int, int, Sequence[str]], dict[str, Outcome]]
"""(labelled, test_features [N, D], n_classes, seed, names of the wanted protocols)"""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Protocols that share their work."""

    protocols: dict[str, str]
    """Name and version → one line: exactly what is done. The name up to ``@`` is for good; the
    version rises when the same tiles would get other numbers."""
    run: Run
    usual: tuple[str, ...] = ()
    """Those that are run when nothing else is asked for."""


def one_hot(predictions: npt.NDArray[np.int64], n_classes: int) -> npt.NDArray[np.float64]:
    """Votes [N, C] of a probe that names one class a tile."""
    return np.eye(n_classes)[predictions]


def shares_of_runs(runs: npt.NDArray[np.int16], n_classes: int) -> npt.NDArray[np.float64]:
    """Votes [N, C]: of the runs [R, N], the share that named each class."""
    return np.stack([(runs == label).mean(axis=0) for label in range(n_classes)], axis=1)


def normalise(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows scaled to unit L2 norm; rows of zeros stay."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    scaled: npt.NDArray[np.float32] = features / np.maximum(norms, np.finfo(np.float32).tiny)
    return scaled
