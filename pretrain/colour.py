"""Colour of a crop: scanner-like jitter as one affine matrix, stain jitter in optical density.

Brightness, contrast, saturation, hue and greyscale are all affine in RGB, so they are multiplied
into one 3 × 4 matrix and applied in one pass. Two deviations from torchvision's ColorJitter follow:
nothing is clipped between the steps, whose order is fixed, and hue is a rotation about the grey
axis of YIQ instead of one of the HSV hexagon (which costs more than all the rest of a crop).
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

LUMA_OF_RED, LUMA_OF_GREEN, LUMA_OF_BLUE = 0.299, 0.587, 0.114
LUMA = np.array([LUMA_OF_RED, LUMA_OF_GREEN, LUMA_OF_BLUE])
"""Weights of R, G, B in luma (ITU-R BT.601), as in Pillow's "L" and torchvision's greyscale."""

YIQ_FROM_RGB = np.array([LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
"""NTSC: luma and two chroma axes, in which a hue shift is a rotation of the last two."""

HED_STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
"""Optical density of R, G, B per unit of haematoxylin, eosin and DAB, one stain a row.

Ruifrok and Johnston, "Quantification of histochemical staining by color deconvolution", 2001.
"""

_STAINS_FROM_OD = np.linalg.inv(HED_STAINS)
"""A pixel's amounts are od @ this, as its od is amounts @ `HED_STAINS`."""

_UNMIXING = _STAINS_FROM_OD.T.astype(np.float32)
_TO_LUMA = np.tile(LUMA, (3, 1))
"""Makes each channel the pixel's luma."""

