"""Two layers of attention that falls with distance, ``spatial/alibi@1``: how tissues lie together.

Features go through one layer to 128; a class token and the tiles pass two pre-norm blocks of
self-attention with a Euclidean bias (4 heads, `distance_attention`) and a feed-forward of twice the
width; the class token goes to one linear layer. Turning or mirroring a slide changes nothing, and
memory is linear in its tiles. Legend as in `head`; H heads.
"""

import torch
from torch import Tensor, nn

from eosin.eval.heads.head import Dropout, Head, Verdict, embedder
from eosin.eval.heads.packed import Packed, bag_softmax
from eosin.pretrain.distance_attention import Places, alibi_slopes, distance_attention

WIDTH = 128
HEADS = 4
LAYERS = 2


class Spatial(Head):
    """See the module."""

    def __init__(self, dim: int, n_outputs: int) -> None:
        super().__init__()
        self.embed = embedder(dim, WIDTH)
        self.token = nn.Parameter(torch.randn(1, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(SpatialBlock() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.classify = nn.Linear(WIDTH, n_outputs)

    def forward(self, packed: Packed) -> Verdict:
        """Logits, and how much the class token attends to each tile in the last block."""
        sizes = packed.sizes
        extra = torch.arange(packed.n_bags, device=sizes.device)
        tiles = torch.arange(len(packed.features), device=sizes.device) + packed.bag + 1
        tokens = packed.offsets[:-1] + extra  # the class token before each bag
        h = self.embed(packed.features)
        x = h.new_empty(len(h) + packed.n_bags, WIDTH)
        x = x.index_copy(0, tiles, h).index_copy(0, tokens, self.token.expand(packed.n_bags, -1))
        position = x.new_zeros(len(x), 2, dtype=torch.float32)
        position[tiles] = packed.cells.float()
        placed = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        placed[tiles] = True
        numbers = torch.arange(packed.n_bags + 1, device=sizes.device)
        offsets = tuple((packed.offsets + numbers).tolist())
        places = Places(position, placed, offsets)
        for block in self.blocks[:-1]:
            x = block(x, places)
        last = self.blocks[-1]
        assert isinstance(last, SpatialBlock)
        weights = last.weights_of(x[tokens], x[tiles], packed)
        x = last(x, places)
        embedding = self.norm(x[tokens])
        return Verdict(self.classify(embedding), weights, embedding)


class SpatialBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    slopes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.inputs, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), Dropout(), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.register_buffer("slopes", alibi_slopes(HEADS))

    def forward(self, x: Tensor, places: Places) -> Tensor:
        """Tokens [T, W] to tokens [T, W]."""
        q, k, v = self._heads(x)
        x = x + self.output(distance_attention(q, k, v, self.slopes, places).flatten(1))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def weights_of(self, tokens: Tensor, tiles: Tensor, packed: Packed) -> Tensor:
        """Shares of each class token's attention among its tiles, mean over heads, [T]."""
        q = self._heads(tokens)[0][packed.bag]  # [T, H, C]
        k = self._heads(tiles)[1]
        scores = (q * k).sum(dim=2) * q.shape[2] ** -0.5  # no distance from the class token
        return bag_softmax(scores, packed).mean(dim=1)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.inputs(self.norm1(x)).view(len(x), 3, HEADS, -1)
        q, k, v = parts.unbind(dim=1)  # each [T, H, C]
        return q, k, v
