"""Operations on the pixel masks of an overview, bool [h, w]; sizes are in its pixels."""

import cv2
import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def touching(candidates: Mask, seeds: Mask) -> Mask:
    """The connected parts of `candidates` that hold a seed."""
    _, labels = cv2.connectedComponents(candidates.astype(np.uint8), connectivity=8)
    kept = np.zeros(int(labels.max()) + 1, np.bool_)
    kept[labels[seeds]] = True
    kept[0] = False
    return np.asarray(kept[labels], np.bool_)


def without_small(mask: Mask, min_px: float) -> Mask:
    """The connected parts of at least `min_px` pixels."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    kept = stats[:, cv2.CC_STAT_AREA] >= min_px
    kept[0] = False
    return np.asarray(kept[labels], np.bool_)


def fill_holes(mask: Mask, max_px: float) -> Mask:
    """Fills gaps of at most `max_px` pixels; one that reaches the edge is outside, not a hole."""
    holes = ~mask
    edge = np.ones_like(mask)
    edge[1:-1, 1:-1] = False
    return mask | (holes & ~without_small(holes, max_px) & ~touching(holes, holes & edge))


def dilate(mask: Mask, radius_px: float) -> Mask:
    """Grows the mask by a disc."""
    return np.asarray(cv2.dilate(mask.astype(np.uint8), disc(radius_px)), np.bool_)


def close(mask: Mask, diameter_px: float) -> Mask:
    """Closes gaps of at most `diameter_px`; what lies outside the picture is no part of it."""
    kernel = disc(diameter_px / 2)
    edge = len(kernel) // 2  # OpenCV would close gaps between the mask and the picture's edge
    padded = np.pad(mask.astype(np.uint8), edge)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, kernel)
    return np.asarray(closed[edge:-edge, edge:-edge], np.bool_)


def disc(radius_px: float) -> NDArray[np.uint8]:
    """A disc as the operations of OpenCV take it."""
    side = 2 * max(1, round(radius_px)) + 1
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)), np.uint8)
