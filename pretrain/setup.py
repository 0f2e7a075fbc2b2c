"""A training, put together on one rank: networks on their device, laid out, with an optimiser."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from eosin.launch.process import World, device_memory
from eosin.pretrain.attention import choose_attention
from eosin.pretrain.backbone_weights import load_backbone
from eosin.pretrain.batch import Batch
from eosin.pretrain.checkpoint import list_checkpoints
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.distill import Distiller
from eosin.pretrain.frozen_teacher import check_grids, keep_to_teachers, load_frozen_teachers
from eosin.pretrain.local_part import whole_state
from eosin.pretrain.optim import build_optimizer
from eosin.pretrain.parallel import Layout, choose_parallel
from eosin.pretrain.prototype_kernels import choose_kernels
from eosin.pretrain.rate import flops_counter
from eosin.pretrain.start import freeze, start_from
from eosin.pretrain.trained import trained_tensors
from eosin.pretrain.vit import Vit


@dataclass(frozen=True)
class Training:
    """What the loop works on."""

    config: PretrainConfig
    world: World
    device: torch.device
    dtype: torch.dtype
    """Of the products."""
    model: Distiller
    layout: Layout
    optimizer: torch.optim.AdamW
    choices: str
    """What was chosen for this hardware, in words."""

    @property
    def whole_teacher(self) -> Vit:
        """The teacher's backbone with all its weights: a copy where they lie in shards."""
        backbone = self.model.teacher.backbone
        if self.layout.over_shards is None:
            return backbone
        with torch.device("meta"):
            copy = Vit(self.config.model, backbone.attention_kernel)
        state = whole_state(backbone)
        copy.load_state_dict({k: v.to(self.device) for k, v in state.items()}, assign=True)
        return copy.requires_grad_(False).eval()

    @cached_property
    def flops_of(self) -> Callable[[Batch], float]:
        """Operations of a batch."""
        return flops_counter(self.config)

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes, by name; they share the memory of what is trained."""
        return trained_tensors(self.model, self.model.student, self.optimizer)


def set_up(
    config: PretrainConfig, device: torch.device, dtype: torch.dtype, world: World | None = None
) -> Training:
    """Student and teacher on the device, with the kernels and the layout that suit it.

    Raises:
        ConfigError: a choice that this hardware, or this number of processes, does not allow.
    """
    world = world or World()
    attention = choose_attention(config.attention, device, dtype)
    kernels = choose_kernels(config.loss_kernels, device, dtype)
    frozen = load_frozen_teachers(
        config.teacher, config.objective, config.mean, config.std, attention
    )
    if frozen:
        world.tell("; ".join(check_grids(config.model, teacher) for teacher in frozen))
        keep_to_teachers(config.out, frozen, world)
    model = Distiller(
        config.model, config.objective, attention, kernels, config.group, config.seed, world.group,
        frozen, masked=not frozen or config.teacher.masked,
    )  # fmt: skip
    if config.start.given and not list_checkpoints(config.out / "checkpoints"):
        world.tell(start_from(model, config.start, config.model))
    if config.objective.gram.frozen_from is not None and config.objective.gram.weight > 0:
        world.tell(load_backbone(model.gram_teacher, config.objective.gram.frozen_from))
    freeze(
        model.student, config.start.train_blocks, config.model.depth, config.model.low_rank,
        masked=not frozen or config.teacher.masked,
    )  # fmt: skip
    model.to(device)
    model.student.backbone.recompute(config.recompute)
    compiled = config.compile == "blocks" or (config.compile == "auto" and device.type == "cuda")
    if compiled:
        model.compile()
    parameters = sum(p.numel() for p in model.student.parameters())
    name = choose_parallel(config.parallel, world, parameters, device_memory(device))
    layout = Layout(model, name, world, dtype, config.shard_ranks)
    optimizer = build_optimizer(model.student, config.model.depth, config.optim)
    names = [device.type, str(dtype), attention.__name__, type(kernels).__name__]
    names.append("compiled" if compiled else "eager")
    if world.size > 1:
        names.append(f"{name} over {world.size} ranks")
    return Training(config, world, device, dtype, model, layout, optimizer, ", ".join(names))
