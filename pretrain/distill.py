"""Student and teacher: one forward of both, the losses between them, the teacher's update.

Legend: B samples, V = 2 global views, L local views, S = V + L, C = V · B global crops, N patches a
global crop, M masked patches, K prototypes, D width, Db bottleneck, R rows of the token stream.
"""

import copy
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from eosin.pretrain.attention import AttentionFn
from eosin.pretrain.collectives import gather_rows, lse_over_ranks, sum_over_ranks
from eosin.pretrain.crop_rows import CropRows, crop_rows
from eosin.pretrain.diagnostics import Measured, PrototypeUse, Window, measure_health
from eosin.pretrain.drop_path import DropPath
from eosin.pretrain.ema import follow, update_teacher
from eosin.pretrain.gram import gram_loss
from eosin.pretrain.initialise import materialise
from eosin.pretrain.jepa import jepa_loss
from eosin.pretrain.network import Network, ObjectiveConfig
from eosin.pretrain.positions import Jitter
from eosin.pretrain.prototype_kernels import LossKernels
from eosin.pretrain.prototype_loss import (
    Scaling,
    TargetFigures,
    centred_scaling,
    mean_logits,
    prototype_cross_entropy,
    sinkhorn_scaling,
    strongest_prototype,
    target_figures,
)
from eosin.pretrain.spread import spread_loss
from eosin.pretrain.vit import VitConfig


class Losses(NamedTuple):
    """The terms as they enter the optimised sum, and that sum; scalars, fp32."""

    total: Tensor
    dino_global: Tensor
    dino_local: Tensor
    ibot: Tensor
    jepa: Tensor
    spread: Tensor
    gram: Tensor


class Logits(NamedTuple):
    """What M × K logits are the product of."""

    x: Tensor  # [M, Db], unit length
    prototypes: Tensor  # [K, Db]


class Targets(NamedTuple):
    """The teacher's side of one cross-entropy: its logits, scaled to targets; no M × K tensor."""

    logits: Logits
    scaling: Scaling


class Outputs(NamedTuple):
    """What the health figures and the moving centres are computed from; no gradients."""

    features: Tensor  # the teacher's CLS [C, D]
    cls: Targets | None
    masked: Targets | None
    student: Logits | None  # of the global crops' CLS tokens, M = C


class StepRates(NamedTuple):
    """What the schedules give the objective for one step."""

    temperature: float
    """Of the teacher."""
    spread: float = 1.0
    """Factor on the spread term's weight."""
    gram: bool = False
    """Whether the Gram term is on."""


class _Teacher(NamedTuple):
    """What the teacher says of the global crops."""

    features: Tensor  # CLS [C, D]
    cls: Targets | None
    masked: Targets | None
    patches: Tensor | None  # [C, N, D], where a loss needs all of them


