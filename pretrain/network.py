"""What is trained: a backbone with the heads that the objective uses; the objective's config.

Legend: C global crops, N patches a global crop, S crops of all kinds, M masked patches, K
prototypes, D width, Db bottleneck.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from eosin.pretrain.attention import AttentionFn, sdpa_attention
from eosin.pretrain.crop_rows import Patches
from eosin.pretrain.drop_path import DropPath
from eosin.pretrain.gram import GramConfig
from eosin.pretrain.heads import HeadConfig, PrototypeHead
from eosin.pretrain.jepa import JepaConfig, Predictor
from eosin.pretrain.positions import Jitter
from eosin.pretrain.spread import SpreadConfig
from eosin.pretrain.vit import Vit, VitConfig


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Which losses, how much of each, and the heads they act on (DINOv2, arXiv 2304.07193)."""

    dino: float = 1.0
    """Weight of the CLS cross-entropy over pairs of views; 0 turns it off."""
    local_weight: float = 1.0
    """Factor on the pairs of a local with a global view (DINOv3 halves it in its Gram stage)."""
    ibot: float = 1.0
    """Weight of the masked-patch cross-entropy; 0 turns it off."""
    targets: Literal["sinkhorn", "centre"] = "sinkhorn"
    """How the teacher's logits become targets: Sinkhorn-Knopp, or softmax about a moving centre."""
    centre_momentum: float = 0.9
    """Of the moving centre (DINO, arXiv 2104.14294, eq. 4); unused by ``sinkhorn``."""
    spread: SpreadConfig = field(default_factory=SpreadConfig)
    """The regulariser that keeps the student's CLS features apart."""
    gram: GramConfig = field(default_factory=GramConfig)
    """Gram anchoring of the patch tokens."""
    jepa: JepaConfig = field(default_factory=JepaConfig)
    """Patch regression, an alternative to iBOT."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """The DINO head, and the iBOT head when they are shared."""
    patch_head: HeadConfig | None = None
    """A head of its own for the masked patches; null: they share `head`."""

    def __post_init__(self) -> None:
        """Refuses weights that are none, and an objective that nothing can be learnt from."""
        for name in ("dino", "local_weight", "ibot"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and at least 0")
        if self.dino == self.ibot == self.jepa.weight == 0:
            raise ValueError(
                "dino=0, ibot=0 and jepa.weight=0 leave nothing to learn; give one of them a weight"
            )
        if not 0 <= self.centre_momentum <= 1:
            raise ValueError(f"centre_momentum={self.centre_momentum} must lie in [0, 1]")

    @property
    def separate_heads(self) -> bool:
        """Whether the masked patches have a head that the CLS tokens do not use."""
        return self.ibot > 0 and (self.patch_head is not None or self.dino == 0)

    @property
    def patch_head_name(self) -> str:
        """The head of the masked patches."""
        return "patch_head" if self.separate_heads else "head"

    @property
    def patches(self) -> Patches:
        """Which patch tokens of the global crops a loss reads."""
        if self.jepa.weight > 0 or self.gram.weight > 0:
            return "all"
        return "masked" if self.ibot > 0 else "none"


class Logits(NamedTuple):
    """What M × K logits are the product of."""

    x: Tensor  # [M, Db], unit length
    prototypes: Tensor  # [K, Db]


class Encoded(NamedTuple):
    """What a network says of the crops of a step, as far as the objective asks."""

    cls: Tensor  # [S, D], those of the global crops first
    patches: Tensor | None  # of the global crops [C, N, D], where a loss reads all of them
    cls_logits: Logits | None
    patch_logits: Logits | None  # of the masked patches
    predicted: Tensor | None  # as `jepa.Predictor` gives it
    further: tuple["HeadLogits", ...] = ()  # of the heads for a second teacher, and so on

    @property
    def said(self) -> tuple["HeadLogits", ...]:
        """The logits for each teacher."""
        return HeadLogits(self.cls_logits, self.patch_logits), *self.further


class HeadLogits(NamedTuple):
    """Of the CLS tokens and of the masked patches."""

    cls: Logits | None
    masked: Logits | None


class Heads(nn.Module):
    """The heads for one more teacher, as the objective uses them; the first's are a network's own.

    Args:
        width: of the tokens.
        objective: whose heads they are.
    """

    head: PrototypeHead
    patch_head: PrototypeHead

    def __init__(self, width: int, objective: ObjectiveConfig) -> None:
        super().__init__()
        self.objective = objective
        if objective.dino > 0:
            self.head = PrototypeHead(width, objective.head)
        if objective.separate_heads:
            self.patch_head = PrototypeHead(width, objective.patch_head or objective.head)

    def initialise(self, generator: torch.Generator) -> None:
        """Draws all weights, head after head."""
        for head in self.children():
            assert isinstance(head, PrototypeHead)
            head.initialise(generator)

    def forward(self, cls: Tensor, masked: Tensor) -> HeadLogits:  # [S, D], [M, D]
        """Logits of CLS tokens and of masked patches."""
        return _logits(self, self.objective, cls, masked)


class Network(nn.Module):
    """Backbone, and the heads that the objective uses; the student and the teacher are one each.

    `forward` is the one door to its weights: a layout that shards them opens and closes it there.
    """

    head: PrototypeHead
    patch_head: PrototypeHead
    predictor: Predictor
    further: nn.ModuleList

    def __init__(
        self,
        model: VitConfig,
        objective: ObjectiveConfig,
        attention: AttentionFn = sdpa_attention,
        further: Sequence[ObjectiveConfig] = (),
    ) -> None:
        super().__init__()
        self.objective = objective
        self.backbone = Vit(model, attention)
        if objective.dino > 0:
            self.head = PrototypeHead(model.width, objective.head)
        if objective.separate_heads:
            self.patch_head = PrototypeHead(model.width, objective.patch_head or objective.head)
        if objective.jepa.weight > 0:
            self.predictor = Predictor(objective.jepa, model.width)
        if further:
            self.further = nn.ModuleList(Heads(model.width, own) for own in further)

    def initialise(self, generator: torch.Generator) -> None:
        """Draws all weights, part after part."""
        for module in (self.backbone, *self.on_top()):
            assert isinstance(module, Vit | PrototypeHead | Predictor | Heads)
            module.initialise(generator)

    def on_top(self) -> list[nn.Module]:
        """The parts that stand on the backbone, each with a forward of its own."""
        own = [p for name, p in self.named_children() if name not in ("backbone", "further")]
        return [*own, *getattr(self, "further", [])]

    def forward(
        self,
        crops: Sequence[Tensor],
        mask: Tensor | None,
        wanted: Tensor,
        masked: Tensor,
        drop: DropPath | None = None,
        batch: int = 0,
        jitter: Jitter | None = None,
    ) -> Encoded:
        """Tokens and logits of the crops of a step.

        Args:
            crops: the global crops [C, 3, H, W], then the local ones, if any; normalised.
            mask: patches of the global crops that the mask token replaces, bool [C, N].
            wanted: rows of the stream that the losses read, as `crop_rows` gives them.
            masked: the masked patches among the C · N, int64 [M].
            drop: stochastic depth.
            batch: samples behind the views; needed with `drop` alone.
            jitter: of the rotary positions.
        """
        masks = [mask, *[None] * (len(crops) - 1)]
        out = self.backbone.rows(crops, masks, wanted, drop, batch, jitter)  # [R, D]
        cls, patches = out.tensor_split([sum(len(group) for group in crops)])
        every = None
        if self.objective.patches == "all":
            every = patches.unflatten(0, (len(crops[0]), -1))
            patches = patches.index_select(0, masked)  # [M, D]
        logits = _logits(self, self.objective, cls, patches)
        further = tuple(heads(cls, patches) for heads in getattr(self, "further", []))
        predicted = None
        if mask is not None and every is not None and hasattr(self, "predictor"):
            grid = tuple(side // self.backbone.config.patch_px for side in crops[0].shape[-2:])
            predicted = self.predictor(every, cls[: len(crops[0])], mask, grid)
        return Encoded(cls, every, *logits, predicted, further)


def _logits(
    owner: Network | Heads, objective: ObjectiveConfig, cls: Tensor, masked: Tensor
) -> HeadLogits:
    """Of the CLS tokens and of the masked patches; one pass where they share the head."""
    o = objective
    if o.dino > 0 and o.ibot > 0 and not o.separate_heads:
        x, prototypes = owner.head(torch.cat([cls, masked]))
        return HeadLogits(Logits(x[: len(cls)], prototypes), Logits(x[len(cls) :], prototypes))
    return HeadLogits(
        Logits(*owner.head(cls)) if o.dino > 0 else None,
        Logits(*owner.patch_head(masked)) if o.ibot > 0 else None,
    )
