"""Marker pen on overviews: whole strokes, of every ink, and nothing else."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from eosin.data_curation.tissue import find_tissue

GREEN, TEAL, BLUE, RED, BLACK = (
    (30, 150, 60), (45, 165, 140), (40, 60, 165), (215, 35, 50), (40, 40, 45),
)  # fmt: skip
GLASS, TISSUE = (240, 238, 242), (205, 120, 170)


def overview() -> NDArray[np.uint8]:
    """Glass with a section on its left half, at 8 µm/px, with the camera's noise."""
    image = np.full((400, 600, 3), GLASS, np.float64)
    image[60:340, 40:330] = TISSUE
    image += np.random.default_rng(0).normal(0, 2, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def with_stroke(
    image: NDArray[np.uint8], colour: tuple[int, int, int], *ends: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A stroke as light makes it: what it covers is multiplied by its transmission."""
    mask = np.zeros(image.shape[:2], np.uint8)
    cv2.line(mask, *ends, 1, 24)
    ink = np.array(colour) / 255
    drawn = np.where(mask[..., None] > 0, image * ink, image)
    return drawn.astype(np.uint8), mask > 0


def dice(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))


@pytest.mark.parametrize("colour", [GREEN, TEAL, BLUE, RED, BLACK])
def test_a_stroke_is_found_on_glass_and_where_it_runs_over_tissue(
    colour: tuple[int, int, int],
) -> None:
    image, truth = with_stroke(overview(), colour, (560, 60), (120, 300))
    found = find_tissue(image, (8.0, 8.0))
    assert dice(found.pen, truth) > 0.9
    assert not (found.tissue & truth).any()
    clear = cv2.dilate(truth.astype(np.uint8), np.ones((15, 15), np.uint8)) == 0
    assert found.tissue[60:340, 40:330][clear[60:340, 40:330]].mean() > 0.97


def test_two_inks_on_one_slide_are_both_found() -> None:
    image, first = with_stroke(overview(), RED, (560, 60), (120, 300))
    image, second = with_stroke(image, GREEN, (560, 380), (400, 380))
    assert dice(find_tissue(image, (8.0, 8.0)).pen, first | second) > 0.9


def test_what_is_no_pen_is_not_found() -> None:
    image = overview()
    assert not find_tissue(image, (8.0, 8.0)).pen.any()
    cv2.circle(image, (450, 200), 60, (150, 150, 150), 5)  # a bubble
    cv2.circle(image, (180, 200), 40, (95, 60, 140), -1)  # packed nuclei
    cv2.circle(image, (250, 120), 30, (140, 90, 50), -1)  # DAB
    cv2.circle(image, (520, 330), 3, (30, 30, 30), -1)  # dust
    cv2.circle(image, (100, 100), 4, RED, -1)  # a vessel 64 µm wide, full of erythrocytes
    assert not find_tissue(image, (8.0, 8.0)).pen.any()


def test_real_pictures_are_judged_as_their_names_say(real_data: Path) -> None:
    """qc/ holds pictures at 1 to 4 µm/px; their names say what is on them."""
    least = {"no-tissue-green-pen": 0.65, "medium-nuclei-score-green-pen-level1": 0.5,
             "high-nuclei-score-red-pen-level1": 0.08,
             "very-low-nuclei-score-red-pen-level1": 0.15}  # fmt: skip
    for path in sorted((real_data / "qc").glob("*.png")):
        rgb = np.asarray(Image.open(path).convert("RGB"))
        share = find_tissue(rgb, (2.0, 2.0)).pen.mean()
        assert share >= least.get(path.stem, 0), path.stem
        assert share == 0 or path.stem in least, path.stem


def test_no_real_tile_of_lung_is_taken_for_pen(real_data: Path) -> None:
    for path in sorted((real_data / "lung3").rglob("*.jp*g"))[::40]:
        rgb = np.asarray(Image.open(path).convert("RGB"))
        assert not find_tissue(rgb, (1.0, 1.0)).pen.any(), path.name
