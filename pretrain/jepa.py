"""Patch regression in the I-JEPA way (Assran et al. 2023, arXiv 2301.08243), beside DINO.

A narrow transformer sees the student's tokens of the patches that were not masked and, at each
masked place, one learned query with its position; it regresses the teacher's layer-normed token.
Two things differ from the paper. The student's forward is shared with DINO, so masked patches are
mask tokens in its input and not absent from it. And a crop's target blocks are predicted together,
in one pass over visible tokens and queries. Legend: C crops, N patches, D width, W narrow width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class JepaConfig:
    """How much of the regression, and the predictor's shape."""

    weight: float = 0.0
    """In the total; 0 turns it off."""
    depth: int = 4
    """Blocks of the predictor."""
    width: int = 192
    """W: channels of the predictor; a multiple of 4 (sine and cosine of two coordinates)."""
    heads: int = 3
    """Attention heads of the predictor; divides width."""
    mlp_ratio: float = 4.0
    """Hidden size of the predictor's feed-forward over its width."""
    use_cls: bool = True
    """Show the predictor the student's CLS token too."""
    beta: float = 1.0
    """Error at which the loss turns from square to absolute (smooth L1, arXiv 1504.08083)."""

    def __post_init__(self) -> None:
        """Refuses shapes that do not fit together."""
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight={self.weight} must be finite and at least 0")
        for name in ("depth", "width", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of 4 and heads={self.heads}")
        if int(self.width * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} leaves the feed-forward no channel")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta={self.beta} must be finite and above 0")


class Predictor(nn.Module):
    """From visible patches to masked ones. Weights are undefined until `initialise`.

    Args:
        config: of the predictor.
        width: D of the encoder.
    """

    def __init__(self, config: JepaConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(width, config.width)
        self.query = nn.Parameter(torch.empty(config.width))
        self.blocks = nn.ModuleList(PredictorBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.out = nn.Linear(config.width, width)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Truncated normal 0.02, zero biases, unit norms; the last maps of a branch over √(2l).

        That division by the depth l of the block is I-JEPA's (and BEiT's).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                module.bias.zero_()
            elif isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
                module.bias.zero_()
        nn.init.trunc_normal_(self.query, std=0.02, generator=generator)
        for layer, block in enumerate(self.blocks, start=1):
            assert isinstance(block, PredictorBlock)
            block.proj.weight /= math.sqrt(2 * layer)
            block.fc2.weight /= math.sqrt(2 * layer)

    def forward(
        self, student_patches: Tensor, cls: Tensor, masks: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        """Predictions at every place, of which the masked ones are meant, [C, N, D].

        No crop is padded: at masked places the query stands for the student's token, so the
        student's output there is not read, and gets no gradient from here.

        Args:
            student_patches: normalised output of the student, [C, N, D].
            cls: likewise [C, D]; read where the config says so.
            masks: masked patches, bool [C, N], on the device of the patches.
            grid: (h, w) patches of a crop, h · w = N.
        """
        seen = self.embed(student_patches)  # [C, N, W]
        x = torch.where(masks[..., None], self.query, seen)
        x = x + sincos_positions(grid, self.config.width, x.device)
        if self.config.use_cls:
            x = torch.cat([self.embed(cls)[:, None], x], dim=1)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.out(self.norm(x[:, -masks.shape[1] :]))
        return out


class PredictorBlock(nn.Module):
    """Pre-norm transformer block over equally long sequences."""

    def __init__(self, config: JepaConfig) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:  # [C, T, W] → [C, T, W]
        """Adds attention and feed-forward to x."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # [C, T, 3, H, W / H]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [C, H, T, W / H]
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(attended)
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out


def sincos_positions(grid: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """Sines and cosines of each patch's row and column (arXiv 1706.03762, §3.5), fp32 [N, W].

    The first half of the channels is of the row, the second of the column.
    """
    exponents = torch.arange(width // 4, device=device, dtype=torch.float32) / (width // 4)
    frequencies = 10_000.0**-exponents  # [W / 4]
    parts = [torch.arange(n, device=device)[:, None] * frequencies for n in grid]
    row, column = (torch.cat([p.sin(), p.cos()], dim=1) for p in parts)  # [h, W/2], [w, W/2]
    height, cols = grid
    both = [row[:, None].expand(-1, cols, -1), column[None].expand(height, -1, -1)]
    return torch.cat(both, dim=-1).flatten(0, 1)


def jepa_loss(
    predicted: Tensor, teacher_patches: Tensor, masks: Tensor, crops: int, config: JepaConfig
) -> Tensor:
    """Smooth L1 against the teacher's layer-normed patches, without the weight; a scalar in fp32.

    Mean over channels and over the masked patches of a crop, so each masked crop counts alike,
    then summed and divided by `crops`: iBOT's normaliser. A crop without a mask adds nothing, and
    may be left out of all three tensors; with no mask at all the loss is zero, with a graph.

    Args:
        predicted: [C, N, D] of `Predictor`.
        teacher_patches: normalised output of the teacher, [C, N, D]; no gradient.
        masks: masked patches, bool [C, N].
        crops: global crops in the batch, those without a mask included.
        config: of the loss.
    """
    with torch.autocast(predicted.device.type, enabled=False):
        teacher = teacher_patches.detach().float()
        target = F.layer_norm(teacher, teacher.shape[-1:], eps=NORM_EPS)
        error = F.smooth_l1_loss(predicted.float(), target, beta=config.beta, reduction="none")
        weights = masks / masks.sum(dim=1, keepdim=True).clamp(min=1)  # [C, N]
        return (error.mean(dim=-1) * weights).sum() / max(crops, 1)
