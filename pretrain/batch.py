"""What a step takes from the data path: crops as bytes, or decoded tiles and what to cut from them.

Pixels stay uint8 until they are on the device (`normalise`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eosin.pretrain.device_render import DeviceRenderer
from eosin.pretrain.upload import upload


class Crops(NamedTuple):
    """Rendered crops, view-major: all first global crops, then all second."""

    global_crops: Tensor
    """uint8 [V, B, G, G, 3], RGB."""
    local_crops: Tensor
    """uint8 [L, B, S, S, 3]; L may be 0."""


class Tiles(NamedTuple):
    """Decoded tiles, of which the device renders the crops (`eosin.pretrain.device_render`)."""

    pixels: Tensor
    """uint8 [B, H, W, 3], RGB; a smaller tile stands in the upper left corner."""
    parameters: Tensor
    """float32 [V + L, B, `packed_views.PARAMETERS`]."""
    sizes: tuple[tuple[int, int], tuple[int, int]]
    """Number and side of the global and of the local crops."""


@dataclass(frozen=True)
class Batch:
    """B tiles for one step: the same whichever process made it."""

    step: int
    images: Crops | Tiles
    masks: NDArray[np.bool_]
    """[V · B, N], masked patches of the global crops, view-major."""
    rows: Tensor
    """int64 [B], rows of the index that the tiles are."""
    damaged: Mapping[int, str]
    """Row and reason of each damaged record that was met here for the first time in this call."""

    def split(self, parts: int) -> list["Batch"]:
        """The batch in so many parts, samples in order; what is damaged stays with the whole."""
        if parts == 1:
            return [self]
        size = len(self.rows) // parts
        masks = self.masks.reshape(-1, len(self.rows), self.masks.shape[-1])  # [V, B, N]
        split = []
        for start in range(0, len(self.rows), size):
            these = slice(start, start + size)
            if isinstance(self.images, Tiles):
                images: Crops | Tiles = self.images._replace(
                    pixels=self.images.pixels[these], parameters=self.images.parameters[:, these]
                )
            else:
                images = Crops(*(group[:, these] for group in self.images))
            seen = masks[:, these].reshape(-1, masks.shape[-1])
            split.append(Batch(self.step, images, seen, self.rows[these], {}))
        return split

    def pin_memory(self) -> Self:
        """The batch in page-locked memory, from which a copy to the GPU needs no wait."""
        images = self.images
        if isinstance(images, Tiles):
            pinned: Crops | Tiles = images._replace(pixels=images.pixels.pin_memory())
        else:
            pinned = Crops(*(part.pin_memory() for part in images))
        return replace(self, images=pinned)


class Inputs:
    """Takes batches to a device, as the networks want them.

    Args:
        device: where the crops go, or are rendered.
        mean: of R, G, B, where white is 1.
        std: of R, G, B.
    """

    def __init__(self, device: torch.device, mean: Sequence[float], std: Sequence[float]) -> None:
        self.device, self.mean, self.std = device, tuple(mean), tuple(std)
        self._renderer = DeviceRenderer(device)

    def __call__(self, images: Crops | Tiles) -> tuple[Tensor, Tensor]:
        """Global and local crops, normalised: float32 [V, B, 3, G, G] and [L, B, 3, S, S]."""
        if isinstance(images, Tiles):
            crops = self._renderer(images.pixels, images.parameters, images.sizes)
            first, second = (normalise(part, self.mean, self.std) for part in crops)
        else:
            crops = [upload(part, self.device) for part in images]
            first, second = (normalise_interleaved(part, self.mean, self.std) for part in crops)
        return first, second


def normalise(planes: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(levels / 255 - mean) / std, on the device where the crops are.

    Args:
        planes: uint8 […, 3, H, W].
        mean: of R, G, B, where white is 1.
        std: of R, G, B.

    Returns:
        float32 […, 3, H, W].
    """
    scale, shift = (part.view(3, 1, 1) for part in _affine(mean, std, planes.device))
    levels = planes.float()
    return torch.addcmul(shift, levels, scale, out=levels)


def normalise_interleaved(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """As `normalise`, of uint8 […, H, W, 3]: float32 […, 3, H, W], channels last in memory."""
    *_, width, channels = pixels.shape
    # A row of pixels as one long vector: three times faster than with an axis of three.
    scale, shift = (part.repeat(width) for part in _affine(mean, std, pixels.device))
    rows = pixels.flatten(-2).float()  # […, H, W · 3]
    torch.addcmul(shift, rows, scale, out=rows)  # in place: a second one is as much memory again
    return rows.view(*rows.shape[:-1], width, channels).movedim(-1, -3)


def _affine(
    mean: Sequence[float], std: Sequence[float], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Factor and offset of each channel's levels: float32 [3] on the device."""
    scale = 1 / (255 * torch.tensor(std, dtype=torch.float32))
    shift = -torch.tensor(mean, dtype=torch.float32) / torch.tensor(std, dtype=torch.float32)
    return upload(scale, device), upload(shift, device)
