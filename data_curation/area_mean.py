"""The mean of a picture over rectangles that need not lie on whole pixels.

It is what a coarser scan of the same field would have collected: every source pixel counts by the
area of it that lies inside. Rows are averaged first, then columns, which is the same.
"""

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

_WHOLE_PX = 1e-6
"""An edge this close to that of a pixel lies on it."""
_TIE = 1e-4
"""A mean this close below a half is one, less the error of summing in float32."""


def area_mean(
    pixels: NDArray[np.uint8], x_edges: NDArray[np.float64], y_edges: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """Means over the cells of a grid.

    Args:
        pixels: RGB uint8 [H, W, 3]; the one in (row, column) covers [column, column + 1) ×
            [row, row + 1).
        x_edges: float64 [w + 1], ascending, in [0, W].
        y_edges: float64 [h + 1], ascending, in [0, H].

    Returns:
        RGB uint8 [h, w, 3], halves rounded up.
    """
    across_px, down_px = _whole_step(x_edges), _whole_step(y_edges)
    if across_px and down_px:
        left, top, right, bottom = (
            round(float(v)) for v in (x_edges[0], y_edges[0], x_edges[-1], y_edges[-1])
        )
        image = Image.fromarray(pixels)
        return np.asarray(image.reduce((across_px, down_px), (left, top, right, bottom)))
    by_row = _mean_of_rows(pixels, y_edges)  # [h, W, 3]
    by_column = _mean_of_rows(cv2.transpose(by_row), x_edges)  # [w, h, 3]
    return (np.asarray(cv2.transpose(by_column)) + np.float32(0.5 + _TIE)).astype(np.uint8)


def _whole_step(edges: NDArray[np.float64]) -> int:
    """The pixels from each edge to the next, where they are whole and a power of two; else 0.

    By others Pillow's `reduce` divides by a rounded reciprocal, and is one too low now and then.
    """
    step = round(float(edges[1] - edges[0]))
    even = round(float(edges[0])) + step * np.arange(len(edges), dtype=np.float64)
    return step if step & -step == step and np.abs(edges - even).max() < _WHOLE_PX else 0


def _mean_of_rows(pixels: cv2.typing.MatLike, edges: NDArray[np.float64]) -> NDArray[np.float32]:
    """Means over the rows between edges, [H, W, 3] → float32 [h, W, 3]."""
    rows = np.asarray(pixels, np.float32).reshape(len(pixels), -1)  # [H, W · 3]
    low, high = edges[:-1], edges[1:]
    first = low.astype(np.intp)
    total = np.zeros((len(low), rows.shape[1]), np.float32)
    part = np.empty_like(total)
    for nth in range(int((np.ceil(high) - first).max())):
        at = first + nth
        inside = np.minimum(high, at + 1) - np.maximum(low, at)  # of each such row, 0 to 1
        weight = (np.maximum(inside, 0) / (high - low)).astype(np.float32)
        np.take(rows, np.minimum(at, len(rows) - 1), axis=0, out=part, mode="clip")
        part *= weight[:, None]
        total += part
    return total.reshape(len(low), *pixels.shape[1:])
