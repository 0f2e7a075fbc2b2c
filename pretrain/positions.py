"""Where a patch lies: learned positions that are resampled, or rotations of queries and keys.

Legend: P prefix tokens, N patches a sequence, M patches along a side of the learned table's grid,
D width, C channels a head, T tokens of the stream.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

STREAM = 0x70BE  # keeps these draws apart from those of other modules under one seed
OFFSET = 0.1  # patches that DINOv2 adds to a crop's grid before it divides by the table's

Interpolation: TypeAlias = Literal["antialias", "offset", "exact"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Axial rotary positions (DINOv3, arXiv 2508.10104, section 3.2), and their jitter in training.

    The jitter shifts, then stretches, the coordinates of all crops of a group alike.
    """

    base: float = 100.0
    """Periods are base ** (4 i / C) for i < C / 4, in units of half a crop."""
    shift: float = 0.0
    """Largest shift of an axis, uniform in ±shift; the crop spans -1 … 1."""
    stretch: float = 1.0
    """Largest factor of one axis, log-uniform in 1/stretch … stretch, per axis."""
    rescale: float = 1.0
    """Largest factor of both axes together, log-uniform in 1/rescale … rescale."""

    def __post_init__(self) -> None:
        """Refuses what is no period, shift or factor."""
        if not 1 < self.base < math.inf:
            raise ValueError(f"base={self.base} must be a number above 1")
        if not 0 <= self.shift < math.inf:
            raise ValueError(f"shift={self.shift} must be a number of 0 or more")
        for name in ("stretch", "rescale"):
            if not 1 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a number of 1 or more")


@dataclass(frozen=True)
class Jitter:
    """The jitter of one training step, a pure function of (seed, step, crop group)."""

    seed: int
    step: int

    def factors(
        self, config: RopeConfig, crop_group: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Shift and factor of the (vertical, horizontal) coordinates of a crop group."""
        rng = np.random.default_rng([STREAM, self.seed, self.step, crop_group])
        shift = rng.uniform(-1, 1, 2) * config.shift
        stretch = rng.uniform(-1, 1, 2) * math.log(config.stretch)
        rescale = rng.uniform(-1, 1) * math.log(config.rescale)
        return shift, np.exp(stretch + rescale)


def learned_positions(
    table: Tensor, grid: int, size: tuple[int, int], convention: Interpolation
) -> Tensor:
    """Positions of a crop of (h, w) patches, fp32 [1, h · w, D]; the table itself where they fit.

    The published conventions resample by bicubic convolution with half-pixel centres, in fp32:
    ``antialias`` to the exact size, with antialiasing (DINOv2's register models, timm); ``offset``
    by the factor (h + 0.1) / M, without (DINOv2's models without registers); ``exact`` to the exact
    size, without (the same models in transformers).

    Args:
        table: [1, M · M, D].
        grid: M.
        size: (h, w).
        convention: which of them.
    """
    if size == (grid, grid):
        return table
    square = table.float().unflatten(1, (grid, grid)).permute(0, 3, 1, 2)  # [1, D, M, M]
    if convention == "antialias":
        resized = F.interpolate(square, size=size, mode="bicubic", antialias=True)
    elif convention == "exact":
        resized = F.interpolate(square, size=size, mode="bicubic")
    else:
        factors = [(side + OFFSET) / grid for side in size]
        resized = F.interpolate(square, scale_factor=factors, mode="bicubic")
    return resized.flatten(2).transpose(1, 2)


def rope_angles(
    size: tuple[int, int],
    channels: int,
    config: RopeConfig,
    jitter: Jitter | None = None,
    crop_group: int = 0,
) -> NDArray[np.float64]:
    """Angles of a crop of (h, w) patches, fp64 [h · w, C / 2]: vertical ones, then horizontal ones.

    A patch's coordinates are those of its centre, each axis spanning -1 … 1 over the crop; an angle
    is 2π · coordinate / period.
    """
    quarter = channels // 4
    periods = config.base ** (np.arange(quarter) / (channels / 4))  # [C / 4]
    axes = [2 * (np.arange(side) + 0.5) / side - 1 for side in size]
    coordinates = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)  # [h, w, 2]
    if jitter is not None:
        shift, factor = jitter.factors(config, crop_group)
        coordinates = (coordinates + shift) * factor
    angles = 2 * math.pi * coordinates[..., None] / periods  # [h, w, 2, C / 4]
    return angles.reshape(size[0] * size[1], 2 * quarter)


def turns(angles: NDArray[np.float64], prefix: int) -> NDArray[np.float32]:
    """Cosines and sines of one sequence, fp32 [P + N, C]; prefix tokens are not turned."""
    padded = np.concatenate([np.zeros((prefix, angles.shape[1])), angles])
    return np.concatenate([np.cos(padded), np.sin(padded)], axis=1).astype(np.float32)


def spread_over(groups: Sequence[tuple[int, int]], rows: Sequence[Tensor]) -> Tensor:
    """Each group's [tokens a sequence, C] repeated for its sequences, [T, C]."""
    return torch.cat(
        [
            part[None].expand(count, -1, -1).flatten(0, 1)
            for (count, _), part in zip(groups, rows, strict=True)
        ]
    )


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turns channel i of a head with channel i + C / 2 ("rotate half"), in fp32.

    Args:
        x: queries or keys, [T, …, C].
        rotations: cosines and sines, [T, C].
    """
    between = (1,) * (x.dim() - 2)
    cos, sin = rotations.unflatten(0, (-1, *between)).chunk(2, dim=-1)  # each [T, …, C / 2]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
