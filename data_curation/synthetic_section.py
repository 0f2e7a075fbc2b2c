"""Stains and scans one laid-out synthetic slide: class regions to an RGB picture.

Colour follows Beer and Lambert, I = I0 · exp(-OD), with stain vectors, loads of stain, optics and
sensor drawn for every slide.
"""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from eosin.data_curation.stain_vectors import HAEMATOXYLIN_EOSIN, STAINS
from eosin.data_curation.synthetic_layout import TRUTH_DOWNSAMPLE, Layout, Mask
from eosin.data_curation.synthetic_tissue import PAINTERS, Floats, Rng, paint, smooth_noise

# Unit optical densities of haematoxylin and eosin in R, G, B.
_RUIFROK = HAEMATOXYLIN_EOSIN
_MACENKO = np.array([[0.563, 0.720, 0.406], [0.216, 0.801, 0.558]])  # Macenko et al. 2009
_DAB = STAINS[2]
_SILVER = np.array([0.560, 0.577, 0.595])  # black
_BEIGE = np.array([0.42, 0.52, 0.74])  # what silver leaves on everything else
_PENS = np.array([[1.7, 0.9, 0.15], [1.6, 0.35, 1.1], [1.5, 1.5, 1.4], [0.15, 1.5, 1.2]])


Family = Literal["he", "ihc", "silver"]
"""Haematoxylin and eosin; brown on some cells of pale blue tissue; black fibres on pale beige."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What stain and scanner do to one slide."""

    family: Family
    stains: NDArray[np.float64]
    """[2 or 3, 3] optical densities in R, G, B of a unit of what nuclei take up, of what the matrix
    takes up (haematoxylin and eosin), and of the marker, where the family has one."""
    white: NDArray[np.float64]
    """[3] grey values of empty glass."""
    gamma: float
    """Exponent of the scanner's tone curve."""
    blur_px: float
    """Standard deviation of the optics' point spread."""
    noise: float
    """Standard deviation of the sensor's noise, in grey values."""
    jpeg_quality: int


def draw_look(rng: Rng, family: Family = "he") -> Look:
    """One laboratory and scanner: stains somewhere between two published pairs, and a camera."""
    vectors = _RUIFROK + rng.uniform(0, 1, (2, 1)) * (_MACENKO - _RUIFROK)
    vectors = np.clip(vectors + rng.normal(0, 0.03, (2, 3)), 0.02, None)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    stains = vectors * 1.6 * np.exp(rng.normal(0, 0.22, (2, 1)))
    if family == "ihc":  # a pale counterstain, hardly anything on the matrix
        stains = np.stack([0.6 * stains[0], 0.22 * stains[0], 1.6 * _DAB])
    elif family == "silver":
        stains = np.stack([0.35 * _BEIGE, 0.4 * _BEIGE, 1.8 * _SILVER])
    return Look(
        family=family,
        stains=stains,
        white=np.minimum(rng.uniform(236, 248) * np.exp(rng.normal(0, 0.008, 3)), 253),
        gamma=float(np.exp(rng.normal(0, 0.12))),
        blur_px=rng.uniform(0.35, 0.9),
        noise=rng.uniform(0.6, 2.0),
        jpeg_quality=int(rng.integers(75, 93)),
    )


def render(rng: Rng, layout: Layout, look: Look, mpp: float) -> NDArray[np.uint8]:
    """The slide's level 0, [H, W, 3] RGB."""
    tissue_rng, fold_rng, scan_rng, pen_rng, dust_rng, marker_rng = rng.spawn(6)
    stain = _paint_regions(tissue_rng, layout, mpp)
    if look.family != "he":
        marker = _draw_marker(marker_rng, look.family, stain, layout, mpp)
        stain = np.concatenate([stain, marker[None]])
    if layout.fold.any():
        _fold(fold_rng, stain, layout.fold, mpp)
    for plane in stain:
        cv2.GaussianBlur(plane, (0, 0), look.blur_px, dst=plane)
    if layout.blur.any():
        _defocus(stain, layout.blur, scan_rng.uniform(1.5, 3.0) / mpp)
    dirt = _dust(dust_rng, stain.shape[1], mpp)
    ink = _sharpen(_enlarge(layout.pen), 3) if layout.pen.any() else None
    pen = _PENS[pen_rng.integers(len(_PENS))] * pen_rng.uniform(0.6, 1.1)
    noise = scan_rng.standard_normal(dirt.shape, np.float32)
    image = np.empty((*dirt.shape, 3), np.uint8)
    for channel in range(3):
        haematoxylin, eosin, *others = look.stains[:, channel]
        density = cv2.addWeighted(stain[0], haematoxylin, stain[1], eosin, 0)
        for load in others:
            density += stain[2] * np.float32(load)
        density += dirt
        if ink is not None:
            density += ink * np.float32(pen[channel])
        density *= np.float32(-look.gamma)
        light = cv2.exp(density)
        image[..., channel] = cv2.addWeighted(
            light, look.white[channel], noise, look.noise, 0, dtype=cv2.CV_8U
        )
    return image


