"""A slide encoder with the heads that the objective uses; the student and the teacher are one each.

Legend: B samples, Q sequences, N = views · B, W width, M hidden tokens.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from eosin.pretrain.attention import AttentionFn, sdpa_attention
from eosin.pretrain.drop_path import DropPath
from eosin.pretrain.network import HeadLogits, Heads
from eosin.pretrain.slide.batch import Stream
from eosin.pretrain.slide.encoder import SlideEncoder, SlideModelConfig, SourceShape
from eosin.pretrain.slide.objective import AlignConfig, SlideObjectiveConfig


class SlideEncoded(NamedTuple):
    """What a network says of the views of a step, as far as the objective asks."""

    vectors: Tensor
    """Of each view of each sample, fp32 [N, W], view-major."""
    logits: HeadLogits | None
    """Of the vectors and of the hidden tokens."""
    predicted: tuple[Tensor, ...]
    """Of each source, the features of its hidden tokens, fp32 [M_s, D_s]."""
    projected: Tensor | None
    """For the contrast of views, unit length [N, …]."""
    aligned: Tensor | None
    """For alignment, of the first view, unit length [B, …]."""
    answers: tuple[Tensor, ...]
    """For each task, of the first view, [B, outputs]."""


class Mlp2(nn.Sequential):
    """Two layers, or one where `hidden` is 0."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        if hidden:
            super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))
        else:
            super().__init__(nn.Linear(width, out))


class Alignment(nn.Module):
    """Projections of the slide and of each modality, and the scale of their cosines."""

    def __init__(self, width: int, dims: Mapping[str, int], config: AlignConfig) -> None:
        super().__init__()
        self.slide = nn.Linear(width, config.width)
        self.names = tuple(dims)
        self.modalities = nn.ModuleList(
            Mlp2(dim, config.hidden, config.width) for dim in dims.values()
        )
        self.log_scale = nn.Parameter(torch.empty(1))
        self.bias = nn.Parameter(torch.empty(1)) if config.loss == "sigmoid" else None

    def project(self, name: str, vectors: Tensor) -> Tensor:  # [m, Dm] → [m, out]
        """Vectors of one modality to unit length."""
        out: Tensor = self.modalities[self.names.index(name)](vectors)
        return F.normalize(out.float(), dim=1)


class SlideNetwork(nn.Module):
    """See the module.

    Args:
        model: shape of the encoder.
        objective: which heads there are.
        sources: of the features.
        paired: width of the vectors of each modality.
        tasks: outputs of each task.
        attention: of the blocks.
    """

    def __init__(
        self,
        model: SlideModelConfig,
        objective: SlideObjectiveConfig,
        sources: Sequence[SourceShape],
        paired: Mapping[str, int],
        tasks: Sequence[int],
        attention: AttentionFn = sdpa_attention,
    ) -> None:
        super().__init__()
        self.objective, width = objective, model.width
        self.backbone = SlideEncoder(model, sources, attention)
        o = objective
        if o.distil is not None:
            self.heads = Heads(width, o.distil)
        if o.regress is not None:
            self.predictors = nn.ModuleList(
                Mlp2(width, o.regress.hidden, source.dim) for source in sources
            )
        if o.contrast is not None:
            self.projector = Mlp2(width, o.contrast.hidden, o.contrast.width)
            if o.contrast.teacher:
                self.predictor = Mlp2(o.contrast.width, o.contrast.hidden, o.contrast.width)
        if o.align is not None:
            self.alignment = Alignment(width, paired, o.align)
        if o.labels is not None:
            self.tasks = nn.ModuleList(nn.Linear(width, outputs) for outputs in tasks)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draws all weights, part after part."""
        self.backbone.initialise(generator)
        if hasattr(self, "heads"):
            self.heads.initialise(generator)
        for part in self.on_top():
            if part is getattr(self, "heads", None):
                continue
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                    module.bias.zero_()
        if self.objective.align is not None:
            self.alignment.log_scale.fill_(-math.log(self.objective.align.temperature))
            if self.alignment.bias is not None:
                self.alignment.bias.fill_(-10.0)  # SigLIP: most pairs are none

    def on_top(self) -> list[nn.Module]:
        """The parts that stand on the encoder."""
        return [part for name, part in self.named_children() if name != "backbone"]

    def forget_student_parts(self) -> None:
        """Removes the heads that only a student needs."""
        for name in ("predictors", "predictor", "alignment", "tasks"):
            if hasattr(self, name):
                delattr(self, name)

    def forward(
        self,
        stream: Stream,
        owner: NDArray[np.int64],
        count: int,
        asked: tuple[Tensor, ...],
        hidden: Tensor | None = None,
        drop: DropPath | None = None,
        samples: tuple[int, int, int] = (0, 0, 0),
    ) -> SlideEncoded:
        """What it says.

        Args:
            stream: of Q sequences.
            owner: view · B + sample of each, rising.
            count: N.
            asked: of each source, its tokens that a loss of hidden tokens reads, int64 [M_s].
            hidden: tokens that are not seen, bool [T]; None for a teacher.
            drop: stochastic depth.
            samples: as in `SlideEncoder`.
        """
        said = self.backbone(stream, hidden, drop, owner, samples)
        index = torch.from_numpy(owner).to(said.vector.device)
        vectors = self.backbone.case(said.vector, index, count)
        batch = samples[0]
        logits = None
        if hasattr(self, "heads"):
            masked = torch.cat(asked).sort().values if len(asked) > 1 else asked[0]
            logits = self.heads(vectors, said.tokens.index_select(0, masked))
        predicted: tuple[Tensor, ...] = ()
        if hasattr(self, "predictors"):
            predicted = tuple(
                head(said.tokens.index_select(0, rows)).float()
                for head, rows in zip(self.predictors, asked, strict=True)
            )
        projected = None
        if hasattr(self, "projector"):
            projected = self.projector(vectors)
            if hasattr(self, "predictor"):
                projected = self.predictor(projected)
            projected = F.normalize(projected.float(), dim=1)
        aligned, answers = None, tuple[Tensor, ...]()
        if hasattr(self, "alignment"):
            aligned = F.normalize(self.alignment.slide(vectors[:batch]).float(), dim=1)
        if hasattr(self, "tasks"):
            answers = tuple(task(vectors[:batch]).float() for task in self.tasks)
        return SlideEncoded(vectors, logits, predicted, projected, aligned, answers)
