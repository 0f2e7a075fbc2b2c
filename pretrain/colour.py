"""Colour of a crop: scanner-like jitter as one affine matrix, stain jitter in optical density.

Brightness, contrast, saturation, hue and greyscale are all affine in RGB, so they are multiplied
into one 3 × 4 matrix and applied in one pass. Two deviations from torchvision's ColorJitter follow:
nothing is clipped between the steps, whose order is fixed, and hue is a rotation about the grey
axis of YIQ instead of one of the HSV hexagon (which costs more than all the rest of a crop).
"""

import math

import cv2
import numpy as np
from numpy.typing import NDArray

LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of R, G, B in luma (ITU-R BT.601), as in Pillow's "L" and torchvision's greyscale."""

YIQ_FROM_RGB = np.array([LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
"""NTSC: luma and two chroma axes, in which a hue shift is a rotation of the last two."""

HED_STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
"""Optical density of R, G, B per unit of haematoxylin, eosin and DAB, one stain a row.

Ruifrok and Johnston, "Quantification of histochemical staining by color deconvolution", 2001.
"""

_STAINS_FROM_OD = np.linalg.inv(HED_STAINS)
_TO_LUMA = np.tile(LUMA, (3, 1))
"""Makes each channel the pixel's luma."""

_RGB_FROM_YIQ = np.linalg.inv(YIQ_FROM_RGB)
_CHROMA = _RGB_FROM_YIQ @ np.diag([0.0, 1.0, 1.0]) @ YIQ_FROM_RGB
_CHROMA_TURNED = _RGB_FROM_YIQ @ np.array([[0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ YIQ_FROM_RGB
"""A rotation by an angle a is luma + cos(a) · chroma + sin(a) · (chroma turned by 90 degrees)."""

_OD_OF_LEVEL = -np.log((np.arange(256) + 1) / 256).astype(np.float32)
"""Optical density (natural logarithm) of an 8-bit level v, taken as the transmittance (v+1)/256,
so that black is finite and white is exactly 0."""

_ONE_LEVEL = np.ones(4)
"""In each channel, as OpenCV takes a scalar."""


def jitter_matrix(
    mean_rgb: NDArray[np.float64],
    *,
    brightness: float = 1.0,
    contrast: float = 1.0,
    saturation: float = 1.0,
    hue_turns: float = 0.0,
    grey: bool = False,
) -> NDArray[np.float64]:
    """The affine map of brightness, then contrast, saturation, hue and greyscale.

    Args:
        mean_rgb: float [3], the mean colour of the crop in 8-bit levels; contrast is stretched
            about its luma.
        brightness: factor on all channels; 1 changes nothing.
        contrast: factor on the distance from the mean luma; 1 changes nothing.
        saturation: factor on the distance of each pixel from its own luma; 1 changes nothing.
        hue_turns: rotation of the hue in full turns; 0 changes nothing.
        grey: replace each pixel by its luma at the end.

    Returns:
        float64 [3, 4]: output = matrix[:, :3] @ rgb + matrix[:, 3].
    """
    angle = 2 * math.pi * hue_turns
    linear = _TO_LUMA  # greyscale at the end needs nothing of saturation and hue
    if not grey:
        turned = math.cos(angle) * _CHROMA + math.sin(angle) * _CHROMA_TURNED
        linear = _TO_LUMA + saturation * turned
    matrix = np.empty((3, 4))
    matrix[:, :3] = brightness * contrast * linear
    # Saturation, hue and greyscale leave greys alone, so the pivot passes through them unchanged.
    matrix[:, 3] = (1 - contrast) * brightness * float(LUMA @ mean_rgb)
    return matrix


def apply_matrix(image: NDArray[np.uint8], matrix: NDArray[np.float64]) -> NDArray[np.uint8]:
    """`image` uint8 [H, W, 3] under an affine map [3, 4], rounded and clipped to 0 … 255."""
    return _as_uint8(cv2.transform(image, matrix.astype(np.float32)))


def mean_colour(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean of R, G, B over `image` uint8 [H, W, 3], in 8-bit levels: float64 [3]."""
    return np.array(cv2.mean(image)[:3])


def jitter_stains(
    image: NDArray[np.uint8], factor: tuple[float, float, float], shift: tuple[float, float, float]
) -> NDArray[np.uint8]:
    """Makes each stain stronger or weaker: amount ← factor · amount + shift, for H, E and DAB.

    Tellez et al., "Whole-slide mitosis detection in H&E breast histology …", 2018. The amounts are
    in units of optical density (natural logarithm). As the amounts are linear in optical density,
    so is the whole change: one affine map between a logarithm and an exponential.

    Args:
        image: uint8 [H, W, 3].
        factor: of haematoxylin, eosin and DAB; 1 changes nothing.
        shift: added to each; 0 changes nothing.

    Returns:
        uint8 [H, W, 3].
    """
    # A pixel's od is a row (r, g, b): od' = od @ inv(S) @ diag(factor) @ S + shift @ S.
    linear = _STAINS_FROM_OD @ (np.array(factor)[:, None] * HED_STAINS)
    matrix = np.empty((3, 4), np.float32)
    matrix[:, :3] = -linear.T
    matrix[:, 3] = math.log(256) - np.asarray(shift) @ HED_STAINS
    scaled = cv2.exp(cv2.transform(cv2.LUT(image, _OD_OF_LEVEL), matrix))  # 256·exp(-od)
    # What a negative density makes brighter than white is clipped, as on a sensor.
    return _as_uint8(cv2.subtract(scaled, _ONE_LEVEL, dtype=cv2.CV_8U))


def blur(image: NDArray[np.uint8], sigma_px: float, radius_px: int = 4) -> NDArray[np.uint8]:
    """Gaussian blur of `image` uint8 [H, W, 3]; 9 taps wide by default, as in DINOv2."""
    # Float taps on bytes take half the time of cv2.GaussianBlur, and differ by one level at most.
    taps = cv2.getGaussianKernel(2 * radius_px + 1, sigma_px).astype(np.float32)
    return _as_uint8(cv2.sepFilter2D(image, -1, taps, taps))


def solarize(image: NDArray[np.uint8], threshold: int = 128) -> NDArray[np.uint8]:
    """Inverts the levels of `image` uint8 [H, W, 3] from `threshold` up."""
    levels = np.arange(256)
    table = np.where(levels < threshold, levels, 255 - levels).astype(np.uint8)
    return _as_uint8(cv2.LUT(image, table))


def _as_uint8(image: object) -> NDArray[np.uint8]:
    """What OpenCV returned, under the type that it has."""
    array = np.asarray(image)
    assert array.dtype == np.uint8
    return array
