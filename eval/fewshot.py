"""Few-shot prototypes ``fewshot/simpleshot@1``: SimpleShot with UNI's semantics, in products.

An episode draws S tiles a class from train and val without replacement; support and queries are
centred with the mean of the SUPPORT and scaled to unit length; a prototype is the mean of a
class's support (not scaled again); every test tile goes to the nearest prototype (Euclidean).
There are `EPISODES` episodes, drawn from (seed, episode) alone, so every encoder meets the same.
S is the largest of `SHOTS` that every class affords.

A tile's votes are its shares of episodes. Balanced accuracy and accuracy of votes are exactly the
means over the episodes, and a bootstrap over groups of votes is one of those means; macro-F1 is
that of the pooled episodes.
"""

import numpy as np
import numpy.typing as npt

from eosin.eval.probe import Labelled, Outcome, normalise

PROTOCOL = "fewshot/simpleshot@1"
DESCRIPTION = (
    "nearest of prototypes from up to 16 tiles a class of train and val; mean of 1000 episodes"
)

SHOTS = (16, 8, 4, 2, 1)
EPISODES = 1000
CHUNK = 32
"""Episodes whose similarities are held at a time."""


def probe(
    labelled: Labelled, test_features: npt.NDArray[np.float32], n_classes: int, seed: int
) -> Outcome:
    """Votes of all episodes."""
    members = [np.flatnonzero(labelled.labels == label) for label in range(n_classes)]
    shots = next(s for s in SHOTS if s <= min(map(len, members)))
    supports = draw_supports(members, shots, seed)  # [E, C, S]
    # Distances do not change with the origin; at the mean, float32 loses the least.
    origin = labelled.features.mean(axis=0, dtype=np.float64).astype(np.float32)
    references, queries = labelled.features - origin, test_features - origin
    counts = np.zeros((len(queries), n_classes))
    for start in range(0, EPISODES, CHUNK):
        nearest = _nearest(references, queries, supports[start : start + CHUNK])  # [e, Q]
        for predictions in nearest:
            counts[np.arange(len(queries)), predictions] += 1
    return Outcome(votes=counts / EPISODES, chosen={"shots": float(shots)})


def draw_supports(
    members: list[npt.NDArray[np.intp]], shots: int, seed: int
) -> npt.NDArray[np.intp]:
    """Rows drawn for the support of every episode, [E, C, S]; `members` are the rows of a class."""
    supports = np.empty((EPISODES, len(members), shots), np.intp)
    for episode in range(EPISODES):
        generator = np.random.Generator(np.random.Philox(key=[seed, episode]))
        for label, rows in enumerate(members):
            supports[episode, label] = generator.choice(rows, shots, replace=False)
    return supports


def _nearest(
    references: npt.NDArray[np.float32],
    queries: npt.NDArray[np.float32],
    supports: npt.NDArray[np.intp],
) -> npt.NDArray[np.intp]:
    """The nearest prototype of every query in every one of e episodes, [e, Q].

    With q' = (q - m) / |q - m|, argmin |q' - p|² = argmax (q·p - m·p) / |q - m| - |p|² / 2, and
    |q - m|² = |q|² - 2 q·m + |m|²: one product of the queries with all p and m does it.
    """
    episodes, n_classes, shots = supports.shape
    support = references[supports]  # [e, C, S, D]
    means = support.mean(axis=(1, 2))  # [e, D]
    centred = (support - means[:, None, None]).reshape(episodes * n_classes * shots, -1)
    prototypes = normalise(centred).reshape(support.shape).mean(axis=2)  # [e, C, D]
    along_means = means @ queries.T  # [e, Q]
    along_prototypes = (prototypes.reshape(episodes * n_classes, -1) @ queries.T).reshape(
        episodes, n_classes, -1
    )  # [e, C, Q]
    squared = (queries**2).sum(axis=1) - 2 * along_means + (means**2).sum(axis=1)[:, None]
    lengths = np.sqrt(np.maximum(squared, np.finfo(np.float32).tiny))  # [e, Q]
    offsets = np.einsum("ed,ecd->ec", means, prototypes)
    margins = (along_prototypes - offsets[:, :, None]) / lengths[:, None]
    margins -= (prototypes**2).sum(axis=2)[:, :, None] / 2
    nearest: npt.NDArray[np.intp] = margins.argmax(axis=1)
    return nearest
