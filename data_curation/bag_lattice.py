"""On which lattice the tiles of a slide lie, from their corners alone; what cannot lie is refused.

Files of features carry corners and a footprint, and the two are often of different levels, rounded,
or collapsed, which nobody notices: the network still says something. Tiles lie a whole number of
steps apart, but each piece of tissue may have an origin of its own (CLAM lays a grid a contour).
So tiles are taken together by what is left of their corners modulo the step. Legend: N tiles.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eosin.configs.errors import InputError

TOLERANCE_PX = 1.0
"""Of corners that were rounded to whole pixels of level 0."""
MAX_ORIGINS = 64
"""Pieces of tissue with a grid of their own, at most."""
FEW_TILES = 8
"""With fewer, that they lie far apart says nothing."""
TILES_AN_ORIGIN = 4
"""Fewer tiles than this an origin are no lattice: any points lie on some."""


@dataclass(frozen=True)
class Lattice:
    """Where tiles lie."""

    cells: npt.NDArray[np.int32]
    """Column and row of each tile on the lattice of its origin, [N, 2]."""
    origin: npt.NDArray[np.int32]
    """Which origin each tile has, [N], from 1, in the order of the corners."""


def find_lattice(
    corners_px: npt.NDArray[np.float64],
    footprint_px: float,
    step_px: float,
    where: str,
    sparse: bool = False,
) -> Lattice:
    """The cells of tiles.

    Args:
        corners_px: top left, in level-0 pixels, [N, 2].
        footprint_px: side of a tile in level-0 pixels.
        step_px: from tile to tile, likewise: the footprint, less where tiles overlap.
        where: file, for messages.
        sparse: whether tiles may lie several steps apart everywhere.

    Raises:
        InputError: a corner is not a number, two tiles lie in one place, or they lie on no lattice
            of that step.
    """
    if not np.isfinite(corners_px).all():
        row = int(np.flatnonzero(~np.isfinite(corners_px).all(axis=1))[0])
        raise InputError(f"{where}: the corner of tile {row} is {corners_px[row].tolist()}")
    _refuse_twins(np.round(corners_px), where)
    found = common_step(corners_px)
    apart = 1 if found is None else max(1, round(found / step_px))
    if found is not None and abs(found - apart * step_px) > TOLERANCE_PX:
        raise InputError(
            f"{where}: tiles lie {found:g} level-0 px apart, which is no whole number of the "
            f"{step_px:g} px that their footprint ({footprint_px:g} px) and overlap say: corners "
            "and footprint are of different levels or scales; write the file again, or give "
            "footprint_px= or overlap_px="
        )
    cells, origin = _assign(corners_px, step_px, where)
    _refuse_twins(np.column_stack([cells, origin]), where)
    if not sparse and len(cells) >= FEW_TILES:
        shared = min(int(np.gcd.reduce(_from_first(cells, origin)[:, axis])) for axis in (0, 1))
        if shared > 1:
            raise InputError(
                f"{where}: every tile lies {shared} or more footprints of {footprint_px:g} px from "
                "the next, so the footprint is of another level; give footprint_px=, or "
                "sparse=true where tiles are meant to lie apart"
            )
    return Lattice(cells, origin)


def common_step(corners_px: npt.NDArray[np.float64]) -> float | None:
    """The most frequent distance of neighbours in a row or column of tiles; None without any."""
    steps = []
    for along, across in ((0, 1), (1, 0)):
        order = np.lexsort((corners_px[:, along], np.round(corners_px[:, across])))
        sorted_ = corners_px[order]
        same = np.diff(np.round(sorted_[:, across])) == 0
        steps.append(np.diff(sorted_[:, along])[same])
    joined = np.round(np.concatenate(steps))
    if not len(joined):
        return None
    values, counts = np.unique(joined, return_counts=True)
    return float(values[counts.argmax()])


def _from_first(
    cells: npt.NDArray[np.int32], origin: npt.NDArray[np.int32]
) -> npt.NDArray[np.int32]:
    """Cells from the first tile of their origin, [N, 2]."""
    firsts = np.unique(origin, return_index=True)[1]
    return cells - cells[firsts[origin - 1]]


def _assign(
    corners_px: npt.NDArray[np.float64], step: float, where: str
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    cells = np.zeros(corners_px.shape, np.int32)
    origin = np.zeros(len(corners_px), np.int32)
    left = np.lexsort((corners_px[:, 0], corners_px[:, 1]))
    for number in range(1, MAX_ORIGINS + 1):
        if not len(left):
            return cells, origin
        away = (corners_px[left] - corners_px[left[0]]) / step
        nearest = np.round(away)
        on = (np.abs(away - nearest) * step <= TOLERANCE_PX).all(axis=1)
        cells[left[on]], origin[left[on]] = nearest[on], number
        left = left[~on]
        if number * TILES_AN_ORIGIN > max(len(corners_px), 2 * TILES_AN_ORIGIN) and len(left):
            break
    if not len(left):
        return cells, origin
    raise InputError(
        f"{where}: {len(left)} of {len(corners_px)} tiles lie on no lattice of {step:g} level-0 px,"
        f" such as the one at {corners_px[left[0]].tolist()}: the corners are of another level or "
        "were spoilt; write the file again"
    )


def _refuse_twins(places: npt.NDArray[np.generic], where: str) -> None:
    kept, counts = np.unique(places, axis=0, return_counts=True)
    if len(kept) < len(places):
        raise InputError(
            f"{where}: {len(places)} tiles lie in {len(kept)} places, {counts.max()} of them in "
            f"the one at {kept[counts.argmax()][:2].tolist()}: two tiles cannot be one"
        )
