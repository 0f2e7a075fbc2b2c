from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import spearmanr

from eosin.data_curation.glass import optical_density
from eosin.data_curation.quality import Quality, measure_quality, measure_sharpness
from eosin.data_curation.synthetic_section import draw_look
from eosin.data_curation.synthetic_tissue import PAINTERS, Sheet, balance

EOSIN, NUCLEI, GLASS = (230, 150, 190), (95, 60, 140), (243, 243, 244)


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
    quality = measure_quality(tile, 0.5)
    assert quality.white_fraction == 16 / 64
    assert quality.dark_fraction == 8 / 64


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
    assert measure_sharpness(plain(GLASS), 0.5) == pytest.approx(-1)


def test_optical_density_is_minus_the_logarithm_of_transmission() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    expected = -np.log((rgb + 1.0) / np.array([241.0, 231.0, 221.0]))
    np.testing.assert_allclose(optical_density(rgb, (240, 230, 220)), expected, atol=1e-5)


def test_a_tile_half_out_of_focus_is_told_from_one_half_of_glass() -> None:
    sharp = cells(0.5)
    blurred = np.asarray(cv2.GaussianBlur(sharp, (0, 0), 4.0), np.uint8)
    half_blurred, half_glass = sharp.copy(), sharp.copy()
    half_blurred[:280] = blurred[:280]
    half_glass[:280] = GLASS
    assert measure_sharpness(half_blurred, 0.5) < measure_sharpness(sharp, 0.5) - 0.8
    assert measure_sharpness(half_glass, 0.5) > measure_sharpness(sharp, 0.5) - 0.15


def test_entropy_is_that_of_the_histogram() -> None:
    assert measure_quality(plain(GLASS), 1.0).entropy == 0
    levels = np.repeat(np.arange(64, dtype=np.uint8)[:, None, None] * 4, 64, 1)
    assert measure_quality(np.repeat(levels, 3, 2), 1.0).entropy == pytest.approx(6)


def painted(seed: int) -> tuple[NDArray[np.uint8], float, NDArray[np.float64]]:
    """A synthetic tile at 0.5 µm/px, the share of its pixels in nuclei, and its two stains."""
    rng = np.random.default_rng([11, seed])
    sheet = Sheet(
        nuclei=np.zeros((256, 256), np.uint8),
        matrix=np.zeros((256, 256), np.float32),
        px_per_um=2.0,
        rng=rng,
    )
    list(PAINTERS.values())[seed % len(PAINTERS)](sheet, rng.uniform(0.12, 0.4))
    share = float((sheet.nuclei > 90).mean())
    planes, look = balance(sheet), draw_look(rng)
    density = sum(
        plane[..., None] * stain for plane, stain in zip(planes, look.stains, strict=True)
    )
    light = np.exp(-look.gamma * density) * look.white + rng.normal(0, look.noise, (256, 256, 3))
    return np.clip(light, 0, 255).astype(np.uint8), share, look.stains


def test_nuclei_and_haematoxylin_follow_the_truth() -> None:
    tiles = [painted(seed) for seed in range(96)]
    found = [measure_quality(rgb, 0.5) for rgb, _, _ in tiles]
    truth = np.array([share for _, share, _ in tiles])
    nuclei = np.array([q.nuclei_fraction for q in found])
    assert spearmanr(nuclei, truth).statistic > 0.8
    assert np.abs(nuclei - truth).mean() < 0.07
    assert min(q.haematoxylin for q in found) > 0.05


def test_stain_vectors_of_a_tile_point_where_they_should() -> None:
    """Against the vectors that the tile was stained with, where both stains are there."""
    cosines = []
    for seed in range(96):
        rgb, share, stains = painted(seed)
        found = measure_quality(rgb, 0.5).stain_vectors
        if found is None or share < 0.1:
            continue
        truth = stains / np.linalg.norm(stains, axis=1, keepdims=True)
        cosines.append((np.array(found).reshape(2, 3) * truth).sum(1))
    assert len(cosines) > 60
    assert np.median(cosines, axis=0).min() > 0.97
    assert measure_quality(plain(GLASS), 0.5).stain_vectors is None


def test_real_tiles_are_judged_as_their_names_say(real_data: Path) -> None:
    def quality_of(name: str) -> Quality:
        rgb = np.asarray(Image.open(real_data / "qc" / f"{name}.png").convert("RGB"))
        return measure_quality(rgb, 1.0)

    assert quality_of("no-tissue").white_fraction > 0.99
    assert quality_of("almost-white-2").white_fraction > 0.9
    order = ("very-low-nuclei-score-red-pen-level1", "low-nuclei-score-level1",
             "high-nuclei-score-red-pen-level1", "medium-nuclei-score-level2")  # fmt: skip
    scores = [quality_of(name).nuclei_fraction for name in order]
    assert scores == sorted(scores)
    assert quality_of("no-tissue").entropy < 3 < quality_of("low-nuclei-score-level1").entropy
