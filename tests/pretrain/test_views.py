"""Views: how often each thing is drawn, from what it follows, and on what it does not depend."""

import dataclasses
import math
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from eosin.configs.errors import ConfigError
from eosin.data_curation.torchvision_import import import_timm
from eosin.pretrain.augment import AugmentConfig, Resolution
from eosin.pretrain.stain import StainTemplateConfig
from eosin.pretrain.views import (
    STAIN_DEVIATIONS,
    STAIN_FLOOR,
    Views,
    augment_at,
    decode_factor,
    draw_views,
    scaled_box,
)

DRAWS = 2000


def drawn(
    config: AugmentConfig,
    hw: tuple[int, int] = (256, 256),
    n: int = DRAWS,
    seed: int = 11,
    epoch: int = 0,
    mpp: float | None = None,
) -> Views:
    positions = np.arange(n)
    scales = None if mpp is None else np.full(n, mpp)
    return draw_views(config, seed, 0 * positions + epoch, positions, np.tile(hw, (n, 1)), scales)


def assert_rate(applied: NDArray[np.bool_], probability: float) -> None:
    """Within 4 standard deviations of the binomial; exact where there is nothing to draw."""
    tolerance = 4 * math.sqrt(probability * (1 - probability) / len(applied))
    assert abs(np.mean(applied) - probability) <= tolerance


def assert_equal(ours: Views, theirs: Views) -> None:
    for name, our, their in zip(Views._fields, ours, theirs, strict=True):
        assert np.array_equal(our, their), name


@pytest.fixture(scope="module")
def random_resized_crop() -> Any:
    """Of torchvision: (image, scale, ratio) to (top, left, height, width)."""
    import_timm()  # so that torchvision can be imported
    return import_module("torchvision.transforms").RandomResizedCrop.get_params


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
    blurred = drawn(config).blur_sigma_px > 0
    for index in range(10):
        assert_rate(blurred[:, index], blurs[min(index, 2)])


def test_everything_is_applied_as_often_as_its_probability_says() -> None:
    config = AugmentConfig(
        flip=0.4, turn=0.6, jitter=0.8, grey=0.2, hed=0.3, second_global_solarize=0.25,
        stain=StainTemplateConfig(probability=0.35),
    )  # fmt: skip
    views = drawn(config)
    for index in range(10):
        assert_rate(views.flip[:, index], 0.4)
        for turns in (1, 2, 3):
            assert_rate(views.quarter_turns[:, index] == turns, 0.2)
        assert_rate(views.jitter[:, index], 0.8)
        assert_rate(views.grey[:, index], 0.2)
        assert_rate(views.hed[:, index], 0.3)
        assert_rate(views.stain[:, index], 0.35)
        assert_rate(views.solarize[:, index], 0.25 if index == 1 else 0)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_never_and_always_are_never_and_always(probability: float) -> None:
    names = ("flip", "turn", "jitter", "grey", "hed", "local_blur", "second_global_solarize")
    views = drawn(AugmentConfig(**dict.fromkeys(names, probability)))
    for applied in (views.flip, views.quarter_turns > 0, views.jitter, views.grey, views.hed):
        assert applied.mean() == probability
    assert (views.blur_sigma_px[:, 2:] > 0).mean() == views.solarize[:, 1].mean() == probability


def test_by_default_all_eight_orientations_are_equally_frequent() -> None:
    views = drawn(AugmentConfig())
    orientation = (views.flip * 4 + views.quarter_turns).reshape(-1)
    assert stats.chisquare(np.bincount(orientation, minlength=8)).pvalue > 1e-3


def test_strengths_fill_their_ranges_evenly() -> None:
    config = AugmentConfig(
        brightness=0.3, hue=0.1, hed_factor=0.2, hed_shift=0.1, local_blur=1, blur_sigma_px=(0.5, 2)
    )
    views = drawn(config)
    for values, low, high in (
        (views.brightness, 0.7, 1.3),
        (views.contrast, 0.8, 1.2),
        (views.saturation, 0.9, 1.1),
        (views.hue_turns, -0.1, 0.1),
        *((views.hed_factor[..., stain], 0.8, 1.2) for stain in range(3)),
        *((views.hed_shift[..., stain], -0.1, 0.1) for stain in range(3)),
        (views.blur_sigma_px[:, 2:], 0.5, 2),
    ):
        assert stats.kstest(values[:, 3:].reshape(-1), "uniform", (low, high - low)).pvalue > 1e-3