_RGB_FROM_YIQ = np.linalg.inv(YIQ_FROM_RGB)
_CHROMA = _RGB_FROM_YIQ @ np.diag([0.0, 1.0, 1.0]) @ YIQ_FROM_RGB
_CHROMA_TURNED = _RGB_FROM_YIQ @ np.array([[0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ YIQ_FROM_RGB
"""A rotation by an angle a is luma + cos(a) · chroma + sin(a) · (chroma turned by 90 degrees)."""


def _jitter_parts() -> NDArray[np.float64]:
    """What the affine map of a colour jitter is a sum of: luma, chroma, turned chroma, offset."""
    parts = np.zeros((4, 3, 4))
    parts[:3, :, :3] = _TO_LUMA, _CHROMA, _CHROMA_TURNED
    parts[3, :, 3] = 1.0
    return parts.reshape(4, 12)


def _stain_parts() -> NDArray[np.float64]:
    """The same of ln 256 - od', a change of stains: three factors, three shifts and ln 256.

    A pixel's od is a row (r, g, b): od' = od @ inv(S) @ diag(factor) @ S + shift @ S.
    """
    parts = np.zeros((7, 3, 4))
    for stain, colours in enumerate(HED_STAINS):
        parts[stain, :, :3] = -np.outer(colours, _STAINS_FROM_OD[:, stain])
        parts[3 + stain, :, 3] = -colours
    parts[6, :, 3] = math.log(256)
    return parts.reshape(7, 12)


_JITTER_PARTS = _jitter_parts()
_STAIN_PARTS = _stain_parts()

_OD_OF_LEVEL = -np.log((np.arange(256) + 1) / 256).astype(np.float32)
"""Optical density (natural logarithm) of an 8-bit level v, taken as the transmittance (v+1)/256,
so that black is finite and white is exactly 0."""

LEAST_TAP = 1 / 2048
"""Taps of a blur that are smaller than this share of the middle one are left out. They move no
pixel by a level, and at a sigma of 0.3 px they are denormal numbers, which take 20 times as
long."""


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
    both = brightness * contrast
    chroma = 0.0 if grey else both * saturation  # greys have none
    # Saturation, hue and greyscale leave greys alone, so the pivot passes through them unchanged.
    red, green, blue = mean_rgb.tolist()
    mean_luma = LUMA_OF_RED * red + LUMA_OF_GREEN * green + LUMA_OF_BLUE * blue
    pivot = (1 - contrast) * brightness * mean_luma
    parts = (both, chroma * math.cos(angle), chroma * math.sin(angle), pivot)
    return (np.array(parts) @ _JITTER_PARTS).reshape(3, 4)


def apply_matrix(
    image: NDArray[np.uint8], matrix: NDArray[np.float64], out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """`image` uint8 [H, W, 3] under an affine map [3, 4], rounded and clipped to 0 … 255.

    `out`, here and below, is what is written to (not `image`) and returned; without it, a new
    array. Fresh memory costs as much as the arithmetic, so a renderer keeps its own.
    """
    return _as_uint8(cv2.transform(image, matrix.astype(np.float32), out))


def mean_colour(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean of R, G, B over `image` uint8 [H, W, 3], in 8-bit levels: float64 [3]."""
    return np.array(cv2.mean(image)[:3])


def optical_density(
    image: NDArray[np.uint8], out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """-ln((v+1) / 256) of each level v of `image` uint8 [H, W, 3]: float32 [H, W, 3]."""
    return _as_float32(cv2.LUT(image, _OD_OF_LEVEL, out))


def stain_moments(
    density: NDArray[np.float32], out: NDArray[np.float32] | None = None
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of the amounts of haematoxylin, eosin and DAB over a crop.

    Args:
        density: float32 [H, W, 3], from `optical_density`.
        out: float32 [H, W, 3], room for the amounts.

    Returns:
        Two triples, in natural optical density.
    """
    mean, std = cv2.meanStdDev(cv2.transform(density, _UNMIXING, out))
    (h_mean,), (e_mean,), (d_mean,) = mean.tolist()
    (h_std,), (e_std,), (d_std,) = std.tolist()
    return (h_mean, e_mean, d_mean), (h_std, e_std, d_std)


def change_stains(
    density: NDArray[np.float32],
    factor: Sequence[float],
    shift: Sequence[float],
    room: NDArray[np.float32] | None = None,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Makes each stain stronger or weaker: amount ← factor · amount + shift, for H, E and DAB.

    Tellez et al., "Whole-slide mitosis detection in H&E breast histology …", 2018. As the amounts
    are linear in optical density, so is the whole change: one affine map before an exponential.

    The amounts here are natural densities: one unit of a stain darkens R, G and B by the factors
    exp(-row of `HED_STAINS`). scikit-image's ``rgb2hed`` takes the logarithm to the base 10⁻⁶
    instead, so its amounts are ours over ln 10⁶ = 13.8: a published shift of 0.05 in its units is
    one of 0.69 in ours. Factors are the same in both; it also raises negative amounts to 0.

    Args:
        density: float32 [H, W, 3], from `optical_density`.
        factor: [3], of haematoxylin, eosin and DAB; 1 changes nothing.
        shift: [3], added to each; 0 changes nothing.
        room: float32 [H, W, 3] for what lies between, not `density`.
        out: uint8 [H, W, 3].

    Returns:
        uint8 [H, W, 3].
    """
    matrix = (np.array((*factor, *shift, 1.0)) @ _STAIN_PARTS).reshape(3, 4).astype(np.float32)
    negative = cv2.transform(density, matrix, room)
    scaled = cv2.exp(negative, negative)  # 256·exp(-od)
    # What a negative density makes brighter than white is clipped, as on a sensor.
    return _as_uint8(cv2.convertScaleAbs(scaled, out, 1.0, -1.0))


def blur(
    image: NDArray[np.uint8],
    sigma_px: float,
    radius_px: int = 4,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Gaussian blur of `image` uint8 [H, W, 3]; 9 taps wide at most by default, as in DINOv2."""
    needed = int(sigma_px * math.sqrt(-2 * math.log(LEAST_TAP)))
    # Float taps on bytes take half the time of cv2.GaussianBlur, and differ by one level at most.
    taps = cv2.getGaussianKernel(2 * min(radius_px, needed) + 1, sigma_px).astype(np.float32)
    return _as_uint8(cv2.sepFilter2D(image, -1, taps, taps, out))


def solarize(
    image: NDArray[np.uint8], threshold: int = 128, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Inverts the levels of `image` uint8 [H, W, 3] from `threshold` up."""
    levels = np.arange(256)
    table = np.where(levels < threshold, levels, 255 - levels).astype(np.uint8)
    return _as_uint8(cv2.LUT(image, table, out))


def _as_uint8(image: object) -> NDArray[np.uint8]:
    """What OpenCV returned, under the type that it has."""
    array = np.asarray(image)
    assert array.dtype == np.uint8
    return array


def _as_float32(image: object) -> NDArray[np.float32]:
    array = np.asarray(image)
    assert array.dtype == np.float32
    return array
