"""What a probe loses when class and origin go together in what it is fitted on: PathoROB's APD.

Two classes and two origins, those of which the labelled tiles hold the most. A probe is fitted on
as many tiles of both classes each time, but in more and more of them a class comes from one origin:
at level r, (1 + r) / 2 of them. It is asked about test tiles of both classes from both origins. The
average performance drop is the mean over levels above 0 of its balanced accuracy relative to level
0, less 1, averaged over repeats (PathoROB 46594e9, ``apd``): 0 is robust, -0.5 a coin after full
success.

What is not PathoROB's: its splits are fixed tables of its own datasets; here tiles are drawn from
the task's train and val, from (seed, repeat, level), and test is the task's test split.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from eosin.eval.linear import GRID, choose_and_fit
from eosin.eval.metrics import balanced_accuracy, confusion_matrix
from eosin.eval.probe import Labelled

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
REPEATS = 20
FEWEST = 10
"""Labelled tiles, and test tiles, that each class must have from each origin."""
MOST = 400
"""Tiles of a class that are drawn from an origin at most."""

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Shortcut:
    """See the module."""

    apd: float
    accuracies: list[float]
    """Mean balanced accuracy at each of `LEVELS`."""
    classes: list[int]
    origins: list[str]


def shortcut(
    features: npt.NDArray[np.float32],
    labels: Indices,
    origins: Sequence[str],
    is_test: npt.NDArray[np.bool_],
    seed: int,
    device: torch.device,
) -> Shortcut | None:
    """The drop; None where no two classes come from the same two origins often enough.

    Args:
        features: of all tiles, [N, D].
        labels: [N].
        origins: of each tile.
        is_test: [N].
        seed: of the draws.
        device: where to compute.
    """
    names, origin = np.unique(np.asarray(origins), return_inverse=True)
    chosen = _square(labels, origin, is_test)
    if chosen is None:
        return None
    classes, places = chosen
    within = np.isin(labels, classes) & np.isin(origin, places)
    asked = np.flatnonzero(within & is_test)
    truth = (labels[asked] == classes[1]).astype(np.int64)
    cells = {
        (c, o): np.flatnonzero(~is_test & (labels == classes[c]) & (origin == places[o]))
        for c in (0, 1)
        for o in (0, 1)
    }
    n = min(MOST, *(len(rows) for rows in cells.values()))
    scores = np.zeros((len(LEVELS), REPEATS))
    for level, share in enumerate(LEVELS):
        for repeat in range(REPEATS):
            generator = np.random.Generator(np.random.Philox(key=[seed, 1000 * repeat + level]))
            rows, is_val = _draw(cells, n, share, generator)
            labelled = Labelled(
                features=features[rows],
                labels=(labels[rows] == classes[1]).astype(np.int64),
                is_val=is_val,
                device=device,
            )
            outcome = choose_and_fit(labelled, features[asked], 2, GRID)
            confusion = confusion_matrix(truth, outcome.votes)
            scores[level, repeat] = float(balanced_accuracy(confusion))
    return Shortcut(
        apd=drop(scores),
        accuracies=[float(score) for score in scores.mean(axis=1)],
        classes=[int(c) for c in classes],
        origins=[str(names[o]) for o in places],
    )


def drop(scores: npt.NDArray[np.float64]) -> float:
    """APD of balanced accuracies [levels, repeats], the first level without correlation."""
    return float((scores[1:] / scores[0]).mean() - 1)


def _square(
    labels: Indices, origin: Indices, is_test: npt.NDArray[np.bool_]
) -> tuple[Indices, Indices] | None:
    """The two classes and two origins whose scarcest combination is the most frequent."""
    n_classes, n_origins = int(labels.max()) + 1, int(origin.max()) + 1
    counts = np.zeros((2, n_classes, n_origins), np.int64)
    np.add.at(counts, (is_test.astype(int), labels, origin), 1)
    best, found = FEWEST - 1, None
    for a in range(n_classes):
        for b in range(a + 1, n_classes):
            least = counts[:, [a, b]].min(axis=(0, 1))  # [O], over splits and both classes
            first, second = np.sort(np.argsort(-least, kind="stable")[:2])
            if min(least[first], least[second]) > best:
                best = int(min(least[first], least[second]))
                found = np.array([a, b]), np.array([first, second])
    return found


def _draw(
    cells: dict[tuple[int, int], npt.NDArray[np.intp]],
    n: int,
    share: float,
    generator: np.random.Generator,
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    """Rows, and which of them are val: every fifth of a cell, one of each class at least."""
    together, apart = round(n * (1 + share) / 2), round(n * (1 - share) / 2)
    rows, is_val = [], []
    for (c, o), members in cells.items():
        drawn = generator.permutation(members)[: together if c == o else apart]
        rows.append(drawn)
        is_val.append(np.arange(len(drawn)) % 5 == 0)
    return np.concatenate(rows), np.concatenate(is_val)
