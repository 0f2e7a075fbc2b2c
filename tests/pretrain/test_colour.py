"""Colour of crops against per-pixel formulas, Pillow and SciPy."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy import ndimage

from eosin.pretrain import colour


@pytest.fixture
def image() -> NDArray[np.uint8]:
    """Smooth mid-range colours, so that no factor near 1 clips."""
    noise = np.random.default_rng(0).uniform(40, 190, (5, 6, 3))
    return ndimage.zoom(noise, (8, 8, 1), order=1).astype(np.uint8)


def jitter_by_pixel(
    image: NDArray[np.uint8],
    brightness: float,
    contrast: float,
    saturation: float,
    hue_turns: float,
    grey: bool,
) -> NDArray[np.float64]:
    """The steps one after the other on one pixel at a time, in words of R, G, B, Y, I, Q."""
    bright = image.astype(np.float64) * brightness
    mean_luma = float(np.mean(bright @ [0.299, 0.587, 0.114]))
    out = np.empty_like(bright)
    for place in np.ndindex(*image.shape[:2]):
        r, g, b = (mean_luma + contrast * (value - mean_luma) for value in bright[place])
        luma = 0.299 * r + 0.587 * g + 0.114 * b
        r, g, b = (luma + saturation * (value - luma) for value in (r, g, b))
        i = 0.5959 * r - 0.2746 * g - 0.3213 * b
        q = 0.2115 * r - 0.5227 * g + 0.3112 * b
        angle = 2 * math.pi * hue_turns
        i, q = i * math.cos(angle) - q * math.sin(angle), i * math.sin(angle) + q * math.cos(angle)
        rgb = np.linalg.solve(colour.YIQ_FROM_RGB, [luma, i, q])
        out[place] = luma if grey else rgb
    return out


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize(
    ("brightness", "contrast", "saturation", "hue_turns"),
    [
        (1, 1, 1, 0),
        (1.2, 1, 1, 0),
        (1, 0.7, 1, 0),
        (1, 1, 0.4, 0),
        (1, 1, 1, 0.1),
        (0.9, 1.2, 0.8, -0.05),
    ],
)
def test_one_matrix_does_what_the_steps_do_pixel_by_pixel(
    image: NDArray[np.uint8],
    brightness: float,
    contrast: float,
    saturation: float,
    hue_turns: float,
    grey: bool,
) -> None:
    matrix = colour.jitter_matrix(
        colour.mean_colour(image),
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue_turns=hue_turns,
        grey=grey,
    )
    expected = jitter_by_pixel(image, brightness, contrast, saturation, hue_turns, grey)
    exact = image @ matrix[:, :3].T + matrix[:, 3]
    assert np.abs(exact - expected).max() < 1e-6
    rendered = colour.apply_matrix(image, matrix)
    assert np.abs(rendered - np.clip(expected, 0, 255)).max() <= 1.01


@pytest.mark.parametrize(
    ("name", "enhance"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
@pytest.mark.parametrize("factor", [0.6, 1.0, 1.3])
def test_each_factor_means_what_it_means_in_pillow(
    image: NDArray[np.uint8], name: str, enhance: type[ImageEnhance._Enhance], factor: float
) -> None:
    matrix = colour.jitter_matrix(colour.mean_colour(image), **{name: factor})
    ours = colour.apply_matrix(image, matrix).astype(int)
    assert np.abs(ours - np.asarray(enhance(Image.fromarray(image)).enhance(factor))).max() <= 2


def test_greyscale_is_pillows() -> None:
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    ours = colour.apply_matrix(image, colour.jitter_matrix(np.zeros(3), grey=True)).astype(int)
    assert np.abs(ours - np.asarray(Image.fromarray(image).convert("L"))[..., None]).max() <= 1


def test_hue_turns_colours_and_leaves_greys_and_luma() -> None:
    linear = colour.jitter_matrix(np.zeros(3), hue_turns=0.1)[:, :3]
    assert np.allclose(linear @ np.ones(3), 1)
    assert np.allclose(colour.LUMA @ linear, colour.LUMA)
    assert np.allclose(np.linalg.matrix_power(linear, 10), np.eye(3))
    assert not np.allclose(linear, np.eye(3), atol=0.1)


def test_stain_jitter_of_no_strength_changes_nothing() -> None:
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image[0, :, :] = np.arange(64 * 3).reshape(64, 3)
    image[1] = 255
    assert np.array_equal(colour.jitter_stains(image, (1, 1, 1), (0, 0, 0)), image)


def test_stain_jitter_is_the_unmixing_of_each_pixel() -> None:
    image = np.random.default_rng(3).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    factor, shift = (1.2, 0.8, 1.1), (0.1, -0.2, 0.05)
    expected = np.empty(image.shape)
    for place in np.ndindex(9, 7):
        density = [-math.log((int(value) + 1) / 256) for value in image[place]]
        amounts = np.linalg.solve(colour.HED_STAINS.T, density)
        changed = (amounts * factor + shift) @ colour.HED_STAINS
        expected[place] = 256 * np.exp(-changed) - 1
    ours = colour.jitter_stains(image, factor, shift)
    assert np.abs(ours - np.clip(expected, 0, 255)).max() <= 0.51


def test_doubled_haematoxylin_darkens_nuclei_and_leaves_pure_eosin() -> None:
    pure = 256 * np.exp(-0.5 * colour.HED_STAINS[None]) - 1  # [1, 3, 3]: H, E, DAB of amount 0.5
    doubled = colour.jitter_stains(np.round(pure).astype(np.uint8), (2, 1, 1), (0, 0, 0))
    twice = 256 * np.exp(-1.0 * colour.HED_STAINS[0]) - 1
    assert np.abs(doubled[0, 0] - twice).max() < 2
    assert np.abs(doubled[0, 1] - pure[0, 1]).max() < 2


@pytest.mark.parametrize("sigma_px", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_a_gaussian_of_nine_taps(image: NDArray[np.uint8], sigma_px: float) -> None:
    expected = ndimage.gaussian_filter(
        image.astype(np.float64), (sigma_px, sigma_px, 0), mode="mirror", radius=(4, 4, 0)
    )
    assert np.abs(colour.blur(image, sigma_px) - expected).max() <= 1


def test_blur_removes_what_pillows_removes() -> None:
    noise = np.random.default_rng(4).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    theirs = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1.5)))
    assert colour.blur(noise, 1.5).std() == pytest.approx(theirs.std(), rel=0.1)


def test_solarize_is_pillows() -> None:
    image = np.arange(256 * 3, dtype=np.int64).reshape(16, 16, 3).astype(np.uint8)
    expected = np.asarray(ImageOps.solarize(Image.fromarray(image), 128))
    assert np.array_equal(colour.solarize(image), expected)
