"""Which prints are compared: a cluster with itself and its neighbours, or all with all."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from eosin.configs.errors import InputError
from eosin.data_curation.cluster_config import TABLE_NAME
from eosin.data_curation.features import FeatureStore
from eosin.data_curation.manifest import CLUSTERS, open_table


def blocks(
    clusters: Path | None, neighbours: int, store: FeatureStore, rows: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows to be compared among themselves, and those that they are compared with besides.

    Args:
        clusters: folder of `eosin cluster`; None: one block of all rows.
        neighbours: clusters near each cluster that it is compared with.
        store: of prints.
        rows: of the store that take part.

    Raises:
        InputError: the clusters are of other tiles.
    """
    if clusters is None:
        yield rows, rows[:0]
        return
    label = _labels(clusters, store)[rows]
    order = np.argsort(label, kind="stable")
    bounds = np.searchsorted(label[order], np.arange(int(label.max()) + 2))
    members = [rows[order[low:high]] for low, high in itertools.pairwise(bounds)]
    for cluster, others in enumerate(_neighbours(clusters, neighbours, len(members))):
        if len(members[cluster]):
            near = [members[other] for other in others if other < len(members)]
            yield members[cluster], np.concatenate([rows[:0], *near])


def _labels(clusters: Path, store: FeatureStore) -> NDArray[np.int64]:
    """The finest cluster of each print."""
    table = open_table(clusters / TABLE_NAME, CLUSTERS).read(["tile_id", "level_1"])
    ids = store.rows["tile_id"].combine_chunks()
    place = pc.index_in(ids, table["tile_id"].combine_chunks())
    if place.null_count:
        lost = ids.filter(place.is_null())[0].as_py()
        raise InputError(f"{clusters} lacks '{lost}' of the prints; cluster the same tiles")
    labels = table["level_1"].combine_chunks().take(place)
    return np.asarray(labels.to_numpy(), np.int64)


def _neighbours(clusters: Path, neighbours: int, count: int) -> list[list[int]]:
    """Of each cluster the later ones that are near it, or that it is near: each pair once."""
    centroids = torch.from_numpy(np.load(clusters / "centroids_1.npy"))
    pairs = set()
    k = min(neighbours + 1, len(centroids))
    for start in range(0, len(centroids), 1024):
        apart = torch.cdist(centroids[start : start + 1024], centroids)
        for row, others in enumerate(apart.topk(k, largest=False).indices.tolist(), start):
            pairs |= {(min(row, o), max(row, o)) for o in others if o != row}
    found: list[list[int]] = [[] for _ in range(count)]
    for one, other in sorted(pairs):
        if one < count:
            found[one].append(other)
    return found
