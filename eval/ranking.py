"""The area under the ROC curve where groups count more than once, or not at all.

The area is the share of pairs (a tile of the class, a tile of another) in which the first scores
higher, a tie being half. With weights of groups it is ``Σ w_g w_h P[g, h]`` over the weights of all
pairs, where P counts the won pairs of group g's tiles of the class against group h's others: with P
made once, a resample costs G² and no sorting. With too many groups for that, each resample sums
weights along the sorted tiles. Shapes as in `metrics`.
"""

import numpy as np
import numpy.typing as npt

MOST_PAIRED_GROUPS = 300
"""Up to so many groups, won pairs are counted by pair of groups."""
_AT_ONCE = 4_000_000
"""Numbers in one block of weights along the tiles."""

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


class Ranking:
    """AUROC: of the second class where there are two; else the mean of one class against the rest.

    A class without tiles on either side in a row of weights leaves that row's mean.
    """

    def __init__(
        self, scores: npt.NDArray[np.float32], labels: Indices, groups: Indices, n_groups: int
    ) -> None:
        n_classes = scores.shape[1]
        classes = [1] if n_classes == 2 else list(range(n_classes))
        paired = n_groups <= MOST_PAIRED_GROUPS
        make = _PairedGroups if paired else _SortedTiles
        self._classes = [make(scores[:, c], labels == c, groups, n_groups) for c in classes]

    def __call__(self, weights: Array) -> Array:
        """Weights [B, G] to areas [B]; 0.5 where no class has tiles on both sides."""
        won, pairs = np.zeros(len(weights)), np.zeros(len(weights))
        for one in self._classes:
            numerator, denominator = one.count(weights)
            there = denominator > 0
            won += np.divide(numerator, denominator, out=np.zeros_like(won), where=there)
            pairs += there
        return np.divide(won, pairs, out=np.full_like(won, 0.5), where=pairs > 0)


class _PairedGroups:
    """One class: won pairs by group of the winner and group of the other."""

    def __init__(
        self,
        scores: npt.NDArray[np.float32],
        is_class: npt.NDArray[np.bool_],
        groups: Indices,
        n_groups: int,
    ) -> None:
        self._inside = np.bincount(groups[is_class], minlength=n_groups).astype(np.float64)
        self._outside = np.bincount(groups[~is_class], minlength=n_groups).astype(np.float64)
        ours, owners = scores[is_class], groups[is_class]
        self._won = np.zeros((n_groups, n_groups))
        for other in np.unique(groups[~is_class]).tolist():
            theirs = np.sort(scores[~is_class & (groups == other)])
            below = np.searchsorted(theirs, ours, "left") + np.searchsorted(theirs, ours, "right")
            np.add.at(self._won[:, other], owners, below / 2)

    def count(self, weights: Array) -> tuple[Array, Array]:
        """Won pairs and all pairs, [B] each."""
        won = ((weights @ self._won) * weights).sum(axis=1)
        return won, (weights @ self._inside) * (weights @ self._outside)


class _SortedTiles:
    """One class: its tiles and the others in the order of their scores."""

    def __init__(
        self,
        scores: npt.NDArray[np.float32],
        is_class: npt.NDArray[np.bool_],
        groups: Indices,
        n_groups: int,
    ) -> None:
        order = np.argsort(scores, kind="stable")
        ranked = scores[order]
        self._groups, self._is_class = groups[order], is_class[order]
        self._first = np.searchsorted(ranked, ranked, "left")
        self._last = np.searchsorted(ranked, ranked, "right")

    def count(self, weights: Array) -> tuple[Array, Array]:
        """Won pairs and all pairs, [B] each."""
        won, pairs = np.empty(len(weights)), np.empty(len(weights))
        rows = max(1, _AT_ONCE // max(len(self._groups), 1))
        inside = self._is_class
        for start in range(0, len(weights), rows):
            along = weights[start : start + rows][:, self._groups]  # [b, N]
            below = np.zeros((len(along), len(inside) + 1))
            np.cumsum(np.where(inside, 0.0, along), axis=1, out=below[:, 1:])
            beaten = (below[:, self._first[inside]] + below[:, self._last[inside]]) / 2
            ours = along[:, inside]
            won[start : start + rows] = (ours * beaten).sum(axis=1)
            pairs[start : start + rows] = ours.sum(axis=1) * below[:, -1]
        return won, pairs
