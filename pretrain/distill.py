"""Student and teacher: one forward of both, the losses between them, the teacher's update.

Legend: B samples, V = 2 global views, L local views, M masked patches, K prototypes, D width.
"""

import copy
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eosin.pretrain.attention import AttentionFn
from eosin.pretrain.drop_path import DropPath
from eosin.pretrain.heads import HeadConfig, PrototypeHead
from eosin.pretrain.losses import dino_pairs, ibot_loss, koleo_loss, sinkhorn_targets
from eosin.pretrain.vit import Vit, VitConfig


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Which losses, how much of each, and the heads they act on (DINOv2, arXiv 2304.07193)."""

    dino: float = 1.0
    """Weight of the CLS cross-entropy over pairs of views; 0 turns it off."""
    ibot: float = 1.0
    """Weight of the masked-patch cross-entropy; 0 turns it off."""
    koleo: float = 0.1
    """Weight of the spread of the student's CLS features; 0 turns it off."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """The DINO head, and the iBOT head when they are shared."""
    separate_heads: bool = False
    """A second head of the same kind for the masked patches."""

    def __post_init__(self) -> None:
        """Refuses an objective without a term that trains the teacher's targets."""
        if self.dino <= 0 and self.ibot <= 0:
            raise ValueError("dino=0 and ibot=0 leave nothing to learn; give one of them a weight")


class Network(nn.Module):
    """Backbone and heads; the student and the teacher are one each."""

    def __init__(
        self, model: VitConfig, objective: ObjectiveConfig, attention: AttentionFn
    ) -> None:
        super().__init__()
        self.backbone = Vit(model, attention)
        self.head = PrototypeHead(model.width, objective.head)
        if objective.separate_heads:
            self.patch_head = PrototypeHead(model.width, objective.head)

    def initialise(self, seed: int) -> None:
        """Draws all weights from `seed`, on the CPU's generator, alike on every machine."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.children():
            assert isinstance(module, Vit | PrototypeHead)
            module.initialise(generator)

    def patch_logits(self, patches: Tensor) -> Tensor:  # [M, D] → [M, K]
        """Logits of patch tokens, by their own head where there is one."""
        out: Tensor = getattr(self, "patch_head", self.head)(patches)
        return out


class Losses(NamedTuple):
    """The terms as they enter the optimised sum, and that sum; scalars, fp32."""

    total: Tensor
    dino_global: Tensor
    dino_local: Tensor
    ibot: Tensor
    koleo: Tensor


class Outputs(NamedTuple):
    """What the health figures are computed from; no gradients."""

    teacher_cls: Tensor  # [V · B, D]
    targets: Tensor  # [V, B, K]
    student_logits: Tensor  # [V, B, K]


class Distiller(nn.Module):
    """A student that learns to agree with its own moving average."""

    def __init__(
        self, model: VitConfig, objective: ObjectiveConfig, attention: AttentionFn, seed: int
    ) -> None:
        super().__init__()
        self.objective = objective
        self.student = Network(model, objective, attention)
        self.student.initialise(seed)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()

    def forward(
        self,
        global_crops: Tensor,
        local_crops: Tensor,
        masks: NDArray[np.bool_],
        temperature: float,
        drop: DropPath | None,
    ) -> tuple[Losses, Outputs]:
        """Losses of one step.

        Args:
            global_crops: normalised [V, B, 3, H, W]; the teacher sees them whole, the student
                masked.
            local_crops: normalised [L, B, 3, h, w]; L may be 0.
            masks: which global patches the student does not see, bool [V · B, N], view-major.
            temperature: of the teacher.
            drop: the student's stochastic depth.
        """
        views, batch = global_crops.shape[:2]
        device = global_crops.device
        mask = torch.from_numpy(masks)
        masked_rows = mask.flatten().nonzero().squeeze(1).to(device)  # [M], found on the host
        per_crop = mask.sum(dim=1).clamp(min=1)
        weights = (1.0 / per_crop)[mask.nonzero()[:, 0]].to(device)  # [M]

        with torch.no_grad():
            teacher_out = self.teacher.backbone([global_crops.flatten(0, 1)])[0]
            targets = sinkhorn_targets(self.teacher.head(teacher_out.cls), temperature)  # [V·B, K]
            patches = teacher_out.patches.flatten(0, 1)[masked_rows]  # [M, D]
            patch_targets = sinkhorn_targets(self.teacher.patch_logits(patches), temperature)

        crops = [global_crops.flatten(0, 1)]
        if len(local_crops):
            crops.append(local_crops.flatten(0, 1))
        out = self.student.backbone(
            crops, masks=[mask.to(device), *[None] * (len(crops) - 1)], drop=drop, batch=batch
        )
        logits = self.student.head(torch.cat([o.cls for o in out]))  # [(V + L)·B, K]
        logits = logits.unflatten(0, (-1, batch))  # [V + L, B, K]
        patch_logits = self.student.patch_logits(out[0].patches.flatten(0, 1)[masked_rows])

        targets = targets.unflatten(0, (views, batch))  # [V, B, K]
        pairs = dino_pairs(logits, targets)  # [V + L, V]
        # Every pair of different views weighs the same: 1/18 with 8 local crops (DINOv2).
        n_pairs = views * (views - 1) + len(local_crops) * views
        weight = self.objective.dino / n_pairs
        different = 1 - torch.eye(views, device=device)
        dino_global = weight * (pairs[:views] * different).sum()
        dino_local = weight * pairs[views:].sum()
        ibot = self.objective.ibot * ibot_loss(patch_logits, patch_targets, weights, views * batch)
        spread = torch.stack([koleo_loss(view) for view in out[0].cls.unflatten(0, (views, batch))])
        koleo = self.objective.koleo * spread.sum()
        losses = Losses(
            dino_global + dino_local + ibot + koleo, dino_global, dino_local, ibot, koleo
        )
        return losses, Outputs(teacher_out.cls, targets, logits[:views].detach())

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Teacher ← momentum · teacher + (1 - momentum) · student, every parameter, in fp32."""
        torch._foreach_lerp_(
            list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum
        )
