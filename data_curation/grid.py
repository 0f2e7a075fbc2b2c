"""The grid of tiles on a slide: where each cell lies, in exact level-0 coordinates.

A cell is a pure function of its column and row, the scan's mpp and the request. It does not depend
on the tissue mask, so two masks, or two thresholds, name the same tiles.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.float64]

_EDGE_PX = 1e-6
"""Float noise forgiven, in level-0 pixels, when a last cell ends on the slide's edge."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Whole cells only: ``columns × rows`` of them, none reaching beyond the scanned area."""

    origin_px: tuple[float, float]
    """Top left corner of the scanned area, in level-0 pixels."""
    cell_px: tuple[float, float]
    """Width and height of a cell in level-0 pixels; a fraction as a rule."""
    step_px: tuple[float, float]
    """Distance between the corners of neighbouring cells in level-0 pixels."""
    columns: int
    rows: int

    def __len__(self) -> int:
        return self.columns * self.rows

    def corners_px(self) -> _Array:
        """Top left corners [rows, columns, 2] as (x, y) in level-0 pixels.

        Each is computed from its index, so there is no accumulated rounding.
        """
        x = self.origin_px[0] + np.arange(self.columns) * self.step_px[0]
        y = self.origin_px[1] + np.arange(self.rows) * self.step_px[1]
        return np.stack(np.meshgrid(x, y), axis=-1)

    def fractions(self, mask: NDArray[np.bool_], pixel_px: tuple[float, float]) -> _Array:
        """Share of each cell that `mask` covers, exactly, by its summed-area table.

        Args:
            mask: bool [h, w] over the scanned area, its first pixel at `origin_px`.
            pixel_px: width and height of a mask pixel in level-0 pixels.

        Returns:
            float64 [rows, columns] in [0, 1]; mask pixels that a cell's edge cuts count in part.
        """
        table = np.asarray(cv2.integral(mask.astype(np.uint8), sdepth=cv2.CV_64F), np.float64)
        cell = (self.cell_px[0] / pixel_px[0], self.cell_px[1] / pixel_px[1])
        left: _Array = np.arange(self.columns, dtype=np.float64) * self.step_px[0] / pixel_px[0]
        top: _Array = np.arange(self.rows, dtype=np.float64) * self.step_px[1] / pixel_px[1]
        wide = _at(table, left + cell[0], axis=1) - _at(table, left, axis=1)
        covered = _at(wide, top + cell[1], axis=0) - _at(wide, top, axis=0)
        return np.clip(covered / (cell[0] * cell[1]), 0.0, 1.0)


def make_grid(
    bounds_px: tuple[int, int, int, int],
    scan_mpp: tuple[float, float],
    *,
    mpp: float,
    size_px: int,
    step_px: int,
) -> Grid:
    """The grid of `size_px` tiles at `mpp`, every `step_px` tile pixels, over a scanned area.

    Args:
        bounds_px: x, y, width, height of the scanned area in level-0 pixels.
        scan_mpp: µm per level-0 pixel (x, y).
        mpp: µm per tile pixel.
        size_px: side of a tile in tile pixels.
        step_px: from one tile to the next in tile pixels.
    """
    cell = (size_px * mpp / scan_mpp[0], size_px * mpp / scan_mpp[1])
    step = (step_px * mpp / scan_mpp[0], step_px * mpp / scan_mpp[1])
    return Grid(
        origin_px=(float(bounds_px[0]), float(bounds_px[1])),
        cell_px=cell,
        step_px=step,
        columns=_whole_cells(bounds_px[2], cell[0], step[0]),
        rows=_whole_cells(bounds_px[3], cell[1], step[1]),
    )


def _whole_cells(extent: float, cell: float, step: float) -> int:
    if extent + _EDGE_PX < cell:
        return 0
    return math.floor((extent + _EDGE_PX - cell) / step) + 1


def _at(table: _Array, position: _Array, axis: int) -> _Array:
    """The table at fractional positions along an axis; linear, which is exact for a sum."""
    size = table.shape[axis]
    position = np.clip(position, 0.0, size - 1)
    low = np.minimum(position.astype(np.intp), size - 2)
    weight = position - low
    weight = weight[None, :] if axis == 1 else weight[:, None]
    lower, upper = np.take(table, low, axis), np.take(table, low + 1, axis)
    return np.asarray(lower + (upper - lower) * weight, np.float64)
