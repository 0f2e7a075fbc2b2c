"""Views of tiles: what is drawn for each crop of a batch, all at once.

Drawing is pure in (seed, epoch, position, view) and apart from rendering, so that a crop can be
named, repeated and shown, by a worker or on the device. No number depends on which other tiles are
in the batch, nor on a probability or a strength: changing one leaves all else as it was.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from eosin.pretrain.augment import AugmentConfig
from eosin.pretrain.crop_boxes import BOX_BLOCK, draw_boxes
from eosin.pretrain.philox import Counters, stream_key

VIEW_STREAM = 0x76696577
"""Keeps the draws of views apart from every other use of the same seed ("view" in ASCII)."""

RESOLUTION_STREAM = 0x7265736F6C
"""Of the resolutions of the steps ("resol")."""

STAIN_DEVIATIONS = 3.0
"""Stain statistics are drawn from normal distributions cut off at so many standard deviations."""

STAIN_FLOOR = 0.1
"""They are cut off at this share of a positive mean, too: no template is of less than no stain."""

DECODE_FACTORS = (1, 2, 4, 8)
"""Reductions at which a JPEG can be decoded."""

# The blocks of four numbers that a view has. Those below _COMMON are drawn for every view, those of
# the stain template only where it is applied; crop_boxes.py has some of its own.
_WHETHER, _JITTER, _SHARPNESS, _HED_FACTOR, _HED_SHIFT, _COMMON = range(BOX_BLOCK + 1, 7)
_STAIN_BLOCKS = (8, 9)

Floats = NDArray[np.float64]


class View(NamedTuple):
    """Everything that is drawn for one crop; what is not applied is of no effect."""

    x_px: int
    """Left edge of the box that is cut out of the tile, in the tile's pixels."""
    y_px: int
    width_px: int
    height_px: int
    size_px: int
    """Side of the crop that comes out."""
    flip: bool
    quarter_turns: int
    """Counter-clockwise, after the flip."""
    stain: bool
    """Whether the crop is moved to the stain statistics of the next two triples."""
    stain_mean: tuple[float, float, float]
    """Of the amounts of haematoxylin, eosin and DAB, in natural optical density."""
    stain_std: tuple[float, float, float]
    hed: bool
    """Whether the two triples below are applied."""
    hed_factor: tuple[float, float, float]
    hed_shift: tuple[float, float, float]
    jitter: bool
    """Whether the four values below are applied."""
    brightness: float
    contrast: float
    saturation: float
    hue_turns: float
    grey: bool
    blur_sigma_px: float
    """0 for no blur."""
    solarize: bool


class Boxes(NamedTuple):
    """Parts of tiles that are cut out, in pixels; int32 arrays of one shape."""

    x_px: NDArray[np.int32]
    y_px: NDArray[np.int32]
    width_px: NDArray[np.int32]
    height_px: NDArray[np.int32]


class Views(NamedTuple):
    """What is drawn for V crops of each of B tiles: the fields of `View`, an array each."""

    x_px: NDArray[np.int32]
    """[B, V], as all that follow but the triples; in the pixels of the whole tile."""
    y_px: NDArray[np.int32]
    width_px: NDArray[np.int32]
    height_px: NDArray[np.int32]
    flip: NDArray[np.bool_]
    quarter_turns: NDArray[np.uint8]
    stain: NDArray[np.bool_]
    stain_mean: NDArray[np.float32]
    """[B, V, 3]; the template's own mean where `stain` is false."""
    stain_std: NDArray[np.float32]
    """[B, V, 3]."""
    hed: NDArray[np.bool_]
    hed_factor: NDArray[np.float32]
    """[B, V, 3]."""
    hed_shift: NDArray[np.float32]
    """[B, V, 3]."""
    jitter: NDArray[np.bool_]
    brightness: NDArray[np.float32]
    contrast: NDArray[np.float32]
    saturation: NDArray[np.float32]
    hue_turns: NDArray[np.float32]
    grey: NDArray[np.bool_]
    blur_sigma_px: NDArray[np.float32]
    solarize: NDArray[np.bool_]

    def at(self, b: int, v: int, size_px: int) -> View:
        """View `v` of tile `b`, whose crop has the side `size_px`."""
        (view,) = self._rows(b, slice(v, v + 1), [size_px])
        return view

    def of_tile(self, b: int, sizes_px: Sequence[int]) -> list[View]:
        """All views of tile `b`, in a fraction of the time that `at` takes for each."""
        return self._rows(b, slice(None), sizes_px)

    def _rows(self, b: int, which: slice, sizes_px: Sequence[int]) -> list[View]:
        columns: list[Any] = [column[b, which].tolist() for column in self]
        for place in _TRIPLES:
            columns[place] = map(tuple, columns[place])
        columns.insert(4, sizes_px)
        return list(map(View._make, zip(*columns, strict=True)))


