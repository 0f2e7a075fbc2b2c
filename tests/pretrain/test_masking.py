"""Block masks: counts, stratification, and independence of how the batch is split."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from eosin.pretrain.masking import MaskConfig, draw_block_mask, draw_masks


def draw(step: int, groups: range, size: int = 8, **changes: float) -> np.ndarray:
    config = MaskConfig(**changes)  # type: ignore[arg-type]
    return draw_masks(
        config, seed=3, step=step, groups=groups, group_size=size, views=2, grid=(14, 14)
    )


def test_an_exact_share_of_the_crops_is_masked_within_the_ratios() -> None:
    for step in range(20):
        masks = draw(step, range(2))
        counts = masks.reshape(2, 2, 8, 196).sum(-1)  # view, group, sample
        for group in range(2):
            masked = counts[:, group][counts[:, group] > 0]
            assert len(masked) == 8
            assert masked.max() <= 0.5 * 196


def test_ratios_are_stratified_over_the_masked_crops() -> None:
    counts = np.concatenate([np.sort(draw(s, range(1)).sum(1))[8:][None] for s in range(200)])
    means = counts.mean(0) / 196
    expected = 0.1 + (np.arange(8) + 0.5) / 8 * 0.4
    # masks may fall short of their target by what the last block could not fill
    assert (means <= expected + 0.01).all() and (means > expected - 0.06).all()


def test_masks_are_a_function_of_seed_step_and_group() -> None:
    whole = draw(5, range(4)).reshape(2, 4, 8, -1)
    part = draw(5, range(2, 3)).reshape(2, 1, 8, -1)
    assert np.array_equal(whole[:, 2:3], part)
    assert not np.array_equal(draw(5, range(1)), draw(6, range(1)))


def test_no_share_means_no_mask() -> None:
    assert not draw(0, range(1), share=0.0).any()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1), st.floats(0, 0.6))
def test_a_block_mask_never_exceeds_its_target(h: int, w: int, seed: int, ratio: float) -> None:
    target = int(h * w * ratio)
    mask = draw_block_mask(np.random.default_rng(seed), (h, w), target, MaskConfig())
    assert mask.shape == (h, w) and mask.sum() <= target
