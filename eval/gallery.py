"""Tiles to look at: what a probe confuses, and what an encoder finds alike."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from eosin.eval.figures import tile_sheet
from eosin.eval.neighbours import centred, nearest
from eosin.eval.probe import Outcome
from eosin.eval.tasks import Task

PAIRS = 6
"""Pairs of classes that are shown, the most confused first."""
EXAMPLES = 10
QUERIES = 8
ANSWERS = 7

Features = npt.NDArray[np.float32]


def confused_tiles(task: Task, outcome: Outcome, path: Path) -> bool:
    """Writes the test tiles of the most confused pairs of classes; False where none is.

    Within a pair, tiles stand in the order in which they are given.
    """
    test = np.flatnonzero(task.splits == "test")
    labels, predictions = task.labels[test], outcome.predictions
    wrong = np.flatnonzero(labels != predictions)
    if not len(wrong):
        return False
    n = len(task.classes)
    pairs, counts = np.unique(labels[wrong] * n + predictions[wrong], return_counts=True)
    images, names = [], []
    for rank, index in enumerate(np.argsort(-counts, kind="stable")[:PAIRS]):
        true, said = divmod(int(pairs[index]), n)
        rows = wrong[(labels[wrong] == true) & (predictions[wrong] == said)]
        # evenly spaced, so that they come from several groups
        chosen = rows[np.unique(np.linspace(0, len(rows) - 1, EXAMPLES).round().astype(int))]
        for row in chosen:
            images.append(task.images[int(test[row])].read())
            names.append(f"{rank + 1} {task.classes[true]} → {task.classes[said]}")
    tile_sheet(images, names, path)
    return True


def found_tiles(
    task: Task, features: Features, path: Path, device: torch.device
) -> list[tuple[str, list[str]]]:
    """Writes test tiles, evenly over classes, each before its nearest of train and val.

    Returns:
        The class of each, and those of its answers.
    """
    test = np.flatnonzero(task.splits == "test")
    known = np.flatnonzero(task.splits != "test")
    asking: list[int] = []
    of_class = [test[task.labels[test] == c] for c in range(len(task.classes))]
    for turn in range(QUERIES):
        members = of_class[turn % len(of_class)]
        place = (turn // len(of_class) * 2 + 1) * len(members) // (2 * QUERIES)
        asking.append(int(members[min(place, len(members) - 1)]))
    references, queries = centred(features[known], features[np.array(asking)])
    images, names, told = [], [], []
    for found in nearest(queries, references, ANSWERS, device):
        for place, rows in zip(range(found.queries.start, found.queries.stop), found.rows,
                               strict=True):  # fmt: skip
            query = asking[place]
            answers = [int(known[row]) for row in rows]
            for tile in (query, *answers):
                images.append(task.images[tile].read())
                names.append(f"{place + 1} {task.classes[task.labels[query]]}")
            told.append(
                (task.classes[task.labels[query]], [task.classes[task.labels[a]] for a in answers])
            )
    tile_sheet(images, names, path, columns=ANSWERS + 1)
    return told


def principal_points(
    features: Features,
) -> tuple[npt.NDArray[np.float64], tuple[float, float]]:
    """The first two principal components [N, 2] of features [N, D], and their shares of variance.

    A component's sign is the one that makes its largest loading positive.
    """
    x = features.astype(np.float64)
    x -= x.mean(axis=0)
    values, vectors = np.linalg.eigh(x.T @ x)
    axes = vectors[:, ::-1][:, :2]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    points = x @ axes
    if points.shape[1] < 2:
        points = np.pad(points, [(0, 0), (0, 1)])
    shares = [*(values[::-1][:2] / max(values.sum(), 1e-300)), 0.0, 0.0]
    return points, (float(shares[0]), float(shares[1]))