def test_stain_templates_follow_their_normal_distributions_cut_off() -> None:
    stain = StainTemplateConfig(
        probability=1, mean=(0.5, 0.3, -0.1), mean_std=(0.1, 0.2, 0.1), std_std=(0.02, 0.3, 0.0)
    )
    views = drawn(AugmentConfig(stain=stain, n_local=0))
    for values, means, spreads in (
        (views.stain_mean, stain.mean, stain.mean_std),
        (views.stain_std, stain.std, stain.std_std),
    ):
        for index, (mean, spread) in enumerate(zip(means, spreads, strict=True)):
            column = values[..., index].reshape(-1)
            if spread == 0:
                assert np.allclose(column, mean)
                continue
            lowest = max(-STAIN_DEVIATIONS, (STAIN_FLOOR - 1) * mean / spread) if mean > 0 else -3
            theirs = stats.truncnorm(lowest, STAIN_DEVIATIONS, mean, spread)
            assert stats.kstest(column, theirs.cdf).pvalue > 1e-3
            assert column.max() < mean + STAIN_DEVIATIONS * spread + 1e-6


@pytest.mark.parametrize("hw", [(2000, 2000), (600, 1000), (1600, 400)], ids=str)
@pytest.mark.parametrize("kind", ["global", "local"])
def test_boxes_are_those_of_torchvisions_random_resized_crop(
    random_resized_crop: Any, hw: tuple[int, int], kind: str
) -> None:
    config = AugmentConfig()
    scale = config.global_scale if kind == "global" else config.local_scale
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.empty((1, *hw))
        theirs = np.array(
            [random_resized_crop(image, list(scale), list(config.ratio)) for _ in range(1500)]
        )
    views, index = drawn(config, hw), 0 if kind == "global" else 2
    fields = (views.y_px, views.x_px, views.height_px, views.width_px)
    ours = np.stack([field[:, index] for field in fields], axis=1)
    height, width = hw
    for name, measure in {
        "area": lambda box: box[:, 2] * box[:, 3],
        "aspect": lambda box: box[:, 3] / box[:, 2],
        "across": lambda box: box[:, 1] / np.maximum(width - box[:, 3], 1),
        "down": lambda box: box[:, 0] / np.maximum(height - box[:, 2], 1),
    }.items():
        assert stats.ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3, name


def test_a_share_that_no_box_can_have_gives_torchvisions_fallback(
    random_resized_crop: Any,
) -> None:
    config = AugmentConfig(global_scale=(1.0, 1.0), local_scale=(1.0, 1.0), n_local=1)
    for hw in ((100, 41), (41, 100), (7, 300), (300, 7)):
        box = random_resized_crop(torch.empty((1, *hw)), [1.0, 1.0], list(config.ratio))
        views = drawn(config, hw, n=5)
        for fields in zip(views.y_px, views.x_px, views.height_px, views.width_px, strict=True):
            assert all(tuple(int(field[v]) for field in fields) == box for v in (0, 1, 2))


@pytest.mark.parametrize("hw", [(50, 42), (1, 1), (3, 200), (200, 3), (7, 7), (70_000, 50_000)])
def test_boxes_lie_within_tiles_of_any_size(hw: tuple[int, int]) -> None:
    views = drawn(AugmentConfig(), hw, n=300)
    assert views.x_px.min() >= 0 and views.y_px.min() >= 0
    assert views.width_px.min() >= 1 and views.height_px.min() >= 1
    assert (views.x_px + views.width_px).max() <= hw[1]
    assert (views.y_px + views.height_px).max() <= hw[0]


def test_a_view_depends_on_nothing_but_its_place_and_its_own_tile() -> None:
    config = AugmentConfig(stain=StainTemplateConfig(probability=0.5), mpp=0.5,
                           global_zoom=(0.9, 1.1), local_zoom=(1.0, 2.0))  # fmt: skip
    rng = np.random.default_rng(3)
    epochs, positions = rng.integers(0, 5, 40), rng.integers(0, 10**10, 40)
    hw, mpp = rng.integers(400, 900, (40, 2)), rng.uniform(0.4, 0.6, 40)
    whole = draw_views(config, 2**64 - 1, epochs, positions, hw, mpp)
    for chosen in (rng.permutation(40), np.arange(7), np.array([13])):
        part = draw_views(
            config, 2**64 - 1, epochs[chosen], positions[chosen], hw[chosen], mpp[chosen]
        )
        assert_equal(part, Views(*(field[chosen] for field in whole)))
    fewer = draw_views(dataclasses.replace(config, n_local=3), 2**64 - 1, epochs, positions, hw,
                       mpp)  # fmt: skip
    assert_equal(fewer, Views(*(field[:, :5] for field in whole)))


