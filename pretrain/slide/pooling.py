"""From the tokens of a slide to one vector, and to a few; from the slides of a case to one vector.

Legend: T tokens, Q sequences, W width, K latents, H heads.
"""

from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eosin.pretrain.attention import AttentionFn
from eosin.pretrain.block import Block, BlockRows
from eosin.pretrain.slide.attention import ragged
from eosin.pretrain.slide.segments import segment_mean, segment_softmax, segment_sum

PoolName: TypeAlias = Literal["cls", "mean", "attention", "latents"]
"""``cls``: the class token. ``mean``: of the tiles. ``attention``: gated, of several heads (Ilse et
al. 2018). ``latents``: learned queries that attend to the tiles once (PRISM's Perceiver, the
poolers of CoCa); their mean is the vector."""
CaseName: TypeAlias = Literal["mean", "transformer"]


class Pooled(NamedTuple):
    """Of each sequence."""

    vector: Tensor
    """[Q, W]"""
    latents: Tensor | None
    """[Q, K, W]"""
    weights: Tensor | None
    """How much of the vector is of each tile, fp32 [T]; they sum to 1 over a sequence."""


class GatedPool(nn.Module):
    """Gated attention with H heads, each over its own W / H channels; O(T)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.gate = nn.Linear(width, 2 * width)
        self.score = nn.Linear(width, heads, bias=False)  # a softmax does not see a bias
        self.out = nn.Linear(width, width)

    def forward(self, tiles: Tensor, segment: Tensor, count: int) -> Pooled:
        """Tiles [T, W] of `count` sequences."""
        a, b = self.gate(tiles).chunk(2, dim=1)
        weights = segment_softmax(self.score(a.tanh() * b.sigmoid()), segment, count)  # [T, H]
        values = tiles.unflatten(1, (self.heads, -1)).float() * weights[:, :, None]
        return Pooled(
            self.out(segment_sum(values.flatten(1), segment, count)), None, weights.mean(1)
        )


class LatentPool(nn.Module):
    """K learned queries attend to the tiles of a sequence; O(T · K), and no T × T."""

    def __init__(self, width: int, heads: int, latents: int) -> None:
        super().__init__()
        self.heads = heads
        self.latents = nn.Parameter(torch.empty(latents, width))
        self.norm = nn.LayerNorm(width)
        self.query, self.keys = nn.Linear(width, width), nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, tiles: Tensor, lengths: tuple[int, ...]) -> Pooled:
        """Tiles [T, W]; a sequence without any leaves the queries as they are."""
        q = self.query(self.norm(self.latents)).unflatten(1, (self.heads, -1)).transpose(0, 1)
        k, v = self.keys(tiles).chunk(2, dim=1)
        said = []
        for own_k, own_v in zip(k.split(list(lengths)), v.split(list(lengths)), strict=True):
            heads = [x.unflatten(1, (self.heads, -1)).transpose(0, 1)[None] for x in (own_k, own_v)]
            mixed = F.scaled_dot_product_attention(q[None].to(own_k.dtype), *heads)
            said.append(mixed[0].transpose(0, 1).flatten(1))  # [K, W]
        latents = self.latents + self.out(torch.stack(said))
        return Pooled(latents.float().mean(dim=1), latents, None)


class Pool(nn.Module):
    """A slide's tokens to its vector.

    Args:
        name: how.
        width: W.
        heads: of ``attention`` and ``latents``.
        latents: K.
    """

    def __init__(self, name: PoolName, width: int, heads: int, latents: int) -> None:
        super().__init__()
        self.name = name
        self.inner: GatedPool | LatentPool | None = None
        if name == "attention":
            self.inner = GatedPool(width, heads)
        elif name == "latents":
            self.inner = LatentPool(width, heads, latents)

    def forward(
        self, prefix: Tensor, tiles: Tensor, segment: Tensor, lengths: tuple[int, ...]
    ) -> Pooled:
        """One vector a sequence.

        Args:
            prefix: [Q, P, W], the class token first, where there is one.
            tiles: [T, W].
            segment: sequence of each tile, int64 [T].
            lengths: of the sequences, in tiles.
        """
        found: Pooled
        if isinstance(self.inner, GatedPool):
            found = self.inner(tiles, segment, len(lengths))
            return found
        if isinstance(self.inner, LatentPool):
            found = self.inner(tiles, lengths)
            return found
        if self.name == "cls":
            return Pooled(prefix[:, 0], None, None)
        vector = segment_mean(tiles, segment, len(lengths))
        counts = torch.tensor(lengths, device=tiles.device, dtype=torch.float32)
        return Pooled(vector, None, 1 / counts[segment])


class CasePool(nn.Module):
    """The slides of a case to its vector: their mean, or what a [CASE] token finds in them.

    Args:
        name: how.
        width: W.
        heads: of the blocks.
        depth: of them.
        kernel: of attention.
    """

    def __init__(
        self, name: CaseName, width: int, heads: int, depth: int, kernel: AttentionFn
    ) -> None:
        super().__init__()
        self.name = name
        if name == "transformer":
            self.token = nn.Parameter(torch.empty(1, width))
            self.layers = nn.ModuleList(
                Block(width, heads, 4 * width, "gelu", kernel, 1e-6) for _ in range(depth)
            )
            self.norm = nn.LayerNorm(width)

    def forward(self, vectors: Tensor, owner: Tensor, count: int) -> Tensor:
        """Vectors [Q, W] of slides to those of cases, [count, W].

        Args:
            vectors: of slides, those of a case one behind the other.
            owner: case of each, int64 [Q], rising; every case has a slide.
            count: of cases.
        """
        if self.name == "mean":
            return segment_mean(vectors, owner, count)
        sizes = torch.bincount(owner, minlength=count).tolist()
        parts = vectors.split(sizes)
        x = torch.cat([row for part in parts for row in (self.token, part)])
        lengths = [size + 1 for size in sizes]
        rows = BlockRows(ragged(lengths, None, x.device))
        for layer in self.layers:
            x = layer(x, rows)
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).to(x.device)
        out: Tensor = self.norm(x[starts])
        return out
