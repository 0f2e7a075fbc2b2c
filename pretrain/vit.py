"""The vision transformer: patches, CLS and registers, pre-norm blocks with LayerScale.

Parameters carry timm's names and the CLS token has no position of its own (timm's
`no_embed_class`), so an export is a plain copy. All crops of a step run as one packed stream.
Legend: B sequences of a crop group, N patches a sequence, P prefix tokens (CLS + registers),
D width, T tokens of the stream.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eosin.pretrain.attention import AttentionFn, Packing, sdpa_attention
from eosin.pretrain.drop_path import DropPath

NORM_EPS = 1e-6  # timm's and DINOv2's; torch's own default is 1e-5


@dataclass(frozen=True, kw_only=True)
class VitConfig:
    """Shape of the encoder; `configs/size/` holds the published sizes."""

    width: int = 384
    """D: channels of a token."""
    depth: int = 12
    """Blocks."""
    heads: int = 6
    """Attention heads; divides width."""
    patch_px: int = 14
    """Side of a patch in pixels."""
    image_px: int = 224
    """Side of the image that the learned positions are for (the global crop's)."""
    registers: int = 4
    """Register tokens (Darcet et al. 2024, arXiv 2309.16588), 0 to 8."""
    ffn: Literal["gelu", "swiglu"] = "gelu"
    """Feed-forward: GELU MLP, or SwiGLU with DINOv2's hidden size."""
    mlp_ratio: float = 4.0
    """Hidden size of the feed-forward over width (before SwiGLU's two thirds)."""
    layer_scale: float = 1e-5
    """Initial LayerScale (Touvron et al. 2021, arXiv 2103.17239)."""
    drop_path: float = 0.0
    """Share of samples that skip each residual branch in training, by batch subset."""

    def __post_init__(self) -> None:
        """Refuses shapes that do not fit together."""
        for name in ("width", "depth", "heads", "patch_px", "image_px"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")
        if self.image_px % self.patch_px:
            raise ValueError(
                f"image_px={self.image_px} is not a multiple of patch_px={self.patch_px}"
            )
        if not 0 <= self.registers <= 8:
            raise ValueError(f"registers={self.registers} must lie in 0 … 8")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path} must lie in [0, 1)")

    @property
    def prefix(self) -> int:
        """P: tokens before the patches."""
        return 1 + self.registers

    @property
    def grid(self) -> int:
        """Patches along one side at `image_px`."""
        return self.image_px // self.patch_px

    @property
    def hidden(self) -> int:
        """Hidden channels of the feed-forward (of each half for SwiGLU, DINOv2 layers/swiglu)."""
        hidden = int(self.width * self.mlp_ratio)
        return (int(hidden * 2 / 3) + 7) // 8 * 8 if self.ffn == "swiglu" else hidden


@dataclass(frozen=True)
class Tokens:
    """What the encoder returns for one crop group, after the final norm."""

    cls: Tensor  # [B, D]
    patches: Tensor  # [B, N, D]


class Attention(nn.Module):
    """Multi-head self-attention on a packed stream."""

    def __init__(self, config: VitConfig, attention: AttentionFn) -> None:
        super().__init__()
        self.heads, self.attention = config.heads, attention
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:  # [T, D] → [T, D]
        """Attends within each sequence of the packing."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # each [T, H, C]
        out: Tensor = self.proj(self.attention(q, k, v, packing).flatten(1))
        return out


class Mlp(nn.Module):
    """The feed-forward: GELU MLP, or SwiGLU packed as timm's (gate first)."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.gated = config.ffn == "swiglu"
        self.fc1 = nn.Linear(config.width, config.hidden * (2 if self.gated else 1))
        self.fc2 = nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:  # [T, D] → [T, D]
        """Applies the feed-forward to every token."""
        hidden = self.fc1(x)
        if self.gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        else:
            hidden = F.gelu(hidden)
        out: Tensor = self.fc2(hidden)
        return out


class LayerScale(nn.Module):
    """One learned factor a channel on a residual branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """Scales the channels of x, [T, D]."""
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VitConfig, index: int, attention: AttentionFn) -> None:
        super().__init__()
        self.index = index
        self.norm1 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.attn = Attention(config, attention)
        self.ls1 = LayerScale(config.width)
        self.norm2 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.mlp = Mlp(config)
        self.ls2 = LayerScale(config.width)

    def forward(self, x: Tensor, packing: Packing, drop: DropPath | None, batch: int) -> Tensor:
        """Adds both branches to x, [T, D]; with `drop`, each to a subset of the sequences."""
        if drop is None:
            x = x + self._attention_branch(x, packing)
            return x + self._mlp_branch(x)
        rows, kept, scale = _kept_rows(drop, self.index, 0, packing, batch, x.device)
        branch = self._attention_branch(x.index_select(0, rows), kept)
        x = x.index_add(0, rows, (branch * scale[:, None]).to(x.dtype))
        rows, _, scale = _kept_rows(drop, self.index, 1, packing, batch, x.device)
        branch = self._mlp_branch(x.index_select(0, rows))
        return x.index_add(0, rows, (branch * scale[:, None]).to(x.dtype))

    def _attention_branch(self, x: Tensor, packing: Packing) -> Tensor:
        out: Tensor = self.ls1(self.attn(self.norm1(x), packing))
        return out

    def _mlp_branch(self, x: Tensor) -> Tensor:
        out: Tensor = self.ls2(self.mlp(self.norm2(x)))
        return out


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_px, stride=config.patch_px)

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W] → [B, h, w, D]
        """Embeds every patch."""
        out: Tensor = self.proj(images)
        return out.permute(0, 2, 3, 1)


class Vit(nn.Module):
    """The encoder. Weights are undefined until `initialise` is called or a state is loaded."""

    def __init__(self, config: VitConfig, attention: AttentionFn = sdpa_attention) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.reg_token = nn.Parameter(torch.empty(1, config.registers, width))
        self.pos_embed = nn.Parameter(torch.empty(1, config.grid**2, width))
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.blocks = nn.ModuleList(Block(config, i, attention) for i in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draws the weights as DINOv2 does: truncated normal 0.02, biases and mask token zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, LayerScale):
                module.gamma.fill_(self.config.layer_scale)
        # torch's own convolution start, which DINOv2 and timm keep for the patch embedding
        fan_in = 3 * self.config.patch_px**2
        bound = 1 / math.sqrt(fan_in)
        self.patch_embed.proj.weight.uniform_(-bound, bound, generator=generator)
        nn.init.trunc_normal_(self.pos_embed, std=0.02, generator=generator)
        nn.init.normal_(self.cls_token, std=1e-6, generator=generator)
        nn.init.normal_(self.reg_token, std=1e-6, generator=generator)
        self.mask_token.zero_()

    def forward(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        drop: DropPath | None = None,
        batch: int = 0,
    ) -> list[Tokens]:
        """Encodes crop groups in one packed stream.

        Args:
            crops: per group, images [B, 3, H, W], normalised.
            masks: per group, None or which patches the mask token replaces, bool [B, N].
            drop: the step's stochastic depth; None runs every branch in full.
            batch: samples behind the views of a group; needed with `drop` alone.

        Returns:
            Per group the CLS tokens [B, D] and patch tokens [B, N, D].
        """
        masks = masks or [None] * len(crops)
        embedded = [self._embed(c, m) for c, m in zip(crops, masks, strict=True)]  # [B, P + N, D]
        packing = Packing(tuple((x.shape[0], x.shape[1]) for x in embedded))
        x = torch.cat([x.flatten(0, 1) for x in embedded])  # [T, D]
        for block in self.blocks:
            x = block(x, packing, drop, batch)
        x = self.norm(x)
        parts = x.split([count * length for count, length in packing.groups])
        outputs = []
        for part, group in zip(parts, packing.groups, strict=True):
            tokens = part.unflatten(0, group)  # [B, P + N, D]
            outputs.append(Tokens(cls=tokens[:, 0], patches=tokens[:, self.config.prefix :]))
        return outputs

    def _embed(self, images: Tensor, mask: Tensor | None) -> Tensor:
        patches = self.patch_embed(images)  # [B, h, w, D]
        count, height, width, _ = patches.shape
        patches = patches.flatten(1, 2)  # [B, N, D]
        if mask is not None:
            patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
        patches = patches + self._positions(height, width)
        prefix = torch.cat([self.cls_token, self.reg_token], dim=1).expand(count, -1, -1)
        return torch.cat([prefix.to(patches.dtype), patches], dim=1)  # [B, P + N, D]

    def _positions(self, height: int, width: int) -> Tensor:
        """Positions of a height × width grid, [1, N, D]; resampled in fp32 as timm does."""
        grid = self.config.grid
        if (height, width) == (grid, grid):
            return self.pos_embed
        square = self.pos_embed.float().unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        resized = F.interpolate(
            square, size=(height, width), mode="bicubic", antialias=True, align_corners=False
        )
        return resized.flatten(2).transpose(1, 2)


def _kept_rows(
    drop: DropPath, layer: int, branch: int, packing: Packing, batch: int, device: torch.device
) -> tuple[Tensor, Packing, Tensor]:
    """Rows of the stream that a branch computes, their packing, and each row's upscaling."""
    rows, groups, scales, start = [], [], [], 0
    for index, (count, length) in enumerate(packing.groups):
        kept = drop.kept(layer, branch, index, count, batch)
        rows.append((start + kept[:, None] * length + torch.arange(length)).flatten())
        groups.append((len(kept), length))
        scales.append(torch.full((len(kept) * length,), count / len(kept)))
        start += count * length
    return torch.cat(rows).to(device), Packing(tuple(groups)), torch.cat(scales).to(device)