def numbers(views: Views) -> NDArray[np.float64]:
    """A row for everything that is drawn for a view, and each view: [rows, DRAWS]."""
    fields = views._asdict()
    fields["x_px"] = views.x_px / (256 - views.width_px + 1)
    fields["y_px"] = views.y_px / (256 - views.height_px + 1)
    fields["width_px"] = views.width_px * views.height_px
    fields["height_px"] = np.log(views.width_px / views.height_px)
    fields["quarter_turns"] = views.quarter_turns > 0
    columns = [field.reshape(DRAWS, -1) for field in fields.values()]
    rows = np.concatenate(columns, axis=1).T.astype(np.float64)
    return rows[rows.std(axis=1) > 0]


def test_all_that_is_drawn_for_views_positions_epochs_and_seeds_is_unrelated() -> None:
    always, half = (
        AugmentConfig(
            n_local=1, first_global_blur=0.5, stain=StainTemplateConfig(probability=probability)
        )
        for probability in (1.0, 0.5)
    )
    first = numbers(drawn(always))
    assert len(first) == 3 * (14 + 12)
    others = [numbers(drawn(always, epoch=1)), numbers(drawn(always, seed=1))]
    before = np.roll(first, 1, axis=1)
    related = np.corrcoef(np.concatenate([first, drawn(half).stain.T, before, *others]))
    np.fill_diagonal(related, 0)
    assert np.abs(related).max() < 5.5 / math.sqrt(DRAWS)


@pytest.mark.parametrize(
    ("changed", "fields"),
    [
        ({"grey": 0.9}, ["grey"]),
        ({"flip": 0.1}, ["flip"]),
        ({"turn": 0.1}, ["quarter_turns"]),
        ({"hue": 0.3}, ["hue_turns"]),
        ({"hed_factor": 0.3}, ["hed_factor"]),
        ({"local_blur": 1.0}, ["blur_sigma_px"]),
        ({"local_scale": (0.1, 0.2)}, ["x_px", "y_px", "width_px", "height_px"]),
        (
            {"stain": StainTemplateConfig(probability=0.9)},
            ["stain", "stain_mean", "stain_std"],
        ),
    ],
    ids=str,
)
def test_changing_one_strength_leaves_all_else_as_it_was(
    changed: dict[str, Any], fields: list[str]
) -> None:
    before, after = drawn(AugmentConfig(), n=200), drawn(AugmentConfig(**changed), n=200)
    found = [n for n, a, b in zip(Views._fields, before, after, strict=True) if (a != b).any()]
    assert found == fields


def test_a_template_that_stays_stays_the_same_when_more_are_applied() -> None:
    some, more = (
        drawn(AugmentConfig(stain=StainTemplateConfig(probability=p)), n=200) for p in (0.3, 0.8)
    )
    kept = some.stain
    assert 0 < kept.sum() < more.stain.sum() and more.stain[kept].all()
    assert np.array_equal(some.stain_mean[kept], more.stain_mean[kept])


def test_one_view_alone_holds_what_the_columns_do() -> None:
    config = AugmentConfig(n_local=2)
    views = drawn(config, n=3)
    of_tile = views.of_tile(1, config.sizes_px)
    assert of_tile == [views.at(1, v, size) for v, size in enumerate((224, 224, 98, 98))]
    for v, view in enumerate(of_tile):
        for name, column in views._asdict().items():
            value = getattr(view, name)
            assert not isinstance(value, np.generic)
            assert np.array_equal(value, column[1, v]), name
            assert isinstance(value, tuple) == (column.ndim == 3)


