"""Rendering of views against Pillow, NumPy and the formulas in float64."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from eosin.pretrain import colour
from eosin.pretrain.augment import AugmentConfig
from eosin.pretrain.render import orient, render_view, resize
from eosin.pretrain.stain import StainTemplateConfig, move_to_template
from eosin.pretrain.views import View, draw_views

PLAIN = View(
    x_px=0,
    y_px=0,
    width_px=96,
    height_px=96,
    size_px=96,
    flip=False,
    quarter_turns=0,
    stain=False,
    stain_mean=(0.4, 0.3, 0.2),
    stain_std=(0.25, 0.2, 0.15),
    hed=False,
    hed_factor=(1.05, 0.96, 1.02),
    hed_shift=(0.02, -0.03, 0.04),
    jitter=False,
    brightness=1.1,
    contrast=0.9,
    saturation=1.08,
    hue_turns=0.04,
    grey=False,
    blur_sigma_px=0.0,
    solarize=False,
)
"""The whole of a tile of 96 px, untouched."""

COLOURS: list[dict[str, Any]] = [
    {"stain": True},
    {"hed": True},
    {"stain": True, "hed": True},
    {"jitter": True},
    {"grey": True},
    {"jitter": True, "grey": True},
    {"blur_sigma_px": 0.9},
    {"solarize": True},
]


@pytest.fixture
def tile() -> NDArray[np.uint8]:
    """Uneven in every direction, 96 × 96."""
    noise = np.random.default_rng(0).uniform(30, 225, (12, 12, 3))
    return ndimage.zoom(noise, (8, 8, 1), order=1).astype(np.uint8)


def levels(exact: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip(np.round(exact), 0, 255)


def exactly(tile: NDArray[np.uint8], view: View) -> NDArray[np.float64]:
    """All steps after box and resize in float64, rounded and clipped where the renderer does."""
    crop = tile.astype(np.float64)
    crop = np.rot90(np.fliplr(crop) if view.flip else crop, view.quarter_turns)
    if view.stain or view.hed:
        amounts = -np.log((crop + 1) / 256) @ np.linalg.inv(colour.HED_STAINS)
        if view.stain:
            flat = amounts.reshape(-1, 3)
            mean, std = (tuple(part.tolist()) for part in (flat.mean(0), flat.std(0)))
            factor, shift = move_to_template(mean, std, view.stain_mean, view.stain_std)
            amounts = amounts * factor + shift
        if view.hed:
            amounts = amounts * view.hed_factor + view.hed_shift
        crop = levels(256 * np.exp(-amounts @ colour.HED_STAINS) - 1)
    if view.jitter:
        crop = crop * view.brightness
        pivot = (crop @ colour.LUMA).mean()
        crop = pivot + view.contrast * (crop - pivot)
        luma = (crop @ colour.LUMA)[..., None]
        yiq = (luma + view.saturation * (crop - luma)) @ colour.YIQ_FROM_RGB.T
        angle = 2 * math.pi * view.hue_turns
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        yiq[..., 1:] = yiq[..., 1:] @ turn.T
        crop = yiq @ np.linalg.inv(colour.YIQ_FROM_RGB).T
    if view.grey:
        crop = np.repeat((crop @ colour.LUMA)[..., None], 3, axis=-1)
    crop = levels(crop)
    if view.blur_sigma_px:
        sigma = (view.blur_sigma_px, view.blur_sigma_px, 0)
        crop = levels(ndimage.gaussian_filter(crop, sigma, mode="mirror", radius=(4, 4, 0)))
    return np.where(crop < 128, crop, 255 - crop) if view.solarize else crop


@pytest.mark.parametrize("changed", COLOURS, ids=lambda changed: "+".join(changed))
def test_each_step_is_its_formula_to_within_two_levels(
    tile: NDArray[np.uint8], changed: dict[str, Any]
) -> None:
    view = PLAIN._replace(**changed)
    assert np.abs(render_view(tile, view) - exactly(tile, view)).max() <= 2
    assert np.abs(render_view(tile, view).astype(int) - tile).max() > 5


def test_all_steps_together_are_the_formulas_in_their_order(tile: NDArray[np.uint8]) -> None:
    view = PLAIN._replace(
        flip=True, quarter_turns=1, stain=True, hed=True, jitter=True, blur_sigma_px=0.6
    )
    assert np.abs(render_view(tile, view) - exactly(tile, view)).max() <= 3


def test_a_view_that_changes_nothing_is_the_tile(tile: NDArray[np.uint8]) -> None:
    assert np.array_equal(render_view(tile, PLAIN), tile)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_orientations_are_numpys(flip: bool, turns: int) -> None:
    image = np.random.default_rng(4).integers(0, 256, (17, 17, 3), dtype=np.uint8)
    expected = np.rot90(np.fliplr(image) if flip else image, turns)
    assert np.array_equal(orient(image, flip, turns), expected)
    assert np.array_equal(orient(image, flip, turns, np.zeros_like(image)), expected)
    view = PLAIN._replace(flip=flip, quarter_turns=turns, width_px=17, height_px=17, size_px=17)
    assert np.array_equal(render_view(image, view), expected)


@pytest.mark.parametrize("square_px", [1, 2, 3])
def test_a_checkerboard_shrunk_five_times_aliases_no_more_than_pillows(square_px: int) -> None:
    y, x = np.mgrid[:480, :480] // square_px
    board = np.repeat(((x + y) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)
    theirs = np.asarray(Image.fromarray(board).resize((96, 96), Image.Resampling.BICUBIC))
    ours = resize(board, 96)
    assert ours.std() <= theirs.std() + 0.5
    assert np.abs(ours.astype(int) - theirs).max() <= 2
    assert board[::5, ::5].std() > 100  # what no filter would have left


@pytest.mark.parametrize(("source_px", "size_px"), [(40, 98), (100, 98), (150, 98), (98, 224)])
def test_resampling_is_pillows(source_px: int, size_px: int) -> None:
    noise = np.random.default_rng(2).integers(0, 256, (source_px, source_px, 3), dtype=np.uint8)
    theirs = Image.fromarray(noise).resize((size_px, size_px), Image.Resampling.BICUBIC)
    assert np.abs(resize(noise, size_px).astype(int) - np.asarray(theirs)).max() <= 2


def test_only_the_box_is_seen(tile: NDArray[np.uint8]) -> None:
    view = PLAIN._replace(x_px=8, y_px=16, width_px=40, height_px=32, size_px=64)
    expected = Image.fromarray(tile[16:48, 8:48]).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.abs(render_view(tile, view).astype(int) - np.asarray(expected)).max() <= 2


def test_memory_of_every_kind_is_read_and_never_written(tile: NDArray[np.uint8]) -> None:
    """Read-only, as Pillow gives it; a part of another array; a transpose."""
    view = PLAIN._replace(hed=True, jitter=True, flip=True, blur_sigma_px=1.0)
    expected = render_view(tile, view)
    padded = np.zeros((120, 130, 3), np.uint8)
    padded[5:101, 9:105] = tile
    planar = np.ascontiguousarray(tile.transpose(2, 0, 1))
    kinds = [padded[5:101, 9:105], planar.transpose(1, 2, 0), np.asarray(Image.fromarray(tile))]
    for kind in kinds:
        before = kind.copy()
        kind.flags.writeable = False
        assert np.array_equal(render_view(kind, view), expected)
        assert np.array_equal(kind, before)


def test_crops_do_not_share_memory(tile: NDArray[np.uint8]) -> None:
    """The renderer keeps memory from call to call; what it has returned is not in it."""
    for changed in ({}, {"hed": True}, {"jitter": True}, {"blur_sigma_px": 1.0}, {"flip": True}):
        view = PLAIN._replace(**changed)
        first = render_view(tile, view)
        kept = first.copy()
        render_view(255 - tile, view)
        assert np.array_equal(first, kept)


def test_a_crop_is_written_where_it_is_asked_to(tile: NDArray[np.uint8]) -> None:
    batch = np.zeros((3, 96, 96, 3), np.uint8)
    for changed in ({}, *COLOURS):
        view = PLAIN._replace(**changed)
        target = batch[1]
        assert render_view(tile, view, out=target) is target
        assert np.array_equal(batch[1], render_view(tile, view))
        assert not batch[0].any() and not batch[2].any()


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_tile_decoded_smaller_gives_the_same_crop(factor: int) -> None:
    """A ramp says where each pixel came from: to within half a decoded pixel at each edge."""
    y, x = np.mgrid[:512, :512]
    whole = np.stack([x / 2, y / 2, np.full((512, 512), 128)], -1)
    small = whole.reshape(512 // factor, factor, 512 // factor, factor, 3).mean((1, 3))
    config = AugmentConfig(global_px=32, local_px=16, jitter=0, grey=0, hed=0, local_blur=0)
    config = dataclasses.replace(config, second_global_blur=0)
    views = draw_views(config, 3, np.zeros(20, int), np.arange(20), np.full((20, 2), 512))
    for sample in range(20):
        for view in views.of_tile(sample, config.sizes_px):
            full = render_view(whole.astype(np.uint8), view).astype(int)
            ours = render_view(small.astype(np.uint8), view, factor)
            # Position and side are rounded to a decoded pixel, which is factor / 2 levels; the
            # kernel's reach past the box's edge and the rounding to bytes add to it.
            assert np.abs(ours[4:-4, 4:-4] - full[4:-4, 4:-4]).max() <= factor / 2 + 2


@pytest.mark.parametrize("hw", [(50, 42), (1, 1), (3, 200), (200, 3), (7, 7)])
def test_tiles_of_any_size_give_crops_of_the_asked_size(hw: tuple[int, int]) -> None:
    config = AugmentConfig(
        global_px=56, local_px=28, stain=StainTemplateConfig(probability=0.5), n_local=2
    )
    tile = np.random.default_rng(1).integers(0, 256, (*hw, 3), dtype=np.uint8)
    views = draw_views(config, 0, np.zeros(25, int), np.arange(25), np.tile(hw, (25, 1)))
    for sample in range(25):
        for view in views.of_tile(sample, config.sizes_px):
            assert render_view(tile, view).shape == (view.size_px, view.size_px, 3)
