"""Bare glass, and how much denser than it something on it is."""

from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

Value = TypeVar("Value", np.uint8, np.float32)
Planes = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
"""The channels R, G, B of a picture, [h, w] each."""

_SIDE_LOOKED_AT = 1000
_GLASS_PERCENTILE = 99.0
_GLASS_DEPTH = 12
_DARKEST_GLASS = 180
"""Below this grey value nothing on the slide is taken for glass."""
_DEFAULT_GLASS = (240.0, 240.0, 240.0)


def estimate_glass(rgb: NDArray[np.uint8]) -> tuple[float, float, float]:
    """The colour of bare glass: the median of the brightest pixels; 240 grey where none is bright.

    Only its tint matters to the mask, so a crop without any glass does no harm.
    """
    step = 1 + max(rgb.shape[:2]) // _SIDE_LOOKED_AT
    rgb = rgb[::step, ::step]
    grey = np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY))
    bright = float(np.percentile(grey, _GLASS_PERCENTILE))
    if bright < _DARKEST_GLASS:
        return _DEFAULT_GLASS
    red, green, blue = np.median(rgb[grey >= bright - _GLASS_DEPTH], axis=0)
    return float(red), float(green), float(blue)


def optical_density(
    rgb: NDArray[np.uint8], glass: tuple[float, float, float] = (255.0, 255.0, 255.0)
) -> NDArray[np.float32]:
    """Optical density -ln((I + 1) / (glass + 1)) per channel, float32 [h, w, 3]; glass is 0."""
    levels = np.arange(256)[:, None]
    table = -np.log((levels + 1.0) / (np.asarray(glass)[None, :] + 1.0))
    return np.asarray(cv2.LUT(rgb, table[None].astype(np.float32)), np.float32)


def density_planes(rgb: NDArray[np.uint8], glass: tuple[float, float, float]) -> Planes:
    """`optical_density` channel by channel, float32 [h, w] each."""
    red, green, blue = cv2.split(optical_density(rgb, glass))
    return np.asarray(red), np.asarray(green), np.asarray(blue)


def extremes(
    planes: tuple[NDArray[Value], NDArray[Value], NDArray[Value]],
) -> tuple[NDArray[Value], NDArray[Value]]:
    """The least and the greatest of three channels at each pixel, both [h, w]."""
    red, green, blue = planes
    least, most = cv2.min(cv2.min(red, green), blue), cv2.max(cv2.max(red, green), blue)
    return np.asarray(least, red.dtype), np.asarray(most, red.dtype)
