"""Rendering of drawn views on the device, a batch at a time: decoded tiles in, crops out.

The same operations in the same order as `eosin.pretrain.render`, and the same levels but for one
here and there. Crop, resize, flip and turn of a view are two matrix products with every tile of
the batch at once, whose weights are built from the boxes; so is the blur. What a view leaves out
has its neutral value, so that no shape depends on what was drawn and nothing waits for the device.

Weights are multiples of 2^-11 and pixels are kept as level - 128: 16 bits hold both exactly, and
the sums fit into 24 bits, so a product is exact in whatever order a kernel adds it up. A tile's
crops thus do not depend on the tiles beside it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eosin.pretrain import colour
from eosin.pretrain.packed_views import BLUR_RADIUS_PX, PARAMETERS, WEIGHT_STEPS, Drawn
from eosin.pretrain.stain import MAX_STAIN_FACTOR
from eosin.pretrain.upload import upload

WORK_BYTES = 2**27
"""About what one of the few intermediate results may take; larger batches are rendered in parts."""

PAD_PX = 32
"""Sides of tiles are padded to multiples of this, which products like, and compilers meet again."""

_BLUR_STEPS = 2.0**4
"""Steps of a level between the two passes of the blur; 16-bit floats hold -128 … 128 in them."""
_TINY = 1e-6
"""In optical density, as in `stain.move_to_template`."""


class Operations(NamedTuple):
    """What has to be computed after the resize because some view asks for it."""

    template: bool
    stains: bool
    """Of the template or of the stain jitter."""
    colour: bool
    blur: bool
    solarize: bool


ALL_OPERATIONS = Operations(True, True, True, True, True)


class _Fixed(NamedTuple):
    """What crops of one size have in common, on the device."""

    mirror: Tensor
    """`_mirrored_bands`, in the type of the products."""
    stains: Tensor
    """`colour.HED_STAINS`, float32 [stain, channel]."""
    unmix: Tensor
    """Its inverse, float32 [channel, stain]: amounts are od @ this."""
    luma: Tensor
    """`colour.LUMA`, float32 [3]."""


class DeviceRenderer:
    """Renders the views of a batch of decoded tiles on one device.

    On a GPU the products are of 16-bit floats with sums in 32 bits, elsewhere of 32-bit floats.
    """

    def __init__(
        self, device: torch.device, *, backend: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Prepares rendering on `device`.

        Args:
            device: where crops are rendered and stay.
            backend: of `torch.compile`, as in ``inductor``, to fuse the operations; None to run
                them one by one. Compiled, every view gets all of them, so that there is one graph
                for each pair of tile size and crop size.
            dtype: of the factors of the products; float16 on a GPU and float32 elsewhere by
                default.
        """
        self.device = device
        self.dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
        self.compiled = backend is not None
        self._render = _render
        if backend is not None:
            # the limit counts for all sizes of tiles and crops
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
            self._render = torch.compile(_render, fullgraph=True, dynamic=False, backend=backend)
        self._fixed: dict[int, _Fixed] = {}

    @torch.no_grad()
    def __call__(
        self, tiles: Tensor, parameters: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """The crops of B tiles.

        Args:
            tiles: RGB, uint8 [B, H, W, 3], each decoded tile in the upper left corner; what is
                beyond it is not looked at. On the CPU or on the device.
            parameters: float32 [V, B, `PARAMETERS`] of `pack_views`. On the CPU they cost nothing
                to look at, and what no view of a group asks for is left out.
            sizes: how many views (of V, in order) have which side in pixels, as in
                ``[(2, 224), (8, 98)]``.

        Returns:
            For each group of v views of side S: uint8 [v, B, 3, S, S] on the device, view-major.

        Raises:
            ValueError: tiles, parameters and sizes do not fit one another.
        """
        _check(tiles, parameters, sizes)
        groups = parameters.split([views for views, _ in sizes])
        operations = [self._operations(group) for group in groups]
        groups = self._here(parameters).split([views for views, _ in sizes])
        tiles = self._here(tiles)
        n_tiles, height, width, _ = tiles.shape
        crops = [
            torch.empty(views, n_tiles, 3, size, size, dtype=torch.uint8, device=self.device)
            for views, size in sizes
        ]
        largest = max((size for _, size in sizes), default=1)
        part = max(1, WORK_BYTES // (12 * max(height, largest) * max(width, largest)))
        with torch.autocast(self.device.type, enabled=False):
            for first in range(0, n_tiles, part):
                which = slice(first, first + part)
                planes = _centred_planes(tiles[which], self.dtype)
                for out, group, wanted, (_, size) in zip(
                    crops, groups, operations, sizes, strict=True
                ):
                    fixed = self._of_size(size)
                    for view in range(len(group)):
                        out[view, which] = self._render(planes, group[view, which], fixed, wanted)
        return crops

    def _operations(self, group: Tensor) -> Operations:
        """What the views [v, B, `PARAMETERS`] ask for, as far as that is known without a wait."""
        if self.compiled or group.device.type != "cpu":
            return ALL_OPERATIONS
        drawn = Drawn.unpack(group)
        template = bool(drawn.stain.any())
        hed = bool((drawn.hed_factor != 1).any()) or bool((drawn.hed_shift != 0).any())
        recoloured = (drawn.colour != torch.eye(3).flatten()).any() or drawn.pivot.any()
        return Operations(
            template=template,
            stains=template or hed,
            colour=bool(recoloured),
            blur=bool(drawn.taps[..., 1:].any()),
            solarize=bool(drawn.solarize.any()),
        )

    def _here(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == self.device.type:
            return tensor
        return upload(tensor, self.device)

    def _of_size(self, size_px: int) -> _Fixed:
        if size_px not in self._fixed:
            bands = torch.from_numpy(_mirrored_bands(size_px)).to(self.dtype)
            colours = (colour.HED_STAINS, np.linalg.inv(colour.HED_STAINS), colour.LUMA)
            tables = (torch.from_numpy(table.astype(np.float32)) for table in colours)
            self._fixed[size_px] = _Fixed(*(upload(part, self.device) for part in (bands, *tables)))
        return self._fixed[size_px]


def _render(planes: Tensor, parameters: Tensor, fixed: _Fixed, wanted: Operations) -> Tensor:
    """One view of each tile.

    Args:
        planes: level - 128, float16 or float32 [B, H, 3, W].
        parameters: float32 [B, `PARAMETERS`].
        fixed: for crops of side S.
        wanted: operations that some view asks for.

    Returns:
        uint8 [B, 3, S, S].
    """
    drawn = Drawn.unpack(parameters)
    size = fixed.mirror.shape[-1]
    crops = _resize(planes, drawn, size)  # [B, S, 3, S], as are all below
    if wanted.stains:
        crops = _change_stains(crops, drawn, fixed, wanted.template)
    if wanted.colour:
        crops = _recolour(crops, drawn, fixed.luma)
    if wanted.blur:
        crops = _blur(crops, drawn.taps, fixed.mirror)
    if wanted.solarize:
        inverted = torch.where(crops < 128, crops, 255 - crops)
        crops = torch.where(_spread(drawn.solarize) > 0, inverted, crops)
    levels = crops.to(torch.uint8)
    # A quarter turn is a swap of the axes after a reversal; nothing above tells the axes apart.
    swapped = drawn.order[:, 2:, None, None] > 0  # [B, 1, 1, 1]
    return torch.where(swapped, levels.permute(0, 2, 3, 1), levels.permute(0, 2, 1, 3))


def _centred_planes(tiles: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [B, H, W, 3] as level - 128 in `dtype` [B, H', 3, W'], to whole steps of `PAD_PX`."""
    height, width = tiles.shape[1:3]
    planes = tiles.permute(0, 1, 3, 2).to(dtype, memory_format=torch.contiguous_format).sub_(128)
    return F.pad(planes, (0, -width % PAD_PX, 0, 0, 0, -height % PAD_PX))


def _resize(planes: Tensor, drawn: Drawn, size: int) -> Tensor:
    """The boxes at the crop's size, reversed as asked: float32 levels [B, S, 3, S]."""
    batch, height, _, width = planes.shape
    x, y, box_width, box_height = drawn.box.unbind(-1)
    columns = _weights(x, box_width, drawn.order[:, 0], size, width).to(planes.dtype)
    rows = _weights(y, box_height, drawn.order[:, 1], size, height).to(planes.dtype)
    # Across and then down, with whole levels between them, as torch and Pillow do it for bytes.
    across = torch.bmm(planes.view(batch, height * 3, width), columns.transpose(1, 2))
    across = across.round().clamp(-128, 127).view(batch, height, 3 * size)
    crops = torch.bmm(rows, across).round().clamp(-128, 127).float() + 128
    return crops.view(batch, size, 3, size)


def _weights(start: Tensor, length: Tensor, reverse: Tensor, size: int, extent: int) -> Tensor:
    """What each pixel of a tile's side weighs in each pixel of the crop.

    Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981, eq. 15 (a = -1/2),
    widened by the shrinking; nothing beyond the box has a weight, and the rest is made up for.

    Args:
        start: float32 [B], first pixel of the box on this axis.
        length: float32 [B], pixels of the box.
        reverse: float32 [B], 1 where the crop runs against the tile.
        size: S, pixels of the crop.
        extent: E, pixels of the padded tile.

    Returns:
        float32 [B, S, E], multiples of 1 / `WEIGHT_STEPS` that sum to 1 over E.
    """
    target = torch.arange(size, device=start.device)
    target = torch.where(reverse[:, None] > 0, size - 1 - target, target)  # [B, S]
    scale = length / size
    centre = ((target + 0.5) * scale[:, None])[..., None]  # [B, S, 1], from the start of the box
    source = (torch.arange(extent, device=start.device) - start[:, None])[:, None]  # [B, 1, E]
    distance = (source + 0.5 - centre).abs() / scale.clamp(min=1)[:, None, None]  # [B, S, E]
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weights = torch.where((source >= 0) & (source < length[:, None, None]), weights, 0.0)
    weights = (weights / weights.sum(-1, keepdim=True) * WEIGHT_STEPS).round()
    missing = WEIGHT_STEPS - weights.sum(-1, keepdim=True)  # goes to the pixel in the middle
    weights = weights + torch.where(source == centre.floor(), missing, 0.0)
    return weights / WEIGHT_STEPS


def _change_stains(crops: Tensor, drawn: Drawn, fixed: _Fixed, template: bool) -> Tensor:
    """`colour.change_stains` by the template and the jitter of each view."""
    density = -((crops + 1) / 256).log()
    factor, shift = drawn.hed_factor, drawn.hed_shift  # [B, 3]
    if template:
        to_factor, to_shift = _move_to_template(density, drawn, fixed.unmix)
        factor, shift = factor * to_factor, factor * to_shift + shift
    # A pixel's density is a row d: d' = d @ unmix @ diag(factor) @ stains + shift @ stains.
    linear = (fixed.unmix[:, :, None] * factor[:, None, :, None] * fixed.stains).sum(2)
    offset = (shift[:, :, None] * fixed.stains).sum(1)  # [B, 3]
    changed = 256 * (-_affine(density, linear.transpose(1, 2), offset)).exp() - 1
    return changed.round().clamp(0, 255)


def _move_to_template(density: Tensor, drawn: Drawn, unmix: Tensor) -> tuple[Tensor, Tensor]:
    """`stain.move_to_template` of each view: factor and shift of the amounts, [B, 3] each."""
    linear = unmix.T.expand(len(density), 3, 3)
    amounts = _affine(density, linear, torch.zeros_like(drawn.hed_shift))
    variance, mean = torch.var_mean(amounts, dim=(1, 3), correction=0)
    std = variance.sqrt()
    wanted = drawn.template_std
    reach = MAX_STAIN_FACTOR * std
    factor = wanted.clamp(std / MAX_STAIN_FACTOR, reach) / std.clamp(min=_TINY)
    share = (reach / wanted.clamp(min=_TINY)).clamp(max=1)
    shift = mean + share * (drawn.template_mean - mean) - factor * mean
    applied = drawn.stain > 0
    return torch.where(applied, factor, 1.0), torch.where(applied, shift, 0.0)


def _recolour(crops: Tensor, drawn: Drawn, luma: Tensor) -> Tensor:
    """`colour.apply_matrix` of each view's jitter; contrast is about the mean luma of the crop."""
    pixels = crops.shape[1] * crops.shape[3]
    # Whole numbers: exact, and the same in whatever order they are added up.
    mean = crops.int().sum((1, 3), dtype=torch.int32).float() / pixels  # [B, 3]
    offset = (drawn.pivot * (mean * luma).sum(1, keepdim=True)).expand(-1, 3)
    return _affine(crops, drawn.colour.unflatten(1, (3, 3)), offset).round().clamp(0, 255)


def _affine(pixels: Tensor, linear: Tensor, offset: Tensor) -> Tensor:
    """Each pixel as linear @ pixel + offset, in full float32 (products on a GPU may have less).

    Args:
        pixels: float32 [B, S, 3, S].
        linear: float32 [B, 3, 3], to which channel from which.
        offset: float32 [B, 3].
    """
    result = offset[:, None, :, None]
    for channel in range(3):
        result = torch.addcmul(
            result, pixels[:, :, channel : channel + 1], linear[:, None, :, channel, None]
        )
    return result


def _blur(crops: Tensor, taps: Tensor, mirror: Tensor) -> Tensor:
    """`colour.blur` of each view.

    Args:
        crops: float32 [B, S, 3, S], whole levels.
        taps: float32 [B, 5], from the middle outwards.
        mirror: of `_mirrored_bands`, in the type of the products.
    """
    batch, size, _, _ = crops.shape
    kernel = (taps.to(mirror.dtype) @ mirror.flatten(1)).view(batch, size, size)
    centred = (crops - 128).to(mirror.dtype).view(batch, size, 3 * size)
    down = (torch.bmm(kernel, centred) * _BLUR_STEPS).round() / _BLUR_STEPS
    across = torch.bmm(down.view(batch, size * 3, size), kernel.transpose(1, 2))
    return (across.round().clamp(-128, 127).float() + 128).view(batch, size, 3, size)


def _spread(column: Tensor) -> Tensor:
    """[B, 1] beside [B, S, 3, S]."""
    return column[:, :, None, None]


def _check(tiles: Tensor, parameters: Tensor, sizes: Sequence[tuple[int, int]]) -> None:
    if tiles.dtype != torch.uint8 or tiles.ndim != 4 or tiles.shape[-1] != 3:
        raise ValueError(f"tiles must be uint8 [B, H, W, 3], not {tiles.dtype} {tiles.shape}")
    expected = (sum(views for views, _ in sizes), len(tiles), PARAMETERS)
    if parameters.shape != expected:
        raise ValueError(f"parameters must be of shape {expected}, not {tuple(parameters.shape)}")


def _mirrored_bands(size_px: int) -> NDArray[np.float32]:
    """Which pixel a tap at each distance falls on, mirrored about the outermost pixels.

    Returns:
        float32 [5, S, S]: how often the taps at distance d from pixel i (two but for d = 0) fall
        on pixel j. A kernel of taps t is the sum of t[d] · bands[d].
    """
    bands = np.zeros((BLUR_RADIUS_PX + 1, size_px, size_px), np.float32)
    period = max(1, 2 * (size_px - 1))
    pixels = np.arange(size_px)
    for offset in range(-BLUR_RADIUS_PX, BLUR_RADIUS_PX + 1):
        folded = (pixels + offset) % period
        np.add.at(bands[abs(offset)], (pixels, np.minimum(folded, period - folded)), 1)
    return bands
