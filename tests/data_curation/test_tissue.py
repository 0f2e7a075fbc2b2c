from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from eosin.data_curation.glass import estimate_glass
from eosin.data_curation.slide import Slide
from eosin.data_curation.tissue import RULES, find_tissue, mask_mpp, rule_for

GLASS = (240, 238, 242)
DENSE, PALE, FAINT = (205, 120, 170), (236, 212, 228), (237, 222, 233)


def glass(side: int = 600) -> NDArray[np.uint8]:
    image = np.full((side, side, 3), GLASS, np.float64)
    image += np.random.default_rng(0).normal(0, 2, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def disc(image: NDArray[np.uint8], x: int, y: int, radius: int, colour: tuple[int, ...]) -> None:
    cv2.circle(image, (x, y), radius, colour, thickness=-1)


def overlap(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    return float((found & truth).sum() / (found | truth).sum())


@pytest.mark.parametrize("colour", [DENSE, PALE, (150, 140, 175), (170, 130, 95)])
def test_stained_tissue_is_found_dense_or_pale(colour: tuple[int, int, int]) -> None:
    image = glass()
    truth = np.zeros(image.shape[:2], np.uint8)
    disc(image, 300, 280, 150, colour)
    disc(truth, 300, 280, 150, (1,))
    tissue = find_tissue(image, (8.0, 8.0))
    assert overlap(tissue.tissue, truth > 0) > 0.95
    assert tissue.area_mm2(tissue.tissue) == pytest.approx(np.pi * 1.2**2, rel=0.05)


def test_bare_glass_dust_bubbles_and_shadows_are_not_tissue() -> None:
    image = glass()
    cv2.circle(image, (200, 200), 80, (150, 150, 150), thickness=6)  # bubble
    disc(image, 420, 120, 25, (40, 42, 41))  # dirt
    image[:, 500:] = (image[:, 500:] * 0.85).astype(np.uint8)  # coverslip edge
    for x, y in np.random.default_rng(1).integers(20, 480, (30, 2)):
        disc(image, int(x), int(y), 2, (120, 60, 80))  # coloured specks
    assert not find_tissue(image, (8.0, 8.0)).tissue.any()


def test_tinted_glass_is_not_tissue() -> None:
    image = np.full((400, 400, 3), (242, 232, 208), np.uint8)
    assert not find_tissue(image, (8.0, 8.0)).tissue.any()
    assert estimate_glass(image) == (242, 232, 208)


def test_pale_parts_count_beside_tissue_and_not_alone() -> None:
    image = glass()
    disc(image, 200, 200, 90, FAINT)
    disc(image, 200, 200, 60, DENSE)
    disc(image, 450, 450, 60, FAINT)
    found = find_tissue(image, (8.0, 8.0)).tissue
    assert found[200, 275]
    assert not found[400:500, 400:500].any()


def test_pen_is_left_out_and_tissue_beside_it_kept() -> None:
    image = glass()
    disc(image, 200, 300, 120, DENSE)
    cv2.line(image, (420, 50), (420, 550), (30, 150, 120), thickness=25)
    tissue = find_tissue(image, (8.0, 8.0))
    assert tissue.tissue[300, 200]
    assert not tissue.tissue[:, 400:440].any()
    assert tissue.pen[300, 420]


def test_small_holes_are_filled_and_large_ones_left() -> None:
    image = glass()
    disc(image, 300, 300, 200, DENSE)
    disc(image, 250, 300, 10, GLASS)  # 160 µm across
    disc(image, 380, 300, 50, GLASS)  # 800 µm across
    found = find_tissue(image, (8.0, 8.0)).tissue
    assert found[300, 250]
    assert not found[300, 380]


def test_the_mask_is_physical_and_does_not_depend_on_the_scale() -> None:
    image = glass(512)
    disc(image, 250, 250, 120, DENSE)
    disc(image, 60, 60, 6, DENSE)  # 96 µm across: debris
    fine = np.asarray(Image.fromarray(image).resize((1024, 1024), Image.Resampling.LANCZOS))
    coarse, finer = find_tissue(image, (8.0, 8.0)), find_tissue(fine, (4.0, 4.0))
    assert finer.area_mm2(finer.tissue) == pytest.approx(coarse.area_mm2(coarse.tissue), rel=0.03)
    assert not coarse.tissue[:100, :100].any()
    assert not finer.tissue[:200, :200].any()


def test_a_picture_full_of_tissue_is_all_tissue() -> None:
    image = np.full((300, 300, 3), DENSE, np.uint8)
    assert find_tissue(image, (8.0, 8.0)).tissue.all()


def test_small_slides_and_small_tiles_are_looked_at_finely() -> None:
    assert mask_mpp((50_000, 30_000), 128, 0.25) == 8
    assert mask_mpp((1024, 900), 128, 0.25) == 2
    assert mask_mpp((50_000, 30_000), 32, 0.25) == 4
    assert mask_mpp((1024, 900), 32, 4.0) == 4


@pytest.mark.parametrize(
    ("stain", "rule"),
    [
        (None, "he"), ("", "he"), ("H&E", "he"), ("HE", "he"), ("unknown", "he"), ("PAS", "he"),
        ("Masson trichrome", "he"), ("Reticulin", "silver"), ("Warthin-Starry", "silver"),
        ("Gomori silver", "silver"), ("CD3", "pale"), ("Ki-67", "pale"), ("HER2", "pale"),
    ],
)  # fmt: skip
def test_a_stain_has_its_rule(stain: str | None, rule: str) -> None:
    assert rule_for(stain) == rule


def test_pale_and_grey_tissue_is_found_by_its_own_rule_alone() -> None:
    image = glass()
    disc(image, 200, 300, 120, (214, 212, 232))  # a counterstain's ground
    disc(image, 450, 300, 120, (205, 204, 206))  # silver's
    for name, left, right in (("he", 0, 0), ("pale", 1, 0), ("silver", 1, 1)):
        found = find_tissue(image, (8.0, 8.0), RULES[name]).tissue
        assert (found[300, 200], found[300, 450]) == (left, right), name


def test_a_small_crop_of_bare_glass_is_not_a_filled_hole() -> None:
    assert not find_tissue(glass(64), (2.0, 2.0)).tissue.any()


def test_real_tissue_is_found_and_dust_and_bubbles_are_not(real_data: Path) -> None:
    with Slide(real_data / "slides" / "C3L-00601-26.tiff", (4.0, 4.0)) as slide:
        overview, _ = slide.overview(16.0)
    found = find_tissue(overview, (16.0, 16.0)).tissue
    height, width = found.shape
    assert not found[int(0.88 * height) :].any()  # bubbles and dust below the section
    assert not found[: int(0.14 * height)].any()
    assert not found[:, : int(0.17 * width)].any()
    inside = found[int(0.3 * height) : int(0.7 * height), int(0.3 * width) : int(0.7 * width)]
    assert inside.mean() > 0.97
    assert 0.30 < found.mean() < 0.34


@pytest.mark.parametrize("name", ["no-tissue", "no-tissue-line", "no-tissue-green-pen"])
def test_real_glass_line_and_pen_are_not_tissue(real_data: Path, name: str) -> None:
    rgb = np.asarray(Image.open(real_data / "qc" / f"{name}.png").convert("RGB"))
    assert not find_tissue(rgb, (4.0, 4.0)).tissue.any()
