"""Masks of the global crops: iBOT's blocks (arXiv 2111.07832; BEiT, 2106.08254) and I-JEPA's.

Drawn for fixed groups of samples, keyed by (seed, step, group): the same whatever the batch is
split over. In a group an exact share of the global crops is masked. iBOT's ratios are stratified
over the masked crops; a mask ends at or below its target, or, with `exact`, on the upper edge of
its stratum, so that a batch has the same number of masked patches at every step (DINOv3).

A block is as large as what its mask still lacks, and no larger. DINOv2 bounds it by half the grid
too (128 patches of 16 × 16, 98 of 14 × 14): the same thing while no crop has more than half masked.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

STREAM = 0x3A5C  # keeps these draws apart from those of other modules under one seed
CHUNK = 64  # uniform numbers that are drawn together
TRIES = 10  # attempts at one block before the mask is left as it is (BEiT)


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """How much of the global crops is masked, and in which shapes."""

    share: float = 0.5
    """Share of the global crops that get a mask; the others get none. I-JEPA: 1."""
    kind: Literal["blocks", "jepa"] = "blocks"
    """Random rectangles up to a stratified ratio (iBOT), or a fixed number of blocks of about one
    size (I-JEPA)."""
    ratio: tuple[float, float] = (0.1, 0.5)
    """blocks: least and largest masked share of a crop's patches, stratified over the crops."""
    exact: bool = False
    """blocks: every mask has all patches of its stratum's upper edge, the last ones at random."""
    min_block: int = 4
    """blocks: patches in the smallest block."""
    aspect: float = 0.3
    """blocks: least height over width of a block; its inverse is the largest."""
    n_blocks: int = 4
    """jepa: blocks a crop; their union is masked."""
    block_area: tuple[float, float] = (0.15, 0.2)
    """jepa: least and largest share of the patches in one block (arXiv 2301.08243, §3)."""
    block_aspect: tuple[float, float] = (0.75, 1.5)
    """jepa: least and largest height over width of a block."""

    def __post_init__(self) -> None:
        """Refuses shares outside 0 … 1, blocks without patches, and a count that has no meaning."""
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share} must lie in [0, 1]")
        if not 0 < self.aspect <= 1:
            raise ValueError(f"aspect={self.aspect} must lie in (0, 1]")
        low, high = self.ratio
        if not 0 <= low <= high <= 1:
            raise ValueError(f"ratio={self.ratio} must be two ascending numbers in [0, 1]")
        for name in ("min_block", "n_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        low, high = self.block_area
        if not 0 < low <= high < 1:
            raise ValueError(
                f"block_area={self.block_area} must be two ascending numbers in (0, 1)"
            )
        low, high = self.block_aspect
        if not 0 < low <= high < math.inf:
            raise ValueError(
                f"block_aspect={self.block_aspect} must be two ascending numbers above 0"
            )
        if self.exact and self.kind == "jepa":
            raise ValueError("exact=True goes with kind=blocks; blocks that overlap have no count")


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
        config: shares and shapes.
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
        if config.kind == "jepa":
            masks[crop] = draw_jepa_mask(rng, grid, config)
        elif config.exact:
            masks[crop] = draw_exact_mask(rng, grid, int(masks[crop].size * high), config)
        else:
            target = int(masks[crop].size * rng.uniform(low, high))
            masks[crop] = draw_block_mask(rng, grid, target, config)
    return masks


def draw_block_mask(
    rng: np.random.Generator, grid: tuple[int, int], target: int, config: MaskConfig
) -> NDArray[np.bool_]:
    """A union of random rectangles of at most `target` patches, bool [h, w]."""
    mask = np.zeros(grid, dtype=bool)
    count, numbers = 0, _numbers(rng)
    while count < target:
        added = _add_block(numbers, mask, target - count, config)
        if added == 0:
            break
        count += added
    return mask


def draw_exact_mask(
    rng: np.random.Generator, grid: tuple[int, int], target: int, config: MaskConfig
) -> NDArray[np.bool_]:
    """A block mask completed by single patches at random to `target`, bool [h, w]."""
    mask = draw_block_mask(rng, grid, target, config)
    visible = np.flatnonzero(~mask)
    missing = target - (mask.size - len(visible))
    mask.flat[rng.choice(visible, missing, replace=False)] = True
    return mask


def draw_jepa_mask(
    rng: np.random.Generator, grid: tuple[int, int], config: MaskConfig
) -> NDArray[np.bool_]:
    """A union of `n_blocks` rectangles, each of its own size and place, bool [h, w].

    They may overlap (I-JEPA). A block that would leave no patch visible is left out, which takes a
    grid of a few patches or blocks that could cover it. Sides are shorter than the grid's.
    """
    height, width = grid
    mask = np.zeros(grid, dtype=bool)
    for _ in range(config.n_blocks):
        area = mask.size * rng.uniform(*config.block_area)
        aspect = rng.uniform(*config.block_aspect)
        h = min(max(round(math.sqrt(area * aspect)), 1), max(height - 1, 1))
        w = min(max(round(math.sqrt(area / aspect)), 1), max(width - 1, 1))
        top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
        block = mask[top : top + h, left : left + w]
        if np.count_nonzero(mask) + block.size - np.count_nonzero(block) < mask.size:
            block[:] = True
    return mask


def _numbers(rng: np.random.Generator) -> Iterator[float]:
    """Uniform numbers in [0, 1), drawn many at a time: one alone costs as much as fifty."""
    while True:
        yield from rng.random(CHUNK).tolist()


def _add_block(
    numbers: Iterator[float], mask: NDArray[np.bool_], room: int, config: MaskConfig
) -> int:
    """Adds one rectangle that masks 1 … room new patches; 0 when no try fits."""
    height, width = mask.shape
    least, log_aspect = min(config.min_block, room), math.log(config.aspect)
    for _ in range(TRIES):
        area = least + (room - least) * next(numbers)
        aspect = math.exp(log_aspect - 2 * log_aspect * next(numbers))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < h < height and 0 < w < width):
            continue
        top, left = int(next(numbers) * (height - h + 1)), int(next(numbers) * (width - w + 1))
        block = mask[top : top + h, left : left + w]
        new = block.size - int(np.count_nonzero(block))
        if 0 < new <= room:
            block[:] = True
            return new
    return 0
