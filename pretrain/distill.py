"""Student and teacher: one forward of both, the losses between them, the teacher's update.

Legend: B samples, V = 2 global views, L local views, S = V + L, C = V · B global crops, N patches a
global crop, M masked patches, K prototypes, D width, Db bottleneck, R rows of the token stream.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from eosin.pretrain.agreement import follow_logits, masked_loss, pairs_loss, scaled_targets
from eosin.pretrain.aside import Aside
from eosin.pretrain.attention import AttentionFn, Packing
from eosin.pretrain.collectives import (
    gather_rows,
    lse_over_ranks,
    max_over_ranks,
    sum_over_ranks,
)
from eosin.pretrain.compiled import compile_forward
from eosin.pretrain.crop_rows import CropRows, crop_rows
from eosin.pretrain.diagnostics import PrototypeUse
from eosin.pretrain.drop_path import DropPath
from eosin.pretrain.ema import update_teacher
from eosin.pretrain.frozen_teacher import FrozenTeacher
from eosin.pretrain.gram import gram_loss
from eosin.pretrain.heads import PrototypeHead
from eosin.pretrain.initialise import materialise
from eosin.pretrain.jepa import jepa_loss
from eosin.pretrain.local_part import local
from eosin.pretrain.network import Encoded, HeadLogits, Logits, Network, ObjectiveConfig
from eosin.pretrain.positions import Jitter
from eosin.pretrain.prototype_kernels import LossKernels
from eosin.pretrain.spread import spread_loss, spread_of
from eosin.pretrain.targets import Outputs, Targets, Taught
from eosin.pretrain.vit import VitConfig
from eosin.pretrain.watched_pair import WatchedPair


class Losses(NamedTuple):
    """The terms as they enter the optimised sum, and that sum; scalars, fp32."""

    total: Tensor
    dino_global: Tensor
    dino_local: Tensor
    ibot: Tensor
    jepa: Tensor
    spread: Tensor
    gram: Tensor


class StepRates(NamedTuple):
    """What the schedules give the objective for one step."""

    temperature: float
    """Of the teacher."""
    spread: float = 1.0
    """Factor on the spread term's weight."""
    gram: bool = False
    """Whether the Gram term is on."""


