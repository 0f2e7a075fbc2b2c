"""TransMIL, ``transmil/grid@2`` (Shao et al. 2021), with tiles at their true places.

Features go through one layer to 256; a class token and the tiles pass a layer of self-attention (8
heads), then depth-wise convolutions of 7, 5 and 3 cells over the slide's grid (PPEG), then a second
layer of self-attention; the class token goes to one linear layer.

Two things are not the paper's. Its convolutions run over a square that tiles fill in the order in
which they are stored, padded with copies of the first; here every tile stands in its own cell of
the slide, and empty cells are zero. And attention is exact, where the paper approximates it
(Nyström); its memory is linear all the same (scaled dot-product attention). Legend as in `head`; H
heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eosin.eval.heads.head import Dropout, Head, Verdict, embedder
from eosin.eval.heads.packed import Packed

WIDTH = 256
HEADS = 8
KERNELS = (7, 5, 3)


class TransMil(Head):
    """See the module."""

    def __init__(self, dim: int, n_outputs: int) -> None:
        super().__init__()
        self.embed = embedder(dim, WIDTH)
        self.token = nn.Parameter(torch.zeros(1, WIDTH))
        self.before, self.after = SelfAttention(), SelfAttention()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(WIDTH, WIDTH, size, padding=size // 2, groups=WIDTH) for size in KERNELS
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.classify = nn.Linear(WIDTH, n_outputs)

    def forward(self, packed: Packed) -> Verdict:
        """Logits, and how much the class token attends to each tile in the last layer."""
        h = self.embed(packed.features)  # [T, 256]
        bags = zip(h.split(packed.sizes.tolist()), packed.split(), strict=True)
        found = [self._bag(tiles, bag.cells) for tiles, bag in bags]
        tokens = torch.stack([token for token, _ in found])
        return Verdict(self.classify(tokens), torch.cat([w for _, w in found]), tokens)

    def _bag(self, tiles: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """The class token of one bag [256], and the weights of its tiles [N]."""
        tokens = torch.cat([self.token, tiles])  # [1 + N, 256]
        tokens = self.before(tokens)
        tokens = torch.cat([tokens[:1], self._place(tokens[1:], cells)])
        weights = self.after.weights_of_first(tokens)[1:]
        tokens = self.after(tokens)
        return self.norm(tokens[0]), weights / weights.sum()

    def _place(self, tiles: Tensor, cells: Tensor) -> Tensor:
        """Tiles [N, 256] plus what the convolutions see around their cells."""
        columns, rows = (int(cells[:, axis].max()) + 1 for axis in (0, 1))
        grid = tiles.new_zeros(rows * columns, WIDTH)
        flat = cells[:, 1] * columns + cells[:, 0]
        grid = grid.index_copy(0, flat, tiles)
        image = grid.T.reshape(1, WIDTH, rows, columns)
        seen = torch.stack([conv(image) for conv in self.convolutions]).sum(dim=0)
        return tiles + seen.reshape(WIDTH, -1).T[flat]


class SelfAttention(nn.Module):
    """x + attention(norm(x)) over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inputs = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.output = nn.Sequential(nn.Linear(WIDTH, WIDTH), Dropout())

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [N, 256] to tokens [N, 256]."""
        q, k, v = self._heads(tokens)
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]  # [H, N, 32]
        attended: Tensor = self.output(mixed.transpose(0, 1).reshape(len(tokens), WIDTH))
        return tokens + attended

    def weights_of_first(self, tokens: Tensor) -> Tensor:
        """How much the first token attends to each, mean over heads, [N]."""
        q, k, _ = self._heads(tokens)
        scores = torch.einsum("hd,hnd->hn", q[:, 0], k) * q.shape[-1] ** -0.5
        weights: Tensor = scores.softmax(dim=1).mean(dim=0)
        return weights

    def _heads(self, tokens: Tensor) -> Tensor:
        parts: Tensor = self.inputs(self.norm(tokens)).view(len(tokens), 3, HEADS, -1)
        return parts.permute(1, 2, 0, 3)  # [3, H, N, 32]
