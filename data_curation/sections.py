"""Which pieces of tissue on a slide are one section: several lie side by side on most slides."""

import cv2
import numpy as np
from numpy.typing import NDArray

from eosin.data_curation.pixel_masks import Mask, dilate

GAP_UM = 300.0
"""Pieces closer than this are one section."""
SMALLEST_SHARE = 0.05
"""A group of pieces smaller than this share of the largest is a fragment of its nearest section."""
_SEARCH_UM = 32.0
"""Sections are told apart at this scale."""


def find_sections(tissue: Mask, pixel_um: float) -> NDArray[np.int32]:
    """The section of each pixel, int32 [h, w]: 1 and on, row by row from the left; 0 is glass.

    Sections that touch are one: only a network can tell them apart (`segmenter`).

    Args:
        tissue: bool [h, w].
        pixel_um: side of a pixel.
    """
    if not tissue.any():
        return np.zeros(tissue.shape, np.int32)
    coarse = _shrink(tissue, _SEARCH_UM / pixel_um)
    scale_um = pixel_um * tissue.shape[0] / coarse.shape[0]
    joined = dilate(coarse, GAP_UM / 2 / scale_um)
    count, labels = cv2.connectedComponents(joined.astype(np.uint8), connectivity=8)
    area = np.bincount(labels[coarse], minlength=count)
    large = np.flatnonzero(area >= SMALLEST_SHARE * area.max())
    centres = np.array([np.argwhere(coarse & (labels == label)).mean(0) for label in large])
    numbered = large[_reading_order(centres)]
    own = np.zeros(count, np.int32)
    own[numbered] = np.arange(1, len(numbered) + 1)
    nearest = _nearest(own[labels])
    size = (tissue.shape[1], tissue.shape[0])
    grown = cv2.resize(nearest.astype(np.float32), size, interpolation=cv2.INTER_NEAREST)
    return np.where(tissue, grown, 0).astype(np.int32)


def _shrink(mask: Mask, factor: float) -> Mask:
    """The mask at a coarser scale; a pixel is set where any of its own was."""
    if factor <= 1:
        return mask
    height, width = (max(1, round(side / factor)) for side in mask.shape)
    share = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(share > 0, np.bool_)


def _reading_order(centres: NDArray[np.float64]) -> NDArray[np.intp]:
    """Order of centres (y, x) in rows from the top, and from the left in each.

    A row ends where the next centre lies lower by more than half of the mean distance between rows
    that a square arrangement would have.
    """
    by_y = np.argsort(centres[:, 0], kind="stable")
    heights = centres[by_y, 0]
    spread = float(np.ptp(centres, axis=0).max())
    step = spread / max(1.0, np.sqrt(len(centres))) / 2
    row = np.concatenate([[0], np.cumsum(np.diff(heights) > step)])
    return by_y[np.lexsort((centres[by_y, 1], row))]


def _nearest(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    """Every pixel's nearest label above 0."""
    _, index = cv2.distanceTransformWithLabels(
        (labels == 0).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    of_pixel = np.zeros(int(index.max()) + 1, np.int32)
    of_pixel[index[labels > 0]] = labels[labels > 0]
    return np.asarray(of_pixel[index], np.int32)
