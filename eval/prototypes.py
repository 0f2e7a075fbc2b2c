"""Class prototypes from all labelled tiles, ``prototypes/simpleshot@1``, as UNI has them.

Features are centred with the mean of train and val and scaled to unit length; a prototype is the
mean of a class (not scaled again); a tile goes to the nearest (Euclidean). Nothing is chosen.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from eosin.eval.neighbours import centred
from eosin.eval.probe import Family, Labelled, Outcome, normalise, one_hot

PROTOCOL = "prototypes/simpleshot@1"


def run(
    labelled: Labelled,
    test_features: npt.NDArray[np.float32],
    n_classes: int,
    seed: int,
    wanted: Sequence[str],
) -> dict[str, Outcome]:
    """Scores are minus half the squared distances; `seed` is not used."""
    known, queries = (normalise(x) for x in centred(labelled.features, test_features))
    prototypes = np.stack([known[labelled.labels == c].mean(axis=0) for c in range(n_classes)])
    scores = queries @ prototypes.T - (prototypes**2).sum(axis=1) / 2  # [N, C]
    return {PROTOCOL: Outcome(votes=one_hot(scores.argmax(axis=1), n_classes), scores=scores)}


FAMILY = Family(
    protocols={
        PROTOCOL: "the nearest mean of a class of train and val; features centred and of unit "
        "length"
    },
    run=run,
)