def test_what_was_once_drawn_is_drawn_for_ever() -> None:
    stain = StainTemplateConfig(
        probability=1, mean=(0.4, 0.3, 0.2), mean_std=(0.1, 0.1, 0.1), std=(0.3, 0.2, 0.15),
        std_std=(0.1, 0.1, 0.1),
    )  # fmt: skip
    tile = (7, [3], [10**10])
    view = draw_views(AugmentConfig(stain=stain), *tile, [(256, 300)]).at(0, 1, 224)
    assert view[:4] == (71, 14, 190, 226)
    assert (view.flip, view.quarter_turns, view.jitter, view.hed) == (False, 2, False, True)
    assert view.stain_mean == pytest.approx((0.5304882, 0.2570328, 0.1635771))
    assert view.stain_std == pytest.approx((0.1039446, 0.1421796, 0.1047463))
    assert view.hed_factor == pytest.approx((1.0115439, 0.9683058, 0.9715119))
    assert view.hed_shift == pytest.approx((0.0095190, -0.0364360, -0.0055628), rel=1e-4)
    colour = (view.brightness, view.contrast, view.saturation, view.hue_turns)
    assert colour == pytest.approx((1.1588469, 1.0114331, 0.9747037, 0.0435773))
    assert view.blur_sigma_px == pytest.approx(0.3592987)
    narrow = draw_views(AugmentConfig(), *tile, [(100, 300)]).at(0, 0, 224)
    assert narrow[:4] == (143, 0, 127, 98)  # not the first try


def test_a_zoom_keeps_the_magnification_and_moves_about_the_tile() -> None:
    config = AugmentConfig(
        global_px=64, local_px=32, global_zoom=(0.5, 2.0), local_zoom=(1.0, 1.0), ratio=(0.9, 1.1)
    )
    views = drawn(config, (300, 400))
    aspect = np.log(views.width_px / views.height_px)
    zoom = np.log(np.sqrt(views.width_px * views.height_px)[:, :2] / 64) / math.log(2)
    assert stats.kstest(zoom.reshape(-1), "uniform", (-1, 2)).pvalue > 1e-3
    assert abs(aspect).max() < math.log(1.1) + 2 / 32
    assert (np.abs(np.sqrt(views.width_px * views.height_px)[:, 2:] - 32) < 1).all()
    across = views.x_px / (400 - views.width_px)
    assert stats.kstest(across[:, 5], "uniform").pvalue > 1e-3
    larger = drawn(config, (600, 400))  # the scale is that of the tile's pixels, not of its size
    assert np.array_equal(larger.width_px, views.width_px)


