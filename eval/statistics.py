"""Metrics with intervals from a bootstrap over groups.

Tiles of one patient resemble each other: resampling tiles would make intervals far too narrow. So
the groups (patients, else slides) of the test split are drawn with replacement, and every score of
every encoder sees the same draws, which makes differences paired. A draw needs no predictions,
only how often each group was drawn: with one confusion matrix a group, all draws are one product.
Shapes: B draws, G groups, C classes; confusion matrices are [true, predicted].
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

FEW_GROUPS = 20
"""Below this many groups in the test split, percentile intervals are known to be too narrow."""

Array = npt.NDArray[np.float64]


def confusion_matrix(labels: npt.NDArray[np.int64], votes: Array) -> Array:
    """Votes [N, C] summed by true class: [C, C]."""
    one_group = np.zeros(len(labels), np.int64)
    total: Array = grouped_confusion(labels, votes, one_group, 1).sum(axis=0)
    return total


def grouped_confusion(
    labels: npt.NDArray[np.int64],
    votes: Array,
    groups: npt.NDArray[np.int64],
    n_groups: int,
) -> Array:
    """One confusion matrix a group, [G, C, C], from votes [N, C] and indices of groups [N]."""
    n_classes = votes.shape[1]
    sums: Array = np.zeros((n_groups * n_classes, n_classes))
    np.add.at(sums, groups * n_classes + labels, votes)
    return sums.reshape(n_groups, n_classes, n_classes)


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


METRICS: dict[str, Callable[[Array], Array]] = {
    "balanced_accuracy": balanced_accuracy,
    "accuracy": accuracy,
    "macro_f1": macro_f1,
}
"""By name, the table's first. A class that a draw lacks leaves the mean of that draw, as in
scikit-learn, so no draw is thrown away."""


def draw_groups(n_groups: int, draws: int, seed: int) -> Array:
    """How often each group is in each resample, [B, G]; rows sum to G."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    return generator.multinomial(n_groups, np.full(n_groups, 1 / n_groups), draws).astype(float)


def resample(confusions: Array, draws: Array, metric: Callable[[Array], Array]) -> Array:
    """The metric in every draw [B], from confusion matrices [G, C, C] and draws [B, G]."""
    n_groups, n_classes, _ = confusions.shape
    drawn = draws @ confusions.reshape(n_groups, -1)
    return metric(drawn.reshape(-1, n_classes, n_classes))


def interval(values: Array) -> tuple[float, float]:
    """The central 95 % of resampled values (percentile interval)."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _mean_where(numerator: Array, denominator: Array, present: npt.NDArray[np.bool_]) -> Array:
    """Mean over the last axis of numerator / denominator, where `present`."""
    ratio = np.divide(numerator, denominator, out=np.zeros_like(denominator), where=present)
    mean: Array = ratio.sum(axis=-1) / present.sum(axis=-1)
    return mean