class Distiller(WatchedPair):
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
        frozen: teachers that never change, in the place of the moving average; the student has
            heads for each, and the losses are means over them.
        masked: whether patches are hidden from the student.
    """

    student: Network
    teacher: Network

    def __init__(
        self,
        model: VitConfig,
        objective: ObjectiveConfig,
        attention: AttentionFn,
        kernels: LossKernels,
        group_size: int,
        seed: int,
        ranks: dist.ProcessGroup | None = None,
        frozen: Sequence[FrozenTeacher] = (),
        masked: bool = True,
    ) -> None:
        super().__init__()
        self.frozen, self._masked = nn.ModuleList(frozen), masked
        self.objective, self.kernels, self.group_size = objective, kernels, group_size
        self._lse_over_ranks = None if ranks is None else lse_over_ranks(ranks)
        self._gather_rows, self._max_over_ranks = gather_rows(ranks), max_over_ranks(ranks)
        self._sum_over_ranks, self._ranks = sum_over_ranks(ranks), ranks
        self._rank = 0 if ranks is None else ranks.rank()
        self._spread_of, self._jepa_loss, self._gram_loss = spread_of, jepa_loss, gram_loss
        further = [teacher.heads_for(objective) for teacher in frozen[1:]]
        self.student = materialise(lambda: Network(model, objective, attention, further), seed)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        if objective.jepa.weight > 0:
            del self.teacher.predictor
        if further:
            del self.teacher.further
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
        taught: Sequence[Taught] | None = None,
    ) -> tuple[Losses, Outputs]:
        """Losses of one step, or of a part of its samples.

        Args:
            global_crops: normalised [V, B, 3, H, W]; the teacher sees them whole, the student
                masked.
            local_crops: normalised [L, B, 3, h, w]; L may be 0.
            masks: which global patches the student does not see, bool [C, N], view-major.
            rates: of the step.
            drop: the student's stochastic depth.
            jitter: of the student's rotary positions.
            taught: what `teach` made of these crops, of each teacher, where they are a part of a
                step.
        """
        o = self.objective
        views, batch = global_crops.shape[:2]
        n_crops = views * batch
        crops = [global_crops.flatten(0, 1)]
        if len(local_crops):
            crops.append(local_crops.flatten(0, 1))
        rows = self._rows(crops, masks)
        aside = Aside(crops[0].device if self._ranks is not None else None)
        if taught is None:
            encoded = self._encode(crops[0], rows)
            with aside:
                taught = [self._targets([of], rates.temperature)[0] for of in encoded]
        hidden = rows.mask if self._masked else None
        student: Encoded = self.student(
            crops, hidden, rows.student, rows.masked, drop, batch, jitter
        )
        aside.join()
        zero = student.cls.new_zeros((), dtype=torch.float32)
        dino_global = dino_local = ibot = jepa = spread = gram = zero
        share = 1 / len(taught)
        for said, told in zip(student.said, taught, strict=True):
            if said.cls is not None and told.cls is not None:
                pairs = pairs_loss(
                    said.cls, told.cls, views, len(local_crops), batch, o.local_weight, self.kernels
                )  # [S]
                dino_global = dino_global + share * o.dino * pairs[:views].sum()
                dino_local = dino_local + share * o.dino * pairs[views:].sum()
            if said.masked is not None and told.masked is not None:
                patches = masked_loss(said.masked, told.masked, rows.weights, self.kernels)
                ibot = ibot + share * o.ibot * patches
        if o.jepa.weight > 0:
            assert student.predicted is not None and taught[0].patches is not None
            jepa = o.jepa.weight * self._jepa_loss(
                student.predicted, taught[0].patches, rows.mask, n_crops, o.jepa
            )
        if o.spread.weight > 0 and rates.spread > 0:
            features = student.cls[:n_crops].unflatten(0, (views, batch))
            terms = [
                spread_loss(
                    view, o.spread, self.group_size, self._gather_rows, self._rank, self._spread_of
                )
                for view in features
            ]
            spread = o.spread.weight * rates.spread * torch.stack(terms).sum()
        if o.gram.weight > 0 and rates.gram:
            assert student.patches is not None
            with torch.no_grad():
                anchor = self.gram_teacher([crops[0]])[0].patches
            gram = o.gram.weight * self._gram_loss(student.patches, anchor, o.gram, rows.mask)
        total = dino_global + dino_local + ibot + jepa + spread + gram
        losses = Losses(total, dino_global, dino_local, ibot, jepa, spread, gram)
        seen = None
        if student.cls_logits is not None:
            x, prototypes = student.cls_logits
            seen = Logits(x[:n_crops].detach(), prototypes.detach())
        return losses, Outputs(taught[0].features, taught[0].cls, taught[0].masked, seen)

    def networks(self) -> list[Network]:
        """The student, its moving average, and the frozen teachers."""
        return [self.student, self.teacher, *(frozen.network for frozen in self._frozen())]

    def units(self) -> list[tuple[nn.Module, list[nn.Module]]]:
        """See `Pair`: a block, a head, the predictor."""
        roots: list[tuple[nn.Module, list[nn.Module]]] = [
            (network, [*network.backbone.blocks, *network.on_top()]) for network in self.networks()
        ]
        if hasattr(self, "gram_teacher"):
            roots.append((self.gram_teacher, list(self.gram_teacher.blocks)))
        return roots

    def _frozen(self) -> list[FrozenTeacher]:
        return [of for of in self.frozen if isinstance(of, FrozenTeacher)]

    def _rows(self, crops: Sequence[Tensor], masks: NDArray[np.bool_]) -> CropRows:
        """Where the losses read the streams of the teachers and of the student."""
        patch_px = self.student.backbone.config.patch_px
        cells = [(len(c), c.shape[2] // patch_px, c.shape[3] // patch_px) for c in crops]
        networks = [self.student, *(self.networks()[2:] or [self.teacher])]
        prefixes = [network.backbone.config.prefix for network in networks]
        groups = [cells, *[cells[:1]] * (len(networks) - 1)]
        student, *teachers = (
            Packing(tuple((n, prefix + h * w) for n, h, w in group))
            for group, prefix in zip(groups, prefixes, strict=True)
        )
        patches = self.objective.patches
        return crop_rows(masks, student, teachers, prefixes, patches, crops[0].device)

    @torch.no_grad()
    def _encode(self, crops: Tensor, rows: CropRows) -> list[Encoded]:
        """Each teacher's tokens and logits of whole global crops [C, 3, H, W]."""
        if not self.frozen:
            return [self.teacher([crops], None, rows.teachers[0], rows.masked)]
        patch_px = self.student.backbone.config.patch_px
        return [
            frozen.network([frozen.show(crops, patch_px)], None, wanted, rows.masked)
            for frozen, wanted in zip(self._frozen(), rows.teachers, strict=True)
        ]

    def teach(
        self, parts: Sequence[tuple[Tensor, NDArray[np.bool_]]], temperature: float
    ) -> list[tuple[Taught, ...]]:
        """The teachers' side of a step whose samples are taken in parts: of a part, of each one.

        Targets are those of all parts together, so losses of the parts, averaged, are those of the
        step.

        Args:
            parts: global crops [V, b, 3, H, W] and masks bool [V · b, N] of each.
            temperature: of the teacher.
        """
        encoded = []
        for global_crops, masks in parts:
            crops = global_crops.flatten(0, 1)
            encoded.append(self._encode(crops, self._rows([crops], masks)))
        of_each = [self._targets(told, temperature) for told in zip(*encoded, strict=True)]
        return list(zip(*of_each, strict=True))

    @torch.no_grad()
    def _targets(self, parts: Sequence[Encoded], temperature: float) -> list[Taught]:
        """Targets of one teacher for the parts of a step, scaled together."""
        logits = [HeadLogits(part.cls_logits, part.patch_logits) for part in parts]
        centres = {
            name: getattr(self, f"{name}_centre")
            for name in ("cls", "masked")
            if hasattr(self, f"{name}_centre")
        }
        made = scaled_targets(
            logits, self.objective, temperature, self.kernels, centres, self._lse_over_ranks
        )
        return [Taught(p.cls, *targets, p.patches) for p, targets in zip(parts, made, strict=True)]

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
                follow_logits(
                    getattr(self, f"{name}_centre"), targets.logits,
                    self.objective.centre_momentum, self._sum_over_ranks, bad,
                )  # fmt: skip

    @torch.no_grad()
    def refresh_gram_teacher(self) -> None:
        """The Gram teacher becomes a copy of the teacher."""
        current = self.teacher.backbone.state_dict()
        for name, tensor in self.gram_teacher.state_dict().items():
            local(tensor).copy_(local(current[name]))

    def compile(self, backend: str = "inductor") -> None:
        """Compiles blocks, the heads' MLPs and losses, each to a graph, when it first runs.

        Args:
            backend: as in `Vit.compile_blocks`.
        """
        for network in self.networks():
            network.backbone.compile_blocks(backend)
            for part in network.modules():
                if isinstance(part, PrototypeHead):
                    compile_forward(part.mlp, dynamic=True, backend=backend)
        if hasattr(self.student, "predictor"):
            compile_forward(self.student.predictor, dynamic=False, backend=backend)
        if hasattr(self, "gram_teacher"):
            self.gram_teacher.compile_blocks(backend)
        self._spread_of, self._jepa_loss, self._gram_loss = (
            torch.compile(loss, fullgraph=True, dynamic=False, backend=backend)
            for loss in (spread_of, jepa_loss, gram_loss)
        )  # those over prototypes have kernels of their own
