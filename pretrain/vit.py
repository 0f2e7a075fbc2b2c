"""The vision transformer: patches, CLS and registers, pre-norm blocks with LayerScale.

Parameters carry timm's names and the CLS token has no position of its own (timm's
`no_embed_class`), so an export is a plain copy. All crops of a step run as one packed stream.
Legend: B sequences of a crop group, N patches a sequence, P prefix tokens (CLS + registers),
D width, T tokens of the stream, R wanted rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from eosin.pretrain.attention import AttentionFn, Packing, sdpa_attention
from eosin.pretrain.block import Block, LayerScale
from eosin.pretrain.compiled import compile_forward
from eosin.pretrain.drop_path import DropPath
from eosin.pretrain.low_rank import LowRankLinear
from eosin.pretrain.positions import (
    Interpolation,
    Jitter,
    RopeConfig,
    learned_positions,
    rope_angles,
    turns,
)
from eosin.pretrain.recompute import Recompute
from eosin.pretrain.stream import plan_blocks


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
    swiglu_multiple: int = 8
    """SwiGLU's hidden size is rounded up to a multiple of this: 8 in DINOv2, 64 in DINOv3's 7B."""
    layer_scale: float = 1e-5
    """Initial LayerScale (Touvron et al. 2021, arXiv 2103.17239)."""
    norm_eps: float = 1e-6
    """Added to the variance in every layer norm: 1e-6 in DINOv2 and timm, 1e-5 in DINOv3."""
    drop_path: float = 0.0
    """Share of samples that skip each residual branch in training, by batch subset."""
    low_rank: int = 0
    """Rank of additions to the blocks' linear layers, which are then trained instead of them (LoRA,
    arXiv 2106.09685); an export has them added up. 0: none."""
    positions: Literal["learned", "rope"] = "learned"
    """How a patch knows its place: a learned table, or axial rotary positions in every block."""
    interpolation: Interpolation = "antialias"
    """How the learned table is resampled for other crops (`positions.learned_positions`)."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """The rotary positions and their jitter; of no effect on a learned table."""

    def __post_init__(self) -> None:
        """Refuses shapes that do not fit together."""
        for name in ("width", "depth", "heads", "patch_px", "image_px", "swiglu_multiple"):
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
        if self.low_rank < 0:
            raise ValueError(f"low_rank={self.low_rank} must not be negative")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path} must lie in [0, 1)")
        known = (1e-6, 1e-5) if self.positions == "rope" else (1e-6,)
        if self.norm_eps not in known:
            raise ValueError(
                f"norm_eps={self.norm_eps}: timm has networks with positions={self.positions} for "
                f"{' and '.join(map(str, known))}, and an export must load there"
            )
        if self.hidden < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} leaves the feed-forward no channel")
        if self.positions == "rope" and self.head_channels % 4:
            raise ValueError(
                f"positions=rope needs heads of a multiple of 4 channels, not width={self.width} / "
                f"heads={self.heads}"
            )

    @property
    def prefix(self) -> int:
        """P: tokens before the patches."""
        return 1 + self.registers

    @property
    def grid(self) -> int:
        """Patches along one side at `image_px`."""
        return self.image_px // self.patch_px

    @property
    def head_channels(self) -> int:
        """C: channels of a head."""
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Hidden channels of the feed-forward (of each half for SwiGLU, DINOv2 layers/swiglu)."""
        hidden = int(self.width * self.mlp_ratio)
        if self.ffn == "gelu":
            return hidden
        return -(-int(hidden * 2 / 3) // self.swiglu_multiple) * self.swiglu_multiple


@dataclass(frozen=True)
class Tokens:
    """What the encoder returns for one crop group, after the final norm."""

    cls: Tensor  # [B, D]
    patches: Tensor  # [B, N, D]


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
        self.config, self.attention_kernel = config, attention
        width = config.width
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.reg_token = nn.Parameter(torch.empty(1, config.registers, width))
        self.pos_embed = None
        if config.positions == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, config.grid**2, width))
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.heads,
                config.hidden,
                config.ffn,
                attention,
                config.norm_eps,
                config.low_rank,
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.compiled = False
        """Whether `compile_blocks` was called."""

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draws the weights as DINOv2 does: truncated normal 0.02, biases and mask token zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
                if isinstance(module, LowRankLinear):
                    module.initialise_addition(generator)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, LayerScale):
                module.gamma.fill_(self.config.layer_scale)
        # torch's own convolution start, which DINOv2 and timm keep for the patch embedding
        fan_in = 3 * self.config.patch_px**2
        bound = 1 / math.sqrt(fan_in)
        self.patch_embed.proj.weight.uniform_(-bound, bound, generator=generator)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02, generator=generator)
        nn.init.normal_(self.cls_token, std=1e-6, generator=generator)
        nn.init.normal_(self.reg_token, std=1e-6, generator=generator)
        self.mask_token.zero_()

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compiles every block, each to one graph, when it first runs.

        Blocks of the same shapes share their kernels. All sizes are static but the number of wanted
        rows, so nothing is compiled again while crops and batch stay as they are.

        Args:
            backend: of `torch.compile`; ``aot_eager`` traces the same graphs without kernels.
        """
        self.compiled = True
        # the limit counts for the code that all blocks share: student, teacher, other crop sizes
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for block in self.blocks:
            compile_forward(block, dynamic=False, backend=backend)

    def recompute(self, mode: Recompute) -> None:
        """Sets what the blocks keep for their backward; gradients do not depend on it."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.recompute = mode

    def packing(self, sizes: Sequence[tuple[int, int, int]]) -> Packing:
        """How crop groups lie in the stream, from the (B, H, W) of each; H, W in pixels."""
        patch = self.config.patch_px
        return Packing(
            tuple((n, self.config.prefix + (h // patch) * (w // patch)) for n, h, w in sizes)
        )

    def forward(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        drop: DropPath | None = None,
        batch: int = 0,
        jitter: Jitter | None = None,
    ) -> list[Tokens]:
        """Encodes crop groups in one packed stream.

        Args:
            crops: per group, images [B, 3, H, W], normalised.
            masks: per group, None or which patches the mask token replaces, bool [B, N].
            drop: the step's stochastic depth; None runs every branch in full.
            batch: samples behind the views of a group; needed with `drop` alone.
            jitter: of the rotary positions; None for the teacher and for evaluation.

        Returns:
            Per group the CLS tokens [B, D] and patch tokens [B, N, D].
        """
        x, packing = self._run(crops, masks, None, drop, batch, jitter)
        outputs = []
        parts = x.split([count * length for count, length in packing.groups])
        for part, group in zip(parts, packing.groups, strict=True):
            tokens = part.unflatten(0, group)  # [B, P + N, D]
            outputs.append(Tokens(cls=tokens[:, 0], patches=tokens[:, self.config.prefix :]))
        return outputs

    def rows(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None,
        wanted: Tensor,
        drop: DropPath | None = None,
        batch: int = 0,
        jitter: Jitter | None = None,
    ) -> Tensor:
        """Normalised output of some rows of the stream alone, [R, D]; equal to `forward`'s.

        The last block's projection and feed-forward, and the final norm, are computed for these
        rows only. `stream.cls_rows` and `stream.patch_rows` name rows of a `packing`.

        Args:
            crops: as in `forward`.
            masks: as in `forward`.
            wanted: rows of the stream in any order, int64 [R], on the CPU.
            drop: as in `forward`.
            batch: as in `forward`.
            jitter: as in `forward`.

        Raises:
            ValueError: `wanted` is not on the CPU, not int64, or holds a row that there is not.
        """
        return self._run(crops, masks, wanted, drop, batch, jitter)[0]

    def _run(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None,
        wanted: Tensor | None,
        drop: DropPath | None,
        batch: int,
        jitter: Jitter | None,
    ) -> tuple[Tensor, Packing]:
        """Normalised rows, [R, D], and how the whole stream is packed."""
        config = self.config
        packing = self.packing([(c.shape[0], c.shape[2], c.shape[3]) for c in crops])
        tables = []
        if config.positions == "rope":
            for group, crop in enumerate(crops):
                size = crop.shape[2] // config.patch_px, crop.shape[3] // config.patch_px
                angles = rope_angles(size, config.head_channels, config.rope, jitter, group)
                tables.append(turns(angles, config.prefix))
        plan = plan_blocks(
            packing,
            config.depth,
            self.cls_token.device,
            drop=drop,
            batch=batch,
            wanted=wanted,
            turns=tables,
        )
        if self.compiled and wanted is not None:
            last = plan[-1]  # how many rows are wanted changes from step to step
            for part in (last.leave, last.project, last.attention_adds, last.mlp_adds):
                if part is not None:
                    torch._dynamo.maybe_mark_dynamic(part, 0)
        masks = masks or [None] * len(crops)
        embedded = [self._embed(c, m) for c, m in zip(crops, masks, strict=True)]  # [B, P + N, D]
        x = torch.cat([tokens.flatten(0, 1) for tokens in embedded])  # [T, D]
        for block, rows in zip(self.blocks, plan, strict=True):
            x = block(x, rows)
        return self.norm(x), packing

    def _embed(self, images: Tensor, mask: Tensor | None) -> Tensor:
        # the stream is fp32 at least, whatever autocast or gathered weights make of the branches
        stream = torch.promote_types(self.cls_token.dtype, torch.float32)
        patches = self.patch_embed(images).to(stream)  # [B, h, w, D]
        count, height, width, _ = patches.shape
        patches = patches.flatten(1, 2)  # [B, N, D]
        if mask is not None:
            patches = torch.where(mask[..., None], self.mask_token, patches)
        if self.pos_embed is not None:
            patches = patches + learned_positions(
                self.pos_embed, self.config.grid, (height, width), self.config.interpolation
            )
        prefix = torch.cat([self.cls_token, self.reg_token], dim=1).expand(count, -1, -1)
        return torch.cat([prefix, patches], dim=1)  # [B, P + N, D]
