"""The stages of `eosin bench data` behind the decoder, on tiles that both sides hold decoded.

Ours are those of `eosin.pretrain.steps`: what colour and blur take is what `render_view` takes
longer with them than without. Legend: B tiles, V views, L local ones, S side of a crop.
"""

import itertools
import time
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eosin.launch.bench_pipelines import IMAGENET_MEAN, IMAGENET_STD, Picture, PillowCrops
from eosin.launch.stopwatch import seconds_now, wait_for
from eosin.pretrain.augment import AugmentConfig
from eosin.pretrain.batch import Crops, Inputs
from eosin.pretrain.render import render_view
from eosin.pretrain.views import Views, draw_views

STAGES = ("draw", "crop", "colour", "blur", "collate", "transfer")
"""In their order. The baseline draws within its stages; ``draw`` is what that alone takes. Its
``collate`` makes floats, normalises and stacks them, so that its ``transfer`` is a copy; ours
copies bytes in ``collate``, and in ``transfer`` takes them to the device and normalises there."""

Pixels = NDArray[np.uint8]


class Stages(Protocol):
    """A side whose stages can be timed again and again."""

    def seconds(self) -> dict[str, float]:
        """Seconds of each of `STAGES` for one tile, the mean over the batch, for new draws."""


class OurStages:
    """One batch of decoded tiles, and our stages on it.

    Args:
        tiles: uint8 [H, W, 3] each.
        augment: what is drawn.
        seed: of the draws.
        device: where the batch goes.
    """

    def __init__(
        self, tiles: Sequence[Pixels], augment: AugmentConfig, seed: int, device: torch.device
    ) -> None:
        self.tiles, self.augment, self.seed, self.device = tiles, augment, seed, device
        self._hw = np.array([tile.shape[:2] for tile in tiles])
        self._inputs = Inputs(device, IMAGENET_MEAN, IMAGENET_STD)
        self._positions = np.arange(len(tiles))
        self._epochs = itertools.count()
        self._crops = [
            [np.empty((side, side, 3), np.uint8) for side in augment.sizes_px] for _ in tiles
        ]

    def seconds(self) -> dict[str, float]:
        """See `Stages`."""
        watch = _Laps(self.device)
        epochs = np.full(len(self.tiles), next(self._epochs))
        views = draw_views(self.augment, self.seed, epochs, self._positions, self._hw)
        drawn = watch.lap()
        sharp = without(views, "blur_sigma_px", "solarize")
        plain = without(sharp, "stain", "hed", "jitter", "grey")
        rendered = [self._render(some, watch) for some in (plain, sharp, views)]
        batch = self._collate()
        collated = watch.lap()
        batch = Crops(*_pinned(batch, self.device))
        watch.lap()
        self._inputs(batch)
        cropped, coloured, blurred = rendered
        laps = (
            *(drawn, cropped, coloured - cropped, blurred - coloured, collated),
            watch.lap(waits=True),
        )
        return {stage: lap / len(self.tiles) for stage, lap in zip(STAGES, laps, strict=True)}

    def _render(self, views: Views, watch: "_Laps") -> float:
        """Renders all views into the same memory; seconds."""
        watch.lap()
        for b, (tile, crops) in enumerate(zip(self.tiles, self._crops, strict=True)):
            for view, crop in zip(views.of_tile(b, self.augment.sizes_px), crops, strict=True):
                render_view(tile, view, out=crop)
        return watch.lap()

    def _collate(self) -> Crops:
        """The crops in new memory, laid out as a batch."""
        by_view = list(zip(*self._crops, strict=True))
        groups = by_view[: self.augment.n_global], by_view[self.augment.n_global :]
        sides = self.augment.global_px, self.augment.local_px
        parts = []
        for views, side in zip(groups, sides, strict=True):
            part = torch.empty((len(views), len(self.tiles), side, side, 3), dtype=torch.uint8)
            for target, crops in zip(part.numpy(), views, strict=True):
                for b, crop in enumerate(crops):
                    target[b] = crop
            parts.append(part)
        return Crops(*parts)


class PillowStages:
    """One batch of decoded tiles, and the baseline's stages on it.

    Args:
        tiles: RGB pictures.
        augment: what is drawn.
        device: where the batch goes.
    """

    def __init__(
        self, tiles: Sequence[Picture], augment: AugmentConfig, device: torch.device
    ) -> None:
        self.tiles, self.crops, self.device = tiles, PillowCrops(augment), device

    def seconds(self) -> dict[str, float]:
        """See `Stages`."""
        crops, watch = self.crops, _Laps(self.device)
        for tile in self.tiles:
            crops.draw(tile)
        laps = [watch.lap()]
        cut = [crops.crop(tile) for tile in self.tiles]
        laps.append(watch.lap())
        coloured = [crops.colour(views) for views in cut]
        laps.append(watch.lap())
        blurred = [crops.blur(views) for views in coloured]
        laps.append(watch.lap())
        batch = crops.collate([crops.finish(views) for views in blurred])
        laps.append(watch.lap())
        batch = _pinned(batch, self.device)
        watch.lap()
        for part in batch:
            part.to(self.device, non_blocking=True, copy=True)
        laps.append(watch.lap(waits=True))
        return {stage: lap / len(self.tiles) for stage, lap in zip(STAGES, laps, strict=True)}


def without(views: Views, *fields: str) -> Views:
    """The views with these of their fields all false or zero."""
    return views._replace(**{name: np.zeros_like(getattr(views, name)) for name in fields})


def _pinned(parts: Iterable[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """In page-locked memory for a GPU, as either loader hands batches over."""
    return tuple(part.pin_memory() if device.type == "cuda" else part for part in parts)


class _Laps:
    """Seconds since the lap before: of the wall where the device has to be waited for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = self._wall = 0.0
        self.lap()

    def lap(self, *, waits: bool = False) -> float:
        """Seconds since the last call; with `waits`, until the device has done its work."""
        on_gpu = waits and self._device.type == "cuda"
        if on_gpu:
            wait_for(self._device)
        cpu, wall = seconds_now(False), time.perf_counter()
        spent = wall - self._wall if on_gpu else cpu - self._cpu
        self._cpu, self._wall = cpu, wall
        return spent
