"""The labelled tiles that a training is scored on while it runs: train and val, never test.

They stand in a seeded order of whole groups of which every beginning is a small set of its own:
classes in proportion, and as many tiles of val as of train until val is used up, since what the
scores of two checkpoints differ by is hidden by too few tiles of val. So a run that affords fewer
tiles takes the first ones, the same at each of its probes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eosin.data_curation.embed import TileImage
from eosin.eval.tasks import Task
from eosin.launch.artefacts import stamp_of

LEAST_TILES = 200
"""A score on fewer says too little; where a set holds fewer, all of them."""


@dataclass(frozen=True, kw_only=True)
class ProbeTiles:
    """N tiles in the order in which they are taken."""

    images: list[TileImage]
    labels: npt.NDArray[np.int64]
    """[N], indices of classes."""
    is_val: npt.NDArray[np.bool_]
    """[N]: the tiles that are scored; the others are learnt from."""
    ends: npt.NDArray[np.int64]
    """After how many tiles a group ends, ascending, from the least that can be scored on to N."""
    n_classes: int
    digest: str
    """XXH3-128 of tiles, labels, splits and order: scores on equal sets can be compared."""

    def __len__(self) -> int:
        return len(self.images)

    def first(self, most: int) -> int:
        """The most tiles that are whole groups and not more than `most`; 0 where that is too few.

        A score on the first so many tiles has every class, in train and, if it is there, in val.
        """
        place = int(np.searchsorted(self.ends, most, "right"))
        return int(self.ends[place - 1]) if place else 0


def order_tiles(task: Task, seed: int, most: int = 0) -> ProbeTiles:
    """The tiles of train and val of a task, in the order of the seed.

    Args:
        task: with splits.
        seed: of the order.
        most: tiles that are kept at most; 0: all.
    """
    is_val = task.splits == "val"
    groups: dict[tuple[bool, str], list[int]] = {}
    for row in np.flatnonzero(task.splits != "test").tolist():
        groups.setdefault((bool(is_val[row]), task.groups[row]), []).append(row)
    strata: dict[tuple[bool, int], list[list[int]]] = {}
    for (val, _), rows in groups.items():  # in the order of tile_ids, whichever the table's
        most_frequent = int(np.bincount(task.labels[rows]).argmax())
        strata.setdefault((val, most_frequent), []).append(rows)
    generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
    in_split = {val: sum(len(r) for (v, _), r in groups.items() if v == val) for val in (0, 1)}
    placed: list[tuple[float, list[int]]] = []
    for stratum in sorted(strata):
        members = [strata[stratum][i] for i in generator.permutation(len(strata[stratum]))]
        sizes = np.array([len(rows) for rows in members])
        # where the group's middle lies in its class, as tiles of the split before it
        middles = (np.cumsum(sizes) - sizes / 2) * (in_split[stratum[0]] / sizes.sum())
        placed += zip(middles.tolist(), members, strict=True)
    placed.sort(key=lambda entry: (entry[0], entry[1][0]))
    order = np.concatenate([rows for _, rows in placed])
    ends = np.cumsum([len(rows) for _, rows in placed])
    first = _first_that_has_all(task.labels[order], is_val[order])
    ends = ends[ends >= max(first, min(LEAST_TILES, len(order)))]
    if most:
        ends = ends[: max(int(np.searchsorted(ends, most, "right")), 1)]
        order = order[: ends[-1]]
    return ProbeTiles(
        images=[task.images[row] for row in order],
        labels=task.labels[order],
        is_val=is_val[order],
        ends=ends,
        n_classes=len(task.classes),
        digest=stamp_of(task=task.digest, seed=seed, tiles=len(order)),
    )


def _first_that_has_all(labels: npt.NDArray[np.int64], is_val: npt.NDArray[np.bool_]) -> int:
    """Tiles after which every class of either split has come up."""
    _, first = np.unique(labels * 2 + is_val, return_index=True)
    return int(first.max()) + 1
