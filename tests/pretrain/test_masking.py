"""Masks: counts, stratification, shapes, and independence of how the batch is split."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eosin.pretrain.masking import (
    MaskConfig,
    draw_block_mask,
    draw_exact_mask,
    draw_jepa_mask,
    draw_masks,
)


def draw(step: int, groups: range, size: int = 8, **changes: float) -> np.ndarray:
    config = MaskConfig(**changes)  # type: ignore[arg-type]
    return draw_masks(
        config, seed=3, step=step, groups=groups, group_size=size, views=2, grid=(14, 14)
    )


@pytest.mark.pitfall(8)
def test_an_exact_share_of_the_crops_is_masked_within_the_ratios() -> None:
    for step in range(20):
        masks = draw(step, range(2))
        counts = masks.reshape(2, 2, 8, 196).sum(-1)  # view, group, sample
        for group in range(2):
            masked = counts[:, group][counts[:, group] > 0]
            assert len(masked) == 8
            assert masked.max() <= 0.5 * 196


@pytest.mark.pitfall(8)
def test_ratios_are_stratified_over_the_masked_crops() -> None:
    counts = np.concatenate([np.sort(draw(s, range(1)).sum(1))[8:][None] for s in range(200)])
    means = counts.mean(0) / 196
    expected = 0.1 + (np.arange(8) + 0.5) / 8 * 0.4
    # masks may fall short of their target by what the last block could not fill
    assert (means <= expected + 0.01).all() and (means > expected - 0.06).all()


@pytest.mark.pitfall(8)
def test_masks_are_a_function_of_seed_step_and_group() -> None:
    whole = draw(5, range(4)).reshape(2, 4, 8, -1)
    part = draw(5, range(2, 3)).reshape(2, 1, 8, -1)
    assert np.array_equal(whole[:, 2:3], part)
    assert not np.array_equal(draw(5, range(1)), draw(6, range(1)))


def test_no_share_means_no_mask() -> None:
    assert not draw(0, range(1), share=0.0).any()


@pytest.mark.pitfall(8)
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1), st.floats(0, 0.6))
def test_a_block_mask_never_exceeds_its_target(h: int, w: int, seed: int, ratio: float) -> None:
    target = int(h * w * ratio)
    mask = draw_block_mask(np.random.default_rng(seed), (h, w), target, MaskConfig())
    assert mask.shape == (h, w) and mask.sum() <= target


def naive_block_mask(seed: int, grid: tuple[int, int], target: int) -> tuple[set, list[int]]:
    """BEiT's blocks on a set of cells, and the area of each block that was taken."""
    rng, cells, areas = np.random.default_rng(seed), set(), []
    while len(cells) < target:
        room = target - len(cells)
        for _ in range(10):
            area = rng.uniform(min(4, room), room)
            aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < 1 or w < 1 or h >= grid[0] or w >= grid[1]:
                continue
            top, left = math.floor(rng.uniform(0, grid[0] - h + 1)), rng.uniform(0, grid[1] - w + 1)
            left = math.floor(left)
            block = {(top + i, left + j) for i in range(h) for j in range(w)}
            if 0 < len(block - cells) <= room:
                cells |= block
                areas.append(h * w)
                break
        else:
            break
    return cells, areas


@pytest.mark.pitfall(8)
@pytest.mark.parametrize("grid", [(16, 16), (14, 14), (6, 21)])
def test_blocks_are_those_of_a_plain_loop_and_span_four_to_half_the_grid(
    grid: tuple[int, int],
) -> None:
    half, first = grid[0] * grid[1] // 2, []
    for seed in range(150):
        mask = draw_block_mask(np.random.default_rng(seed), grid, half, MaskConfig())
        cells, areas = naive_block_mask(seed, grid, half)
        assert set(zip(*(x.tolist() for x in np.nonzero(mask)), strict=True)) == cells
        first.append(areas[0])
    # a side is rounded to whole patches, so an area may miss its draw in 4 … half a little
    assert 3 <= min(first) < 0.15 * half and 0.75 * half < max(first) <= 1.15 * half


