"""k-means from nothing: a start on a sample, Lloyd's iterations, and the labels of all rows.

The start is sought by one rank on `START_ROWS` rows a cluster and handed to the others, so it does
not depend on how many there are.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from eosin.data_curation.kmeans import Progress, assign, lloyd
from eosin.data_curation.kmeans_points import (
    ArrayPoints,
    Frame,
    largest_of,
    make_frame,
    sample_rows,
    share_of,
)
from eosin.data_curation.kmeans_start import start_centroids
from eosin.launch.process import World

START_ROWS = 128
"""Rows a cluster on which the start is sought, where there are so many."""


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How long and on how much k-means is fitted."""

    iterations: int = 25
    """Of Lloyd, at most."""
    tolerance: float = 1e-4
    """An iteration that lowers the inertia by a smaller share of it is the last."""
    points_per_centroid: int = 0
    """Rows a cluster on which centroids are fitted (0: all); all rows are assigned in the end."""
    seed: int = 0


@dataclass(frozen=True)
class Fitted:
    """A clustering of all rows."""

    frame: Frame
    centroids: NDArray[np.float32]
    """[K, D], in the frame."""
    points: ArrayPoints
    """This rank's rows."""
    labels: Tensor
    """int32 [N of this rank]."""
    inertia: float
    """Mean squared distance of the rows that were fitted on to the means of their clusters."""
    iterations: int
    repaired: int
    seconds: dict[str, float]
    """Of the start, of Lloyd, and of assigning all rows where only some were fitted."""


def fit(
    array: NDArray[np.floating],
    k: int,
    settings: FitSettings,
    *,
    world: World,
    device: torch.device,
    unit: bool = False,
    chunk_rows: int = 65_536,
    begin: Progress | None = None,
    save: Callable[[Progress], None] = lambda progress: None,
) -> Fitted:
    """Clusters the rows of `array`, float16 or float32 [N, D], in `k` clusters.

    `begin` and `save` are those of `kmeans.lloyd`; without `begin` a start is sought first.

    Equal on every rank but for `points` and `labels`, which are of the rank's rows.

    Raises:
        ValueError: fewer rows than clusters, or a value is not finite.
    """
    n = len(array)
    if n < k:
        raise ValueError(f"{n} rows cannot have {k} clusters")
    frame, mine = make_frame(array, unit, settings.seed), share_of(n, world)
    largest = largest_of(array, mine, frame, world)
    whole = ArrayPoints(array, mine, frame, device, largest, chunk_rows)
    began = time.monotonic()
    if begin is None:
        begin = Progress(_start(array, k, settings.seed, whole, frame, world))
        save(begin)
    started = time.monotonic()
    limit = settings.points_per_centroid * k
    fitted = n if not limit else min(n, limit)
    points = whole if fitted == n else _sampled(array, fitted, settings.seed, whole, frame, world)
    found = lloyd(
        points,
        begin,
        iterations=settings.iterations,
        tolerance=settings.tolerance,
        world=world,
        save=save,
    )
    ended = time.monotonic()
    labels = found.labels if fitted == n else assign(whole, found.centroids)
    return Fitted(
        frame=frame,
        centroids=found.centroids.cpu().numpy(),
        points=whole,
        labels=labels,
        inertia=found.inertia / fitted,
        iterations=found.progress.iterations,
        repaired=found.progress.repaired,
        seconds={
            "start": started - began,
            "lloyd": ended - started,
            "assign": time.monotonic() - ended,
        },
    )


def _start(
    array: NDArray[np.floating],
    k: int,
    seed: int,
    whole: ArrayPoints,
    frame: Frame,
    world: World,
) -> Tensor:
    """Centroids to start from, sought by rank 0."""
    centroids = torch.empty(k, whole.dim, device=whole.device)
    if world.leads:
        rows = sample_rows(len(array), min(len(array), START_ROWS * k), seed)
        sample = _held(array, rows, len(rows), frame, whole)
        centroids = start_centroids(sample, k, seed)
    if world.group is not None:
        dist.broadcast(centroids, 0, group=world.group)
    return centroids


def _sampled(
    array: NDArray[np.floating],
    rows: int,
    seed: int,
    whole: ArrayPoints,
    frame: Frame,
    world: World,
) -> ArrayPoints:
    """This rank's share of `rows` sampled rows, in memory."""
    share = share_of(rows, world)
    return _held(
        array, sample_rows(len(array), rows, seed)[share.start : share.stop], rows, frame, whole
    )


def _held(
    array: NDArray[np.floating],
    rows: NDArray[np.int64],
    n_total: int,
    frame: Frame,
    whole: ArrayPoints,
) -> ArrayPoints:
    """Some rows, read once and kept; `n_total` of all ranks."""
    points = ArrayPoints(
        np.asarray(array[rows]), range(len(rows)), frame, whole.device, whole.largest
    )
    points.n_total = n_total
    return points