_TRIPLES = tuple(
    Views._fields.index(name) for name in ("stain_mean", "stain_std", "hed_factor", "hed_shift")
)

_DTYPES = (
    *([np.int32] * 4),
    *(np.bool_, np.uint8),
    *(np.bool_, np.float32, np.float32),
    *(np.bool_, np.float32, np.float32),
    *(np.bool_, np.float32, np.float32, np.float32, np.float32),
    *(np.bool_, np.float32, np.bool_),
)


def draw_views(
    config: AugmentConfig,
    seed: int,
    epochs: ArrayLike,
    positions: ArrayLike,
    tile_hw: ArrayLike,
    mpp: ArrayLike | None = None,
) -> Views:
    """Draws all crops of B tiles.

    Args:
        config: strengths and sizes.
        seed: of the run, in [0, 2^64).
        epochs: int [B], from 0, below 2^32.
        positions: int [B], the tiles' places in their epochs' orders.
        tile_hw: int [B, 2], height and width of the tiles in pixels.
        mpp: [B], micrometres to a pixel of the tiles, NaN where unknown; used with `config.mpp`.

    Returns:
        views: [B, V], the global ones first.

    Raises:
        ConfigError: a zoom is set, and a tile cannot hold the largest box that it gives, or has no
            known mpp where `config.mpp` asks for one.
        ValueError: an argument lies outside of its range.
    """
    epoch, position = np.asarray(epochs, np.int64), np.asarray(positions, np.int64)
    hw = np.asarray(tile_hw, np.int64)
    if epoch.size and (min(epoch.min(), position.min()) < 0 or epoch.max() >> 32):
        raise ValueError("epochs must lie in [0, 2^32) and positions not be negative")
    batch, count = len(position), config.n_views
    counters = Counters(
        np.repeat(position, count), np.repeat(epoch, count), np.tile(np.arange(count), batch),
        stream_key(seed, VIEW_STREAM),
    )  # fmt: skip
    common = counters.draw(range(_COMMON))
    units = None if mpp is None else np.asarray(mpp, np.float64)
    boxes = draw_boxes(config, counters, common[BOX_BLOCK], hw, units)
    flip, turn, grey, jitter = common[_WHETHER]
    hed, blur, sigma, solarize = common[_SHARPNESS]
    spread = 2 * common[_JITTER] - 1
    index = counters.view
    blurs = np.full(count, config.local_blur)
    blurs[:2] = config.first_global_blur, config.second_global_blur
    low, high = config.blur_sigma_px
    stain, mean, std = _draw_stains(config, counters, common[_HED_FACTOR, 3])
    columns = (
        *boxes,
        flip < config.flip,
        np.where(turn < config.turn, 1 + (3 * common[_HED_SHIFT, 3]).astype(np.uint8), np.uint8(0)),
        stain,
        mean,
        std,
        hed < config.hed,
        (1 + config.hed_factor * (2 * common[_HED_FACTOR, :3] - 1)).T,
        (config.hed_shift * (2 * common[_HED_SHIFT, :3] - 1)).T,
        jitter < config.jitter,
        1 + config.brightness * spread[0],
        1 + config.contrast * spread[1],
        1 + config.saturation * spread[2],
        config.hue * spread[3],
        grey < config.grey,
        np.where(blur < blurs[index], low + (high - low) * sigma, 0.0),
        (index == 1) & (solarize < config.second_global_solarize),
    )
    return Views(
        *(
            column.astype(dtype).reshape(batch, count, *column.shape[1:])
            for column, dtype in zip(columns, _DTYPES, strict=True)
        )
    )


