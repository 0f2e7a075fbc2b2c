"""Features of tile files from a teacher in training, as an export of it would give them.

The weights are used where they are: nothing is copied or written. The ranks share the tiles, each
forward has the same number of them on every rank (a sharded teacher needs that), and rank 0 gets
the features. Legend: R ranks, B tiles a forward, D features.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from eosin.data_curation.embed import TileImage
from eosin.data_curation.torchvision_import import import_timm
from eosin.launch.process import World
from eosin.pretrain.export import timm_config
from eosin.pretrain.model_card import EncoderCard
from eosin.pretrain.vit import Tokens, Vit, VitConfig

THREADS = 4
"""That decode and resize."""


@dataclass(frozen=True)
class Embedded:
    """The first tiles of a list."""

    count: int
    features: npt.NDArray[np.float32] | None
    """[count, D] on rank 0; None elsewhere."""


class TeacherFeatures:
    """Embeds files with a backbone that is being trained.

    Args:
        model: its shape.
        pooling: ``cls``, ``mean`` or ``clsmean``.
        batch_size: B.
        world: the ranks.
        device: of this rank.
        dtype: of the products of matrices.
    """

    def __init__(
        self,
        model: VitConfig,
        pooling: str,
        batch_size: int,
        world: World,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        import_timm()  # takes seconds: before the first step, not at the first probe
        self._model, self._pooling, self._batch = model, pooling, batch_size
        self._world, self._device, self._dtype = world, device, dtype

    def __call__(
        self,
        teacher: Vit,
        card: EncoderCard,
        tiles: Sequence[TileImage],
        go_on: Callable[[], bool],
    ) -> Embedded:
        """Features of the first of `tiles`: of all, or of those before `go_on` said no.

        Args:
            teacher: see `LiveProbe`.
            card: its normalisation.
            tiles: labelled tiles, N.
            go_on: asked before each forward but the first, on every rank alike.

        Raises:
            InputError: an image cannot be read.
        """
        geometry = _geometry(self._model, card)
        mean, std = (
            torch.tensor(values, device=self._device).view(3, 1, 1)
            for values in (card.mean, card.std)
        )
        span = self._batch * self._world.size
        outputs: list[Tensor] = []
        with ThreadPoolExecutor(THREADS) as pool:

            def prepare(start: int) -> list[Future[Tensor]]:
                first = start + self._world.rank * self._batch
                # the last forward is filled up with the last tile
                mine = [min(i, len(tiles) - 1) for i in range(first, first + self._batch)]
                return [pool.submit(_prepared, geometry, tiles[i]) for i in mine]

            coming = prepare(0)
            for start in range(0, len(tiles), span):
                if start and not go_on():
                    break
                images = torch.stack([future.result() for future in coming])  # uint8 [B, 3, H, W]
                if start + span < len(tiles):
                    coming = prepare(start + span)
                # as the encoder of an export has it, to the bit
                images = images.to(self._device, torch.float32).div_(255).sub_(mean).div_(std)
                outputs.append(self._forward(teacher, images))
            for future in coming:
                future.cancel()
        count = min(len(outputs) * span, len(tiles))
        return Embedded(count, self._gather(torch.stack(outputs).cpu(), count))

    @torch.no_grad()
    def _forward(self, teacher: Vit, images: Tensor) -> Tensor:
        # compiled blocks would be compiled anew for these sizes, which takes longer than the probe
        stance = torch.compiler.set_stance("force_eager") if teacher.compiled else nullcontext()
        autocast = torch.autocast(
            self._device.type, self._dtype, enabled=self._dtype != torch.float32
        )
        with stance, autocast:
            tokens: Tokens = teacher([images])[0]
        parts = {
            "cls": [tokens.cls],
            "mean": [tokens.patches.mean(dim=1)],
            "clsmean": [tokens.cls, tokens.patches.mean(dim=1)],
        }[self._pooling]
        return torch.cat(parts, dim=1).float()  # [B, D]

    def _gather(self, mine: Tensor, count: int) -> npt.NDArray[np.float32] | None:
        """Those of all ranks in the order of the tiles; of each, [forwards, B, D]."""
        parts = [mine]
        if self._world.host is not None:
            room = [torch.empty_like(mine) for _ in range(self._world.size)]
            parts = room if self._world.leads else []
            dist.gather(mine, parts or None, dst=0, group=self._world.host)
            if not self._world.leads:
                return None
        features: npt.NDArray[np.float32] = torch.stack(parts, dim=1).flatten(0, 2)[:count].numpy()
        return features


def _geometry(model: VitConfig, card: EncoderCard) -> Any:
    """Timm's evaluation transform of the export, without the normalisation."""
    timm = import_timm()
    config = timm.data.resolve_data_config(
        pretrained_cfg=timm_config(model, card)["pretrained_cfg"]
    )
    return timm.data.create_transform(**config, is_training=False, normalize=False)


def _prepared(geometry: Any, image: TileImage) -> Tensor:
    prepared: Tensor = geometry(Image.fromarray(image.read()))
    return prepared
