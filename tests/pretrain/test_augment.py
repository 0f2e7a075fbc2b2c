"""Views: how often each thing is drawn, from what it follows, and what is rendered."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, stats

from eosin.pretrain.augment import AugmentConfig, View, draw_view, render_view, resize

DRAWS = 2000


def whole(tile_px: int, **changed: Any) -> View:
    """The whole of a square tile at its own size, untouched but for what is given."""
    config = AugmentConfig(flip=0, turn=0, jitter=0, grey=0, hed=0)
    drawn = draw_view(config, 0, 0, 0, 0, (tile_px, tile_px))
    plain = drawn._replace(
        x_px=0, y_px=0, width_px=tile_px, height_px=tile_px, size_px=tile_px, blur_sigma_px=0.0
    )
    return plain._replace(**changed)


@pytest.fixture
def tile() -> NDArray[np.uint8]:
    """Uneven in every direction, 96 × 96."""
    noise = np.random.default_rng(0).uniform(0, 255, (12, 12, 3))
    return ndimage.zoom(noise, (8, 8, 1), order=1).astype(np.uint8)


def views(config: AugmentConfig, index: int, hw: tuple[int, int] = (256, 256)) -> list[View]:
    return [draw_view(config, 11, 0, position, index, hw) for position in range(DRAWS)]


def assert_rate(applied: list[bool], probability: float) -> None:
    """Within 4 standard deviations of the binomial; exact where there is nothing to draw."""
    tolerance = 4 * math.sqrt(probability * (1 - probability) / len(applied))
    assert abs(np.mean(applied) - probability) <= tolerance


@pytest.mark.pitfall(1)
@pytest.mark.parametrize(
    "blurs", [(0.0, 0.9, 0.5), (1.0, 0.1, 0.5), (0.3, 0.3, 0.3)], ids=["applied", "written", "all"]
)
def test_blur_is_applied_as_often_as_its_probability_says(
    blurs: tuple[float, float, float],
) -> None:
    config = AugmentConfig(
        first_global_blur=blurs[0], second_global_blur=blurs[1], local_blur=blurs[2]
    )
    for index, probability in ((0, blurs[0]), (1, blurs[1]), (2, blurs[2]), (9, blurs[2])):
        assert_rate([view.blur_sigma_px > 0 for view in views(config, index)], probability)


@pytest.mark.parametrize("index", [0, 1, 2, 9])
def test_everything_is_applied_as_often_as_its_probability_says(index: int) -> None:
    config = AugmentConfig(
        flip=0.4, turn=0.6, jitter=0.8, grey=0.2, hed=0.3, second_global_solarize=0.25
    )
    drawn = views(config, index)
    assert_rate([view.flip for view in drawn], 0.4)
    for turns in (1, 2, 3):
        assert_rate([view.quarter_turns == turns for view in drawn], 0.2)
    assert_rate([view.jitter for view in drawn], 0.8)
    assert_rate([view.grey for view in drawn], 0.2)
    assert_rate([view.hed for view in drawn], 0.3)
    assert_rate([view.solarize for view in drawn], 0.25 if index == 1 else 0)


def test_strengths_fill_their_ranges_evenly() -> None:
    config = AugmentConfig(
        brightness=0.3, hue=0.1, hed_factor=0.2, hed_shift=0.1, local_blur=1, blur_sigma_px=(0.5, 2)
    )
    drawn = views(config, 3)
    for values, low, high in (
        ([view.brightness for view in drawn], 0.7, 1.3),
        ([view.hue_turns for view in drawn], -0.1, 0.1),
        ([view.hed_factor[1] for view in drawn], 0.8, 1.2),
        ([view.hed_shift[2] for view in drawn], -0.1, 0.1),
        ([view.blur_sigma_px for view in drawn], 0.5, 2),
    ):
        assert stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-3


def test_boxes_have_the_area_and_shape_that_were_asked_for() -> None:
    drawn = views(AugmentConfig(), 2, (2000, 2000))
    areas = [view.width_px * view.height_px / 2000**2 for view in drawn]
    shapes = [math.log(view.width_px / view.height_px) for view in drawn]
    assert stats.kstest(areas, "uniform", (0.05, 0.27)).pvalue > 1e-3
    low, high = math.log(3 / 4), math.log(4 / 3)
    assert stats.kstest(shapes, "uniform", (low, high - low)).pvalue > 1e-3
    across = [view.x_px / (2000 - view.width_px) for view in drawn]
    assert stats.kstest(across, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("hw", [(50, 42), (1, 1), (3, 200), (200, 3), (7, 7)])
@pytest.mark.parametrize("index", [0, 2])
def test_tiles_of_any_size_give_crops_of_the_asked_size(hw: tuple[int, int], index: int) -> None:
    config = AugmentConfig(global_px=56, local_px=28)
    tile = np.random.default_rng(1).integers(0, 256, (*hw, 3), dtype=np.uint8)
    for position in range(50):
        view = draw_view(config, 0, 0, position, index, hw)
        assert 0 <= view.x_px <= hw[1] - view.width_px
        assert 0 <= view.y_px <= hw[0] - view.height_px
        size = 56 if index == 0 else 28
        assert render_view(tile, view).shape == (size, size, 3)


def test_a_crop_follows_from_its_key_and_from_all_of_it(tile: NDArray[np.uint8]) -> None:
    config = AugmentConfig(global_px=48, local_px=48)

    def crop(seed: int, epoch: int, position: int, index: int) -> bytes:
        return render_view(
            tile, draw_view(config, seed, epoch, position, index, (96, 96))
        ).tobytes()

    keys = [(1, 2, 3, 4), (2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5), (4, 3, 2, 1)]
    assert [crop(*key) for key in keys] == [crop(*key) for key in keys]
    assert len({crop(*key) for key in keys}) == len(keys)


def test_changing_one_probability_leaves_all_else_as_it_was() -> None:
    never, always = AugmentConfig(grey=0), AugmentConfig(grey=1)
    for position in range(100):
        view = draw_view(never, 0, 0, position, 2, (96, 96))
        assert not view.grey
        assert draw_view(always, 0, 0, position, 2, (96, 96)) == view._replace(grey=True)


def test_a_view_that_changes_nothing_is_the_tile(tile: NDArray[np.uint8]) -> None:
    assert np.array_equal(render_view(tile, whole(96)), tile)


def test_only_the_box_is_seen(tile: NDArray[np.uint8]) -> None:
    view = whole(96, x_px=8, y_px=16, width_px=40, height_px=32, size_px=64)
    expected = Image.fromarray(tile[16:48, 8:48]).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.abs(render_view(tile, view).astype(int) - np.asarray(expected)).max() <= 2


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_turned_and_flipped_crops_are_numpys_of_the_plain_one(
    tile: NDArray[np.uint8], flip: bool, turns: int
) -> None:
    applied = {"hed": True, "jitter": True, "size_px": 56}
    plain = render_view(tile, whole(96, **applied))
    expected = np.rot90(np.fliplr(plain) if flip else plain, turns)
    turned = render_view(tile, whole(96, flip=flip, quarter_turns=turns, **applied))
    assert np.array_equal(turned, expected)


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


def test_a_tile_that_must_not_be_written_to_is_read(tile: NDArray[np.uint8]) -> None:
    tile.flags.writeable = False
    before = tile.copy()
    render_view(tile, whole(96, jitter=True, hed=True, flip=True, solarize=True))
    assert np.array_equal(tile, before)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"n_global": 3}, "n_global must be 2, not 3"),
        ({"local_blur": 1.5}, "local_blur must be a probability, not 1.5"),
        ({"hue": 0.7}, "hue"),
        ({"brightness": -0.1}, "brightness"),
        ({"hed_shift": -1.0}, "hed_shift"),
        ({"n_local": -1}, "n_local"),
        ({"global_scale": (0.0, 1.0)}, "global_scale"),
        ({"local_scale": (0.5, 1.2)}, "local_scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
    ],
)
def test_a_nonsensical_value_is_refused_by_name(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(AugmentConfig(), **changed)
