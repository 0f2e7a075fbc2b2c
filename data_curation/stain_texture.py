"""A weight-free descriptor of a tile: how it is stained, and how its texture runs over scales.

Good enough to cluster tissue before there is an encoder, and to find near duplicates. It is made of
pixel rules alone, so it is the same on every machine. Flips and quarter turns change it in the last
bits only: moments, magnitudes of gradients and Laplacians, rotation-invariant uniform local binary
patterns (riu2: Ojala, Pietikäinen, Mäenpää, TPAMI 2002) and eigenvalues of structure tensors
have no preferred direction.
"""

from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from eosin.data_curation.glass import optical_density

LONGEST_SIDE_PX = 128
"""A larger tile is halved until it is no larger: 256 px at 0.5 µm/px become 128 at 1."""
SCALES = 4
"""The image and its halves on which texture is measured."""
PATTERN_SCALES = 3
"""Of them, those with binary patterns."""
PATTERN_STEP = 2.0
"""Grey values by which a neighbour must be brighter: noise on glass makes no pattern."""

_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Haematoxylin, eosin, DAB: Ruifrok and Johnston, AQCH 2001."""
_UNMIX = np.linalg.inv(_STAINS / np.linalg.norm(_STAINS, axis=1, keepdims=True)).T
_QUANTILES = (10, 50, 90)
_DENSITIES = (-1.0, 5.0)
_NUCLEUS = 0.35
"""Haematoxylin density from which a pixel is nuclear."""
_SMALL = 1e-4
_NEIGHBOURS = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))

Array = npt.NDArray[np.float32]


class _Part(NamedTuple):
    """Where a part of the descriptor lies, and what its values are multiplied by."""

    size: int
    weight: float


_COLOUR = _Part(3 * (2 + len(_QUANTILES)) + 3, 1.5)
_ENERGY = _Part(SCALES * 2 * 3, 1.0)
_PATTERNS = _Part(PATTERN_SCALES * 10, 4.0)
_NUCLEI = _Part(3, 0.5)
DIM = _COLOUR.size + _ENERGY.size + _PATTERNS.size + _NUCLEI.size
"""Features of a tile."""


def stain_texture(tile: npt.NDArray[np.uint8]) -> Array:
    """The descriptor of an RGB tile, uint8 [H, W, 3]: float32 [DIM].

    Its parts are scaled so that each adds about as much to squared distances between tiles.
    """
    while max(tile.shape[:2]) > LONGEST_SIDE_PX and min(tile.shape[:2]) >= 2:
        half = (tile.shape[1] // 2, tile.shape[0] // 2)
        tile = np.asarray(cv2.resize(tile, half, interpolation=cv2.INTER_AREA), np.uint8)
    density = optical_density(tile)
    planes = [np.asarray(p, np.float32) for p in cv2.split(cv2.transform(density, _UNMIX))]
    colour = _colour(planes, np.asarray(cv2.transform(density, np.ones((1, 3))), np.float32))
    energy, patterns = _texture(planes[0], np.asarray(cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY)))
    nuclei = _nuclei(planes[0])
    parts = ((colour, _COLOUR), (energy, _ENERGY), (patterns, _PATTERNS), (nuclei, _NUCLEI))
    return np.concatenate([values * part.weight for values, part in parts]).astype(np.float32)


def _colour(planes: list[Array], total: Array) -> Array:
    """Mean, deviation and quantiles of each stain; glass, darkness, and how the stains go along."""
    moments = [cv2.meanStdDev(plane) for plane in planes]
    means, deviations = ([float(m[which][0, 0]) for m in moments] for which in (0, 1))
    quantiles = [value for plane in planes for value in _quantiles(plane)]
    glass, dark = float((total < 0.15).mean()), float((total > 4.5).mean())
    covariance = float((planes[0] * planes[1]).mean()) - means[0] * means[1]
    along = covariance / max(deviations[0] * deviations[1], _SMALL)
    return np.array([*means, *deviations, *quantiles, glass, dark, 0.3 * along], np.float32)


def _quantiles(plane: Array) -> npt.NDArray[np.float64]:
    """`_QUANTILES` of a plane of densities, to a 256th of `_DENSITIES`, by a histogram."""
    low, high = _DENSITIES
    inside = np.clip(plane, low, np.float32(high - 1e-3))
    counts = cv2.calcHist([inside], [0], None, [256], [low, high]).ravel()
    below = np.cumsum(counts, dtype=np.float64) / counts.sum(dtype=np.float64)
    edges = np.linspace(low, high, 257)[1:]
    return edges[np.searchsorted(below, np.array(_QUANTILES) / 100)]


def _texture(haematoxylin: Array, grey: npt.NDArray[np.uint8]) -> tuple[Array, Array]:
    """Energies over scales of haematoxylin and grey, and pattern histograms of grey."""
    energies: list[float] = []
    histograms: list[Array] = []
    planes: list[Array] = [haematoxylin, grey.astype(np.float32) * np.float32(1 / 255)]
    for scale in range(SCALES):
        for plane in planes:
            energies += _energies(plane)
        if scale < PATTERN_SCALES:
            histograms.append(pattern_histogram(planes[1] * 255))
        half = (max(1, planes[0].shape[1] // 2), max(1, planes[0].shape[0] // 2))
        planes = [
            np.asarray(cv2.resize(plane, half, interpolation=cv2.INTER_AREA), np.float32)
            for plane in planes
        ]
    return np.array(energies, np.float32), np.concatenate(histograms)


def _energies(plane: Array) -> tuple[float, float, float]:
    """log10 of gradient and Laplacian energy, and how far the gradients share one direction."""
    gx = cv2.Sobel(plane, cv2.CV_32F, 1, 0, scale=0.125)
    gy = cv2.Sobel(plane, cv2.CV_32F, 0, 1, scale=0.125)
    xx, yy, xy = float((gx * gx).mean()), float((gy * gy).mean()), float((gx * gy).mean())
    laplace = float(np.square(cv2.Laplacian(plane, cv2.CV_32F)).mean())
    sum_, difference = xx + yy, float(np.hypot(xx - yy, 2 * xy))
    return (
        float(np.log10(sum_ + _SMALL**2)),
        float(np.log10(laplace + _SMALL**2)),
        difference / (sum_ + _SMALL**2),
    )


def pattern_histogram(grey: Array) -> Array:
    """Square roots of the frequencies of riu2 patterns over 8 neighbours, float32 [10].

    Patterns 0 to 8 are those with at most two changes around the pixel, by how many neighbours are
    brighter by `PATTERN_STEP`; 9 is every other. A plane narrower than 3 px has none: zeros.
    """
    height, width = grey.shape
    if min(height, width) < 3:
        return np.zeros(10, np.float32)
    centre = grey[1:-1, 1:-1] + PATTERN_STEP
    ring = [
        grey[1 + dy : height - 1 + dy, 1 + dx : width - 1 + dx] >= centre for dy, dx in _NEIGHBOURS
    ]
    bright = np.zeros(centre.shape, np.uint8)
    changes = np.zeros(centre.shape, np.uint8)
    for one, following in zip(ring, ring[1:] + ring[:1], strict=True):
        bright += one
        changes += one ^ following
    pattern = np.where(changes <= 2, bright, 9)
    counts = np.bincount(pattern.ravel(), minlength=10)
    return np.asarray(np.sqrt(counts / pattern.size), np.float32)


def _nuclei(haematoxylin: Array) -> Array:
    """Share of nuclear pixels, how many pieces they form, and how large these are."""
    smooth = cv2.GaussianBlur(haematoxylin, (0, 0), 1.0)
    mask = np.asarray(smooth > _NUCLEUS, np.uint8)
    area = int(mask.sum())
    pieces = cv2.connectedComponents(mask, connectivity=8)[0] - 1
    per_pixel = pieces / mask.size
    return np.array(
        [area / mask.size, np.log10(per_pixel + _SMALL) + 4, np.log10(1 + area / max(pieces, 1))],
        np.float32,
    )
