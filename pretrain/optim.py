"""AdamW as DINOv2 sets it up: layer-wise decay, no decay of biases, clipping per module.

Nothing here waits for the device: the norms stay on it, and a step that must not be taken is left
out by the fused kernel itself.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from eosin.pretrain.collectives import Collective
from eosin.pretrain.local_part import local
from eosin.pretrain.schedules import Schedule

ClipMode = Literal["module", "global"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser and its schedules."""

    lr: Schedule = field(default_factory=lambda: Schedule(peak=1e-3, end=1e-6, warmup=0.1))
    """Learning rate at `lr_reference_batch`."""
    lr_reference_batch: int = 0
    """The peak is scaled by sqrt(batch_size / this), as DINOv2 does with 1024; 0: not scaled."""
    weight_decay: Schedule = field(default_factory=lambda: Schedule(peak=0.04, end=0.4, start=0.04))
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's two moments."""
    eps: float = 1e-8
    """Added to the root of AdamW's second moment."""
    layer_decay: float = 0.9
    """Factor on the learning rate from one block to the one below it."""
    patch_embed_lr: float = 0.2
    """Factor on the patch embedding's learning rate, on top of the layer's."""
    clip: ClipMode = "module"
    """What `clip_norm` bounds: each module's gradient (DINOv2), or that of all of them."""
    clip_norm: float = 3.0
    """Largest gradient norm."""
    freeze_last_layer: float = 0.01
    """Share of all steps in which the heads' prototypes do not move."""

    def __post_init__(self) -> None:
        """Refuses values that AdamW cannot take."""
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must lie in [0, 1)")
        for name in ("lr_reference_batch", "layer_decay", "patch_embed_lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("clip_norm", "eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not 0 <= self.freeze_last_layer <= 1:
            raise ValueError(
                f"freeze_last_layer={self.freeze_last_layer} is a share of all steps, in [0, 1]"
            )

    def last_layer_frozen(self, step: int, total_steps: int) -> bool:
        """Whether the prototypes stay where they are at `step`."""
        return step < self.freeze_last_layer * total_steps


@dataclass(frozen=True)
class GroupKey:
    """What parameters of one optimiser group have in common."""

    lr_factor: float
    decays: bool
    last_layer: bool
    backbone: bool = False


def group_key(name: str, depth: int, config: OptimConfig) -> GroupKey:
    """The group of the student's parameter `name`, e.g. ``backbone.blocks.3.norm1.bias``.

    Layer ids are DINOv2's: 0 for tokens, positions and patch embedding, i + 1 for block i,
    depth + 1 for the final norm, the heads and a predictor, and for the poolings of a slide
    encoder, which count as heads. Biases, norms and LayerScale do not
    decay; tokens, positions and the prototypes' gain do, as in DINOv2.
    """
    layer, in_backbone = depth + 1, name.startswith("backbone.")
    block = re.match(r"backbone\.blocks\.(\d+)\.", name)
    if block:
        layer = int(block[1]) + 1
    elif name.startswith(("backbone.pool.", "backbone.case.")):
        in_backbone = False
    elif in_backbone and not name.startswith("backbone.norm."):
        layer = 0
    factor = config.layer_decay ** (depth + 1 - layer)
    if name.startswith("backbone.patch_embed."):
        factor *= config.patch_embed_lr
    exempt = name.endswith((".bias", ".gamma")) or "norm" in name
    return GroupKey(factor, not exempt, ".last_" in name, in_backbone)


def build_optimizer(student: nn.Module, depth: int, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over what this rank holds of what is trained, one group per `GroupKey`.

    The kernel is the fused one on the CPU too: it leaves out a bad step by itself, and takes a
    third of the time of torch's default there.
    """
    members: dict[GroupKey, list[Tensor]] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        members.setdefault(group_key(name, depth, config), []).append(local(parameter))
    groups = [{"params": params, "key": key} for key, params in members.items()]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)
    for group in optimizer.param_groups:
        for part in group["params"]:  # at once, so that a checkpoint has a place to be loaded to
            optimizer.state[part] = {
                "step": torch.zeros((), device=part.device),
                "exp_avg": torch.zeros_like(part),
                "exp_avg_sq": torch.zeros_like(part),
            }
    return optimizer


def set_rates(
    optimizer: torch.optim.Optimizer,
    lr: float,
    weight_decay: float,
    *,
    freeze_last: bool,
    backbone: float = 1.0,
) -> None:
    """Sets every group's learning rate and weight decay for the coming step.

    Args:
        optimizer: of `build_optimizer`.
        lr: learning rate.
        weight_decay: of the groups that decay.
        freeze_last: whether the prototypes stay where they are.
        backbone: factor on the backbone's learning rate; at 0 it stays where it is.
    """
    for group in optimizer.param_groups:
        key: GroupKey = group["key"]
        factor = key.lr_factor * (backbone if key.backbone else 1.0)
        group["lr"] = 0.0 if key.last_layer and freeze_last else lr * factor
        group["weight_decay"] = weight_decay if key.decays else 0.0


@torch.no_grad()
def clip_gradients(
    modules: Iterable[nn.Module],
    max_norm: float,
    mode: ClipMode = "module",
    over_shards: Collective | None = None,
) -> Tensor:
    """Scales gradients to a norm of at most `max_norm`, without waiting for the device.

    The factor is min(1, max_norm / (norm + 1e-6)). Where a norm is NaN or Inf the gradients it
    scales are spoilt, so the step must be left out (`step_unless_bad`).

    Args:
        modules: the student's parts; parameters without a gradient are passed over.
        max_norm: of each module's gradient, or of all of them together.
        mode: ``module`` or ``global``.
        over_shards: sums over the ranks that hold the parts of one copy; None where each holds all.

    Returns:
        Norms before scaling, one a module in either mode, fp32 [modules].
    """
    parts = [list(module.parameters()) for module in modules]
    gradients = [[local(p.grad) for p in part if p.grad is not None] for part in parts]
    zero = torch.zeros((), device=local(parts[0][0]).device)  # the norm of a part without gradients
    norms = torch.stack(
        [
            torch.linalg.vector_norm(torch.stack(torch._foreach_norm(part))) if part else zero
            for part in gradients
        ]
    )
    if over_shards is not None:
        norms = over_shards(norms.square()).sqrt()
    bounded = norms if mode == "module" else torch.linalg.vector_norm(norms).expand_as(norms)
    factors = (max_norm / (bounded + 1e-6)).clamp(max=1.0)
    for part, factor in zip(gradients, factors.unbind(), strict=True):
        if part:
            torch._foreach_mul_(part, factor)
    return norms


def hand_gradients(student: nn.Module) -> None:
    """Gives what this rank holds of a gradient to what it holds of the parameter.

    A replicated parameter has it already. For a sharded one the optimiser's tensor is its part.
    """
    for parameter in student.parameters():
        part = local(parameter)
        if part is not parameter:
            part.grad = None if parameter.grad is None else local(parameter.grad)


def forget_gradients(student: nn.Module) -> None:
    """Frees the gradients of a step."""
    for parameter in student.parameters():
        parameter.grad = local(parameter).grad = None


def step_unless_bad(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """Takes the optimiser's step, or leaves weights, moments and step counts as they are.

    A fused optimiser decides on the device, by the tensor that torch's gradient scaler gives it
    too; with any other one the host waits for `bad`.

    Args:
        optimizer: with its gradients in place.
        bad: 1 to leave the step out, 0 to take it, fp32 [].
    """
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif not bool(bad):
        optimizer.step()
