"""Few-shot prototypes: SimpleShot with UNI's semantics, in products.

An episode draws S tiles a class from train and val without replacement; support and queries are
centred with the mean of the SUPPORT and scaled to unit length; a prototype is the mean of a
class's support (not scaled again); every test tile goes to the nearest prototype (Euclidean).
There are `EPISODES` episodes, drawn from (seed, episode) alone, so every encoder meets the same.

``fewshot/simpleshot@1``
    mean over the episodes; S is the largest of `SHOTS` up to 16 that every class affords.
``fewshot/simpleshot-S@1``
    the same with S = 1, 2, 4 … 256 tiles a class; left out where a class has fewer.
``fewshot/thunder-vote@1``
    what the majority of those episodes says of each tile, with S as in the first: an ensemble of
    1,000, and no mean over them. THUNDER reports this; it is not comparable with the others.

A tile's votes are its shares of episodes. Balanced accuracy and accuracy of votes are exactly the
means over the episodes, and a bootstrap over groups of votes is one of those means; macro-F1 and
kappa are those of the pooled episodes.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eosin.eval.probe import Family, Labelled, Outcome, normalise, one_hot, shares_of_runs

PROTOCOL = "fewshot/simpleshot@1"
VOTE = "fewshot/thunder-vote@1"

SHOTS = (256, 128, 64, 32, 16, 8, 4, 2, 1)
USUAL_SHOTS = 16
EPISODES = 1000
AT_ONCE = 2_000_000
"""Similarities that are held at a time."""


def protocol_of(shots: int) -> str:
    """The name of the protocol with so many tiles a class."""
    return f"fewshot/simpleshot-{shots}@1"


def run(
    labelled: Labelled,
    test_features: npt.NDArray[np.float32],
    n_classes: int,
    seed: int,
    wanted: Sequence[str],
) -> dict[str, Outcome]:
    """See `Family`; without the protocols that the smallest class does not afford."""
    affords = int(np.bincount(labelled.labels, minlength=n_classes).min())
    usual = next(shots for shots in SHOTS if shots <= min(affords, USUAL_SHOTS))
    users: dict[int, list[str]] = {}
    for name in wanted:
        named = next((s for s in SHOTS if protocol_of(s) == name), usual)
        if named <= affords:
            users.setdefault(named, []).append(name)
    found = {}
    for shots, names in users.items():
        runs = episodes(labelled, test_features, n_classes, shots, seed)
        votes = shares_of_runs(runs, n_classes)
        for name in names:
            chosen = {"shots": float(shots)}
            if name == VOTE:
                votes_of_all = one_hot(votes.argmax(axis=1), n_classes)
                found[name] = Outcome(votes=votes_of_all, chosen=chosen)
            else:
                found[name] = Outcome(votes=votes, runs=runs, chosen=chosen)
    return found


def probe(
    labelled: Labelled, test_features: npt.NDArray[np.float32], n_classes: int, seed: int
) -> Outcome:
    """`PROTOCOL`."""
    return run(labelled, test_features, n_classes, seed, [PROTOCOL])[PROTOCOL]


def episodes(
    labelled: Labelled,
    test_features: npt.NDArray[np.float32],
    n_classes: int,
    shots: int,
    seed: int,
) -> npt.NDArray[np.int16]:
    """What every episode says of every test tile, [E, Q]."""
    members = [np.flatnonzero(labelled.labels == label) for label in range(n_classes)]
    supports = draw_supports(members, shots, seed)  # [E, C, S]
    # Distances do not change with the origin; at the mean, float32 loses the least.
    origin = labelled.features.mean(axis=0, dtype=np.float64).astype(np.float32)
    references = labelled.features - origin
    queries = torch.from_numpy(test_features - origin).to(labelled.device)
    squares = queries.square().sum(dim=1)
    together = max(1, AT_ONCE // (len(queries) * n_classes))
    runs = np.empty((EPISODES, len(queries)), np.int16)
    for start in range(0, EPISODES, together):
        means, prototypes = _prototypes(references[supports[start : start + together]])
        found = _nearest(
            queries,
            squares,
            torch.from_numpy(means).to(labelled.device),
            torch.from_numpy(prototypes).to(labelled.device),
        )
        runs[start : start + together] = found.cpu().numpy()
    return runs


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


def _prototypes(
    support: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Means [e, D] of the supports [e, C, S, D], and their prototypes around those, [e, C, D]."""
    means = support.mean(axis=(1, 2))
    centred = support - means[:, None, None]
    unit = normalise(centred.reshape(-1, support.shape[-1])).reshape(support.shape)
    return means, unit.mean(axis=2)


def _nearest(queries: Tensor, squares: Tensor, means: Tensor, prototypes: Tensor) -> Tensor:
    """The nearest prototype of every query in every one of e episodes, [e, Q].

    With q' = (q - m) / |q - m|, argmin |q' - p|² = argmax (q·p - m·p) / |q - m| - |p|² / 2, and
    |q - m|² = |q|² - 2 q·m + |m|²: one product of the queries with all p and m does it.
    """
    e, n_classes, dim = prototypes.shape
    along_means = means @ queries.T  # [e, Q]
    margins = (prototypes.view(e * n_classes, dim) @ queries.T).view(e, n_classes, -1)  # [e, C, Q]
    squared = squares - 2 * along_means + means.square().sum(dim=1, keepdim=True)
    lengths = squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt()
    margins -= torch.einsum("ed,ecd->ec", means, prototypes)[:, :, None]
    margins /= lengths[:, None]
    margins -= prototypes.square().sum(dim=2)[:, :, None] / 2
    return margins.argmax(dim=1)


FAMILY = Family(
    protocols={
        PROTOCOL: "nearest of prototypes from up to 16 tiles a class of train and val; mean of "
        "1000 episodes",
        **{
            protocol_of(shots): f"nearest of prototypes from {shots} tiles a class of train and "
            "val; mean of 1000 episodes"
            for shots in reversed(SHOTS)
        },
        VOTE: "the majority of the 1000 episodes of fewshot/simpleshot@1 on each tile: an ensemble",
    },
    run=run,
    usual=(PROTOCOL,),
)