def _sharpen(weight: Floats, slope: float) -> Floats:
    """Steepens the edges of a soft mask around one half."""
    steep = weight * np.float32(slope)
    steep += np.float32(0.5 - 0.5 * slope)
    return np.clip(steep, 0, 1, out=steep)


def _enlarge(plane: NDArray[np.generic]) -> Floats:
    """A plane of the truth grid at level 0, with soft edges."""
    soft = cv2.GaussianBlur(plane.astype(np.float32), (0, 0), 0.8)
    size = (plane.shape[1] * TRUTH_DOWNSAMPLE, plane.shape[0] * TRUTH_DOWNSAMPLE)
    return np.asarray(cv2.resize(soft, size, interpolation=cv2.INTER_LINEAR), np.float32)


def _window(cells: Mask, margin: int) -> tuple[slice, slice]:
    """Rows and columns of the smallest rectangle around `cells`, with a margin."""
    rows, columns = (np.flatnonzero(cells.any(axis)) for axis in (1, 0))
    return (
        slice(max(0, int(rows[0]) - margin), int(rows[-1]) + 1 + margin),
        slice(max(0, int(columns[0]) - margin), int(columns[-1]) + 1 + margin),
    )


def _at_level0(window: tuple[slice, slice]) -> tuple[slice, slice]:
    rows, columns = (slice(s.start * TRUTH_DOWNSAMPLE, s.stop * TRUTH_DOWNSAMPLE) for s in window)
    return rows, columns


def _paint_regions(rng: Rng, layout: Layout, mpp: float) -> Floats:
    """Haematoxylin and eosin of the section, [2, H, W] in units of stain."""
    side = len(layout.region) * TRUTH_DOWNSAMPLE
    stain = np.zeros((2, side, side), np.float32)
    names = list(PAINTERS)
    for region, stream in enumerate(rng.spawn(len(layout.classes))):
        cells = layout.region == region
        if not (cells & layout.tissue).any():
            continue
        window = _window(cells, margin=4)
        weight = _sharpen(_enlarge(cells[window]), 2)
        shape = (weight.shape[0], weight.shape[1])
        painted = paint(names[layout.classes[region] - 1], shape, 1 / mpp, stream)
        for plane, drawn in zip(stain, painted, strict=True):
            plane[_at_level0(window)] += weight * drawn
    # Tissue ends within a few µm, and its thickness swells and thins over the slide.
    edge = _sharpen(_enlarge(layout.tissue), 5)
    stain *= edge * np.exp(0.08 * smooth_noise(rng, (side, side), 250 / mpp))
    return stain


def _draw_marker(rng: Rng, family: Family, stain: Floats, layout: Layout, mpp: float) -> Floats:
    """[H, W] load of the third stain: DAB on cells of some regions, or silver on fibres."""
    if family == "silver":
        fine = stain[1] - cv2.GaussianBlur(stain[1], (0, 0), 3 / mpp)
        return np.asarray(np.clip(8 * fine, 0, 1.2), np.float32)
    positive = rng.random(len(layout.classes)) < 0.4
    where = _enlarge(positive[layout.region])
    return np.asarray(where * (stain[0] if rng.random() < 0.5 else stain[1]), np.float32)


def _fold(rng: Rng, stain: Floats, fold: Mask, mpp: float) -> None:
    """Lays tissue from 20 to 60 µm away over the band, in place."""
    rows, columns = _at_level0(_window(fold, margin=4))
    weight = _enlarge(fold[_window(fold, margin=4)])
    shift = np.rint(rng.uniform(20, 60, 2) * rng.choice([-1, 1], 2) / mpp).astype(int)
    for plane in stain:
        over = np.roll(plane, shift, (0, 1))[rows, columns]
        plane[rows, columns] += weight * over


def _defocus(stain: Floats, blur: Mask, sigma_px: float) -> None:
    """Blurs the patch, in place."""
    window = _window(blur, margin=4)
    rows, columns = _at_level0(window)
    weight = _enlarge(blur[window])
    for plane in stain:
        sharp = plane[rows, columns]
        sharp += weight * (cv2.GaussianBlur(sharp, (0, 0), sigma_px) - sharp)


def _dust(rng: Rng, side_px: int, mpp: float) -> Floats:
    """[H, W] grey density of a few specks per mm², 3 to 12 µm wide."""
    density = np.zeros((side_px, side_px), np.float32)
    for _ in range(rng.poisson(8 * (side_px * mpp / 1000) ** 2)):
        major = rng.uniform(1.5, 6) / mpp
        axes = (max(1, int(major)), max(1, int(major * rng.uniform(0.3, 1))))
        x, y = (int(v) for v in rng.integers(0, side_px, 2))
        cv2.ellipse(density, (x, y), axes, rng.uniform(0, 180), 0, 360, rng.uniform(0.5, 1.6), -1)
    return np.asarray(cv2.GaussianBlur(density, (0, 0), 0.8), np.float32)