class Distiller(nn.Module):
    """A student that learns to agree with its own moving average.

    Args:
        model: the encoder.
        objective: the losses.
        attention: of `attention.choose_attention`.
        kernels: of `prototype_kernels.choose_kernels`.
        group_size: samples that a spread over groups is taken among.
        seed: of the weights.
        ranks: that share a batch, each with as many samples; None for one process. Losses and
            gradients averaged over them are those of one process with the whole batch.
    """

    def __init__(
        self,
        model: VitConfig,
        objective: ObjectiveConfig,
        attention: AttentionFn,
        kernels: LossKernels,
        group_size: int,
        seed: int,
        ranks: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.objective, self.kernels, self.group_size = objective, kernels, group_size
        self._lse_over_ranks, self._gather_rows = lse_over_ranks(ranks), gather_rows(ranks)
        self._sum_over_ranks = sum_over_ranks(ranks)
        self.student = materialise(lambda: Network(model, objective, attention), seed)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        if objective.jepa.weight > 0:
            del self.teacher.predictor
        if objective.gram.weight > 0:
            self.gram_teacher = copy.deepcopy(self.teacher.backbone)
        if objective.dino > 0:
            self.use = PrototypeUse(objective.head.prototypes)
            if objective.targets == "centre":
                self.register_buffer("cls_centre", torch.zeros(objective.head.prototypes))
        if objective.ibot > 0 and objective.targets == "centre":
            head = getattr(self.teacher, objective.patch_head_name)
            self.register_buffer("masked_centre", torch.zeros(head.config.prototypes))

    def forward(
        self,
        global_crops: Tensor,
        local_crops: Tensor,
        masks: NDArray[np.bool_],
        rates: StepRates,
        drop: DropPath | None = None,
        jitter: Jitter | None = None,
    ) -> tuple[Losses, Outputs]:
        """Losses of one step.

        Args:
            global_crops: normalised [V, B, 3, H, W]; the teacher sees them whole, the student
                masked.
            local_crops: normalised [L, B, 3, h, w]; L may be 0.
            masks: which global patches the student does not see, bool [C, N], view-major.
            rates: of the step.
            drop: the student's stochastic depth.
            jitter: of the student's rotary positions.
        """
        o, body = self.objective, self.student.backbone
        views, batch = global_crops.shape[:2]
        n_crops, n_local = views * batch, len(local_crops) * batch
        crops = [global_crops.flatten(0, 1), *([local_crops.flatten(0, 1)] if n_local else [])]
        seen, stream = (
            body.packing([(len(c), *c.shape[2:]) for c in g]) for g in (crops[:1], crops)
        )
        rows = crop_rows(masks, seen, stream, body.config.prefix, o.patches, global_crops.device)
        teacher = self._targets(crops[0], rows, rates.temperature)
        student_masks = [rows.mask, *[None] * (len(crops) - 1)]
        out = body.rows(crops, student_masks, rows.student, drop, batch, jitter)  # [R, D]
        cls, patches = out.tensor_split([n_crops + n_local])
        masked = patches.index_select(0, rows.masked) if o.patches == "all" else patches  # [M, D]

        cls_logits, patch_logits = self._logits(self.student, cls, masked)
        zero = out.new_zeros((), dtype=torch.float32)
        dino_global = dino_local = ibot = jepa = spread = gram = zero
        if cls_logits is not None and teacher.cls is not None:
            pairs = self._pairs(cls_logits, teacher.cls, views, len(local_crops), batch)  # [S]
            dino_global, dino_local = o.dino * pairs[:views].sum(), o.dino * pairs[views:].sum()
        if patch_logits is not None and teacher.masked is not None:
            ibot = o.ibot * self._masked_patches(patch_logits, teacher.masked, rows.weights)
        grid = tuple(side // body.config.patch_px for side in global_crops.shape[-2:])
        every = patches.unflatten(0, (n_crops, -1)) if o.patches == "all" else None  # [C, N, D]
        if o.jepa.weight > 0:
            assert every is not None and teacher.patches is not None
            predicted = self.student.predictor(every, cls[:n_crops], rows.mask, grid)
            jepa = o.jepa.weight * jepa_loss(predicted, teacher.patches, rows.mask, n_crops, o.jepa)
        if o.spread.weight > 0 and rates.spread > 0:
            features = cls[:n_crops].unflatten(0, (views, batch))
            terms = [
                spread_loss(view, o.spread, self.group_size, self._gather_rows) for view in features
            ]
            spread = o.spread.weight * rates.spread * torch.stack(terms).sum()
        if o.gram.weight > 0 and rates.gram:
            assert every is not None
            with torch.no_grad():
                anchor = self.gram_teacher([crops[0]])[0].patches
            gram = o.gram.weight * gram_loss(every, anchor, o.gram, rows.mask)
        total = dino_global + dino_local + ibot + jepa + spread + gram
        losses = Losses(total, dino_global, dino_local, ibot, jepa, spread, gram)
        student = None
        if cls_logits is not None:
            student = Logits(cls_logits.x[:n_crops].detach(), cls_logits.prototypes.detach())
        return losses, Outputs(teacher.features, teacher.cls, teacher.masked, student)

    def _logits(
        self, network: Network, cls: Tensor, masked: Tensor
    ) -> tuple[Logits | None, Logits | None]:
        """Of the CLS tokens and of the masked patches; one pass where they share the head."""
        o = self.objective
        cls_logits = patch_logits = None
        if o.dino > 0 and o.ibot > 0 and not o.separate_heads:
            prototypes = network.head.prototypes()
            x = network.head.bottleneck(torch.cat([cls, masked]))
            return Logits(x[: len(cls)], prototypes), Logits(x[len(cls) :], prototypes)
        if o.dino > 0:
            cls_logits = Logits(network.head.bottleneck(cls), network.head.prototypes())
        if o.ibot > 0:
            head = network.patch_head
            patch_logits = Logits(head.bottleneck(masked), head.prototypes())
        return cls_logits, patch_logits

    @torch.no_grad()
    def _targets(self, crops: Tensor, rows: CropRows, temperature: float) -> _Teacher:
        """The teacher's side of every loss, for the whole global crops [C, 3, H, W]."""
        o = self.objective
        out = self.teacher.backbone.rows([crops], [None], rows.teacher)  # [R, D]
        cls, patches = out.tensor_split([len(crops)])
        masked = patches.index_select(0, rows.masked) if o.patches == "all" else patches
        cls_logits, patch_logits = self._logits(self.teacher, cls, masked)
        return _Teacher(
            features=cls,
            cls=self._scaled(cls_logits, "cls", temperature),
            masked=self._scaled(patch_logits, "masked", temperature),
            patches=patches.unflatten(0, (len(crops), -1)) if o.patches == "all" else None,
        )

    def _scaled(self, logits: Logits | None, name: str, temperature: float) -> Targets | None:
        if logits is None:
            return None
        if self.objective.targets == "sinkhorn":
            scaling = sinkhorn_scaling(
                *logits, temperature, self.kernels, over_ranks=self._lse_over_ranks
            )
        else:
            centre: Tensor = getattr(self, f"{name}_centre")
            scaling = centred_scaling(*logits, centre, temperature, self.kernels)
        return Targets(logits, scaling)

    def _pairs(
        self, student: Logits, teacher: Targets, views: int, n_local: int, batch: int
    ) -> Tensor:
        """Cross-entropies of each student view with the teacher's other views, [S]."""
        # Every pair of different views weighs the same: 1/18 with 8 local crops (DINOv2).
        n_pairs = views * (views - 1) + n_local * views
        mix = student.x.new_ones(views + n_local, views)
        mix[:views].fill_diagonal_(0)
        mix[views:] *= self.objective.local_weight
        return prototype_cross_entropy(
            student.x.unflatten(0, (-1, batch)),
            student.prototypes,
            teacher.logits.x.unflatten(0, (-1, batch)),
            teacher.logits.prototypes,
            teacher.scaling,
            mix / n_pairs,
            student.x.new_full((batch,), 1 / batch),
            kernels=self.kernels,
        )

    def _masked_patches(self, student: Logits, teacher: Targets, weights: Tensor) -> Tensor:
        """iBOT: each masked crop counts alike, over all crops, those without a mask included."""
        return prototype_cross_entropy(
            student.x[None],
            student.prototypes,
            teacher.logits.x[None],
            teacher.logits.prototypes,
            teacher.scaling,
            torch.ones(1, 1, device=student.x.device),
            weights,
            kernels=self.kernels,
        )[0]

    @torch.no_grad()
    def update_teacher(self, outputs: Outputs, momentum: float, bad: Tensor | None = None) -> None:
        """The teacher follows the student, and the centres the teacher's logits.

        Args:
            outputs: of the step.
            momentum: of the teacher's weights.
            bad: 1 to leave everything as it is, fp32 [] on the device.
        """
        update_teacher(self.teacher, self.student, momentum, bad)
        for name in ("cls", "masked") if self.objective.targets == "centre" else ():
            targets: Targets | None = getattr(outputs, name)
            if targets is not None:
                self._follow_logits(getattr(self, f"{name}_centre"), targets.logits, bad)

    def _follow_logits(self, centre: Tensor, logits: Logits, bad: Tensor | None) -> None:
        """Centre ← m · centre + (1 - m) · mean logits over ranks; as it is where none has a row."""
        x = logits.x.float()
        sums = self._sum_over_ranks(torch.cat([x.sum(dim=0), x.new_full((1,), len(x))]))
        mean = mean_logits((sums[:-1] / sums[-1].clamp(min=1))[None], logits.prototypes)
        none = (sums[-1] == 0).float()
        stay = none if bad is None else torch.maximum(bad, none)
        follow([centre], [mean], self.objective.centre_momentum, stay)

    @torch.no_grad()
    def refresh_gram_teacher(self) -> None:
        """The Gram teacher becomes a copy of the teacher."""
        self.gram_teacher.load_state_dict(self.teacher.backbone.state_dict())

    @torch.no_grad()
    def record_use(
        self, step: int, outputs: Outputs, bad: Tensor | None = None
    ) -> TargetFigures | None:
        """Marks the prototypes that the teacher used in a step; the targets' figures."""
        targets = outputs.cls
        if targets is None:
            return None
        found = target_figures(*targets.logits, targets.scaling, self.kernels)
        self.use.record(step, found.strongest, bad)
        return found

    def health(
        self, step: int, outputs: Outputs, found: TargetFigures | None, window_steps: int
    ) -> Measured:
        """Health figures of a step, and of the prototypes used in the steps before it."""
        if found is None or outputs.student is None or outputs.cls is None:
            none = outputs.features.new_empty(0)
            return measure_health(outputs.features, none, none.long(), none.long(), 0)
        window = Window(self.use.used_since(step + 1 - window_steps), min(window_steps, step + 1))
        return measure_health(
            outputs.features,
            found.entropy,
            found.strongest,
            strongest_prototype(*outputs.student, self.kernels),
            len(outputs.cls.logits.prototypes),
            window,
        )

    def compile(self, backend: str = "inductor") -> None:
        """Compiles the blocks and the heads' MLPs, each to a graph of its own, when it first runs.

        Args:
            backend: as in `Vit.compile_blocks`.
        """
        for network in (self.student, self.teacher):
            network.backbone.compile_blocks(backend)
            for name in ("head", "patch_head"):
                if (head := getattr(network, name, None)) is not None:
                    head.mlp.compile(fullgraph=True, dynamic=True, backend=backend)
        if hasattr(self.student, "predictor"):
            self.student.predictor.compile(fullgraph=True, dynamic=False, backend=backend)
        if hasattr(self, "gram_teacher"):
            self.gram_teacher.compile_blocks(backend)