@pytest.mark.pitfall(8)
@pytest.mark.parametrize("grid", [(16, 16), (14, 14), (5, 12)])
def test_exact_masks_reach_the_upper_edge_of_their_stratum(grid: tuple[int, int]) -> None:
    size = grid[0] * grid[1]
    edges = [int(size * (0.1 + 0.4 * (i + 1) / 8 + 1e-9)) for i in range(8)]
    config = MaskConfig(exact=True)
    for step in range(20):
        masks = draw_masks(
            config, seed=3, step=step, groups=range(1), group_size=8, views=2, grid=grid
        )
        assert sorted(masks.sum(1).tolist()) == [0] * 8 + edges


def test_exact_masks_are_blocks_first() -> None:
    """As many masked neighbours as block masks have, and far more than single patches would."""

    def neighbours(masks: np.ndarray) -> float:
        square = masks.reshape(-1, 14, 14)
        return float((square[:, 1:] & square[:, :-1]).sum() / square.sum())

    blocks, exact = (
        np.concatenate([draw(s, range(1), exact=e) for s in range(30)]) for e in (False, True)
    )
    alone = np.random.default_rng(0).random(exact.shape) < exact.mean(1, keepdims=True)
    assert neighbours(exact) > 0.9 * neighbours(blocks) > 1.5 * neighbours(alone)


@pytest.mark.parametrize("grid", [(16, 16), (14, 14), (10, 18)])
def test_jepa_blocks_have_the_asked_area_and_aspect(grid: tuple[int, int]) -> None:
    config, areas = MaskConfig(kind="jepa", n_blocks=1), []
    for seed in range(200):
        mask = draw_jepa_mask(np.random.default_rng(seed), grid, config)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert (
            mask.sum()
            == len(rows) * len(columns)
            == np.ptp(rows) * np.ptp(columns) + (len(rows) + len(columns) - 1)
        )  # one whole rectangle
        assert 0.75 * 0.8 < len(rows) / len(columns) < 1.5 * 1.25  # whole patches
        areas.append(mask.mean())
    assert np.mean(areas) == pytest.approx(0.175, abs=0.01)
    assert min(areas) > 0.12 and max(areas) < 0.23


def test_jepa_masks_all_crops_asked_for_and_spreads_over_the_grid() -> None:
    config = MaskConfig(kind="jepa", share=1.0)
    masks = np.concatenate(
        [
            draw_masks(config, seed=0, step=s, groups=range(1), group_size=8, views=2, grid=(9, 12))
            for s in range(40)
        ]
    )
    shares = masks.mean(1)
    assert shares.min() >= 0.15 and shares.max() <= 4 * 0.22
    # four independent blocks, apart from edges and overlaps: 1 - (1 - 0.175)^4
    assert 0.4 < shares.mean() < 1 - (1 - 0.175) ** 4 + 0.05
    assert masks.any(0).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_a_jepa_mask_leaves_something_to_see(h: int, w: int, seed: int, blocks: int) -> None:
    config = MaskConfig(kind="jepa", n_blocks=blocks, block_area=(0.3, 0.6))
    mask = draw_jepa_mask(np.random.default_rng(seed), (h, w), config)
    assert not mask.all() and (mask.any() or h * w == 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_an_exact_mask_has_its_target_on_any_grid(h: int, w: int, seed: int, ratio: float) -> None:
    target = int(h * w * ratio)
    mask = draw_exact_mask(np.random.default_rng(seed), (h, w), target, MaskConfig())
    assert mask.shape == (h, w) and mask.sum() == target


def test_config_refuses_what_has_no_meaning() -> None:
    for bad in (
        {"share": 1.5},
        {"ratio": (0.5, 0.1)},
        {"aspect": 0.0},
        {"min_block": 0},
        {"n_blocks": 0},
        {"block_area": (0.2, 1.0)},
        {"block_aspect": (1.5, 0.75)},
        {"exact": True, "kind": "jepa"},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
            MaskConfig(**bad)  # type: ignore[arg-type]
