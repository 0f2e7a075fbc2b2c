"""Numbers that say how good a tile is. They are measured here and judged at selection.

All are classical pixel rules on RGB, so they need no weights and mean the same on every machine.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from eosin.data_curation.glass import extremes, optical_density
from eosin.data_curation.stain_vectors import macenko, unmix_haematoxylin

Plane = NDArray[np.uint8]

WHITE = 220
"""A pixel whose darkest channel is at least this is glass (the field uses 220 to 230)."""
DARK = 50
"""A pixel whose brightest channel is at most this is a fold, dust, ink or a tear, not stain."""
DETAIL_MPP = 1.0
"""Scale of all figures: edges of nuclei are seen, JPEG's and the sensor's noise is not. A tile
coarser than that is measured as it is: figures compare only among equal mpp there."""
SHARPNESS_BLOCK_UM = 8.0
"""Sharpness is measured in blocks of this side."""
SHARPNESS_PERCENTILE = 40.0
"""And is this percentile of the blocks': low where about half of the tile is out of focus."""
FAINTEST_NUCLEUS = 0.3
"""Least density of haematoxylin of a nucleus."""

_LEAST_ENERGY = 0.1
_NUCLEUS_SIGMA_UM = 0.8
_MOST_STAINED = 1024


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The columns of tiles.parquet that are measured on a tile's pixels."""

    white_fraction: float
    dark_fraction: float
    sharpness: float
    """See `measure_sharpness`."""
    entropy: float
    """Of the grey levels' histogram, bits."""
    haematoxylin: float
    """Mean optical density of haematoxylin, natural logarithms, by Ruifrok's vectors."""
    nuclei_fraction: float
    """Share of pixels in nuclei: haematoxylin above the tile's own threshold by Otsu."""
    stain_vectors: list[float] | None
    """Macenko's estimate: haematoxylin's and eosin's unit densities in R, G, B; None where too
    little is stained."""


def measure_quality(rgb: NDArray[np.uint8], mpp: float) -> Quality:
    """The quality of a tile, RGB uint8 [h, w, 3] at `mpp` µm/px."""
    small = _at_detail(rgb, mpp)
    mpp = max(mpp, DETAIL_MPP)
    grey = np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), np.uint8)
    darkest, brightest = extremes(_channels(small))
    density = optical_density(small)
    haematoxylin = unmix_haematoxylin(density)
    return Quality(
        white_fraction=_share(darkest >= WHITE),
        dark_fraction=_share(brightest <= DARK),
        sharpness=_sharpness(grey, darkest, mpp),
        entropy=_entropy(grey),
        haematoxylin=float(np.clip(haematoxylin, 0, None).mean()),
        nuclei_fraction=_nuclei(haematoxylin, mpp),
        stain_vectors=_vectors(density),
    )


def measure_sharpness(rgb: NDArray[np.uint8], mpp: float) -> float:
    """log10 of the mean square of the Laplacian of the grey tile at 1 µm/px, block by block.

    Blocks of glass do not count, where there are others. The Laplacian answers to the finest
    detail, which defocus takes first; the percentile over blocks tells a tile that is half out of
    focus from one with much glass or little texture.

    Args:
        rgb: uint8 [h, w, 3].
        mpp: µm/px.
    """
    small = _at_detail(rgb, mpp)
    grey = np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), np.uint8)
    return _sharpness(grey, extremes(_channels(small))[0], max(mpp, DETAIL_MPP))


def _at_detail(rgb: NDArray[np.uint8], mpp: float) -> NDArray[np.uint8]:
    if mpp >= DETAIL_MPP:
        return rgb
    height, width = (max(3, round(side * mpp / DETAIL_MPP)) for side in rgb.shape[:2])
    return np.asarray(cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def _sharpness(grey: NDArray[np.uint8], darkest: NDArray[np.uint8], mpp: float) -> float:
    laplacian = cv2.Laplacian(grey, cv2.CV_32F)
    block_px = max(4.0, SHARPNESS_BLOCK_UM / mpp)
    height, width = (max(1, round(side / block_px)) for side in grey.shape)
    energy, counted = (
        np.asarray(cv2.resize(plane, (width, height), interpolation=cv2.INTER_AREA))
        for plane in (cv2.multiply(laplacian, laplacian), (darkest < WHITE).astype(np.float32))
    )
    blocks = energy[counted > 0.5] if (counted > 0.5).any() else energy.ravel()
    middle = np.sort(blocks)[int(SHARPNESS_PERCENTILE / 100 * (len(blocks) - 1))]
    return float(np.log10(middle + _LEAST_ENERGY))


def _entropy(grey: NDArray[np.uint8]) -> float:
    counts = cv2.calcHist([grey], [0], None, [256], [0, 256]).ravel()
    share = counts[counts > 0] / grey.size
    return max(0.0, float(-(share * np.log2(share)).sum()))


def _nuclei(haematoxylin: NDArray[np.float32], mpp: float) -> float:
    smooth = cv2.GaussianBlur(haematoxylin, (0, 0), _NUCLEUS_SIGMA_UM / mpp)
    levels = np.clip(smooth * 100, 0, 255).astype(np.uint8)
    threshold, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return _share(levels > max(threshold, 100 * FAINTEST_NUCLEUS))


def _vectors(density: NDArray[np.float32]) -> list[float] | None:
    pixels = density.reshape(-1, 3)
    found = macenko(pixels[:: 1 + len(pixels) // _MOST_STAINED])
    return None if found is None else found.ravel().tolist()


def _channels(rgb: NDArray[np.uint8]) -> tuple[Plane, Plane, Plane]:
    red, green, blue = cv2.split(rgb)
    return np.asarray(red, np.uint8), np.asarray(green, np.uint8), np.asarray(blue, np.uint8)


def _share(mask: NDArray[np.bool_]) -> float:
    return int(np.count_nonzero(mask)) / mask.size
