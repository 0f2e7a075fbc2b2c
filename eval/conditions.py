"""Test tiles as they would look under other conditions, for probes that were fitted on plain ones.

Each transform is a function of the pixels alone, with nothing left to chance. A stain condition
renders a tile as if its slide had been stained like a reference (CTPLab, arXiv 2603.12886: the
reference stains come from a library, the tile's own are measured on it).
"""

import fnmatch
from collections.abc import Callable, Sequence
from io import BytesIO

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from eosin.data_curation.encoder_interface import Encoder
from eosin.launch.artefacts import stamp_of

Pixels = npt.NDArray[np.uint8]
VERSION = 1
"""Of the transforms; features of another one are embedded again."""


def _blurred(tile: Pixels, sigma_px: float) -> Pixels:
    """Out of focus: a Gaussian of that deviation, in pixels of the tile."""
    return np.asarray(cv2.GaussianBlur(tile, (0, 0), sigma_px), np.uint8)


def _recompressed(tile: Pixels, quality: int) -> Pixels:
    """Through JPEG once more, with chroma at half resolution."""
    file = BytesIO()
    Image.fromarray(tile).save(file, "JPEG", quality=quality, subsampling=2)
    return np.asarray(Image.open(file).convert("RGB"))


def _scaled(tile: Pixels, factor: float) -> Pixels:
    """Magnified around the middle, at the tile's size; what a smaller one lacks is mirrored."""
    height, width = tile.shape[:2]
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    scaled = np.asarray(Image.fromarray(tile).resize(size, Image.Resampling.BICUBIC))
    top, left = ((a - b) // 2 for a, b in zip(scaled.shape[:2], (height, width), strict=True))
    if factor >= 1:
        return np.ascontiguousarray(scaled[top : top + height, left : left + width])
    rows = (-top, height - scaled.shape[0] + top)
    columns = (-left, width - scaled.shape[1] + left)
    return np.pad(scaled, [rows, columns, (0, 0)], mode="symmetric")


def _brightened(tile: Pixels, factor: float) -> Pixels:
    """All intensities times `factor`: another lamp."""
    return np.clip(np.round(tile * factor), 0, 255).astype(np.uint8)


CONDITIONS: dict[str, Callable[[Pixels], Pixels]] = {
    "rotate-90": lambda tile: np.rot90(tile).copy(),
    "rotate-180": lambda tile: np.rot90(tile, 2).copy(),
    "mirror": lambda tile: tile[:, ::-1].copy(),
    "blur-1": lambda tile: _blurred(tile, 1.0),
    "blur-2": lambda tile: _blurred(tile, 2.0),
    "jpeg-60": lambda tile: _recompressed(tile, 60),
    "jpeg-30": lambda tile: _recompressed(tile, 30),
    "scale-0.8": lambda tile: _scaled(tile, 0.8),
    "scale-1.25": lambda tile: _scaled(tile, 1.25),
    "bright-0.9": lambda tile: _brightened(tile, 0.9),
    "bright-1.1": lambda tile: _brightened(tile, 1.1),
}
"""By name, of an RGB tile [H, W, 3] to one of the same size (turned by 90°: of the turned size)."""


def choose_conditions(wanted: Sequence[str]) -> list[str]:
    """The transforms that names or patterns stand for, in their order.

    Raises:
        ValueError: one stands for none.
    """
    for pattern in wanted:
        if not fnmatch.filter(CONDITIONS, pattern):
            raise ValueError(f"no condition '{pattern}'; there are {', '.join(CONDITIONS)}")
    return [name for name in CONDITIONS if any(fnmatch.fnmatchcase(name, p) for p in wanted)]


class ConditionedEncoder(Encoder):
    """An encoder that is shown every tile under one of `CONDITIONS`."""

    def __init__(self, encoder: Encoder, condition: str) -> None:
        self._encoder, self._condition = encoder, condition
        self.name = f"{encoder.name}-{condition}"
        self.dim, self.pooling, self.input_px = encoder.dim, encoder.pooling, encoder.input_px
        self.token_grid, self.has_twin = encoder.token_grid, encoder.has_twin
        self.mean, self.std = encoder.mean, encoder.std
        self.digest = stamp_of(encoder=encoder.digest, condition=condition, version=VERSION)
        self.transform_digest = stamp_of(
            transform=encoder.transform_digest, condition=condition, version=VERSION
        )

    def prepare(self, tile: Pixels) -> Tensor:
        """The changed tile, as the encoder prepares it."""
        return self._encoder.prepare(CONDITIONS[self._condition](tile))

    def forward(self, prepared: Sequence[Tensor]) -> npt.NDArray[np.float32]:
        """The encoder's features [B, D]."""
        return self._encoder.forward(prepared)

    def random_twin(self, seed: int) -> Encoder:
        """The encoder's twin, under the same condition."""
        return ConditionedEncoder(self._encoder.random_twin(seed), self._condition)
