from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from eosin.data_curation.quality import (
    measure_quality,
    measure_sharpness,
    optical_density,
    pen_mask,
)

RED_PEN, GREEN_PEN, BLUE_PEN = (215, 35, 50), (45, 165, 140), (40, 60, 165)
EOSIN, NUCLEI, DAB, GLASS = (230, 150, 190), (95, 60, 140), (140, 90, 50), (243, 243, 244)


def plain(colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    return np.full((64, 64, 3), colour, np.uint8)


def cells(mpp: float) -> NDArray[np.uint8]:
    """256 × 256 µm of nuclei, drawn at 0.125 µm/px and shown at `mpp`."""
    rng = np.random.default_rng(3)
    image = np.full((2048, 2048, 3), EOSIN, np.uint8)
    for x, y in rng.integers(0, 2048, (400, 2)):
        cv2.circle(image, (int(x), int(y)), 28, NUCLEI, thickness=-1)
    side = round(2048 * 0.125 / mpp)
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX))


def test_fractions_count_pixels() -> None:
    tile = plain(EOSIN)
    tile[:16] = GLASS
    tile[16:24] = (20, 15, 30)
    tile[24:28] = GREEN_PEN
    quality = measure_quality(tile, 0.5)
    assert quality.white_fraction == 16 / 64
    assert quality.dark_fraction == 8 / 64
    assert quality.pen_fraction == 4 / 64


@pytest.mark.parametrize("colour", [RED_PEN, GREEN_PEN, BLUE_PEN])
def test_ink_is_pen(colour: tuple[int, int, int]) -> None:
    assert pen_mask(plain(colour)).all()


@pytest.mark.parametrize("colour", [EOSIN, NUCLEI, DAB, GLASS, (120, 120, 120), (0, 0, 0)])
def test_stain_glass_and_grey_are_not_pen(colour: tuple[int, int, int]) -> None:
    assert not pen_mask(plain(colour)).any()


def test_blur_lowers_sharpness() -> None:
    sharp = cells(0.5)
    sigmas = (1.0, 2.0, 4.0)
    blurred = [np.asarray(cv2.GaussianBlur(sharp, (0, 0), sigma), np.uint8) for sigma in sigmas]
    values = [measure_sharpness(tile, 0.5) for tile in (sharp, *blurred)]
    assert values == sorted(values, reverse=True)
    assert values[0] - values[-1] > 1


def test_sharpness_does_not_depend_on_the_scale_a_tile_is_read_at() -> None:
    at_half = measure_sharpness(cells(0.5), 0.5)
    assert measure_sharpness(cells(0.25), 0.25) == pytest.approx(at_half, abs=0.05)
    assert measure_sharpness(cells(1.0), 1.0) == pytest.approx(at_half, abs=0.05)


def test_an_empty_tile_has_a_finite_sharpness() -> None:
    assert measure_sharpness(plain(GLASS), 0.5) == -3


def test_optical_density_is_minus_the_logarithm_of_transmission() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    expected = -np.log((rgb + 1.0) / np.array([241.0, 231.0, 221.0]))
    np.testing.assert_allclose(optical_density(rgb, (240, 230, 220)), expected, atol=1e-5)


def test_real_tiles_are_judged_as_their_names_say(real_data: Path) -> None:
    def quality_of(name: str) -> tuple[float, float]:
        rgb = np.asarray(Image.open(real_data / "qc" / f"{name}.png").convert("RGB"))
        quality = measure_quality(rgb, 1.0)
        return quality.white_fraction, quality.pen_fraction

    assert quality_of("no-tissue")[0] > 0.99
    assert quality_of("almost-white-2")[0] > 0.9
    assert quality_of("no-tissue-green-pen")[1] > 0.6
    assert quality_of("medium-nuclei-score-green-pen-level1")[1] > 0.3
    assert quality_of("very-low-nuclei-score-red-pen-level1")[1] > 0.1
    for name in ("medium-nuclei-score-level2", "low-nuclei-score-level1", "no-tissue"):
        assert quality_of(name)[1] < 0.001
