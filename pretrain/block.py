"""One transformer block on a packed stream: pre-norm attention and feed-forward with LayerScale.

A block computes no row that nobody needs: `BlockRows`, drawn on the host before the first block,
says which sequences each branch is for (stochastic depth) and which rows leave the last block.
All it holds are tensors and plain numbers, so a block compiles to one graph. Legend: T tokens of
the stream, D width, H heads, C channels a head.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eosin.pretrain.attention import AttentionFn, Packing
from eosin.pretrain.low_rank import LowRankLinear
from eosin.pretrain.positions import rotate
from eosin.pretrain.recompute import Recompute, run


class BlockRows(NamedTuple):
    """The rows that a block works on, int64; None stands for all of them."""

    packing: Packing
    """Of the rows that attend."""
    rotations: Tensor | None = None
    """Cosines and sines of the rows that attend, fp32 [·, C]; None without rotary positions."""
    attend: Tensor | None = None
    """Rows of the stream that attend: those of the kept sequences."""
    leave: Tensor | None = None
    """Rows of the stream that leave the block."""
    project: Tensor | None = None
    """Rows of what attended that are projected and added."""
    attention_adds: Tensor | None = None
    """Rows of what leaves that these are added to."""
    mlp_adds: Tensor | None = None
    """Rows of what leaves that the feed-forward is computed for and added to."""
    scale: float = 1.0
    """What a branch is multiplied by where it runs for a part of the sequences alone."""


class Attention(nn.Module):
    """Multi-head self-attention on a packed stream."""

    def __init__(self, width: int, heads: int, attention: AttentionFn, rank: int) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.qkv = LowRankLinear(width, 3 * width, rank)
        self.proj = LowRankLinear(width, width, rank)

    def forward(self, x: Tensor, rows: BlockRows) -> Tensor:  # [T, D] → [rows.project, D]
        """Attends within each sequence of the packing; projects the rows that are asked for."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [T, 3, H, C]
        q, k, v = qkv.unbind(1)  # each [T, H, C]
        if rows.rotations is not None:
            q, k = rotate(qkv[:, :2], rows.rotations).unbind(1)
        attended = self.attention(q, k, v, rows.packing).flatten(1)
        out: Tensor = self.proj(_take(attended, rows.project))
        return out


class Mlp(nn.Module):
    """The feed-forward: GELU MLP, or SwiGLU packed as timm's (gate first)."""

    def __init__(self, width: int, hidden: int, ffn: Literal["gelu", "swiglu"], rank: int) -> None:
        super().__init__()
        self.gated = ffn == "swiglu"
        self.fc1 = LowRankLinear(width, hidden * (2 if self.gated else 1), rank)
        self.fc2 = LowRankLinear(hidden, width, rank)

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
    """A residual branch's end: one learned factor a channel, and the addition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, branch: Tensor, rows: Tensor | None, scale: float) -> Tensor:
        """Adds scale · gamma · branch to `rows` of x, [T, D]; to all of them where it is None."""
        if rows is None:
            return torch.addcmul(x, branch, self.gamma)
        return x.index_add(0, rows, (branch * self.gamma).to(x.dtype), alpha=scale)


class Block(nn.Module):
    """Pre-norm transformer block. Weights are undefined until the network's `initialise`."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        ffn: Literal["gelu", "swiglu"],
        attention: AttentionFn,
        norm_eps: float,
        low_rank: int = 0,
    ) -> None:
        super().__init__()
        self.recompute: Recompute = "none"
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, heads, attention, low_rank)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, hidden, ffn, low_rank)
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor, rows: BlockRows) -> Tensor:  # [T, D] → [rows.leave, D]
        """Adds both branches to the stream, each on its own rows."""
        return run(self.recompute, lambda stream: self._add_branches(stream, rows), x)

    def _add_branches(self, x: Tensor, rows: BlockRows) -> Tensor:
        branch = self.attn(self.norm1(_take(x, rows.attend)), rows)
        x = self.ls1(_take(x, rows.leave), branch, rows.attention_adds, rows.scale)
        branch = self.mlp(self.norm2(_take(x, rows.mlp_adds)))
        out: Tensor = self.ls2(x, branch, rows.mlp_adds, rows.scale)
        return out


def _take(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)