@overload
def scaled_box(view: View, factor: int, hw: Sequence[int]) -> tuple[int, int, int, int]: ...
@overload
def scaled_box(view: Views, factor: ArrayLike, hw: ArrayLike) -> Boxes: ...
def scaled_box(view: View | Views, factor: Any, hw: Any) -> tuple[int, int, int, int] | Boxes:
    """Where a box lies in a tile that was decoded at 1/factor: x, y, width, height in its pixels.

    Edges and sides are divided and rounded, halves up, and kept within the tile.

    Args:
        view: one view, or those of B tiles.
        factor: 1, 2, 4 or 8; int [B] for many.
        hw: height and width of the decoded tile; int [B, 2] for many.

    Returns:
        four integers, or int32 arrays [B, V].
    """
    if isinstance(view, View):
        (height, width), half = hw, factor // 2
        box_width = min(max(1, (view.width_px + half) // factor), width)
        box_height = min(max(1, (view.height_px + half) // factor), height)
        x = min((view.x_px + half) // factor, width - box_width)
        y = min((view.y_px + half) // factor, height - box_height)
        return x, y, box_width, box_height
    divisor = np.asarray(factor, np.int32)[:, None]  # [B, 1]
    sides = np.asarray(hw, np.int32)
    tile_height, tile_width = sides[:, :1], sides[:, 1:]
    widths = np.clip((view.width_px + divisor // 2) // divisor, 1, tile_width)
    heights = np.clip((view.height_px + divisor // 2) // divisor, 1, tile_height)
    return Boxes(
        np.minimum((view.x_px + divisor // 2) // divisor, tile_width - widths),
        np.minimum((view.y_px + divisor // 2) // divisor, tile_height - heights),
        widths,
        heights,
    )


def decode_factor(config: AugmentConfig, views: Views) -> NDArray[np.int32]:
    """How far each tile may be reduced in decoding: int32 [B], of 1, 2, 4 and 8.

    The largest at which no side of a box is shorter than that of its crop, so that nothing is
    lost that the crop would have kept; 1 throughout where `config.decode` is ``full``.
    """
    factors = np.ones(len(views.x_px), np.int32)
    if config.decode == "full":
        return factors
    shorter = np.minimum(views.width_px, views.height_px)  # [B, V]
    least = (shorter // np.asarray(config.sizes_px, np.int32)).min(axis=1)
    for factor in DECODE_FACTORS:
        factors[least >= factor] = factor
    return factors


def augment_at(config: AugmentConfig, seed: int, step: int) -> AugmentConfig:
    """The augmentation of one step: with the sides of that entry of `config.resolutions`.

    Steps are dealt out by the fractional parts of an offset plus `step` golden ratios, which fill
    [0, 1) as evenly as any sequence: after any number of steps each entry was taken to within a few
    times of its share.
    """
    if not config.resolutions:
        return config
    low, high = stream_key(seed, RESOLUTION_STREAM)
    place = (((high << 32) + low + step * 0x9E3779B97F4A7C15) % 2**64) / 2**64
    shares = np.cumsum([entry.share for entry in config.resolutions])
    taken = int(np.searchsorted(shares / shares[-1], place, side="right"))
    entry = config.resolutions[min(taken, len(shares) - 1)]
    return replace(config, global_px=entry.global_px, local_px=entry.local_px, resolutions=[])


def _draw_stains(
    config: AugmentConfig, counters: Counters, draws: Floats
) -> tuple[NDArray[np.bool_], Floats, Floats]:
    """Whether each view has a stain template [N], and its mean and spread [N, 3]."""
    template = config.stain
    applied = draws < template.probability
    means = np.tile(np.array(template.mean, np.float64), (len(draws), 1))
    stds = np.tile(np.array(template.std, np.float64), (len(draws), 1))
    chosen = np.flatnonzero(applied)
    if len(chosen):
        first, second = counters.of(chosen).draw(_STAIN_BLOCKS)[:, :3].swapaxes(1, 2)  # [M, 3]
        means[chosen] = _cut_normal(first, template.mean, template.mean_std)
        stds[chosen] = _cut_normal(second, template.std, template.std_std)
    return applied, means, stds


def _cut_normal(
    uniform: Floats, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Floats:
    """Uniform numbers [M, 3] to normal ones, cut off; by the inverse of the distribution."""
    centre, spread = np.array(mean), np.maximum(std, 1e-12)
    lowest = np.where(centre > 0, (STAIN_FLOOR - 1) * centre / spread, -STAIN_DEVIATIONS)
    below = ndtr(np.maximum(lowest, -STAIN_DEVIATIONS))
    return np.asarray(
        centre + spread * ndtri(below + (ndtr(STAIN_DEVIATIONS) - below) * uniform), np.float64
    )
