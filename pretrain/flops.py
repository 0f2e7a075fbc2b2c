"""Floating-point operations of one training step, as a pure function of the config.

Products of matrices, convolution and attention are counted, a multiply-add as two; a backward costs
two forwards (attention's recomputed scores are not counted, nor what checkpointing computes again).
`nominal_flops` is the step with nothing left out: what `plain_step` executes. `executed_flops`
leaves out what the product leaves out: the branches that drop-path skips, and the rows of the last
block that nothing reads. Legend: B samples, V global views, L local views, N patches of a crop, T
tokens of a stream, M masked patches, K prototypes, D width, Db bottleneck.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from eosin.pretrain.drop_path import DropPath
from eosin.pretrain.frozen_teacher import TeacherShape
from eosin.pretrain.gram import GramConfig
from eosin.pretrain.heads import HeadConfig
from eosin.pretrain.jepa import JepaConfig
from eosin.pretrain.network import ObjectiveConfig
from eosin.pretrain.vit import VitConfig

SINKHORN_ITERATIONS = 3


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """Sizes of one step."""

    batch: int
    """B."""
    global_px: int
    """Side of a global crop."""
    local_px: int
    """Side of a local crop."""
    n_global: int = 2
    """V."""
    n_local: int = 8
    """L."""
    masked: int = 0
    """M, over all global crops of the step."""
    group_size: int = 0
    """Samples that share a draw of drop-path; 0: the batch."""
    gram: bool = True
    """Whether the Gram term, where the objective has one, is on in this step."""
    held_logits: int = 0
    """Logits up to which the losses hold a whole matrix (`LossKernels.dense_elements` on the CPU);
    0: all are streamed, and computed again wherever they are needed."""


@dataclass(frozen=True)
class PartFlops:
    """One part of a step."""

    forward: float
    backward: float = 0.0

    @property
    def total(self) -> float:
        """Both directions."""
        return self.forward + self.backward


@dataclass(frozen=True)
class StepFlops:
    """All parts of a step."""

    teacher: PartFlops
    """Its backbone on the global crops."""
    student: PartFlops
    """Its backbone on all crops."""
    heads: PartFlops
    """The MLPs of both networks' heads, up to the bottleneck."""
    prototypes: PartFlops
    """Logits of both networks, each computed once, and the student's gradients."""
    spread: PartFlops
    """Cosines between samples."""
    predictor: PartFlops
    """I-JEPA's, from visible patches to masked ones."""
    gram: PartFlops
    """The Gram teacher's backbone on the global crops, and the similarities of patches."""
    recomputed: float
    """Logits and averages that streaming computes beyond `prototypes`."""

    @property
    def model(self) -> float:
        """What the step needs: without `recomputed`. The numerator of an MFU."""
        parts = (getattr(self, field.name) for field in fields(self))
        return sum(part.total for part in parts if isinstance(part, PartFlops))

    @property
    def hardware(self) -> float:
        """What the device is given to do: with `recomputed`."""
        return self.model + self.recomputed


def executed_flops(
    model: VitConfig,
    objective: ObjectiveConfig,
    shape: StepShape,
    teachers: Sequence[TeacherShape] = (),
) -> StepFlops:
    """What the product's step computes, with frozen teachers or, without one, the moving average.

    Wanted patches are spread evenly over kept and skipped sequences: their share is the mean one.
    """
    return _step(model, objective, shape, teachers, lean=True)


def nominal_flops(model: VitConfig, objective: ObjectiveConfig, shape: StepShape) -> StepFlops:
    """The step with every branch on every row, and each matrix of logits computed once."""
    return _step(model, objective, shape, (), lean=False)


