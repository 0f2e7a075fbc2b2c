"""Nearest neighbours ``knn/uni20@1``, as UNI evaluates them.

Features are centred with the mean of the reference tiles and scaled to unit length; each test tile
takes the majority of its 20 nearest references (Euclidean), the lowest label among equals. The
references are all labelled tiles that are not test (train and val): nothing is chosen.
"""

import numpy as np
import numpy.typing as npt

from eosin.eval.probe import Labelled, Outcome, normalise, one_hot

PROTOCOL = "knn/uni20@1"
DESCRIPTION = "majority of the 20 nearest of train and val; features centred and of unit length"

NEIGHBOURS = 20
CHUNK = 1024
"""Test tiles whose similarities are held at a time."""


def probe(
    labelled: Labelled, test_features: npt.NDArray[np.float32], n_classes: int, seed: int
) -> Outcome:
    """Votes of the nearest references; `seed` is not used: there is no chance in it."""
    centre = labelled.features.mean(axis=0, dtype=np.float64).astype(np.float32)
    references = normalise(labelled.features - centre)
    queries = normalise(test_features - centre)
    k = min(NEIGHBOURS, len(references))
    predictions = np.concatenate(
        [
            _vote(queries[start : start + CHUNK], references, labelled.labels, k, n_classes)
            for start in range(0, len(queries), CHUNK)
        ]
    )
    return Outcome(votes=one_hot(predictions, n_classes), chosen={"k": float(k)})


def _vote(
    queries: npt.NDArray[np.float32],
    references: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    k: int,
    n_classes: int,
) -> npt.NDArray[np.int64]:
    similarity = queries @ references.T  # [Q, N]; on unit vectors, its order is that of distance
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    counts = np.zeros((len(queries), n_classes), np.int64)
    np.add.at(counts, (np.arange(len(queries))[:, None], labels[nearest]), 1)
    winners: npt.NDArray[np.int64] = counts.argmax(axis=1)
    return winners
