"""Metrics as functions of how often each group counts.

A metric is given weights of groups and returns its value; with all weights 1 it is the plain value,
and resampling, leaving out and swapping groups are other weights. Most metrics are a function of
sums over tiles, so they keep one sum a group. Shapes: B rows of weights, G groups, N tiles,
C classes; confusion matrices are [true, predicted].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from eosin.eval.probe import Outcome
from eosin.eval.ranking import Ranking

CALIBRATION_BINS = 15
"""Of equal width, as in Guo et al. 2017."""

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


class Metric(Protocol):
    """Weights [B, G] to values [B]."""

    def __call__(self, weights: Array) -> Array:
        """The metric where each group counts as often as its weight says."""


@dataclass(frozen=True)
class SummedMetric:
    """A function of sums over tiles."""

    sums: Array
    """[G, …]: one entry a group."""
    function: Callable[[Array], Array]
    """Sums [B, …] to values [B]."""

    def __call__(self, weights: Array) -> Array:
        """See `Metric`."""
        summed = weights @ self.sums.reshape(len(self.sums), -1)
        return self.function(summed.reshape(-1, *self.sums.shape[1:]))


def confusion_matrix(labels: Indices, votes: Array) -> Array:
    """Votes [N, C] summed by true class: [C, C]."""
    one_group = np.zeros(len(labels), np.int64)
    total: Array = grouped_confusion(labels, votes, one_group, 1).sum(axis=0)
    return total


def grouped_confusion(labels: Indices, votes: Array, groups: Indices, n_groups: int) -> Array:
    """One confusion matrix a group, [G, C, C], from votes [N, C] and indices of groups [N]."""
    n_classes = votes.shape[1]
    sums: Array = np.zeros((n_groups * n_classes, n_classes))
    np.add.at(sums, groups * n_classes + labels, votes)
    return sums.reshape(n_groups, n_classes, n_classes)


def confusion_of_runs(runs: npt.NDArray[np.int16], labels: Indices, n_classes: int) -> Array:
    """One confusion matrix a run, [R, C, C], from predictions [R, N]."""
    counts = [np.bincount(run, minlength=n_classes**2) for run in labels * n_classes + runs]
    return np.stack(counts).reshape(-1, n_classes, n_classes).astype(np.float64)


def balanced_accuracy(confusion: Array) -> Array:
    """Mean recall of the classes that are present, over leading axes [..., C, C] → [...]."""
    support = confusion.sum(axis=-1)
    return _mean_where(np.diagonal(confusion, axis1=-2, axis2=-1), support, support > 0)


def accuracy(confusion: Array) -> Array:
    """Share of tiles that are right, [..., C, C] → [...]."""
    right = np.trace(confusion, axis1=-2, axis2=-1)
    share: Array = right / confusion.sum(axis=(-2, -1))
    return share


def macro_f1(confusion: Array) -> Array:
    """Mean F1 of the classes that are present or predicted, [..., C, C] → [...]."""
    total = confusion.sum(axis=-1) + confusion.sum(axis=-2)
    return _mean_where(2 * np.diagonal(confusion, axis1=-2, axis2=-1), total, total > 0)


def cohen_kappa(confusion: Array) -> Array:
    """Agreement beyond chance, classes without order (Cohen 1960), [..., C, C] → [...].

    Where chance alone agrees fully (one class, predicted throughout), it is 0.
    """
    total = confusion.sum(axis=(-2, -1))
    expected = (confusion.sum(axis=-1) * confusion.sum(axis=-2)).sum(axis=-1) / total**2
    observed = np.trace(confusion, axis1=-2, axis2=-1) / total
    room = 1 - expected
    kappa: Array = np.divide(observed - expected, room, out=np.zeros_like(room), where=room > 1e-12)
    return kappa


OF_VOTES: dict[str, Callable[[Array], Array]] = {
    "balanced_accuracy": balanced_accuracy,
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "kappa": cohen_kappa,
}
"""By name, the table's first. A class that a draw lacks leaves the mean of that draw, as in
scikit-learn, so no draw is thrown away."""

LOWER_IS_BETTER = frozenset({"ece", "brier", "nll"})


def metrics_of(
    outcome: Outcome, labels: Indices, groups: Indices, n_groups: int
) -> dict[str, Metric]:
    """Every metric that an outcome allows, by name.

    Args:
        outcome: of a probe, on N test tiles.
        labels: of the test tiles, [N].
        groups: indices of the tiles' groups, [N].
        n_groups: G.
    """
    confusions = grouped_confusion(labels, outcome.votes, groups, n_groups)
    found: dict[str, Metric] = {name: SummedMetric(confusions, f) for name, f in OF_VOTES.items()}
    if outcome.scores is not None:
        found["auroc"] = Ranking(outcome.scores, labels, groups, n_groups)
    if outcome.scores is not None and outcome.probabilities:
        found |= _calibration(outcome.scores.astype(np.float64), labels, groups, n_groups)
    for name, values in outcome.values.items():
        own = values[np.arange(len(labels)), labels].astype(np.float64)
        found[name] = _mean(own, groups, n_groups)
    return found


def _calibration(
    probabilities: Array, labels: Indices, groups: Indices, n_groups: int
) -> dict[str, Metric]:
    """Expected calibration error, Brier score and negative log-likelihood."""
    truth = np.eye(probabilities.shape[1])[labels]
    own = (probabilities * truth).sum(axis=1)
    return {
        "ece": calibration_error(probabilities, labels, groups, n_groups),
        "brier": _mean(((probabilities - truth) ** 2).sum(axis=1), groups, n_groups),
        "nll": _mean(-np.log(np.maximum(own, 1e-12)), groups, n_groups),
    }


def calibration_error(
    probabilities: Array, labels: Indices, groups: Indices, n_groups: int
) -> SummedMetric:
    """ECE: mean distance of confidence and accuracy over bins of confidence (Guo et al. 2017)."""
    bins, confidence, right = calibration_bins(probabilities, labels)
    sums = np.zeros((n_groups, CALIBRATION_BINS, 3))
    for column, values in enumerate((np.ones(len(labels)), confidence, right)):
        np.add.at(sums[:, :, column], (groups, bins), values)

    def error(summed: Array) -> Array:
        apart = np.abs(summed[..., 1] - summed[..., 2]).sum(axis=-1)
        value: Array = apart / summed[..., 0].sum(axis=-1)
        return value

    return SummedMetric(sums, error)


def calibration_bins(probabilities: Array, labels: Indices) -> tuple[Indices, Array, Array]:
    """Of each tile: the bin of its confidence, that confidence, and whether it is right (0, 1)."""
    confidence: Array = probabilities.max(axis=1)
    right = (probabilities.argmax(axis=1) == labels).astype(np.float64)
    bins = np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1
    return bins.clip(0, CALIBRATION_BINS - 1), confidence, right


def _mean(values: Array, groups: Indices, n_groups: int) -> SummedMetric:
    sums = np.zeros((n_groups, 2))
    np.add.at(sums, groups, np.stack([values, np.ones_like(values)], axis=1))
    return SummedMetric(sums, lambda summed: summed[..., 0] / summed[..., 1])


def _mean_where(numerator: Array, denominator: Array, present: npt.NDArray[np.bool_]) -> Array:
    """Mean over the last axis of numerator / denominator, where `present`."""
    ratio = np.divide(numerator, denominator, out=np.zeros_like(denominator), where=present)
    mean: Array = ratio.sum(axis=-1) / present.sum(axis=-1)
    return mean
