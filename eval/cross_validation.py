"""Nested cross-validation: what is said of each slide by heads that never saw its patient.

Legend: S slides, F outer and J inner folds, C outputs.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from eosin.eval.folds import Folds
from eosin.eval.heads.aims import Aim, Classes
from eosin.eval.heads.registry import HeadProtocol
from eosin.eval.heads.training import Bag, fit_members, map_of
from eosin.eval.probe import Labelled, Outcome, shares_of_runs
from eosin.eval.protocols import run_protocols


def cross_validate(
    head: HeadProtocol,
    bags: Sequence[Bag],
    aim: Aim,
    folds: Folds,
    seed: int,
    device: torch.device,
    name: str,
) -> tuple[npt.NDArray[np.float32], list[npt.NDArray[np.float32]], list[int]]:
    """What the heads of its fold say of each slide, all fitted in one pass over the bags.

    Returns:
        Outputs [S, J, C]; the map of each slide, as `map_of` makes it; the epochs that were chosen.
    """
    members = folds.members(seed)
    fitted = fit_members(head.make, bags, aim, members, head.recipe, seed, device, name)
    n_inner = len(members) // len(folds.inner)
    outputs = np.empty((len(bags), n_inner, aim.n_outputs), np.float32)
    weights: list[npt.NDArray[np.float32]] = [np.empty(0, np.float32)] * len(bags)
    for fold in range(len(folds.inner)):
        own = fitted[fold * n_inner : (fold + 1) * n_inner]
        for row in folds.test(fold).tolist():
            said = [member.ask(bags[row]) for member in own]
            outputs[row] = torch.stack([outputs_ for outputs_, _ in said]).numpy()
            weights[row] = map_of([w for _, w in said])
    return outputs, weights, [member.epoch for member in fitted]


def classify(
    head: HeadProtocol,
    bags: Sequence[Bag],
    labels: npt.NDArray[np.int64],
    n_classes: int,
    folds: Folds,
    seed: int,
    device: torch.device,
    name: str,
) -> tuple[Outcome, list[npt.NDArray[np.float32]]]:
    """The outcome of a head on all slides; the inner folds' heads of a slide are its runs."""
    aim = Classes(labels, n_classes)
    outputs, weights, epochs = cross_validate(head, bags, aim, folds, seed, device, name)
    probabilities = torch.from_numpy(outputs).softmax(dim=2).numpy()
    runs = probabilities.argmax(axis=2).T.astype(np.int16)  # [J, S]
    outcome = Outcome(
        votes=shares_of_runs(runs, n_classes),
        scores=probabilities.mean(axis=1),
        probabilities=True,
        runs=runs,
        chosen={"epoch": float(np.median(epochs))},
    )
    return outcome, weights


def classify_means(
    protocols: Sequence[str],
    means: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    n_classes: int,
    folds: Folds,
    seed: int,
    device: torch.device,
) -> dict[str, Outcome]:
    """Protocols of tiles on the mean features [S, D] of slides, fold by fold.

    Each outer fold chooses on the first of its inner folds.
    """
    parts: list[dict[str, Outcome]] = []
    for fold in range(len(folds.inner)):
        known = folds.outer != fold
        labelled = Labelled(
            features=means[known],
            labels=labels[known],
            is_val=folds.inner[fold][known] == 0,
            device=device,
        )
        ran = run_protocols(protocols, labelled, means[folds.test(fold)], n_classes, seed)
        parts.append({protocol: outcome for protocol, outcome, _ in ran})
    rows = np.concatenate([folds.test(fold) for fold in range(len(folds.inner))])
    return {name: _joined([part[name] for part in parts], rows) for name in parts[0]}


def _joined(parts: Sequence[Outcome], rows: npt.NDArray[np.int64]) -> Outcome:
    """Outcomes of the folds as one of all slides, whose parts stand in `rows`."""
    back = np.argsort(rows)

    def joined(values: Sequence[npt.NDArray[np.generic]], axis: int) -> npt.NDArray[np.generic]:
        return np.concatenate(values, axis=axis).take(back, axis=axis)

    scores = [part.scores for part in parts if part.scores is not None]
    runs = [part.runs for part in parts if part.runs is not None]
    return Outcome(
        votes=joined([part.votes for part in parts], 0).astype(np.float64),
        scores=joined(scores, 0).astype(np.float32) if len(scores) == len(parts) else None,
        probabilities=all(part.probabilities for part in parts),
        values={
            name: joined([part.values[name] for part in parts], 0).astype(np.float32)
            for name in parts[0].values
        },
        runs=joined(runs, 1).astype(np.int16) if len(runs) == len(parts) else None,
        chosen={
            name: float(np.median([part.chosen[name] for part in parts]))
            for name in parts[0].chosen
        },
    )
