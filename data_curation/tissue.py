"""Where on a slide there is tissue: a classical mask, without weights, at about 8 µm/px.

Stain is colour, glass and dirt are not. Optical density relative to this slide's own glass makes
glass zero whatever its tint; the spread of density over the three channels is then large where
there is stain, and near zero on bubbles, dust, shadows and coverslip edges, which are grey. A
threshold with hysteresis keeps pale tissue next to certain tissue and drops pale dirt on its own.
Sizes are physical, so the mask does not depend on the scan's resolution.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from eosin.data_curation.quality import optical_density, pen_mask

MASK_MPP = 8.0
"""µm/px at which tissue is looked for; nuclei vanish, glands and fat cells are still there."""
SMALLEST_SIDE_PX = 512
"""A slide (or crop of one) smaller than this at `MASK_MPP` is looked at more finely."""
PIXELS_PER_TILE = 8
"""And so is one whose tiles would be narrower than this many mask pixels."""

CERTAIN_CHROMA = 0.08
"""Spread of optical density (max - min channel) from which a pixel is stained tissue."""
FAINT_CHROMA = 0.05
"""Spread that still is tissue when it touches a certain one: pale stroma, fat, mucin."""
SMOOTHING_UM = 8.0
"""Gaussian sigma: evens out JPEG's colour noise on glass, and specks of ink too small to mind."""
CLOSING_UM = 64.0
"""Gaps this wide (fat cells, cracks) belong to the tissue around them."""
MIN_AREA_UM2 = 16_000.0
"""A piece smaller than about (126 µm)² is debris."""
MAX_HOLE_UM2 = 40_000.0
"""A hole up to about (200 µm)² is a lumen or a fat cell and belongs to the tissue."""
MIN_PEN_UM2 = 10_000.0
"""Less ink than this is a speck, or erythrocytes, and does not cost the tissue around it."""
PEN_MARGIN_UM = 60.0
"""Around pen, its pale fringe: a stroke lies on the cover glass, out of focus."""

_GREENISH = 0.5
"""Share of the spread by which red may be denser than green; more is the fringe of green ink."""
_GLASS_PERCENTILE = 99.0
_GLASS_DEPTH = 12
_DARKEST_GLASS = 180
"""Below this grey value nothing on the slide is taken for glass."""
_DEFAULT_GLASS = (240.0, 240.0, 240.0)


@dataclass(frozen=True, kw_only=True)
class Tissue:
    """Masks over a slide's overview, bool [h, w]."""

    tissue: NDArray[np.bool_]
    pen: NDArray[np.bool_]
    mpp: tuple[float, float]
    """Exact µm per mask pixel (x, y)."""

    def area_mm2(self) -> float:
        """Tissue area in mm²."""
        return float(self.tissue.sum()) * self.mpp[0] * self.mpp[1] / 1e6


def mask_mpp(extent_um: tuple[float, float], tile_um: float, scan_mpp: float) -> float:
    """The scale to look for tissue at, in µm/px: `MASK_MPP`, or finer, but never than the scan.

    Args:
        extent_um: width and height of the scanned area.
        tile_um: side of a tile.
        scan_mpp: µm per level-0 pixel.
    """
    wanted = min(MASK_MPP, max(extent_um) / SMALLEST_SIDE_PX, tile_um / PIXELS_PER_TILE)
    return max(wanted, scan_mpp)


def find_tissue(rgb: NDArray[np.uint8], mpp: tuple[float, float]) -> Tissue:
    """The tissue on an overview, RGB uint8 [h, w, 3] at `mpp` µm/px (x, y)."""
    pixel_um = math.sqrt(mpp[0] * mpp[1])
    smooth = np.asarray(cv2.GaussianBlur(rgb, (0, 0), SMOOTHING_UM / pixel_um), np.uint8)
    red, green, blue = cv2.split(optical_density(smooth, estimate_glass(rgb)))
    chroma = cv2.max(cv2.max(red, green), blue) - cv2.min(cv2.min(red, green), blue)
    pen = _without_small(pen_mask(smooth), MIN_PEN_UM2 / pixel_um**2)
    pen = _dilate(pen, PEN_MARGIN_UM / pixel_um)
    stain = ~pen & (red - green < _GREENISH * chroma)
    tissue = _touching(stain & (chroma > FAINT_CHROMA), stain & (chroma > CERTAIN_CHROMA))
    tissue = _close(tissue, CLOSING_UM / pixel_um) & ~pen
    tissue = _fill_holes(tissue, MAX_HOLE_UM2 / pixel_um**2) & ~pen
    tissue = _without_small(tissue, MIN_AREA_UM2 / pixel_um**2)
    return Tissue(tissue=tissue, pen=pen, mpp=mpp)


def estimate_glass(rgb: NDArray[np.uint8]) -> tuple[float, float, float]:
    """The colour of bare glass: the median of the brightest pixels; 240 grey where none is bright.

    Only its tint matters to the mask, so a crop without any glass does no harm.
    """
    grey = np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY))
    bright = float(np.percentile(grey, _GLASS_PERCENTILE))
    if bright < _DARKEST_GLASS:
        return _DEFAULT_GLASS
    red, green, blue = np.median(rgb[grey >= bright - _GLASS_DEPTH], axis=0)
    return float(red), float(green), float(blue)


def _touching(candidates: NDArray[np.bool_], seeds: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The connected parts of `candidates` that hold a seed."""
    _, labels = cv2.connectedComponents(candidates.astype(np.uint8), connectivity=8)
    kept = np.zeros(int(labels.max()) + 1, np.bool_)
    kept[labels[seeds]] = True
    kept[0] = False
    return np.asarray(kept[labels], np.bool_)


def _fill_holes(mask: NDArray[np.bool_], max_px: float) -> NDArray[np.bool_]:
    """Fills gaps of at most `max_px` pixels; one that reaches the edge is glass, not a hole."""
    holes = ~mask
    edge = np.ones_like(mask)
    edge[1:-1, 1:-1] = False
    return mask | (holes & ~_without_small(holes, max_px) & ~_touching(holes, holes & edge))


def _without_small(mask: NDArray[np.bool_], min_px: float) -> NDArray[np.bool_]:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    kept = stats[:, cv2.CC_STAT_AREA] >= min_px
    kept[0] = False
    return np.asarray(kept[labels], np.bool_)


def _disc(radius_px: float) -> NDArray[np.uint8]:
    side = 2 * max(1, round(radius_px)) + 1
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)), np.uint8)


def _dilate(mask: NDArray[np.bool_], radius_px: float) -> NDArray[np.bool_]:
    return np.asarray(cv2.dilate(mask.astype(np.uint8), _disc(radius_px)), np.bool_)


def _close(mask: NDArray[np.bool_], diameter_px: float) -> NDArray[np.bool_]:
    closed = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, _disc(diameter_px / 2))
    return np.asarray(closed, np.bool_)
