"""iBOT's block masks (Zhou et al. 2022, arXiv 2111.07832; blocks as in BEiT, arXiv 2106.08254).

Drawn for fixed groups of samples, keyed by (seed, step, group): the same whatever the batch is
split over. In a group an exact share of the global crops is masked, with stratified ratios.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STREAM = 0x3A5C  # keeps these draws apart from those of other modules under one seed
TRIES = 10  # attempts at one block before the mask is left as it is (BEiT)


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """How much of the global crops is masked."""

    share: float = 0.5
    """Share of the global crops that get a mask; the others get none."""
    ratio: tuple[float, float] = (0.1, 0.5)
    """Least and largest masked share of a crop's patches, stratified over the masked crops."""
    min_block: int = 4
    """Patches in the smallest block."""
    aspect: float = 0.3
    """Least height over width of a block; its inverse is the largest."""

    def __post_init__(self) -> None:
        """Refuses shares outside 0 … 1."""
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share} must lie in [0, 1]")
        if not 0 < self.aspect <= 1:
            raise ValueError(f"aspect={self.aspect} must lie in (0, 1]")
        low, high = self.ratio
        if not 0 <= low <= high <= 1:
            raise ValueError(f"ratio={self.ratio} must be two ascending numbers in [0, 1]")


def draw_masks(
    config: MaskConfig,
    *,
    seed: int,
    step: int,
    groups: range,
    group_size: int,
    views: int,
    grid: tuple[int, int],
) -> NDArray[np.bool_]:
    """Masks of the global crops of one step, bool [views · batch, h · w], view-major.

    Args:
        config: shares.
        seed: of the run.
        step: of the run.
        groups: global numbers of this process's groups of samples.
        group_size: samples a group.
        views: global crops a sample.
        grid: (h, w) patches of a global crop.
    """
    drawn = [_draw_group(config, [STREAM, seed, step, g], group_size * views, grid) for g in groups]
    stacked = np.stack(drawn).reshape(len(groups), views, group_size, grid[0] * grid[1])
    return stacked.transpose(1, 0, 2, 3).reshape(views * len(groups) * group_size, -1)


def _draw_group(
    config: MaskConfig, key: list[int], crops: int, grid: tuple[int, int]
) -> NDArray[np.bool_]:
    rng = np.random.default_rng(key)
    masks = np.zeros((crops, *grid), dtype=bool)
    masked = int(crops * config.share)
    edges = np.linspace(*config.ratio, masked + 1)
    # stratified: the i-th masked crop draws its ratio from the i-th slice of the range
    for crop, low, high in zip(rng.permutation(crops)[:masked], edges[:-1], edges[1:], strict=True):
        target = int(grid[0] * grid[1] * rng.uniform(low, high))
        masks[crop] = draw_block_mask(rng, grid, target, config)
    return masks


def draw_block_mask(
    rng: np.random.Generator, grid: tuple[int, int], target: int, config: MaskConfig
) -> NDArray[np.bool_]:
    """A union of random rectangles of at most `target` patches, bool [h, w]."""
    mask = np.zeros(grid, dtype=bool)
    count = 0
    while count < target:
        added = _add_block(rng, mask, target - count, config)
        if added == 0:
            break
        count += added
    return mask


def _add_block(
    rng: np.random.Generator, mask: NDArray[np.bool_], room: int, config: MaskConfig
) -> int:
    """Adds one rectangle that masks 1 … room new patches; 0 when no try fits."""
    height, width = mask.shape
    log_aspect = math.log(config.aspect)
    for _ in range(TRIES):
        area = rng.uniform(min(config.min_block, room), room)
        aspect = math.exp(rng.uniform(log_aspect, -log_aspect))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < h < height and 0 < w < width):
            continue
        top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
        block = mask[top : top + h, left : left + w]
        new = block.size - int(block.sum())
        if 0 < new <= room:
            block[:] = True
            return new
    return 0
