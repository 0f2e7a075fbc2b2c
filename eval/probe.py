"""What every probe takes and gives.

A probe is a function ``(labelled, test_features, n_classes, seed) -> Outcome``. It is never given
the test labels, so nothing can be chosen on them. Shapes: N tiles, D features, C classes.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """The tiles that a probe may learn from: train and val."""

    features: npt.NDArray[np.float32]
    """[N, D]"""
    labels: npt.NDArray[np.int64]
    """[N], indices of classes."""
    is_val: npt.NDArray[np.bool_]
    """[N]: True for the tiles set aside for choosing hyper-parameters."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a probe says about the test tiles."""

    votes: npt.NDArray[np.float64]
    """[N, C], rows sum to 1: a one-hot prediction, or the share of episodes for each class."""
    chosen: dict[str, float] = field(default_factory=dict)
    """Hyper-parameters that were chosen on val, and what the data allowed (shots, neighbours)."""

    @property
    def predictions(self) -> npt.NDArray[np.int64]:
        """[N]: the class with the most votes; among equals, the lowest."""
        predictions: npt.NDArray[np.int64] = self.votes.argmax(axis=1)
        return predictions


def one_hot(predictions: npt.NDArray[np.int64], n_classes: int) -> npt.NDArray[np.float64]:
    """Votes [N, C] of a probe that names one class a tile."""
    return np.eye(n_classes)[predictions]


def normalise(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows scaled to unit L2 norm; rows of zeros stay."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    scaled: npt.NDArray[np.float32] = features / np.maximum(norms, np.finfo(np.float32).tiny)
    return scaled