def backbone_flops(
    model: VitConfig,
    groups: Sequence[tuple[int, int]],
    kept: float = 1.0,
    wanted: float | None = None,
) -> PartFlops:
    """Forward and backward of a backbone on crop groups.

    Args:
        model: its shape.
        groups: (sequences, side in pixels) of each crop group.
        kept: share of the sequences that each branch runs for.
        wanted: rows that leave the last block; None: all.
    """
    width, hidden = model.width, model.hidden
    lengths = [(count, (px // model.patch_px) ** 2) for count, px in groups]
    patches = sum(count * n for count, n in lengths)
    tokens = sum(count * (n + model.prefix) for count, n in lengths)  # T
    embed = 2.0 * patches * 3 * model.patch_px**2 * width
    qkv = 2 * 3 * width**2
    proj = 2 * width**2
    ffn = 2 * (3 if model.ffn == "swiglu" else 2) * width * hidden
    scores = 4.0 * width * sum(count * (n + model.prefix) ** 2 for count, n in lengths)
    last = tokens if wanted is None else wanted
    blocks = kept * (
        model.depth * (tokens * qkv + scores) + ((model.depth - 1) * tokens + last) * (proj + ffn)
    )
    # pixels have no gradient, so the embedding's backward is that of its weight alone
    return PartFlops(embed + blocks, embed + 2 * blocks)


def _step(
    model: VitConfig,
    objective: ObjectiveConfig,
    shape: StepShape,
    teachers: Sequence[TeacherShape],
    *,
    lean: bool,
) -> StepFlops:
    crops, local = shape.batch * shape.n_global, shape.batch * shape.n_local
    groups = [(crops, shape.global_px), *([(local, shape.local_px)] if local else [])]
    group_size = shape.group_size or shape.batch
    kept = 1 / DropPath(model.drop_path, 0, 0, group_size).scale if lean else 1.0
    n = (shape.global_px // model.patch_px) ** 2
    # of the global crops, that leave the last block
    patches = {"none": 0, "masked": shape.masked, "all": crops * n}[objective.patches]
    student = backbone_flops(model, groups, kept, crops + local + patches if lean else None)
    side = shape.global_px // model.patch_px
    forward = sum(
        backbone_flops(
            own, [(crops, side * own.patch_px)], 1.0, crops + patches if lean else None
        ).forward
        for own in [teacher.model for teacher in teachers] or [model]
    )
    heads: list[_Rows] = []
    told: Sequence[TeacherShape | None] = teachers or [None]
    for theirs in told:
        if objective.dino > 0:
            heads += _rows(model, objective, theirs, "dino", crops, crops + local)
        if objective.ibot > 0:
            heads += _rows(model, objective, theirs, "ibot", shape.masked, shape.masked)
    spread = 0.0
    if objective.spread.weight > 0:
        among = group_size if objective.spread.over == "group" else shape.batch
        spread = 2.0 * crops * among * model.width
    return StepFlops(
        teacher=PartFlops(forward),
        student=student,
        heads=PartFlops(
            sum(_mlp(h.width, h.head) * (h.teacher + h.student) for h in heads),
            2 * sum(_mlp(h.width, h.head) * h.student for h in heads),
        ),
        prototypes=PartFlops(
            sum(_logits(h.head) * (h.teacher + h.student) for h in heads),
            2 * sum(_logits(h.head) * h.student for h in heads),
        ),
        # KoLeo's neighbours are found without a gradient; the kernel density has one
        spread=PartFlops(spread, 2 * spread if objective.spread.kind == "kde" else 0.0),
        predictor=_predictor(objective.jepa, model.width, crops, n),
        gram=_gram(objective.gram, model, groups[:1], n) if shape.gram else PartFlops(0.0),
        recomputed=sum(_streaming(h, objective, shape.held_logits) for h in heads) if lean else 0.0,
    )


@dataclass(frozen=True)
class _Rows:
    """How many tokens go through a head."""

    head: HeadConfig
    width: int
    teacher: int
    student: int


def _head_of(objective: ObjectiveConfig, loss: str) -> HeadConfig:
    own = objective.patch_head if loss == "ibot" and objective.separate_heads else None
    return own or objective.head


def _rows(
    model: VitConfig,
    objective: ObjectiveConfig,
    theirs: TeacherShape | None,
    loss: str,
    seen: int,
    said: int,
) -> list[_Rows]:
    """Of one loss and one teacher: its tokens, and the student's, through their heads."""
    ours = _head_of(objective, loss)
    if theirs is None:
        return [_Rows(ours, model.width, seen, said)]
    head = _head_of(theirs.objective, loss)
    ours = replace(ours, prototypes=head.prototypes)
    return [_Rows(head, theirs.model.width, seen, 0), _Rows(ours, model.width, 0, said)]


def _streaming(rows: _Rows, objective: ObjectiveConfig, held_logits: int) -> float:
    """What `prototype_loss` computes beyond one product a matrix of logits and two a gradient."""
    once, prototypes = _logits(rows.head), rows.head.prototypes
    holds_targets = rows.teacher * prototypes <= held_logits
    if holds_targets and rows.student * prototypes <= held_logits:
        return 0.0
    scaling = 2 * SINKHORN_ITERATIONS if objective.targets == "sinkhorn" else 1
    teacher = (1 if holds_targets else scaling) + 2 + 2  # targets; their average; its gradient
    student = 2 + 2  # the average and its gradient
    return once * (rows.teacher * (teacher - 1) + rows.student * (student - 3))


def _predictor(jepa: JepaConfig, width: int, crops: int, n: int) -> PartFlops:
    """Of all global crops: crops without a mask go through it too."""
    if jepa.weight == 0:
        return PartFlops(0.0)
    narrow, hidden, tokens = jepa.width, int(jepa.width * jepa.mlp_ratio), n + jepa.use_cls
    block = tokens * 2 * (4 * narrow**2 + 2 * narrow * hidden) + 4.0 * narrow * tokens**2
    forward = crops * (2.0 * narrow * width * (tokens + n) + jepa.depth * block)
    return PartFlops(forward, 2 * forward)


def _gram(
    gram: GramConfig, model: VitConfig, groups: Sequence[tuple[int, int]], n: int
) -> PartFlops:
    """The anchor's forward, and what `gram_loss` computes of one matrix or another."""
    if gram.weight == 0:
        return PartFlops(0.0)
    crops, width = groups[0][0], model.width
    units, rows = (1, crops * n) if gram.level == "batch" else (crops, n)
    anchor = backbone_flops(model, groups).forward
    if not gram.remove_negative and rows > width:  # three products [D, D], each with a gradient
        return PartFlops(anchor + units * 6.0 * rows * width**2, units * 12.0 * rows * width**2)
    # two products [N, N], of which the student's alone has a gradient
    return PartFlops(anchor + units * 4.0 * rows**2 * width, units * 4.0 * rows**2 * width)


def _mlp(width: int, head: HeadConfig) -> float:
    """Of one row through a head's MLP."""
    return 2.0 * (width * head.hidden + head.hidden**2 + head.hidden * head.bottleneck)


def _logits(head: HeadConfig) -> float:
    """Of one row against every prototype."""
    return 2.0 * head.bottleneck * head.prototypes
