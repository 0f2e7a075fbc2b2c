"""Which tokens of a view the student does not see: blocks of tissue, tokens at random, sources.

Drawn for fixed groups of samples, keyed by (seed, step, group), as the masks of tiles are. A budget
is counted in tokens that are there: background is no token, so none of it is spent on background.
Legend: N tokens of a view.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from eosin.pretrain.slide.views import View

STREAM = 0x51D0  # keeps these draws apart from those of other modules under one seed
TRIES = 100  # blocks that are drawn before the rest is hidden token by token


@dataclass(frozen=True, kw_only=True)
class HidingConfig:
    """What is hidden of the global views."""

    kind: Literal["blocks", "random", "sources"] = "blocks"
    """Rectangles of neighbouring tiles, in all sources alike (iBOT); tokens at random (MAE); or all
    tokens of some sources (TICON)."""
    share: float = 0.5
    """Of the global views, that are masked at all."""
    ratio: tuple[float, float] = (0.1, 0.5)
    """blocks, random: least and largest hidden share of a view's tokens, stratified over views."""
    min_block: int = 4
    """blocks: tiles in the smallest."""
    aspect: float = 0.3
    """blocks: least height over width; its inverse is the largest."""
    visible_sources: int = 1
    """sources: how many stay visible in a view."""

    def __post_init__(self) -> None:
        low, high = self.ratio
        if not 0 <= low <= high <= 1:
            raise ValueError(f"ratio={self.ratio} must be two ascending numbers in [0, 1]")
        if not 0 <= self.share <= 1 or not 0 < self.aspect <= 1:
            raise ValueError(f"share={self.share}, aspect={self.aspect} must lie in [0, 1]")
        if self.min_block < 1 or self.visible_sources < 1:
            raise ValueError(
                f"min_block={self.min_block} and visible_sources={self.visible_sources} must be at "
                "least 1"
            )


def draw_hidden(
    config: HidingConfig, views: Sequence[View], *, seed: int, step: int, group: int
) -> list[npt.NDArray[np.bool_]]:
    """Which tokens of each view of a group are hidden, bool [N] each.

    Args:
        config: of what is hidden.
        views: of a group of samples, all global views, view-major.
        seed: of the run.
        step: of the run.
        group: global number of the group.
    """
    rng = np.random.default_rng([STREAM, seed, step, group])
    masked = int(len(views) * config.share)
    hidden = [np.zeros(len(view), np.bool_) for view in views]
    edges = np.linspace(*config.ratio, masked + 1)
    chosen = rng.permutation(len(views))[:masked].tolist()
    # stratified: the i-th masked view draws its ratio from the i-th slice of the range
    for at, low, high in zip(chosen, edges[:-1], edges[1:], strict=True):
        view = views[at]
        if config.kind == "sources":
            hidden[at] = _sources(view, config.visible_sources, rng)
            continue
        budget = min(int(len(view) * rng.uniform(low, high)), len(view) - 1)
        if config.kind == "blocks":
            hidden[at] = _blocks(view, budget, config, rng)
        else:
            hidden[at][rng.choice(len(view), max(budget, 0), replace=False)] = True
    return hidden


def _sources(view: View, visible: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    there = np.unique(view.source)
    stays = rng.permutation(there)[: min(visible, len(there))]
    return ~np.isin(view.source, stays)


def _blocks(
    view: View, budget: int, config: HidingConfig, rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Tokens under rectangles, exactly `budget` of them."""
    hidden = np.zeros(len(view), np.bool_)
    if budget < 1:
        return hidden
    cells = np.floor(view.position - view.position.min(axis=0) + 1e-3).astype(np.int64)
    columns, rows = (cells.max(axis=0) + 1).tolist()
    per_cell = len(view) / max(len(np.unique(cells[:, 0] * rows + cells[:, 1])), 1)
    for _ in range(TRIES):
        left = budget - int(hidden.sum())
        if left < 1:
            break
        room = max(left / per_cell, 1.0)  # in cells
        least = min(config.min_block, room)
        area = least + (room - least) * rng.random()
        aspect = math.exp(math.log(config.aspect) * (1 - 2 * rng.random()))
        height = min(max(round(math.sqrt(area * aspect)), 1), rows)
        width = min(max(round(math.sqrt(area / aspect)), 1), columns)
        left_at, top = rng.integers(columns - width + 1), rng.integers(rows - height + 1)
        under = (cells[:, 0] >= left_at) & (cells[:, 0] < left_at + width)
        under &= (cells[:, 1] >= top) & (cells[:, 1] < top + height)
        new = np.flatnonzero(under & ~hidden)
        if len(new) <= left:
            hidden[new] = True
    left = budget - int(hidden.sum())
    if left > 0:
        hidden[rng.choice(np.flatnonzero(~hidden), left, replace=False)] = True
    return hidden
