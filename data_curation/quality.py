"""Numbers that say how good a tile is. They are measured here and judged at selection.

All are classical pixel rules on RGB, so they need no weights and mean the same on every machine.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

WHITE = 220
"""A pixel whose darkest channel is at least this is glass (the field uses 220 to 230)."""
DARK = 50
"""A pixel whose brightest channel is at most this is a fold, dust, ink or a tear, not stain."""
SHARPNESS_MPP = 1.0
"""Scale at which sharpness is measured: nuclei edges are seen, JPEG and sensor noise are not."""
_SMALLEST_VARIANCE = 1e-3

_INK_MARGIN = 20
"""Green above red by this many grey values: never so in H&E or DAB, always in green ink."""

_RED_INK_RED, _RED_INK_GREEN = 195, 108
"""Red ink has more red and less green than this: a little beyond its densities below."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The quality columns of tiles.parquet."""

    white_fraction: float
    dark_fraction: float
    pen_fraction: float
    sharpness: float
    """log10 of the variance of the Laplacian of the grey image at 1 µm/px."""


def measure_quality(rgb: NDArray[np.uint8], mpp: float) -> Quality:
    """The quality of a tile, RGB uint8 [h, w, 3] at `mpp` µm/px."""
    planes = _planes(rgb)
    red, green, blue = planes
    darkest = cv2.min(cv2.min(red, green), blue)
    brightest = cv2.max(cv2.max(red, green), blue)
    return Quality(
        white_fraction=_share(darkest >= WHITE),
        dark_fraction=_share(brightest <= DARK),
        pen_fraction=_share(_pen(rgb, planes)),
        sharpness=measure_sharpness(rgb, mpp),
    )


def measure_sharpness(rgb: NDArray[np.uint8], mpp: float) -> float:
    """log10 of the variance of the Laplacian of the grey tile, brought to 1 µm/px.

    A tile coarser than that is measured as it is: figures compare only among equal mpp there.
    """
    grey: NDArray[np.floating | np.integer] = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    grey = grey.astype(np.float32)
    if mpp < SHARPNESS_MPP:
        height, width = (max(3, round(side * mpp / SHARPNESS_MPP)) for side in grey.shape)
        grey = cv2.resize(grey, (width, height), interpolation=cv2.INTER_AREA)
    variance = float(cv2.Laplacian(grey, cv2.CV_32F).var())
    return float(np.log10(max(variance, _SMALLEST_VARIANCE)))


def pen_mask(rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Pixels of green, teal, blue or red marker or ink, bool [h, w].

    Eosin and haematoxylin absorb green most, so green is the darkest channel of tissue: a pixel
    where red is clearly darker is green or blue ink. Red ink absorbs green and blue about equally
    and no red; dense erythrocytes come close, so a little of it is found in vessels. Black ink has
    no colour and counts as dark.
    """
    return _pen(rgb, _planes(rgb))


def _pen(rgb: NDArray[np.uint8], planes: list[NDArray[np.uint8]]) -> NDArray[np.bool_]:
    """See `pen_mask`; `planes` are the channels."""
    red, green, blue = planes
    over, blue_over = cv2.subtract(green, red), cv2.subtract(blue, red)  # 0 where red is more
    possible = (over > _INK_MARGIN) | (blue_over > 2 * _INK_MARGIN)
    possible |= (red > _RED_INK_RED) & (green < _RED_INK_GREEN)
    pen = np.zeros(rgb.shape[:2], np.bool_)
    places = np.flatnonzero(possible)  # few or none on most tiles, and the rest is slow
    if not len(places):
        return pen
    some = rgb.reshape(-1, 3)[places]
    density = optical_density(some[None])[0]
    d_red, d_green, d_blue = density[:, 0], density[:, 1], density[:, 2]
    green_ink = (over.ravel()[places] > _INK_MARGIN) & (d_red > 0.35)
    blue_ink = blue_over.ravel()[places] > 2 * _INK_MARGIN
    blue_ink &= (d_red > 0.4) & (d_red > 1.25 * d_green)
    red_ink = (d_red < 0.25) & (d_green > 0.9) & (d_blue > 0.75 * d_green)
    pen.ravel()[places] = green_ink | blue_ink | red_ink
    return pen


def _planes(rgb: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    return [np.asarray(plane, np.uint8) for plane in cv2.split(rgb)]


def _share(mask: NDArray[np.bool_]) -> float:
    return int(np.count_nonzero(mask)) / mask.size


def optical_density(
    rgb: NDArray[np.uint8], glass: tuple[float, float, float] = (255.0, 255.0, 255.0)
) -> NDArray[np.float32]:
    """Optical density -ln((I + 1) / (glass + 1)) per channel, float32 [h, w, 3]; glass is 0."""
    levels = np.arange(256)[:, None]
    table = -np.log((levels + 1.0) / (np.asarray(glass)[None, :] + 1.0))
    return np.asarray(cv2.LUT(rgb, table[None].astype(np.float32)), np.float32)
