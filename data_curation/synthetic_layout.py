"""Lays out a synthetic slide: where the tissue lies, which class where, and where it is spoilt.

Everything is drawn on the grid of the ground truth, one cell being `TRUTH_DOWNSAMPLE` pixels of
level 0, so that the truth is what was drawn and not an estimate of it.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from eosin.data_curation.synthetic_tissue import PAINTERS, Rng, smooth_noise

TRUTH_DOWNSAMPLE = 16
"""Level-0 pixels to a cell of the ground truth, on both axes."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One slide, on the grid of the truth."""

    region: NDArray[np.int32]
    """[h, w] index of the region, defined outside the tissue too."""
    classes: NDArray[np.int64]
    """[regions] 1-based class of each region."""
    tissue: Mask
    pen: Mask
    blur: Mask
    fold: Mask

    def class_map(self) -> NDArray[np.uint8]:
        """[h, w] class values, 0 outside the tissue."""
        return np.asarray(np.where(self.tissue, self.classes[self.region], 0), np.uint8)


def draw_layout(
    rng: Rng, cells: int, cell_um: float, region_um: float, artefact_share: float
) -> Layout:
    """An irregular section on `cells` × `cells`, in warped regions about `region_um` wide.

    Args:
        rng: source of everything.
        cells: side of the grid.
        cell_um: side of a cell.
        region_um: mean distance between the middles of regions.
        artefact_share: chance of a pen stroke, of a blurred patch and of a fold.
    """
    tissue = _draw_tissue(rng, cells)
    region, n_regions = _draw_regions(rng, cells, region_um / cell_um)
    # Cards are dealt to the largest regions first: a slide has as many classes as it has room for.
    decks = -(-n_regions // len(PAINTERS))
    cards = np.concatenate([rng.permutation(len(PAINTERS)) + 1 for _ in range(decks)])
    area = np.bincount(region[tissue], minlength=n_regions)
    classes = np.empty(n_regions, np.int64)
    classes[np.argsort(-area, kind="stable")] = cards[:n_regions]
    pen, blur, fold = (
        draw(stream, tissue, cell_um) if stream.random() < artefact_share else tissue & False
        for draw, stream in zip((_draw_pen, _draw_blur, _draw_fold), rng.spawn(3), strict=True)
    )
    return Layout(region=region, classes=classes, tissue=tissue, pen=pen, blur=blur, fold=fold)


def _draw_tissue(rng: Rng, cells: int) -> Mask:
    """A rounded, ragged section that leaves glass around it."""
    shape = (cells, cells)
    along, across = _turned(rng, np.array([cells, cells]) / 2, cells)
    radius = (np.abs(along) ** 2.6 + np.abs(across / rng.uniform(0.88, 1)) ** 2.6) ** (1 / 2.6)
    ragged = 0.06 * smooth_noise(rng, shape, cells / 5)
    ragged += 0.015 * smooth_noise(rng, shape, cells / 30)
    ragged = np.maximum(ragged, -0.03)  # keeps the section within the slide
    tissue = radius / (cells / 2) + ragged < rng.uniform(0.88, 0.95)
    count, label = cv2.connectedComponents(tissue.astype(np.uint8))
    sizes = np.bincount(label.ravel(), minlength=count)
    return np.asarray(tissue & (sizes[label] > 0.01 * cells**2), np.bool_)


def _draw_regions(rng: Rng, cells: int, spacing: float) -> tuple[NDArray[np.int32], int]:
    """Warped Voronoi regions of a jittered grid: their map [h, w] and their number."""
    steps = np.arange(-0.5, cells / spacing + 1)
    seeds = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    seeds = (seeds + rng.uniform(-0.5, 0.5, 2) + rng.normal(0, 0.13, seeds.shape)) * spacing
    y, x = np.mgrid[0:cells, 0:cells]
    warp = [smooth_noise(rng, (cells, cells), spacing / 2) * 0.05 * spacing for _ in range(2)]
    place = np.stack([x + warp[0], y + warp[1]], -1)
    distance = np.stack([np.linalg.norm(place - seed, axis=-1) for seed in seeds])
    return np.asarray(distance.argmin(0), np.int32), len(seeds)


def _turned(
    rng: Rng, middle: NDArray[np.floating], cells: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coordinates [h, w] along and across a random direction, from `middle` (x, y), in cells."""
    y, x = np.mgrid[0:cells, 0:cells]
    dx, dy, turn = x - middle[0], y - middle[1], rng.uniform(0, np.pi)
    return dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)


def _somewhere(rng: Rng, tissue: Mask) -> NDArray[np.floating]:
    """(x, y) of a cell of the tissue."""
    y, x = np.nonzero(tissue)
    pick = rng.integers(len(x))
    return np.array([x[pick], y[pick]], np.float64)


def _draw_fold(rng: Rng, tissue: Mask, cell_um: float) -> Mask:
    """A bent band of doubled tissue, 24 to 44 µm wide."""
    along, across = _turned(rng, _somewhere(rng, tissue), len(tissue))
    bent = across - rng.normal(0, 0.5) * along**2 / len(tissue)
    near = np.abs(bent) * cell_um < rng.uniform(12, 22)
    return np.asarray(near & tissue & (np.abs(along) < rng.uniform(0.2, 0.4) * len(tissue)))


def _draw_blur(rng: Rng, tissue: Mask, cell_um: float) -> Mask:
    """An oval 200 to 360 µm wide that is out of focus."""
    along, across = _turned(rng, _somewhere(rng, tissue), len(tissue))
    axes = rng.uniform(100, 180, 2) / cell_um
    return np.asarray((along / axes[0]) ** 2 + (across / axes[1]) ** 2 < 1)


def _draw_pen(rng: Rng, tissue: Mask, cell_um: float) -> Mask:
    """A marker's stroke 40 to 80 µm wide, bent along one side of the slide."""
    cells = len(tissue)
    along = np.linspace(0.06, rng.uniform(0.5, 0.95), 60) - 0.5
    swing = rng.uniform(0.02, 0.06) * np.sin(rng.uniform(3, 9) * along + rng.uniform(0, 6))
    line = np.stack([along, rng.uniform(0.32, 0.44) + swing], 1)
    turn = rng.integers(4) * np.pi / 2
    turned = line @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    stroke = np.zeros(tissue.shape, np.uint8)
    width = max(2, round(rng.uniform(40, 80) / cell_um))
    cv2.polylines(stroke, [np.asarray((turned + 0.5) * cells, np.int32)], False, 1, width)
    return np.asarray(stroke > 0)
