"""Marker pen on a slide's overview: whole strokes, on glass and over tissue alike.

Where a stroke lies on glass its colour is that of no stain: green, teal or blue is denser in red
than in green, red is as dense in blue as in green and clear in red, black is grey. These are its
seeds, and their density is the ink's. Over tissue densities add up (Beer and Lambert), so the ink
there is found by unmixing each pixel into this ink and the slide's own two stains; what holds at
least half of the ink and is connected to a seed belongs to the stroke.
"""

import numpy as np
from numpy.typing import NDArray

from eosin.data_curation.glass import Planes, extremes
from eosin.data_curation.pixel_masks import Mask, close, fill_holes, touching, without_small
from eosin.data_curation.stain_vectors import HAEMATOXYLIN_EOSIN, macenko

MIN_PEN_UM2 = 10_000.0
"""Less ink than this is a speck, or erythrocytes, and does not cost the tissue around it."""
_MIN_SEED_UM2 = 2_500.0
"""A patch of seeds is at least this large."""
_GAP_UM = 30.0
"""Gaps in a stroke up to this wide are ink too."""
_INK_PERCENTILE = 20.0
"""Of the densities of seeds: some of them lie over tissue, and are denser than the ink."""
_SHARE = 0.5
"""Least part of the ink's density: the half of it marks a stroke's edge."""
_STAINED = 0.08
"""Spread of density over the channels from which a pixel tells something of the stains."""
_MOST_STAINED = 50_000
_ALIKE = 0.99
"""Cosine from which two estimated stains are one, and the published ones tell more."""


def find_pen(planes: Planes, pixel_um: float, black: float = 0.5) -> Mask:
    """The strokes on an overview, bool [h, w], exact to about a pixel.

    Args:
        planes: optical density relative to glass, smoothed over some µm, in R, G, B, float32 [h, w]
            each.
        pixel_um: side of a pixel.
        black: density of every channel from which grey is ink.
    """
    found = np.zeros(planes[0].shape, np.bool_)
    seeds = [without_small(s, _MIN_SEED_UM2 / pixel_um**2) for s in _seeds(planes, black)]
    seeds = [s for s in seeds if s.any()]
    if not seeds:
        return found
    inks = [np.percentile(_at(planes, s), _INK_PERCENTILE, axis=0) for s in seeds]
    dense = [_denser(planes, _SHARE * ink) for ink in inks]
    least, most = extremes(planes)
    clean = _at(planes, (most - least > _STAINED) & ~np.logical_or.reduce([*dense, *seeds]))
    stains = macenko(clean[:: 1 + len(clean) // _MOST_STAINED])
    if stains is None or float(stains[0] @ stains[1]) > _ALIKE:
        stains = HAEMATOXYLIN_EOSIN
    for seed, ink, enough in zip(seeds, inks, dense, strict=True):
        weights = np.linalg.pinv(np.stack([ink, *stains]))[:, 0].astype(np.float32)
        amount = planes[0] * weights[0] + planes[1] * weights[1] + planes[2] * weights[2]
        stroke = touching(seed | (enough & (amount > _SHARE)), seed)
        stroke = fill_holes(close(stroke, _GAP_UM / pixel_um), MIN_PEN_UM2 / pixel_um**2)
        found |= without_small(stroke, MIN_PEN_UM2 / pixel_um**2)
    return found


def _seeds(planes: Planes, black: float) -> list[Mask]:
    """Pixels whose colour is that of an ink and of no stain: green, blue, red and black ink.

    Eosin, haematoxylin and DAB are at least as dense in green as in red. Dense erythrocytes come
    close to red ink; a layer of them can be taken for it.
    """
    red, green, blue = planes
    least, most = extremes(planes)
    not_stain = (red > 0.35) & (red > 1.2 * green)
    return [
        not_stain & (blue > green),
        not_stain & (red > 0.4) & (blue <= green),
        (green > 0.72) & (red < 0.25 * green) & (blue > 0.7 * green),
        (least > black) & (most < 1.2 * least),
    ]


def _denser(planes: Planes, ink: NDArray[np.floating]) -> Mask:
    """Whether a pixel is at least as dense as `ink` in every channel."""
    red, green, blue = (plane >= np.float32(part) for plane, part in zip(planes, ink, strict=True))
    return np.asarray(red & green & blue, np.bool_)


def _at(planes: Planes, mask: Mask) -> NDArray[np.float32]:
    """The densities of the pixels of a mask, [N, 3]."""
    return np.stack([plane[mask] for plane in planes], -1)
