"""Levels of clusters: k-means on the centroids of the level below, with resampling.

Clustering centroids, each counting once, flattens the density of the tiles: the frequent kind of
tissue has many fine clusters and few coarse ones (Vo et al. 2024, arXiv 2405.15613). Each
resampling takes the rows closest to every centroid, fits k-means to those alone, and assigns all
rows to the result; after the first fit there are `resamples` of them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from eosin.data_curation.kmeans import assign, distances
from eosin.data_curation.kmeans_fit import FitSettings, Fitted, fit
from eosin.launch.process import World


@dataclass(frozen=True)
class Level:
    """One level above the first."""

    centroids: NDArray[np.float32]
    """[K, D], in the space of the features."""
    parents: NDArray[np.int32]
    """[K of the level below], the cluster of each of its centroids."""


def build_level(
    below: NDArray[np.float32],
    k: int,
    settings: FitSettings,
    *,
    resamples: int,
    closest: int,
    device: torch.device,
) -> Level:
    """Clusters the centroids of the level below; for one process.

    Args:
        below: float32 [n, D].
        k: clusters, fewer than n.
        settings: of every fit; a resampling's seed is its number further.
        resamples: how often.
        closest: rows taken of each cluster at a resampling; 0: half of the mean cluster's rows.
        device: where.

    Raises:
        ValueError: fewer rows than clusters.
    """
    found = _fit(below, k, settings, device)
    taken = closest or max(1, len(below) // (2 * k))
    for number in range(1, resamples + 1):
        rows = closest_rows(found, taken)
        if len(rows) < k:
            break  # some cluster is empty: there are fewer different centroids than k
        again = FitSettings(
            iterations=settings.iterations,
            tolerance=settings.tolerance,
            seed=settings.seed + number,
        )
        sampled = _fit(below[rows], k, again, device)
        centroids = torch.from_numpy(sampled.centroids + sampled.frame.centre - found.frame.centre)
        centroids = centroids.to(device)
        labels = assign(found.points, centroids)
        found = Fitted(
            frame=found.frame,
            centroids=centroids.cpu().numpy(),
            points=found.points,
            labels=labels,
            inertia=sampled.inertia,
            iterations=sampled.iterations,
            repaired=sampled.repaired,
            seconds=sampled.seconds,
        )
    return Level(centroids=found.centroids + found.frame.centre, parents=found.labels.cpu().numpy())


def closest_rows(found: Fitted, taken: int) -> NDArray[np.int64]:
    """The `taken` rows closest to each centroid (all of a smaller cluster), in rising order."""
    centroids = torch.from_numpy(found.centroids).to(found.points.device)
    apart = distances(found.points, centroids, found.labels).cpu().numpy()
    labels = found.labels.cpu().numpy()
    order = np.lexsort((np.arange(len(labels)), apart, labels))
    ordered = labels[order]
    first = np.searchsorted(ordered, ordered)  # where the cluster of each begins
    rank = np.arange(len(order)) - first
    return np.sort(order[rank < taken])


def _fit(rows: NDArray[np.float32], k: int, settings: FitSettings, device: torch.device) -> Fitted:
    return fit(rows, k, settings, world=World(), device=device)
