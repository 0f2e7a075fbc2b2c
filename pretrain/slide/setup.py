"""A training of a slide encoder, put together on one rank."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eosin.launch.process import World
from eosin.pretrain.attention import choose_attention
from eosin.pretrain.checkpoint import list_checkpoints
from eosin.pretrain.optim import build_optimizer
from eosin.pretrain.parallel import Layout, choose_parallel
from eosin.pretrain.prototype_kernels import choose_kernels
from eosin.pretrain.slide.config import SlideConfig
from eosin.pretrain.slide.data import SlideData
from eosin.pretrain.slide.encoder import SourceShape
from eosin.pretrain.slide.flops import batch_flops
from eosin.pretrain.slide.learner import SlideLearner
from eosin.pretrain.slide.start import start_from
from eosin.pretrain.trained import trained_tensors


@dataclass(frozen=True)
class SlideTraining:
    """What the loop works on; see `trained.Trained`."""

    config: SlideConfig
    world: World
    device: torch.device
    dtype: torch.dtype
    model: SlideLearner
    layout: Layout
    optimizer: torch.optim.AdamW
    choices: str

    @property
    def flops_of(self) -> Callable[[Any], float] | None:
        """Operations of a batch."""
        dims = [source.dim for source in self.model.student.backbone.sources]
        return partial(batch_flops, self.config, dims)

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes, by name; they share the memory of what is trained."""
        return trained_tensors(self.model, self.model.student, self.optimizer)


def set_up(
    config: SlideConfig,
    data: SlideData,
    device: torch.device,
    dtype: torch.dtype,
    world: World | None = None,
) -> SlideTraining:
    """Student and teacher on the device.

    Raises:
        ConfigError: a choice that this hardware, or this number of processes, does not allow.
        InputError: the weights to start from are another network's.
    """
    world = world or World()
    attention = choose_attention(config.attention, device, dtype)
    kernels = choose_kernels(config.loss_kernels, device, dtype)
    sources = data.sources.sources
    model = SlideLearner(
        config.model,
        config.objective,
        [SourceShape(source.name, source.dim) for source in sources],
        {} if data.paired is None else data.paired.dims,
        () if data.labels is None else data.labels.tasks,
        attention,
        kernels,
        config.group,
        config.seed,
        world.group,
    )
    if config.model.standardise:
        for number in range(len(sources)):
            model.standardise(number, *data.sources.statistics(number))
    if config.start.given and not list_checkpoints(config.out / "checkpoints"):
        world.tell(start_from(model, config.start))
    model.to(device)
    model.student.backbone.recompute(config.recompute)
    parameters = sum(p.numel() for p in model.student.parameters())
    name = choose_parallel(config.parallel, world, parameters, None)
    layout = Layout(model, name, world, dtype)
    optimizer = build_optimizer(model.student, config.model.depth, config.optim)
    names = [device.type, str(dtype), config.model.position, attention.__name__]
    names.append(f"{parameters / 1e6:.1f} M parameters with heads")
    if world.size > 1:
        names.append(f"{name} over {world.size} ranks")
    return SlideTraining(config, world, device, dtype, model, layout, optimizer, ", ".join(names))
