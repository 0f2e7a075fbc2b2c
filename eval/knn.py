"""Nearest neighbours, by three published protocols.

``knn/uni20@1``
    UNI's: features centred with the mean of the references and scaled to unit length, the majority
    of the 20 nearest (Euclidean). References are train and val: nothing is chosen.
``knn/dino@1``
    DINO's (Caron et al. 2021; Oquab et al. 2024): cosine, each neighbour weighted by the softmax of
    its cosine / 0.07 over the nearest 200; k of 10, 20, 100 and 200 by accuracy on val, then
    references are train and val.
``knn/thunder@1``
    THUNDER's: cosine, majority, k of 8 values by macro-F1 on val; references are train.

A vote goes to the class with the most weight, the lowest among equals. All k and both votes of one
set of neighbours are prefixes of one list.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from eosin.eval.metrics import accuracy, confusion_matrix, macro_f1
from eosin.eval.neighbours import centred, nearest
from eosin.eval.probe import Family, Labelled, Outcome, one_hot

PROTOCOL = "knn/uni20@1"
DINO = "knn/dino@1"
THUNDER = "knn/thunder@1"

NEIGHBOURS = 20
DINO_KS = (10, 20, 100, 200)
THUNDER_KS = (1, 3, 5, 10, 20, 30, 40, 50)
TEMPERATURE = 0.07

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Vote:
    """How neighbours are counted."""

    k: int
    most: int = 0
    """The softmax of weights is over so many of the nearest; 0: all count alike."""


def run(
    labelled: Labelled,
    test_features: npt.NDArray[np.float32],
    n_classes: int,
    seed: int,
    wanted: Sequence[str],
) -> dict[str, Outcome]:
    """See `Family`; `seed` is not used: there is no chance in it."""
    found = {}
    if PROTOCOL in wanted:
        found[PROTOCOL] = probe(labelled, test_features, n_classes, seed)
    train, val = labelled.only(~labelled.is_val), labelled.only(labelled.is_val)
    if DINO in wanted:
        options = [Vote(k, max(DINO_KS)) for k in DINO_KS]
        best = _best(options, train, val, n_classes, accuracy)
        found[DINO] = _outcome(best, labelled, test_features, n_classes)
    if THUNDER in wanted:
        best = _best([Vote(k) for k in THUNDER_KS], train, val, n_classes, macro_f1)
        found[THUNDER] = _outcome(best, train, test_features, n_classes)
    return found


def probe(
    labelled: Labelled, test_features: npt.NDArray[np.float32], n_classes: int, seed: int
) -> Outcome:
    """`PROTOCOL`."""
    references, queries = centred(labelled.features, test_features)
    moved = Labelled(
        features=references, labels=labelled.labels, is_val=labelled.is_val, device=labelled.device
    )
    return _outcome(Vote(NEIGHBOURS), moved, queries, n_classes)


def count_votes(
    queries: npt.NDArray[np.float32],
    references: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    n_classes: int,
    votes: Sequence[Vote],
    device: torch.device,
) -> list[Array]:
    """The share of each class among each query's neighbours, [N, C], for each way of counting.

    Args:
        queries: [N, D].
        references: [M, D].
        labels: of the references, [M].
        n_classes: C.
        votes: all are read off one list of neighbours.
        device: where to compute.
    """
    shares = [np.empty((len(queries), n_classes)) for _ in votes]
    most = max(max(vote.k, vote.most) for vote in votes)
    for found in nearest(queries, references, most, device):
        classes = labels[found.rows]  # [Q, k]
        rows = np.arange(len(classes))[:, None]
        for vote, share in zip(votes, shares, strict=True):
            weights = np.ones(classes[:, : vote.k].shape)
            if vote.most:
                pulls = found.similarities[:, : vote.most].astype(np.float64) / TEMPERATURE
                pulls = np.exp(pulls - pulls[:, :1])
                weights = (pulls / pulls.sum(axis=1, keepdims=True))[:, : vote.k]
            sums = np.zeros((len(classes), n_classes))
            np.add.at(sums, (rows, classes[:, : vote.k]), weights)
            share[found.queries] = sums / sums.sum(axis=1, keepdims=True)
    return shares


def _best(
    options: Sequence[Vote],
    train: Labelled,
    val: Labelled,
    n_classes: int,
    criterion: Callable[[Array], Array],
) -> Vote:
    shares = count_votes(
        val.features, train.features, train.labels, n_classes, options, train.device
    )
    scores = [
        float(criterion(confusion_matrix(val.labels, one_hot(s.argmax(axis=1), n_classes))))
        for s in shares
    ]
    return options[int(np.argmax(scores))]


def _outcome(
    vote: Vote, known: Labelled, queries: npt.NDArray[np.float32], n_classes: int
) -> Outcome:
    (shares,) = count_votes(queries, known.features, known.labels, n_classes, [vote], known.device)
    return Outcome(
        votes=one_hot(shares.argmax(axis=1), n_classes),
        scores=shares.astype(np.float32),
        chosen={"k": float(min(vote.k, len(known.labels)))},
    )


FAMILY = Family(
    protocols={
        PROTOCOL: "majority of the 20 nearest of train and val; features centred and of unit "
        "length",
        DINO: "the nearest of train and val by cosine, weighted by exp(cosine / 0.07); k of 10, "
        "20, 100, 200 by accuracy on val",
        THUNDER: "majority of the k nearest of train by cosine; k of 8 values up to 50 by macro-F1 "
        "on val",
    },
    run=run,
    usual=(PROTOCOL,),
)
