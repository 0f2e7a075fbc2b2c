"""Gated attention pooling, ``abmil/gated@2`` (Ilse et al. 2018, eq. 9).

Features go through one layer to 256 with ReLU and dropout 0.25; a tile's weight is the softmax over
the bag of ``w · (tanh(V h) ⊙ sigmoid(U h))`` with 128 hidden units; the weighted mean goes to one
linear layer. The bag is whole at training and at test. Legend as in `head`.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eosin.eval.heads.head import DROPOUT, Drawing, Head, Verdict, embedder
from eosin.eval.heads.packed import Packed, bag_max, bag_softmax, bag_sum

WIDTH = 256
HIDDEN = 128
CHUNK_SEEDS = 2**48
"""More than any seed; a chunk's draws are of its number in these."""


class GatedAttention(Head):
    """See the module.

    Args:
        dim: D.
        n_outputs: C.
        width: channels of a tile.
        hidden: units of each gate.
        dropout: share of a tile's channels that are dropped in training.
        chunk_tiles: tiles of which activations are kept at a time; the others' are computed again
            in the backward pass, so memory does not grow with the bag. 0: all are kept.
    """

    def __init__(
        self,
        dim: int,
        n_outputs: int,
        width: int = WIDTH,
        hidden: int = HIDDEN,
        dropout: float = DROPOUT,
        chunk_tiles: int = 0,
    ) -> None:
        super().__init__()
        self.chunk_tiles = chunk_tiles
        self.embed = embedder(dim, width, dropout)
        self.tanh, self.gate = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.weigh = nn.Linear(hidden, 1)
        self.classify = nn.Linear(width, n_outputs)

    def score(self, h: Tensor) -> Tensor:  # [T, W] → [T]
        """What the weights are the softmax of."""
        gated: Tensor = self.weigh(torch.tanh(self.tanh(h)) * torch.sigmoid(self.gate(h)))
        return gated[:, 0]

    def forward(self, packed: Packed) -> Verdict:
        """Logits, and the tiles' weights."""
        if 0 < self.chunk_tiles < len(packed.features):
            embedding, weights = self._streamed(packed)
        else:
            h = self.embed(packed.features)
            weights = bag_softmax(self.score(h), packed)
            embedding = bag_sum(h, packed, weights)
        return Verdict(self.classify(embedding), weights, embedding)

    def _streamed(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """Embeddings [B, W] and weights [T], chunk by chunk.

        Each chunk is summed against its own largest score; the sums are then brought to that of the
        bag. It cancels in the quotient, so it needs no gradient.
        """
        tops, sums, totals, scores, bags = [], [], [], [], []
        for number, start in enumerate(range(0, len(packed.features), self.chunk_tiles)):
            part, first = _rows_of(packed, start, start + self.chunk_tiles)
            found = checkpoint(
                self._chunk, part.features, part, number, use_reentrant=False,
                preserve_rng_state=False,
            )  # fmt: skip
            top, weighted, total, score = cast(tuple[Tensor, Tensor, Tensor, Tensor], found)
            tops.append(top)
            sums.append(weighted)
            totals.append(total)
            scores.append(score)
            bags.append(first + torch.arange(part.n_bags, device=score.device))
        bag = torch.cat(bags)  # [pieces]
        top = torch.cat(tops)
        highest = top.new_full((packed.n_bags,), -torch.inf).scatter_reduce(0, bag, top, "amax")
        factor = (top - highest[bag]).exp()
        none = sums[0].new_zeros(packed.n_bags, sums[0].shape[1])
        weighted = none.index_add(0, bag, torch.cat(sums) * factor[:, None])
        total = none.new_zeros(packed.n_bags).index_add(0, bag, torch.cat(totals) * factor)
        weights = (torch.cat(scores).detach() - highest[packed.bag]).exp() / total[packed.bag]
        return weighted / total[:, None], weights.detach()

    def _chunk(
        self, features: Tensor, part: Packed, number: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the pieces of bags in a chunk: top score, weighted sum and sum of weights; scores."""
        for module in self.modules():
            if isinstance(module, Drawing):  # the same again when it is computed again
                module.restart(module.seed % CHUNK_SEEDS + (number + 1) * CHUNK_SEEDS)
        h = self.embed(features)
        score = self.score(h)
        top = bag_max(score.detach()[:, None], part)[:, 0]
        raised = (score - top[part.bag]).exp()
        total = raised.new_zeros(part.n_bags).index_add(0, part.bag, raised)
        return top, bag_sum(h, part, raised), total, score.detach()


def _rows_of(packed: Packed, start: int, stop: int) -> tuple[Packed, int]:
    """The pieces of bags in rows [start, stop), and the number of the first such bag."""
    inside = packed.offsets.clamp(start, stop)
    first = int(torch.searchsorted(packed.offsets, start, right=True)) - 1
    offsets = torch.unique_consecutive(inside) - start
    return Packed(packed.features[start:stop], offsets, packed.cells[start:stop]), first
