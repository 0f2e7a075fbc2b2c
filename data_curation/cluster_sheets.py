"""What stands for a cluster on a page: its nearest, median and farthest tiles, as one picture."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from eosin.data_curation.records import Failure

RGB = NDArray[np.uint8]
KINDS = ("nearest", "median", "farthest")
_QUALITY = 82
_GAP_PX = 2
_MISSING = (228, 226, 232)  # a cell whose tile cannot be read; the page says so


@dataclass(frozen=True, eq=False)
class Sheet:
    """The chosen tiles of a cluster."""

    rows: list[list[int]]
    """Of each kind in `KINDS`, rows of the cluster table; nearest first."""
    jpeg: bytes
    """A picture, a kind a row."""
    width_px: int
    height_px: int
    failed: dict[int, str]
    """Row and reason of what could not be read."""


def choose(distance: NDArray[np.float32], count: int) -> list[list[int]]:
    """Places of the nearest, the median and the farthest tiles by distance, each at most once.

    Args:
        distance: [N], of one cluster's tiles to its centre.
        count: of each kind; of a small cluster the nearest go first, then the farthest.
    """
    order = np.argsort(distance, kind="stable")
    near, far = order[:count], order[count:][-count:]
    between = order[len(near) : len(order) - len(far)]
    middle = max(0, (len(between) - count) // 2)
    chosen = (near, between[middle : middle + count], far)
    return [[int(place) for place in places] for places in chosen]


def draw_sheet(
    rows: list[list[int]],
    read: Callable[[int], RGB | Failure],
    count: int,
    thumb_px: int,
    pool: ThreadPoolExecutor,
) -> Sheet:
    """Reads the tiles and lays them out, `count` a row, each as a square of `thumb_px`.

    Args:
        rows: of each kind, what `read` takes.
        read: a row's tile RGB uint8 [H, W, 3], or why there is none; called from threads.
        count: places of a row.
        thumb_px: side of a place; between two are 2 px.
        pool: that reads.
    """
    step = thumb_px + _GAP_PX
    sheet = np.full((len(rows) * step - _GAP_PX, count * step - _GAP_PX, 3), 255, np.uint8)
    failed = {}
    places = [
        (row, column, item) for row, kind in enumerate(rows) for column, item in enumerate(kind)
    ]
    for (row, column, item), tile in zip(
        places, pool.map(read, [p[2] for p in places]), strict=True
    ):
        cell = sheet[row * step : row * step + thumb_px, column * step : column * step + thumb_px]
        if isinstance(tile, Failure):
            failed[item] = tile.reason
            cell[:] = _MISSING
        else:
            cell[:] = _square(tile, thumb_px)
    jpeg = simplejpeg.encode_jpeg(sheet, quality=_QUALITY, colorsubsampling="444")
    return Sheet(rows, jpeg, sheet.shape[1], sheet.shape[0], failed)


def _square(tile: RGB, side_px: int) -> RGB:
    """The tile with its longer side made `side_px`, on white."""
    height, width = tile.shape[:2]
    scale = side_px / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    square = np.full((side_px, side_px, 3), 255, np.uint8)
    square[: size[1], : size[0]] = cv2.resize(tile, size, interpolation=how)
    return square