def test_tiles_of_any_scale_give_crops_of_one_physical_scale() -> None:
    config = AugmentConfig(
        global_px=60, local_px=30, global_zoom=(1, 1), local_zoom=(1, 1), mpp=0.5, ratio=(1, 1)
    )
    for mpp, side in ((0.5, 60), (0.25, 120), (1.0, 30)):
        views = drawn(config, n=10, mpp=mpp)
        assert (views.width_px[:, :2] == side).all() and (views.height_px[:, :2] == side).all()
        assert (views.width_px[:, 2:] == side // 2).all()


@pytest.mark.parametrize("mpp", [None, math.nan, 0.0])
def test_a_tile_of_unknown_scale_is_refused_where_the_scale_is_asked_for(
    mpp: float | None,
) -> None:
    config = AugmentConfig(global_zoom=(1, 1), local_zoom=(1, 1), mpp=0.5)
    with pytest.raises(ConfigError, match=r"augment\.mpp=0\.5 needs the scale of every tile"):
        drawn(config, (500, 500), n=2, mpp=mpp)
    drawn(dataclasses.replace(config, mpp=None), (500, 500), n=2, mpp=mpp)


def test_a_tile_too_small_for_a_zoom_is_refused_in_words() -> None:
    config = AugmentConfig(global_zoom=(0.9, 1.1), local_zoom=(0.9, 1.1), ratio=(0.95, 1.05))
    widest, highest = round(246.4 * math.sqrt(1.05)), round(246.4 / math.sqrt(0.95))
    drawn(config, (highest, widest))
    for hw in ((highest - 1, widest), (highest, widest - 1)):
        with pytest.raises(ConfigError) as raised:
            drawn(config, hw, n=1)
        assert str(raised.value) == (
            f"a tile of {hw[1]} × {hw[0]} px is too small: crops of 224 px with "
            f"augment.global_zoom=[0.9, 1.1] are of up to {widest} × {highest} px of it; cut "
            "larger tiles ('eosin tile' with a larger size_px), or lower augment.global_zoom"
        )
    with pytest.raises(ConfigError, match=r"98 px with augment\.local_zoom=\[1, 4\] and augment\."):
        drawn(dataclasses.replace(config, local_zoom=(1, 4), mpp=0.5), (300, 300), mpp=0.5)


def test_a_tile_is_decoded_no_smaller_than_its_crops_need() -> None:
    config = AugmentConfig(global_px=56, local_px=24, n_local=3)
    rng = np.random.default_rng(0)
    sides = rng.integers(100, 2000, (500, 2))
    views = draw_views(config, 0, np.zeros(500, int), np.arange(500), sides)
    factors = decode_factor(config, views)
    assert factors.dtype == np.int32 and set(factors.tolist()) == {1, 2, 4, 8}
    for b, factor in enumerate(factors.tolist()):
        boxes = [(views.width_px[b, v], views.height_px[b, v]) for v in range(5)]
        fits = [
            all(min(box) >= f * side for box, side in zip(boxes, config.sizes_px, strict=True))
            for f in (2, 4, 8)
        ]
        assert factor == 2 ** sum(fits)
        hw = -(-sides[b] // factor)  # as JPEG decoders round
        for v, side in enumerate(config.sizes_px):
            x, y, width, height = scaled_box(views.at(b, v, side), factor, hw.tolist())
            assert factor == 1 or min(width, height) >= side
            assert 0 <= x <= hw[1] - width and 0 <= y <= hw[0] - height
    full = dataclasses.replace(config, decode="full")
    assert (decode_factor(full, views) == 1).all()


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_scaled_boxes_are_rounded_and_kept_within_the_tile(factor: int) -> None:
    config = AugmentConfig(n_local=1)
    for hw in ((253, 260), (3, 9), (1, 1)):
        views = drawn(config, hw, n=50)
        small = (-(-hw[0] // factor), -(-hw[1] // factor))
        together = scaled_box(views, np.full(50, factor), np.tile(small, (50, 1)))
        for b, v in np.ndindex(50, 3):
            view = views.at(b, v, 8)
            alone = scaled_box(view, factor, small)
            assert alone == tuple(int(part[b, v]) for part in together)
            exact = [view.x_px, view.y_px, view.width_px, view.height_px]
            assert np.abs(np.array(alone) - np.array(exact) / factor).max() <= 1
            assert factor > 1 or list(alone) == exact
            assert 0 <= alone[0] <= small[1] - alone[2] and alone[2] >= 1
            assert 0 <= alone[1] <= small[0] - alone[3] and alone[3] >= 1


def test_resolutions_are_dealt_out_by_their_shares() -> None:
    entries = [
        Resolution(global_px=224, local_px=98, share=6),
        Resolution(global_px=336, local_px=126, share=3),
        Resolution(global_px=448, local_px=168, share=1),
    ]
    config = AugmentConfig(resolutions=entries, grey=0.1)
    steps = [augment_at(config, 5, step) for step in range(3000)]
    taken = np.array([[step.global_px == entry.global_px for entry in entries] for step in steps])
    ahead = np.cumsum(taken, axis=0) - np.outer(np.arange(1, 3001), [0.6, 0.3, 0.1])
    assert np.abs(ahead).max() < 4  # at every step, not at the end alone
    assert len({augment_at(config, seed, 0).global_px for seed in range(40)}) == 3
    assert steps[7] == augment_at(config, 5, 7) == augment_at(steps[7], 5, 8)
    by_size = {entry.global_px: entry.local_px for entry in entries}
    for step in steps[:20]:
        local_px = by_size[step.global_px]
        assert step == AugmentConfig(global_px=step.global_px, local_px=local_px, grey=0.1)


def test_without_resolutions_each_step_is_the_config() -> None:
    config = AugmentConfig(global_px=64)
    assert augment_at(config, 0, 12) is config


@pytest.mark.parametrize(("epoch", "position"), [(-1, 0), (0, -1), (2**32, 0)])
def test_a_place_that_is_none_is_refused(epoch: int, position: int) -> None:
    with pytest.raises(ValueError, match="epochs must lie in"):
        draw_views(AugmentConfig(), 0, [epoch], [position], [(256, 256)])
