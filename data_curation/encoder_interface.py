"""What an encoder is: tiles in, features out, with a digest that names both.

Shapes: B tiles, D features.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

Tiles = Sequence[npt.NDArray[np.uint8]] | npt.NDArray[np.uint8]
"""RGB tiles [H, W, 3], of any and of different sizes, or one array [B, H, W, 3]."""


@dataclass(frozen=True)
class EncoderTokens:
    """All that a network says of tiles, by the names that readers of it use."""

    cls: Tensor
    """Class tokens after the final norm [B, D]."""
    patch_mean: Tensor
    """Mean of the patch tokens [B, D]."""
    patch_tokens: Tensor
    """[B, rows, columns, D], without class and register tokens, after the final norm."""
    layers: tuple[Tensor, ...] = ()
    """Patch tokens of the layers that were asked for, likewise."""

    @property
    def cls_patch_mean(self) -> Tensor:
        """Class token and mean of the patch tokens, one behind the other [B, 2 · D]."""
        return torch.cat([self.cls, self.patch_mean], dim=1)


class Encoder(ABC):
    """What turns tiles into features. Made by `load_encoder`."""

    name: str
    """Short name for tables and files."""
    dim: int
    """Features of one tile."""
    pooling: str
    """One of `POOLINGS`, or ``none``."""
    digest: str
    """XXH3-128 of weights, preprocessing and pooling: equal digests mean equal features."""
    transform_digest: str
    """XXH3-128 of the preprocessing alone."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Normalisation of RGB in [0, 1]."""
    input_px: int | None
    """Side of the square that the network sees; None where tiles are taken as they are."""
    has_twin: bool = True
    """Whether `random_twin` can be had."""
    token_grid: tuple[int, int] | None = None
    """Rows and columns of patch tokens behind the class token in its features; None: no tokens."""

    @abstractmethod
    def prepare(self, tile: npt.NDArray[np.uint8]) -> Tensor:
        """One RGB tile [H, W, 3] made ready for `forward`; safe to call from many threads."""

    @abstractmethod
    def forward(self, prepared: Sequence[Tensor]) -> npt.NDArray[np.float32]:
        """Features [B, D] of prepared tiles."""

    @abstractmethod
    def random_twin(self, seed: int) -> "Encoder":
        """The same network and preprocessing at random weights.

        Raises:
            InputError: there are no weights.
        """

    def embed(self, tiles: Tiles) -> npt.NDArray[np.float32]:
        """Features [B, D] of RGB uint8 tiles."""
        return self.forward([self.prepare(tile) for tile in tiles])


def embed_grid(
    encoder: Encoder, region: npt.NDArray[np.uint8], rows: int, columns: int
) -> npt.NDArray[np.float32]:
    """Features of the parts of a region, row by row [rows · columns, D].

    Args:
        encoder: of tiles.
        region: RGB uint8 [H, W, 3], such as 1,024 px as 4 × 4 tiles of 256.
        rows: parts along H.
        columns: parts along W.

    Raises:
        ValueError: its sides are no multiples of them.
    """
    height, width = region.shape[:2]
    if height % rows or width % columns:
        raise ValueError(f"a region of {height} × {width} px has no {rows} × {columns} equal parts")
    parts = region.reshape(rows, height // rows, columns, width // columns, 3)
    tiles = parts.transpose(0, 2, 1, 3, 4).reshape(-1, height // rows, width // columns, 3)
    return encoder.embed(np.ascontiguousarray(tiles))


def digest_of_weights(model: torch.nn.Module) -> str:
    """XXH3-128 of names, types, shapes and bytes of all parameters and buffers."""
    state = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()
