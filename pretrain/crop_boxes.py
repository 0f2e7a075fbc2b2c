"""Which part of its tile each crop is of: a share of the area, or a zoom.

A share is drawn as torchvision's RandomResizedCrop draws it, so a crop's magnification follows
from how much of the tile it covers. A zoom keeps the magnification, and the crop only moves: the
extended-context translation of Virchow2 (Zimmermann et al., arXiv 2408.00738).
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eosin.configs.errors import ConfigError
from eosin.pretrain.augment import AugmentConfig
from eosin.pretrain.philox import Counters

BOX_TRIES = 10
"""Boxes drawn until one fits the tile, as in RandomResizedCrop."""

BOX_BLOCK = 0
"""Block of a view's numbers with its place across and down, and the area and shape of its box."""

TRY_BLOCKS = (10, 11, 12, 13, 14)
"""Blocks with the areas and shapes of the other tries; drawn where the first did not fit."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class _Limits(NamedTuple):
    """What the boxes of N views have to keep to."""

    height_px: Integers  # [N], of the tiles
    width_px: Integers
    low: Floats  # [N], share of the tile's area
    high: Floats
    ratio: tuple[float, float]

    def boxes(self, size: Floats, shape: Floats) -> tuple[Floats, Floats]:
        """Width and height of boxes drawn from uniform numbers […, N]."""
        share = self.low + (self.high - self.low) * size
        return _sides(np.sqrt(self.height_px * self.width_px * share), shape, self.ratio)

    def of(self, chosen: Integers) -> "_Limits":
        height_px, width_px = self.height_px[chosen], self.width_px[chosen]
        return _Limits(height_px, width_px, self.low[chosen], self.high[chosen], self.ratio)


def draw_boxes(
    config: AugmentConfig,
    counters: Counters,
    draws: Floats,
    tile_hw: Integers,
    mpp: Floats | None,
) -> tuple[Floats, Floats, Floats, Floats]:
    """Draws a box for each of the N = B · V views.

    Args:
        config: sizes, shares or zooms, and shapes.
        counters: of the views.
        draws: [4, N], their numbers in `BOX_BLOCK`.
        tile_hw: [B, 2], height and width of the tiles in pixels.
        mpp: [B], micrometres to a pixel of the tiles; needed with `config.mpp` alone.

    Returns:
        left, top, width, height: whole numbers [N] in the pixels of the tiles.

    Raises:
        ConfigError: a tile is too small for a zoom, or of unknown scale where `config.mpp` is set.
    """
    across, down, size, shape = draws
    height, width = np.repeat(tile_hw, config.n_views, axis=0).T
    is_global = counters.view < config.n_global
    shares = np.array((config.local_scale, config.global_scale))[is_global.astype(np.intp)]
    limits = _Limits(height, width, shares[:, 0], shares[:, 1], config.ratio)
    box_width, box_height = limits.boxes(size, shape)
    for which, zoom, side_px, key in (
        (is_global, config.global_zoom, config.global_px, "global_zoom"),
        (~is_global, config.local_zoom, config.local_px, "local_zoom"),
    ):
        if zoom is not None and which.any():
            unit_px = _unit(config, mpp, len(tile_hw))  # [B]
            _check_zoom(config, zoom, key, side_px * unit_px, tile_hw)
            drawn = zoom[0] * (zoom[1] / zoom[0]) ** size[which]
            side = side_px * np.repeat(unit_px, config.n_views)[which] * drawn
            box_width[which], box_height[which] = _sides(side, shape[which], config.ratio)
    left = np.floor(across * (width - box_width + 1))
    top = np.floor(down * (height - box_height + 1))
    unfit = np.flatnonzero((box_width > width) | (box_height > height))
    if len(unfit):  # a share, for zooms always fit
        found = _try_again(counters.of(unfit), limits.of(unfit), across[unfit], down[unfit])
        left[unfit], top[unfit], box_width[unfit], box_height[unfit] = found
    return left, top, box_width, box_height


def _try_again(
    counters: Counters, limits: _Limits, across: Floats, down: Floats
) -> tuple[Floats, Floats, Floats, Floats]:
    """The boxes of M views whose first try did not fit: of the next that does, or the fallback."""
    height, width = limits.height_px, limits.width_px
    draws = counters.draw(TRY_BLOCKS).reshape(-1, 2, len(width))[: BOX_TRIES - 1]  # [9, 2, M]
    box_width, box_height = limits.boxes(draws[:, 0], draws[:, 1])  # [9, M]
    fits = (box_width <= width) & (box_height <= height)
    first = (fits.argmax(axis=0), np.arange(len(width)))
    box_width, box_height = box_width[first], box_height[first]
    # else the whole tile, or the largest part of it that has an allowed shape, in the middle
    aspect = np.clip(width / height, *limits.ratio)
    whole_width = np.clip(np.rint(height * aspect), 1, width)
    whole_height = np.clip(np.rint(width / aspect), 1, height)
    found = fits.any(axis=0)
    return (
        np.where(found, np.floor(across * (width - box_width + 1)), (width - whole_width) // 2),
        np.where(found, np.floor(down * (height - box_height + 1)), (height - whole_height) // 2),
        np.where(found, box_width, whole_width),
        np.where(found, box_height, whole_height),
    )


def _sides(side: Floats, shape: Floats, ratio: tuple[float, float]) -> tuple[Floats, Floats]:
    """Width and height of boxes of the area side², whose log-aspect is uniform by `shape`."""
    root = np.exp(0.5 * (math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * shape))
    return np.maximum(1, np.rint(side * root)), np.maximum(1, np.rint(side / root))


def _unit(config: AugmentConfig, mpp: Floats | None, n_tiles: int) -> Floats:
    """Pixels of each tile to one of a crop at a zoom of 1: [B]."""
    if config.mpp is None:
        return np.ones(n_tiles)
    if mpp is None or not np.all(mpp > 0):  # NaN is not
        raise ConfigError(
            f"augment.mpp={config.mpp:g} needs the scale of every tile, and here is one without: "
            "leave augment.mpp out, or make shards of tiles whose mpp is known"
        )
    return config.mpp / mpp


def _check_zoom(
    config: AugmentConfig,
    zoom: tuple[float, float],
    key: str,
    side_px: Floats,
    tile_hw: Integers,
) -> None:
    """Refuses a tile that cannot hold the largest box, at once and not at some later step.

    A smaller box would be a crop of another scale than the one asked for.
    """
    largest = side_px * zoom[1]  # [B]
    widest = np.rint(largest * math.sqrt(config.ratio[1]))
    highest = np.rint(largest / math.sqrt(config.ratio[0]))
    small = np.flatnonzero((tile_hw[:, 0] < highest) | (tile_hw[:, 1] < widest))
    if not len(small):
        return
    height_px, width_px = tile_hw[small[0]].tolist()
    crop_px = config.global_px if key == "global_zoom" else config.local_px
    scale = "" if config.mpp is None else f" and augment.mpp={config.mpp:g}"
    raise ConfigError(
        f"a tile of {width_px} × {height_px} px is too small: crops of {crop_px} px with "
        f"augment.{key}=[{zoom[0]:g}, {zoom[1]:g}]{scale} are of up to "
        f"{widest[small[0]]:.0f} × {highest[small[0]]:.0f} px of it; cut larger tiles "
        f"('eosin tile' with a larger size_px), or lower augment.{key}"
    )
