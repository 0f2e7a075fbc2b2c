"""Scale and pixels of tiles against an oracle: level 0, read whole, through Pillow's box filter.

Where a target pixel covers no whole number of level-0 pixels, the oracle repeats each of them
until it does: a mean over equal copies is the mean over exact areas.
"""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from eosin.data_curation.area_mean import area_mean
from eosin.data_curation.slide import Slide
from eosin.data_curation.tiles import TileConfig, tile

WriteSlide = Callable[..., Path]
COPIES = 8
FULL_PX = (1003, 907)


def box_means(
    pixels: NDArray[np.uint8], box: tuple[float, float, float, float], size: int
) -> NDArray[np.float64]:
    """Means of `pixels` over the size × size cells of `box`, by Pillow's box filter in float."""
    left, top, right, bottom = (round(v * COPIES) for v in box)
    x0, y0 = left // COPIES, top // COPIES
    part = pixels[y0 : -(-bottom // COPIES), x0 : -(-right // COPIES)]
    region = tuple(
        v - COPIES * o for v, o in zip((left, top, right, bottom), (x0, y0) * 2, strict=True)
    )
    means = []
    for channel in np.moveaxis(part, -1, 0):
        many = channel.repeat(COPIES, axis=0).repeat(COPIES, axis=1).astype(np.float32)
        image = Image.fromarray(many).resize((size, size), Image.Resampling.BOX, box=region)
        means.append(np.asarray(image, np.float64))
    return np.stack(means, -1)


def psnr_db(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return 10 * math.log10(255**2 / max(1e-12, float(((a - b) ** 2).mean())))


def tissue_like(seed: int) -> NDArray[np.uint8]:
    """Coloured noise of which, as in tissue, the large parts differ more than the small ones."""
    rng = np.random.default_rng(seed)
    total = np.full((FULL_PX[1], FULL_PX[0], 3), 170.0)
    for blur_px, spread in ((2.5, 12), (10, 30)):  # 2.5 px is 0.6 µm at 40×
        soft = cv2.GaussianBlur(rng.normal(0, 1, total.shape), (0, 0), blur_px)
        total += spread * soft / soft.std()
    return np.clip(total, 0, 255).astype(np.uint8)


def level_of(full: NDArray[np.uint8], downsample: float) -> NDArray[np.uint8]:
    """A coarser level as a scanner writes it: as many pixels as fit, by area."""
    size = (int(full.shape[1] / downsample), int(full.shape[0] / downsample))
    covered = full[: math.ceil(size[1] * downsample), : math.ceil(size[0] * downsample)]
    return np.asarray(cv2.resize(covered, size, interpolation=cv2.INTER_AREA), np.uint8)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5, 8])
def test_whole_factors_are_exact(tmp_path: Path, write_slide: WriteSlide, factor: int) -> None:
    pixels = np.random.default_rng(factor).integers(0, 256, (700, 760, 3), dtype=np.uint8)
    size = 48
    with Slide(write_slide(tmp_path / "noise.tiff", [pixels], (0.25, 0.25))) as slide:
        for x, y in ((0, 0), (131, 77), (760 - size * factor, 700 - size * factor)):
            found = slide.read_tile(x, y, size, 0.25 * factor)
            expected = box_means(pixels, (x, y, x + size * factor, y + size * factor), size)
            np.testing.assert_array_equal(found, np.floor(expected + 0.5 + 1e-3))


@pytest.mark.parametrize("seed", range(6))
def test_any_scale_of_a_random_pyramid_is_close(
    tmp_path: Path, write_slide: WriteSlide, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    full = tissue_like(seed)
    downsamples = [1.0, *([[], [2.0], [3.9998], [2.0, 4.0]][seed % 4])]
    mpp = tuple(float(m) for m in np.round(rng.uniform(0.245, 0.255, 2), 4))  # unequal axes
    path = tmp_path / "slide.tiff"
    write_slide(path, [full, *(level_of(full, d) for d in downsamples[1:])], mpp)
    with Slide(path) as slide:
        for target in (*rng.uniform(0.26, 1.9, 3), 0.5):
            size = int(min(96, 90 / target))
            cell = [size * target / m for m in mpp]
            x, y = (rng.uniform(0, full - c) for full, c in zip(FULL_PX, cell, strict=True))
            exact = (x, y, x + cell[0], y + cell[1])
            expected = box_means(full, exact, size)
            assert psnr_db(slide.read_tile(x, y, size, target).astype(float), expected) >= 45


def test_means_over_fractions_of_pixels_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    x_edges = np.array([0.0, 0.25, 7.5, 8.0, 8.125, 50.0])
    y_edges = np.array([3.75, 4.0, 4.5, 39.0, 40.0])
    found = area_mean(pixels, x_edges, y_edges)
    for row, (top, bottom) in enumerate(itertools.pairwise(y_edges)):
        for column, (left, right) in enumerate(itertools.pairwise(x_edges)):
            total = [Fraction(0)] * 3
            for y in range(int(top), math.ceil(bottom)):
                high = Fraction(min(bottom, y + 1)) - Fraction(max(top, y))
                for x in range(int(left), math.ceil(right)):
                    wide = Fraction(min(right, x + 1)) - Fraction(max(left, x))
                    total = [
                        t + high * wide * int(v) for t, v in zip(total, pixels[y, x], strict=True)
                    ]
            area = Fraction(bottom - top) * Fraction(right - left)
            expected = [math.floor(t / area + Fraction(1, 2)) for t in total]
            assert found[row, column].tolist() == expected


@pytest.mark.parametrize(("mpp", "target"), [((0.2456, 0.2531), 0.5), ((0.499, 0.499), 0.7)])
def test_the_effective_scale_is_the_distance_between_tiles(
    tmp_path: Path,
    write_slide: WriteSlide,
    tissue_pixels: NDArray[np.uint8],
    mpp: tuple[float, float],
    target: float,
) -> None:
    pixels = tissue_pixels.repeat(3, axis=0).repeat(3, axis=1)
    write_slide(tmp_path / "slide.tiff", [pixels], mpp)
    tile(
        TileConfig(
            slides=tmp_path / "slide.tiff", out=tmp_path / "out", mpp=target, size_px=64, workers=1
        )
    )
    tiles = pq.read_table(tmp_path / "out" / "tiles.parquet").to_pydict()
    at = {
        cell: (x, y)
        for cell, x, y in zip(
            zip(tiles["column"], tiles["row"], strict=True),
            tiles["level0_x"],
            tiles["level0_y"],
            strict=True,
        )
    }
    for axis, name in enumerate(("effective_mpp_x", "effective_mpp_y")):
        neighbour = (1, 0) if axis == 0 else (0, 1)
        step = at[neighbour][axis] - at[0, 0][axis]
        assert tiles[name] == pytest.approx([step * mpp[axis] / 64] * len(tiles[name]), rel=1e-12)
        assert tiles[name][0] == pytest.approx(target, rel=1e-9)


def test_tiles_of_the_scanned_bounds_are_cut_where_they_lie(
    tmp_path: Path, write_slide: WriteSlide, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tissue_like(3)
    path = write_slide(tmp_path / "slide.tiff", [full, level_of(full, 2.0)], (0.25, 0.25))
    bounds = (101, 57, 803, 609)
    monkeypatch.setattr("eosin.data_curation.slide.scanned_bounds_px", lambda *_: bounds)
    with Slide(path) as slide:
        assert slide.bounds_px == bounds
        for x, y in ((101.0, 57.0), (347.3, 211.9)):
            tile_rgb = slide.read_tile(x, y, 96, 0.65).astype(float)
            box = (x, y, x + 96 * 2.6, y + 96 * 2.6)
            assert psnr_db(tile_rgb, box_means(full, box, 96)) >= 45
        overview, readable = slide.overview(2.0)
    assert readable.all()
    assert overview.shape == (round(609 / 8), round(803 / 8), 3)
    step = (803 / overview.shape[1], 609 / overview.shape[0])
    mean = full[57 : 57 + 609, 101 : 101 + 803].mean(axis=(0, 1))
    assert np.abs(overview.mean(axis=(0, 1)) - mean).max() < 1
    middle = overview[40:50, 60:70].astype(float)
    left, top = 101 + 60 * step[0], 57 + 40 * step[1]
    box = (left, top, left + 10 * step[0], top + 10 * step[1])
    assert psnr_db(middle, box_means(full, box, 10)) >= 40
