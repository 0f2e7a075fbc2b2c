"""Folds on a slide's overview: long narrow bands of tissue, denser than all around them.

A number to look at and to select by with care, not a verdict: epithelium, packed nuclei and clotted
blood can look the same at this scale.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from eosin.data_curation.glass import Planes
from eosin.data_curation.pixel_masks import Mask, close, disc, without_small

FOLD_DENSITY = 1.5
"""Optical density of a fold, in medians of the slide's tissue."""
RISE = 0.3
"""How much denser it is than what lies beside it, in the same medians."""
WIDEST_UM = 80.0
"""A broader band is no fold."""
MIN_FOLD_UM2 = 4_000.0
_SEARCH_UM = 4.0
_SMOOTHING_UM = 8.0
_LENGTH_UM = 100.0
"""A fold is dense over at least this length in some direction."""
_DIRECTIONS = 12
_GAP_UM = 16.0


def find_folds(planes: Planes, tissue: Mask, pixel_um: float) -> Mask:
    """Where tissue seems folded, bool [h, w].

    Args:
        planes: optical density relative to glass in R, G, B, float32 [h, w] each.
        tissue: bool [h, w], clear of pen.
        pixel_um: side of a pixel.
    """
    height, width = tissue.shape
    zoom = min(1.0, pixel_um / _SEARCH_UM)
    total = np.where(tissue, planes[0] + planes[1] + planes[2], np.float32(0))
    small = (max(1, round(width * zoom)), max(1, round(height * zoom)))
    total = np.asarray(cv2.resize(total, small, interpolation=cv2.INTER_AREA), np.float32)
    scale_um = pixel_um / zoom
    total = np.asarray(cv2.GaussianBlur(total, (0, 0), _SMOOTHING_UM / scale_um), np.float32)
    inside = cv2.resize(tissue.astype(np.uint8), small, interpolation=cv2.INTER_NEAREST) > 0
    if not inside.any():
        return np.zeros_like(tissue)
    median = float(np.median(total[inside]))
    beside = cv2.morphologyEx(total, cv2.MORPH_OPEN, disc(WIDEST_UM / 2 / scale_um))
    dense = (total > FOLD_DENSITY * median) & (total - beside > RISE * median)
    long = np.zeros(dense.shape, np.uint8)
    for turn in np.arange(_DIRECTIONS) * np.pi / _DIRECTIONS:
        line = _line(_LENGTH_UM / scale_um, float(turn))
        long |= np.asarray(cv2.morphologyEx(dense.astype(np.uint8), cv2.MORPH_OPEN, line))
    grown = cv2.resize(long, (width, height), interpolation=cv2.INTER_NEAREST) > 0
    grown = close(grown, _GAP_UM / pixel_um)
    return without_small(grown & tissue, MIN_FOLD_UM2 / pixel_um**2)


def _line(length_px: float, angle: float) -> NDArray[np.uint8]:
    side = max(3, 2 * round(length_px / 2) + 1)
    reach = side // 2
    kernel = np.zeros((side, side), np.uint8)
    x, y = round(reach * np.cos(angle)), round(reach * np.sin(angle))
    cv2.line(kernel, (reach - x, reach - y), (reach + x, reach + y), 1)
    return kernel
