"""Multi-crop views of a tile: what is drawn for each crop, and how it is rendered.

Drawing is pure in (seed, epoch, position, view) and apart from rendering, so that a crop can be
named, repeated and shown. The recipe is DINOv2's (Oquab et al., 2023), with the orientations and
the stain jitter of pathology beside it. Every probability here is the one with which the thing
happens: DINOv2's code hands 1 - p to the blur, so its published weights saw (0.0, 0.9, 0.5) where
its source reads (1.0, 0.1, 0.5).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from eosin.pretrain import colour

BOX_TRIES = 10
"""Boxes drawn until one fits the tile, as in torchvision's RandomResizedCrop."""

VIEW_STREAM = 0x76696577
"""Keeps the draws of views apart from every other use of the same seed ("view" in ASCII)."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Sizes and strengths of the crops of one tile. Pixels are those of the crop."""

    global_px: int = 224
    """Side of the two global crops."""
    local_px: int = 98
    """Side of the local crops."""
    n_global: int = 2
    """Global crops; the objective swaps two, so nothing but 2 is taken."""
    n_local: int = 8
    """Local crops; 0 for none."""
    global_scale: tuple[float, float] = (0.32, 1.0)
    """Share of the tile's area that a global crop covers, drawn uniformly."""
    local_scale: tuple[float, float] = (0.05, 0.32)
    """Share of the tile's area that a local crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the part that is cut out, drawn uniformly in its logarithm."""
    flip: float = 0.5
    """Probability of a left-right flip."""
    turn: float = 0.75
    """Probability of a turn by 90, 180 or 270 degrees, equally often. With `flip` 0.5, 0.75 makes
    all eight orientations equally frequent: tissue has no upright."""
    jitter: float = 0.8
    """Probability that brightness, contrast, saturation and hue are changed, all together."""
    brightness: float = 0.2
    """Factor drawn from 1 ± this."""
    contrast: float = 0.2
    """Factor drawn from 1 ± this."""
    saturation: float = 0.1
    """Factor drawn from 1 ± this."""
    hue: float = 0.05
    """Rotation drawn from ± this, in full turns; 0.5 is every hue."""
    grey: float = 0.2
    """Probability that a crop loses its colour."""
    hed: float = 0.5
    """Probability that the amounts of haematoxylin, eosin and DAB are changed."""
    hed_factor: float = 0.05
    """Each amount is multiplied by a factor drawn from 1 ± this."""
    hed_shift: float = 0.05
    """Each amount is shifted by a number drawn from ± this, in natural optical density."""
    first_global_blur: float = 0.0
    """Probability that the first global crop is blurred."""
    second_global_blur: float = 0.9
    """Probability that the second global crop is blurred."""
    local_blur: float = 0.5
    """Probability that a local crop is blurred."""
    blur_sigma_px: tuple[float, float] = (0.1, 1.2)
    """Standard deviation of the blur, drawn uniformly. DINOv2 goes up to 2.0, at which nuclei in
    small crops lose their chromatin."""
    second_global_solarize: float = 0.0
    """Probability that levels from 128 up are inverted in the second global crop. DINOv2 has 0.2;
    inverted tissue is no tissue, so it is off unless a recipe asks for it."""

    def __post_init__(self) -> None:
        if self.n_global != 2:
            raise ValueError(f"n_global must be 2, not {self.n_global}")
        if self.global_px < 1 or self.local_px < 1 or self.n_local < 0:
            raise ValueError(
                "global_px and local_px must be positive and n_local not negative, "
                f"not {self.global_px}, {self.local_px}, {self.n_local}"
            )
        for name in _PROBABILITIES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability, not {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation", "hed_factor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must lie in [0, 0.5] turns, not {self.hue}")
        if self.hed_shift < 0:
            raise ValueError(f"hed_shift must not be negative, not {self.hed_shift}")
        for name in ("global_scale", "local_scale", "ratio", "blur_sigma_px"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be (low, high) with 0 < low <= high: {low}, {high}")
        for name in ("global_scale", "local_scale"):
            if getattr(self, name)[1] > 1:
                raise ValueError(f"{name} must not exceed 1, not {getattr(self, name)[1]}")

    @property
    def n_views(self) -> int:
        """Crops of a tile: views 0 and 1 are global, those from 2 on are local."""
        return self.n_global + self.n_local


_PROBABILITIES = (
    *("flip", "turn", "jitter", "grey", "hed"),
    *("first_global_blur", "second_global_blur", "local_blur", "second_global_solarize"),
)


class View(NamedTuple):
    """Everything that is drawn for one crop; what is not applied has its neutral value."""

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
    jitter: bool
    """Whether the four values below are applied."""
    brightness: float
    contrast: float
    saturation: float
    hue_turns: float
    grey: bool
    hed: bool
    """Whether the two triples below are applied."""
    hed_factor: tuple[float, float, float]
    hed_shift: tuple[float, float, float]
    blur_sigma_px: float
    """0 for no blur."""
    solarize: bool


def draw_view(
    config: AugmentConfig,
    seed: int,
    epoch: int,
    position: int,
    view_index: int,
    tile_hw: tuple[int, int],
) -> View:
    """Draws one crop of the tile at `position` of `epoch`; pure in its arguments.

    The same numbers are drawn whatever the probabilities are, so changing one strength leaves
    everything else about a crop as it was.

    Args:
        config: strengths and sizes.
        seed: of the run.
        epoch: from 0.
        position: the tile's place in the epoch's order.
        view_index: 0 and 1 are the global crops, those from 2 on the local ones.
        tile_hw: height and width of the tile in pixels.
    """
    # A counter-based generator: the key is the run, the counter says where in it we are.
    key = np.array((seed, VIEW_STREAM), np.uint64)
    counter = np.array((0, view_index, position, epoch), np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key, counter=counter))
    is_global = view_index < config.n_global
    draws: list[float] = rng.random(9 + 10 + 2 + 2 * BOX_TRIES).tolist()
    box = _draw_box(
        draws[19:], config.global_scale if is_global else config.local_scale, config.ratio, tile_hw
    )
    flip, turn, turns, jitter, grey, hed, blur, sigma, solarize = draws[:9]
    factors = [2 * draw - 1 for draw in draws[9:19]]
    low, high = config.blur_sigma_px
    blurs = (config.first_global_blur, config.second_global_blur, config.local_blur)
    return View(
        *box,
        size_px=config.global_px if is_global else config.local_px,
        flip=flip < config.flip,
        quarter_turns=1 + int(3 * turns) if turn < config.turn else 0,
        jitter=jitter < config.jitter,
        brightness=1 + config.brightness * factors[0],
        contrast=1 + config.contrast * factors[1],
        saturation=1 + config.saturation * factors[2],
        hue_turns=config.hue * factors[3],
        grey=grey < config.grey,
        hed=hed < config.hed,
        hed_factor=_triple(1.0, config.hed_factor, factors[4:7]),
        hed_shift=_triple(0.0, config.hed_shift, factors[7:10]),
        blur_sigma_px=low + (high - low) * sigma if blur < blurs[min(view_index, 2)] else 0.0,
        solarize=view_index == 1 and solarize < config.second_global_solarize,
    )


def render_view(tile: NDArray[np.uint8], view: View) -> NDArray[np.uint8]:
    """The crop that `view` describes.

    Args:
        tile: RGB, uint8 [H, W, 3], of the size for which the view was drawn.
        view: from `draw_view`.

    Returns:
        RGB, uint8 [S, S, 3] with S = `view.size_px`.
    """
    box = tile[view.y_px : view.y_px + view.height_px, view.x_px : view.x_px + view.width_px]
    image = orient(resize(box, view.size_px), view.flip, view.quarter_turns)
    if view.hed:  # before the jitter: the stain comes before the scanner
        image = colour.jitter_stains(image, view.hed_factor, view.hed_shift)
    if view.jitter or view.grey:
        image = colour.apply_matrix(image, _colour_matrix(image, view))
    if view.blur_sigma_px:
        image = colour.blur(image, view.blur_sigma_px)
    if view.solarize:
        image = colour.solarize(image)
    return image


def resize(image: NDArray[np.uint8], size_px: int) -> NDArray[np.uint8]:
    """Bicubic resampling of `image` uint8 [H, W, 3] to uint8 [size_px, size_px, 3].

    The kernel widens with the shrinking, as in Pillow, so nothing aliases; torch's byte kernel
    gives Pillow's values to within two levels, in a quarter of its time.
    """
    # A copy: torch warns of memory that it must not write to, such as what Pillow decodes into.
    pixels = torch.from_numpy(np.array(image, order="C"))
    channels_last = pixels[None].permute(0, 3, 1, 2)
    resized = F.interpolate(channels_last, size=(size_px, size_px), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def orient(image: NDArray[np.uint8], flip: bool, quarter_turns: int) -> NDArray[np.uint8]:
    """`image` uint8 [S, S, 3], flipped left to right, then turned counter-clockwise."""
    if flip:
        image = np.asarray(cv2.flip(image, 1), np.uint8)
    if quarter_turns:
        image = np.asarray(cv2.rotate(image, _ROTATIONS[quarter_turns]), np.uint8)
    return image


_ROTATIONS = {1: cv2.ROTATE_90_COUNTERCLOCKWISE, 2: cv2.ROTATE_180, 3: cv2.ROTATE_90_CLOCKWISE}


def _colour_matrix(image: NDArray[np.uint8], view: View) -> NDArray[np.float64]:
    if not view.jitter:
        return colour.jitter_matrix(np.zeros(3), grey=view.grey)
    return colour.jitter_matrix(
        colour.mean_colour(image),
        brightness=view.brightness,
        contrast=view.contrast,
        saturation=view.saturation,
        hue_turns=view.hue_turns,
        grey=view.grey,
    )


def _draw_box(
    draws: list[float],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    tile_hw: tuple[int, int],
) -> tuple[int, int, int, int]:
    """Left, top, width and height of a box within the tile, as torchvision draws them."""
    height_px, width_px = tile_hw
    across, down, *tries = draws
    for size, shape in zip(tries[::2], tries[1::2], strict=True):
        area = height_px * width_px * (scale[0] + (scale[1] - scale[0]) * size)
        aspect = math.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * shape)
        box_width = max(1, round(math.sqrt(area * aspect)))
        box_height = max(1, round(math.sqrt(area / aspect)))
        if box_width <= width_px and box_height <= height_px:
            break
    else:  # the whole tile, or the largest part of it that has an allowed shape, in the middle
        aspect = min(max(width_px / height_px, ratio[0]), ratio[1])
        box_width = max(1, min(width_px, round(height_px * aspect)))
        box_height = max(1, min(height_px, round(width_px / aspect)))
        across = down = 0.5
    left = int(across * (width_px - box_width + 1))
    top = int(down * (height_px - box_height + 1))
    return left, top, box_width, box_height


def _triple(centre: float, spread: float, draws: list[float]) -> tuple[float, float, float]:
    first, second, third = (centre + spread * draw for draw in draws)
    return first, second, third
