"""AdamW as DINOv2 sets it up: layer-wise decay, no decay of biases, clipping per module."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from eosin.pretrain.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser and its schedules."""

    lr: Schedule = field(default_factory=lambda: Schedule(peak=1e-3, end=1e-6, warmup=0.1))
    """Learning rate at `lr_reference_batch`."""
    lr_reference_batch: int = 0
    """The rate is scaled by sqrt(batch_size / this), as DINOv2 does with 1024; 0: not scaled."""
    weight_decay: Schedule = field(default_factory=lambda: Schedule(peak=0.04, end=0.4, start=0.04))
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's two moments."""
    layer_decay: float = 0.9
    """Factor on the learning rate from one block to the one below it."""
    patch_embed_lr: float = 0.2
    """Factor on the patch embedding's learning rate, on top of the layer's."""
    clip_norm: float = 3.0
    """Largest gradient norm of each module (backbone, each head)."""
    freeze_last_layer: float = 0.01
    """Share of all steps in which the heads' prototypes do not move."""

    def __post_init__(self) -> None:
        """Refuses values that AdamW cannot take."""
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must lie in [0, 1)")
        for name in ("lr_reference_batch", "layer_decay", "patch_embed_lr", "freeze_last_layer"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.clip_norm <= 0:
            raise ValueError(f"clip_norm={self.clip_norm} must be positive")


@dataclass(frozen=True)
class GroupKey:
    """What parameters of one optimiser group have in common."""

    lr_factor: float
    decays: bool
    last_layer: bool


def group_key(name: str, depth: int, config: OptimConfig) -> GroupKey:
    """The group of the student's parameter `name`, e.g. ``backbone.blocks.3.norm1.bias``.

    Layer ids are DINOv2's: 0 for tokens, positions and patch embedding, i + 1 for block i,
    depth + 1 for the final norm and the heads. Biases, norms and LayerScale do not decay; tokens
    and positions do, as in DINOv2.
    """
    layer = depth + 1
    block = re.match(r"backbone\.blocks\.(\d+)\.", name)
    if block:
        layer = int(block[1]) + 1
    elif name.startswith("backbone.") and not name.startswith("backbone.norm."):
        layer = 0
    factor = config.layer_decay ** (depth + 1 - layer)
    if name.startswith("backbone.patch_embed."):
        factor *= config.patch_embed_lr
    exempt = name.endswith((".bias", ".gamma")) or ".norm" in name
    return GroupKey(factor, not exempt, ".last_" in name)


def build_optimizer(student: nn.Module, depth: int, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the student's parameters, one group per `GroupKey`."""
    members: dict[GroupKey, list[Tensor]] = {}
    for name, parameter in student.named_parameters():
        members.setdefault(group_key(name, depth, config), []).append(parameter)
    groups = [{"params": params, "key": key} for key, params in members.items()]
    fused = all(p.is_cuda for p in student.parameters())
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=fused or None)


def set_rates(
    optimizer: torch.optim.Optimizer, lr: float, weight_decay: float, *, freeze_last: bool
) -> None:
    """Sets every group's learning rate and weight decay for the coming step."""
    for group in optimizer.param_groups:
        key: GroupKey = group["key"]
        group["lr"] = 0.0 if key.last_layer and freeze_last else lr * key.lr_factor
        group["weight_decay"] = weight_decay if key.decays else 0.0


def clip_gradients(modules: Iterable[nn.Module], max_norm: float) -> Tensor:
    """Scales each module's gradient to at most `max_norm`; returns the norms before, [modules]."""
    return torch.stack([nn.utils.clip_grad_norm_(list(m.parameters()), max_norm) for m in modules])
