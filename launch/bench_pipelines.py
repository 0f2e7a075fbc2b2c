"""The baselines of `eosin bench data`: DINOv2's crops by Pillow and torchvision, and webdataset.

The crops are those of DINOv2's public loader (Oquab et al., 2023, section 4 and its released
transforms): PIL images through torchvision's transforms, one view after the other, floats out.
Sizes, strengths and probabilities come from the same `AugmentConfig` as ours. Legend: B tiles, L
local views, G and S sides of a global and a local crop.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from eosin.data_curation.torchvision_import import import_timm
from eosin.pretrain.augment import AugmentConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BLUR_TAPS = 9
SOLARIZE_FROM = 128
SHARDS_SHUFFLED = 100
SAMPLES_SHUFFLED = 1000
"""What webdataset's own examples shuffle."""

Picture: TypeAlias = Image.Image


class PillowCrops:
    """DINOv2's pipeline, whole or stage by stage; draws from torch's global generator.

    It has no turn, no stain jitter and no stain template: those of the config are left out. A blur
    has the probability with which it is applied, see `eosin.pretrain.augment`.

    Args:
        augment: sizes, scales, strengths and probabilities.
    """

    def __init__(self, augment: AugmentConfig) -> None:
        import_timm()  # brings torchvision in where its operators do not load
        tv = import_module("torchvision.transforms")
        views = augment.n_views
        jitter = tv.ColorJitter(
            augment.brightness, augment.contrast, augment.saturation, augment.hue
        )
        colour = tv.Compose(
            [tv.RandomApply([jitter], p=augment.jitter), tv.RandomGrayscale(augment.grey)]
        )

        def cut(size_px: int, scale: tuple[float, float]) -> Any:
            bicubic = tv.InterpolationMode.BICUBIC
            box = tv.RandomResizedCrop(size_px, scale, augment.ratio, interpolation=bicubic)
            return tv.Compose([box, tv.RandomHorizontalFlip(augment.flip)])

        def soften(probability: float) -> Any:
            blur = tv.GaussianBlur(BLUR_TAPS, augment.blur_sigma_px)
            return tv.RandomApply([blur], p=probability)

        solarize = tv.RandomSolarize(SOLARIZE_FROM, augment.second_global_solarize)
        big = cut(augment.global_px, augment.global_scale)
        small = cut(augment.local_px, augment.local_scale)
        local = soften(augment.local_blur)
        self.augment, self._tv, self._jitter = augment, tv, jitter
        self._cuts = [*[big] * augment.n_global, *[small] * augment.n_local]
        self._colours = [colour] * views
        self._blurs = [
            soften(augment.first_global_blur),
            tv.Compose([soften(augment.second_global_blur), solarize]),
            *[local] * augment.n_local,
        ]
        last = tv.Compose([tv.ToTensor(), tv.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
        self._lasts = [last] * views

    def decode(self, data: bytes) -> Picture:
        """As DINOv2's image decoder does: opened lazily, made RGB."""
        return Image.open(io.BytesIO(data)).convert("RGB")

    def draw(self, tile: Picture) -> None:
        """The draws of every view alone, which the stages below make again for themselves."""
        tv, augment, jitter = self._tv, self.augment, self._jitter
        blurs = (augment.first_global_blur, augment.second_global_blur, augment.local_blur)
        for view in range(augment.n_views):
            is_global = view < augment.n_global
            scale = augment.global_scale if is_global else augment.local_scale
            tv.RandomResizedCrop.get_params(tile, scale, augment.ratio)
            _, whether_jitter, _, whether_blur = (torch.rand(1) for _ in range(4))
            if whether_jitter < augment.jitter:
                tv.ColorJitter.get_params(
                    jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
                )
            if whether_blur < blurs[min(view, 2)]:
                tv.GaussianBlur.get_params(*augment.blur_sigma_px)

    def crop(self, tile: Picture) -> list[Picture]:
        """Box, resize and flip of every view."""
        return [cut(tile) for cut in self._cuts]

    def colour(self, crops: Sequence[Picture]) -> list[Picture]:
        """Colour jitter and greyscale."""
        return [change(crop) for change, crop in zip(self._colours, crops, strict=True)]

    def blur(self, crops: Sequence[Picture]) -> list[Picture]:
        """Blur, and solarize of the second view."""
        return [blur(crop) for blur, crop in zip(self._blurs, crops, strict=True)]

    def finish(self, crops: Sequence[Picture]) -> list[Tensor]:
        """Float32 [3, S, S] of each crop, normalised."""
        return [last(crop) for last, crop in zip(self._lasts, crops, strict=True)]

    def views(self, tile: Picture) -> list[Tensor]:
        """All stages after the decoder: float32 [3, S, S] of each view."""
        return self.finish(self.blur(self.colour(self.crop(tile))))

    def collate(self, tiles: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """The batch as its loader stacks it: float32 [2·B, 3, G, G] and [L·B, 3, S, S]."""
        by_view = list(zip(*tiles, strict=True))
        groups = by_view[: self.augment.n_global], by_view[self.augment.n_global :]
        return tuple(torch.stack([c for view in views for c in view]) for views in groups if views)

    def batch(self, encoded: Sequence[bytes]) -> tuple[Tensor, ...]:
        """From encoded tiles to what the network is given."""
        return self.collate([self.views(self.decode(data)) for data in encoded])


def stream_records(shards: Path) -> Iterator[bytes]:
    """Stock webdataset over the tars of a folder, again and again: each record's encoded image."""
    dataset = _webdataset(shards, shardshuffle=False).repeat()
    with closing(iter(dataset)) as samples:
        for sample in samples:
            yield sample["jpg"] if "jpg" in sample else sample["png"]


def stream_batches(
    shards: Path, crops: PillowCrops, batch_size: int
) -> Iterator[tuple[Tensor, ...]]:
    """Stock webdataset with its shuffles and its Pillow decoder, and the crops of `crops`.

    Args:
        shards: folder of tars.
        crops: see `PillowCrops`.
        batch_size: B.

    Yields:
        See `PillowCrops.collate`; without an end.
    """
    dataset = (
        _webdataset(shards, shardshuffle=SHARDS_SHUFFLED)
        .shuffle(SAMPLES_SHUFFLED)
        .decode("pil")
        .to_tuple("jpg;png")
        .map_tuple(crops.views)
        .repeat()
    )
    with closing(iter(dataset)) as samples:
        while True:
            yield crops.collate([views for (views,) in islice(samples, batch_size)])


def stream_tiles(shards: Path) -> Iterator[NDArray[np.uint8]]:
    """Stock webdataset with its shuffles and its Pillow decoder alone: uint8 [H, W, 3], endless."""
    dataset = _webdataset(shards, shardshuffle=SHARDS_SHUFFLED).shuffle(SAMPLES_SHUFFLED)
    with closing(iter(dataset.decode("rgb8").to_tuple("jpg;png").repeat())) as samples:
        for (tile,) in samples:
            yield tile


def _webdataset(shards: Path, shardshuffle: int | bool) -> Any:
    import_timm()
    make: Callable[..., Any] = import_module("webdataset").WebDataset
    tars = [str(path) for path in sorted(shards.glob("*.tar"))]
    return make(tars, shardshuffle=shardshuffle, empty_check=False)
