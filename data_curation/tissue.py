"""Where on a slide there is tissue: a classical mask, without weights, at about 8 µm/px.

Stain is colour, glass and dirt are not. Optical density relative to this slide's own glass makes
glass zero whatever its tint; the spread of density over the three channels is then large where
there is stain, and near zero on bubbles, dust, shadows and coverslip edges, which are grey. A
threshold with hysteresis keeps pale tissue next to certain tissue and drops pale dirt on its own.
Silver is grey too: its rule counts density itself. Sizes are physical, so the mask does not depend
on the scan's resolution.
"""

import math
import re
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from eosin.data_curation.glass import density_planes, estimate_glass, extremes
from eosin.data_curation.pen import find_pen
from eosin.data_curation.pixel_masks import close, dilate, fill_holes, touching, without_small

MASK_MPP = 8.0
"""µm/px at which tissue is looked for; nuclei vanish, glands and fat cells are still there."""
SMALLEST_SIDE_PX = 512
"""A slide (or crop of one) smaller than this at `MASK_MPP` is looked at more finely."""
PIXELS_PER_TILE = 8
"""And so is one whose tiles would be narrower than this many mask pixels."""


@dataclass(frozen=True, kw_only=True)
class TissueRule:
    """What counts as tissue in a family of stains."""

    certain: float
    """Spread of optical density (max - min channel) from which a pixel is stained tissue."""
    faint: float
    """Spread that still is tissue when it touches a certain one: pale stroma, fat, mucin."""
    grey: float = 0.0
    """How much of the least dense channel counts as spread; 0: grey is never tissue."""
    black_ink: float = 0.5
    """Density of every channel from which grey is black pen."""


RULES = {
    "he": TissueRule(certain=0.08, faint=0.05),
    "pale": TissueRule(certain=0.06, faint=0.03),
    "silver": TissueRule(certain=0.08, faint=0.04, grey=1.0, black_ink=0.75),
}
"""Haematoxylin and eosin and all stains as dense; immunohistochemistry with a pale counterstain;
silver, whose fibres are black on a pale ground (dark bubbles and dust then count as tissue too)."""

AUTO = "auto"
_NOTHING_SAID = ("", "unknown", "he", "hande", "hes", "hps")
_DENSE = re.compile(
    "haematoxylin|hematoxylin|^pas|masson|trichrome|giemsa|alcian|congo|gieson|movat|elastic|"
    "mucicarmine|oilred|prussian|perls|nissl|luxol|papanicolaou"
)
_SILVER = re.compile(
    "silver|reticulin|gomori|^gms|grocott|warthin|^jones|bielschowsky|gallyas|bodian|fontana|^pasm"
)


def rule_for(stain: str | None) -> str:
    """The name of the rule for a stain as a table of slides calls it; ``he`` where it says nothing.

    Silver by the names of its methods, then the dense stains by theirs; what is left is taken for
    the marker of an immunohistochemical stain (CD3, Ki67, …).
    """
    name = re.sub(r"[^a-z0-9]", "", (stain or "").lower())
    if _SILVER.search(name):
        return "silver"
    return "he" if name in _NOTHING_SAID or _DENSE.search(name) else "pale"


SMOOTHING_UM = 6.0
"""Gaussian sigma: evens out JPEG's colour noise on glass, and specks of ink too small to mind."""
CLOSING_UM = 64.0
"""Gaps this wide (fat cells, cracks) belong to the tissue around them."""
MIN_AREA_UM2 = 16_000.0
"""A piece smaller than about (126 µm)² is debris."""
MAX_HOLE_UM2 = 40_000.0
"""A hole up to about (200 µm)² is a lumen or a fat cell and belongs to the tissue."""
PEN_MARGIN_UM = 24.0
"""Around pen, its pale fringe: a stroke lies on the cover glass, out of focus."""

_GREENISH = 0.5
"""Share of the spread by which red may be denser than green; more is the fringe of green ink."""
_GREY = 0.02
"""A difference of densities up to this is no colour."""


@dataclass(frozen=True, kw_only=True)
class Tissue:
    """Masks over a slide's overview, bool [h, w]."""

    tissue: NDArray[np.bool_]
    """Clear of pen."""
    pen: NDArray[np.bool_]
    mpp: tuple[float, float]
    """Exact µm per mask pixel (x, y)."""

    def area_mm2(self, mask: NDArray[np.bool_]) -> float:
        """Area of one of the masks in mm²."""
        return float(mask.sum()) * self.mpp[0] * self.mpp[1] / 1e6


def mask_mpp(extent_um: tuple[float, float], tile_um: float, scan_mpp: float) -> float:
    """The scale to look for tissue at, in µm/px: `MASK_MPP`, or finer, but never than the scan.

    Args:
        extent_um: width and height of the scanned area.
        tile_um: side of a tile.
        scan_mpp: µm per level-0 pixel.
    """
    wanted = min(MASK_MPP, max(extent_um) / SMALLEST_SIDE_PX, tile_um / PIXELS_PER_TILE)
    return max(wanted, scan_mpp)


def find_tissue(
    rgb: NDArray[np.uint8], mpp: tuple[float, float], rule: TissueRule = RULES["he"]
) -> Tissue:
    """The tissue on an overview, RGB uint8 [h, w, 3] at `mpp` µm/px (x, y)."""
    pixel_um = math.sqrt(mpp[0] * mpp[1])
    smooth = np.asarray(cv2.GaussianBlur(rgb, (0, 0), SMOOTHING_UM / pixel_um), np.uint8)
    planes = density_planes(smooth, estimate_glass(rgb))
    pen = find_pen(planes, pixel_um, rule.black_ink)
    clear = ~dilate(pen, PEN_MARGIN_UM / pixel_um) if pen.any() else ~pen
    least, most = extremes(planes)
    spread = most - least
    stain = clear & (planes[0] - planes[1] < np.maximum(_GREENISH * spread, _GREY))
    spread += np.float32(rule.grey) * least
    tissue = touching(stain & (spread > rule.faint), stain & (spread > rule.certain))
    tissue = close(tissue, CLOSING_UM / pixel_um) & clear
    tissue = fill_holes(tissue, MAX_HOLE_UM2 / pixel_um**2) & clear
    tissue = without_small(tissue, MIN_AREA_UM2 / pixel_um**2)
    return Tissue(tissue=tissue, pen=pen, mpp=mpp)
