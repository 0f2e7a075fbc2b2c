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


def change_stains(
    image: NDArray[np.uint8], factor: tuple[float, ...], shift: tuple[float, ...]
) -> NDArray[np.uint8]:
    return colour.change_stains(colour.optical_density(image), factor, shift)


def amounts_by_pixel(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Haematoxylin, eosin and DAB of each pixel, by solving three equations: [H · W, 3]."""
    densities = [
        [-math.log((int(value) + 1) / 256) for value in pixel] for pixel in image.reshape(-1, 3)
    ]
    return np.array([np.linalg.solve(colour.HED_STAINS.T, density) for density in densities])


def test_a_stain_change_of_no_strength_changes_nothing() -> None:
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image[0, :, :] = np.arange(64 * 3).reshape(64, 3)
    image[1] = 255
    image[2] = 0
    assert np.array_equal(change_stains(image, (1, 1, 1), (0, 0, 0)), image)


@pytest.mark.parametrize(
    ("factor", "shift"),
    [
        ((1.2, 0.8, 1.1), (0.1, -0.2, 0.05)),
        ((1.0, 1.0, 1.0), (-0.3, -0.3, -0.3)),  # brighter than white
        ((3.0, 3.0, 3.0), (0.5, 0.5, 0.5)),  # blacker than black
    ],
)
def test_a_stain_change_is_the_unmixing_of_each_pixel(
    factor: tuple[float, ...], shift: tuple[float, ...]
) -> None:
    image = np.random.default_rng(3).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    changed = (amounts_by_pixel(image) * factor + shift) @ colour.HED_STAINS
    expected = np.clip(256 * np.exp(-changed) - 1, 0, 255).reshape(image.shape)
    assert np.abs(change_stains(image, factor, shift) - expected).max() <= 1


def test_doubled_haematoxylin_darkens_nuclei_and_leaves_pure_eosin() -> None:
    pure = 256 * np.exp(-0.5 * colour.HED_STAINS[None]) - 1  # [1, 3, 3]: H, E, DAB of amount 0.5
    doubled = change_stains(np.round(pure).astype(np.uint8), (2, 1, 1), (0, 0, 0))
    twice = 256 * np.exp(-1.0 * colour.HED_STAINS[0]) - 1
    assert np.abs(doubled[0, 0] - twice).max() < 2
    assert np.abs(doubled[0, 1] - pure[0, 1]).max() < 2


def test_stain_moments_are_those_of_the_amounts_of_the_pixels() -> None:
    image = np.random.default_rng(5).integers(20, 256, (11, 8, 3), dtype=np.uint8)
    amounts = amounts_by_pixel(image)
    mean, std = colour.stain_moments(colour.optical_density(image))
    assert mean == pytest.approx(amounts.mean(0), abs=1e-5)
    assert std == pytest.approx(amounts.std(0), rel=1e-4)


def test_units_of_stain_amounts_are_scikit_images_times_ln_of_a_million() -> None:
    """Its rgb2hed: log(max(rgb, 1e-6)) / log(1e-6) @ inv(rgb_from_hed), for rgb in 0 … 1."""
    image = np.random.default_rng(6).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    rgb = (image.reshape(-1, 3) + 1) / 256
    theirs = np.log(rgb) / np.log(1e-6) @ np.linalg.inv(colour.HED_STAINS)
    assert amounts_by_pixel(image) == pytest.approx(theirs * math.log(1e6))


@pytest.mark.parametrize("sigma_px", [0.1, 0.25, 0.27, 0.4, 0.5, 0.7, 1.0, 1.2, 2.0])
def test_blur_is_a_gaussian_of_nine_taps(image: NDArray[np.uint8], sigma_px: float) -> None:
    expected = ndimage.gaussian_filter(
        image.astype(np.float64), (sigma_px, sigma_px, 0), mode="mirror", radius=(4, 4, 0)
    )
    assert np.abs(colour.blur(image, sigma_px) - expected).max() <= 1
    noise = np.random.default_rng(8).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    noise[:20] = 255
    expected = ndimage.gaussian_filter(
        noise.astype(np.float64), (sigma_px, sigma_px, 0), mode="mirror", radius=(4, 4, 0)
    )
    assert np.abs(colour.blur(noise, sigma_px) - expected).max() <= 2


def test_blur_leaves_flat_images_as_they_are() -> None:
    for sigma_px in np.linspace(0.1, 2.0, 39):
        for level in (1, 128, 250, 255):
            flat = np.full((20, 20, 3), level, np.uint8)
            assert np.array_equal(colour.blur(flat, float(sigma_px)), flat)


@pytest.mark.parametrize("contiguous", [True, False])
def test_results_go_where_they_are_asked_to(contiguous: bool) -> None:
    whole = np.random.default_rng(7).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = whole if contiguous else whole[3:17, 5:25]
    image.flags.writeable = False
    matrix = colour.jitter_matrix(np.array([90.0, 80.0, 70.0]), contrast=1.2, hue_turns=0.03)
    density = colour.optical_density(image)
    factor, shift = (1.1, 0.9, 1.0), (0.02, 0.0, -0.01)
    for fresh, into in (
        (colour.apply_matrix(image, matrix), lambda out: colour.apply_matrix(image, matrix, out)),
        (colour.blur(image, 1.0), lambda out: colour.blur(image, 1.0, out=out)),
        (colour.solarize(image), lambda out: colour.solarize(image, out=out)),
        (
            colour.change_stains(density, factor, shift),
            lambda out: colour.change_stains(density, factor, shift, out=out),
        ),
    ):
        out = np.zeros(image.shape, np.uint8)
        assert into(out) is out and np.array_equal(out, fresh)


def test_blur_removes_what_pillows_removes() -> None:
    noise = np.random.default_rng(4).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    theirs = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1.5)))
    assert colour.blur(noise, 1.5).std() == pytest.approx(theirs.std(), rel=0.1)


def test_solarize_is_pillows() -> None:
    image = np.arange(256 * 3, dtype=np.int64).reshape(16, 16, 3).astype(np.uint8)
    expected = np.asarray(ImageOps.solarize(Image.fromarray(image), 128))
    assert np.array_equal(colour.solarize(image), expected)
