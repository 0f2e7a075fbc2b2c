"""Student and teacher of slides: one forward of both, the terms of the loss, the teacher's update.

Legend: B samples, V global views, L local ones, S = V + L, W width, K prototypes.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from eosin.pretrain.agreement import follow_logits, masked_loss, pairs_loss, scaled_targets
from eosin.pretrain.attention import AttentionFn
from eosin.pretrain.collectives import (
    gather_rows,
    lse_over_ranks,
    max_over_ranks,
    sum_over_ranks,
)
from eosin.pretrain.diagnostics import PrototypeUse
from eosin.pretrain.distill import StepRates
from eosin.pretrain.drop_path import DropPath
from eosin.pretrain.ema import update_teacher
from eosin.pretrain.hazards import hazard_loss
from eosin.pretrain.initialise import materialise
from eosin.pretrain.network import Logits
from eosin.pretrain.prototype_kernels import LossKernels
from eosin.pretrain.slide.asked import Asked
from eosin.pretrain.slide.batch import SlideBatch, Vectors
from eosin.pretrain.slide.contrast import contrast
from eosin.pretrain.slide.encoder import Adapter, SlideModelConfig, SourceShape
from eosin.pretrain.slide.labels import Task
from eosin.pretrain.slide.network import SlideEncoded, SlideNetwork
from eosin.pretrain.slide.objective import SlideObjectiveConfig
from eosin.pretrain.spread import spread_loss
from eosin.pretrain.targets import Outputs
from eosin.pretrain.watched_pair import WatchedPair


class SlideLosses(NamedTuple):
    """The terms as they enter the optimised sum, and that sum; scalars, fp32."""

    total: Tensor
    dino_global: Tensor
    dino_local: Tensor
    ibot: Tensor
    spread: Tensor
    regress: Tensor
    contrast: Tensor
    align: Tensor
    labels: Tensor


class SlideLearner(WatchedPair):
    """A slide encoder that learns, and the moving average of it.

    Args:
        model: shape of the encoder.
        objective: the terms.
        sources: of the features.
        paired: width of each modality's vectors.
        tasks: of the labels.
        attention: of the blocks.
        kernels: of the cross-entropies over prototypes.
        group_size: samples that a spread over groups is taken among.
        seed: of the weights.
        ranks: that share a batch, each with as many samples; None for one process. Losses and
            gradients averaged over them are those of one process with the whole batch.
    """

    student: SlideNetwork
    teacher: SlideNetwork

    def __init__(
        self,
        model: SlideModelConfig,
        objective: SlideObjectiveConfig,
        sources: Sequence[SourceShape],
        paired: Mapping[str, int],
        tasks: Sequence[Task],
        attention: AttentionFn,
        kernels: LossKernels,
        group_size: int,
        seed: int,
        ranks: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.objective, self.kernels, self.group_size = objective, kernels, group_size
        self._tasks = tuple(tasks)
        self._lse_over_ranks = None if ranks is None else lse_over_ranks(ranks)
        self._gather_rows, self._max_over_ranks = gather_rows(ranks), max_over_ranks(ranks)
        self._sum_over_ranks = sum_over_ranks(ranks)
        self._rank, self._ranks = (0, 1) if ranks is None else (ranks.rank(), ranks.size())
        outputs = [task.outputs for task in tasks]
        build: Callable[[], SlideNetwork] = lambda: SlideNetwork(  # noqa: E731
            model, objective, sources, paired, outputs, attention
        )
        self.student = materialise(build, seed)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.teacher.forget_student_parts()
        if not objective.hides:
            self.student.backbone.mask_token.requires_grad_(False)
        distil = objective.distil
        if distil is not None and distil.dino > 0:
            self.use = PrototypeUse(distil.head.prototypes)
            if distil.targets == "centre":
                self.register_buffer("cls_centre", torch.zeros(distil.head.prototypes))
        if distil is not None and distil.ibot > 0 and distil.targets == "centre":
            head = getattr(self.teacher.heads, distil.patch_head_name)
            self.register_buffer("masked_centre", torch.zeros(head.config.prototypes))

    def standardise(self, source: int, *figures: NDArray[np.float32]) -> None:
        """Mean and spread of a source's features [D_s], for student and teacher."""
        for network in (self.student, self.teacher):
            network.backbone.standardise(source, *figures)

    def units(self) -> list[tuple[nn.Module, list[nn.Module]]]:
        """See `Pair`."""
        return [
            (network, [*network.backbone.blocks, *network.on_top()])
            for network in (self.student, self.teacher)
        ]

    def forward(
        self, batch: SlideBatch, asked: Asked, rates: StepRates, drop: DropPath | None = None
    ) -> tuple[SlideLosses, Outputs]:
        """Losses of one step.

        Args:
            batch: with its stream, groups, vectors and targets on the device.
            asked: of its hidden tokens.
            rates: of the step.
            drop: the student's stochastic depth.
        """
        o, size, n_global = self.objective, len(batch.rows), batch.n_global
        shape = size, n_global, batch.views
        count = n_global * size
        told: SlideEncoded | None = None
        if o.teaches:
            with torch.no_grad():
                whole = batch.stream.first(batch.global_sequences)
                owner = batch.owner[: batch.global_sequences]
                told = self.teacher(whole, owner, count, asked.rows, None, None, shape)
        student: SlideEncoded = self.student(
            batch.stream, batch.owner, batch.views * size, asked.rows,
            asked.hidden if o.hides else None, drop, shape,
        )  # fmt: skip
        zero = student.vectors.new_zeros(())
        dino_global = dino_local = ibot = spread = regress = views = align = labels = zero
        outputs = Outputs(student.vectors[:count].detach(), None, None, None)
        if o.distil is not None:
            assert told is not None
            dino_global, dino_local, ibot, outputs = self._distil(
                student, told, asked, rates, shape
            )
            if o.distil.spread.weight > 0 and rates.spread > 0:
                terms = [
                    spread_loss(
                        view, o.distil.spread, self.group_size, self._gather_rows, self._rank
                    )
                    for view in student.vectors[:count].unflatten(0, (n_global, size))
                ]
                spread = o.distil.spread.weight * rates.spread * torch.stack(terms).sum()
        if o.regress is not None:
            regress = o.regress.weight * self._regress(student, batch, asked)
        if o.contrast is not None:
            views = o.contrast.weight * self._contrast(student, told, batch)
        if o.align is not None:
            align = o.align.weight * self._align(student, batch)
        if o.labels is not None:
            labels = o.labels.weight * self._label(student, batch)
        if not (o.contrast or o.align or o.labels or (o.distil and o.distil.dino)):
            # no term reads the vectors; replicas still want a gradient of what they are made by
            regress = regress + 0 * student.vectors.sum()
        terms = [dino_global, dino_local, ibot, spread, regress, views, align, labels]
        return SlideLosses(torch.stack(terms).sum(), *terms), outputs

    def _distil(
        self,
        student: SlideEncoded,
        told: SlideEncoded,
        asked: Asked,
        rates: StepRates,
        shape: tuple[int, int, int],
    ) -> tuple[Tensor, Tensor, Tensor, Outputs]:
        """DINO of pairs of views, iBOT of hidden tokens."""
        o = self.objective.distil
        assert o is not None and student.logits is not None and told.logits is not None
        size, n_global, views = shape
        centres = {
            name: getattr(self, f"{name}_centre")
            for name in ("cls", "masked")
            if hasattr(self, f"{name}_centre")
        }
        [targets] = scaled_targets(
            [told.logits], o, rates.temperature, self.kernels, centres, self._lse_over_ranks
        )
        zero = student.vectors.new_zeros(())
        dino_global = dino_local = ibot = zero
        said, seen = student.logits, None
        if said.cls is not None and targets.cls is not None:
            pairs = pairs_loss(
                said.cls, targets.cls, n_global, views - n_global, size, o.local_weight,
                self.kernels,
            )  # fmt: skip
            dino_global, dino_local = (
                o.dino * pairs[:n_global].sum(),
                o.dino * pairs[n_global:].sum(),
            )
            seen = Logits(said.cls.x[: n_global * size].detach(), said.cls.prototypes.detach())
        if said.masked is not None and targets.masked is not None:
            ibot = o.ibot * masked_loss(
                said.masked, targets.masked, asked.joint_weights, self.kernels
            )
        outputs = Outputs(told.vectors, targets.cls, targets.masked, seen)
        return dino_global, dino_local, ibot, outputs

    def _regress(self, student: SlideEncoded, batch: SlideBatch, asked: Asked) -> Tensor:
        """Predicted features of hidden tokens against their own, standardised."""
        o = self.objective.regress
        assert o is not None
        total = student.vectors.new_zeros(())
        for number, predicted in enumerate(student.predicted):
            adapter = self.student.backbone.adapters[number]
            assert isinstance(adapter, Adapter)
            features = batch.stream.features[number].index_select(0, asked.features[number])
            target = adapter.standardised(features)
            if o.loss == "cosine":
                of_token = 1 - F.cosine_similarity(predicted, target, dim=1)
            else:
                of_token = F.smooth_l1_loss(predicted, target, reduction="none").mean(dim=1)
            total = total + (of_token * asked.weights[number]).sum()
        return total

    def _contrast(
        self, student: SlideEncoded, told: SlideEncoded | None, batch: SlideBatch
    ) -> Tensor:
        """Every global view against every other one's keys, mean over pairs."""
        o, size, n_global = self.objective.contrast, len(batch.rows), batch.n_global
        assert o is not None and student.projected is not None
        keys = told.projected if o.teacher and told is not None else student.projected
        assert keys is not None
        queries = student.projected[: n_global * size].unflatten(0, (n_global, size))
        keys = keys[: n_global * size].unflatten(0, (n_global, size))
        known = torch.ones(size, dtype=torch.bool, device=queries.device)
        scale = queries.new_tensor(1 / o.temperature)
        losses = [
            contrast(
                queries[a], keys[b], known, batch.groups, scale, self._gather_rows, self._rank,
                self._ranks,
            )
            for a in range(n_global)
            for b in range(n_global)
            if a != b
        ]  # fmt: skip
        return torch.stack(losses).mean()

    def _align(self, student: SlideEncoded, batch: SlideBatch) -> Tensor:
        """Slides and modalities against each other, both ways, mean over the pairs of them."""
        o, alignment = self.objective.align, self.student.alignment
        assert o is not None and student.aligned is not None
        size = len(batch.rows)
        everyone = torch.ones(size, dtype=torch.bool, device=student.aligned.device)
        sides: list[tuple[Tensor, Tensor]] = [(student.aligned, everyone)]
        for name in alignment.names:
            vectors: Vectors = batch.paired[name]
            projected = alignment.project(name, vectors.vectors)  # of those that have it alone
            known = torch.zeros_like(everyone).index_fill(0, vectors.rows, True)
            empty = projected.new_zeros(size, o.width)
            sides.append((empty.index_copy(0, vectors.rows, projected), known))
        scale = alignment.log_scale.clamp(max=4.6052).exp()[0]  # at most 100 (CLIP)
        losses, weights = [], []
        for a in range(len(sides)):
            for b in range(a + 1, len(sides)):
                if a and o.pairs == "star":
                    continue
                known = sides[a][1] & sides[b][1]
                both = [
                    contrast(
                        x, y, known, batch.groups, scale, self._gather_rows, self._rank,
                        self._ranks, loss=o.loss, bias=alignment.bias,
                    )
                    for x, y in ((sides[a][0], sides[b][0]), (sides[b][0], sides[a][0]))
                ]  # fmt: skip
                losses.append(torch.stack(both).mean())
                weights.append(known.sum())
        present = (self._sum_over_ranks(torch.stack(weights).float()) > 0).float()
        return (torch.stack(losses) * present).sum() / present.sum().clamp(min=1)

    def _label(self, student: SlideEncoded, batch: SlideBatch) -> Tensor:
        """Mean over the tasks that a sample of any rank has a label of."""
        o = self.objective.labels
        assert o is not None and batch.targets is not None and batch.events is not None
        known = batch.targets >= 0  # [B, tasks]
        counts = self._sum_over_ranks(known.sum(dim=0).float())
        losses = []
        for at, (task, answers) in enumerate(zip(self._tasks, student.answers, strict=True)):
            rows = known[:, at].nonzero()[:, 0]
            said, target = answers[rows], batch.targets[rows, at]
            if task.event is not None:
                pairs = torch.stack([target, batch.events[rows, at]], dim=1)
                total = hazard_loss(said, pairs) * len(rows) if len(rows) else answers.sum() * 0
            else:
                weights = torch.from_numpy(task.weights).to(said.device)
                total = F.cross_entropy(
                    said, target, weights, reduction="sum", label_smoothing=o.smoothing
                )
            losses.append(total * self._ranks / counts[at].clamp(min=1))
        present = (counts > 0).float()
        return (torch.stack(losses) * present).sum() / present.sum().clamp(min=1)

    @torch.no_grad()
    def update_teacher(self, outputs: Outputs, momentum: float, bad: Tensor | None = None) -> None:
        """See `distill.Distiller.update_teacher`."""
        update_teacher(self.teacher, self.student, momentum, bad)
        o = self.objective.distil
        for name in ("cls", "masked") if o is not None and o.targets == "centre" else ():
            targets = getattr(outputs, name)
            if targets is not None and o is not None:
                follow_logits(
                    getattr(self, f"{name}_centre"), targets.logits, o.centre_momentum,
                    self._sum_over_ranks, bad,
                )  # fmt: skip
