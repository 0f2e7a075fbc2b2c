"""Pooling by prototypes, ``prototypes/soft@1``: how much a slide has of each kind of tile.

Features go through one layer to 64; a tile belongs to each of 16 learnt prototypes by the softmax
of its cosines with them at a temperature of 0.1. A bag is the shares of the prototypes, and the
mean tile of each, weighted by belonging (a soft form of the mixtures of PANTHER, Song et al. 2024).
Legend as in `head`; P prototypes.
"""

import torch
import torch.nn.functional as F
from torch import nn

from eosin.eval.heads.head import Head, Verdict, embedder
from eosin.eval.heads.packed import Packed, bag_mean, bag_sum

WIDTH = 64
PROTOTYPES = 16
TEMPERATURE = 0.1


class PrototypePooling(Head):
    """See the module."""

    def __init__(self, dim: int, n_outputs: int) -> None:
        super().__init__()
        self.embed = embedder(dim, WIDTH)
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, WIDTH) * WIDTH**-0.5)
        self.classify = nn.Linear(PROTOTYPES * (1 + WIDTH), n_outputs)

    def forward(self, packed: Packed) -> Verdict:
        """A tile weighs as every other: it speaks through the prototypes that it belongs to."""
        h = self.embed(packed.features)  # [T, W]
        cosines = F.normalize(h, dim=1) @ F.normalize(self.prototypes, dim=1).T
        belongs = (cosines / TEMPERATURE).softmax(dim=1)  # [T, P]
        shares = bag_mean(belongs, packed)  # [B, P]
        means = torch.stack(
            [bag_sum(h, packed, belongs[:, p].contiguous()) for p in range(PROTOTYPES)], dim=1
        )  # [B, P, W]
        means = means / (shares * packed.sizes[:, None])[..., None].clamp_min(1e-6)
        embedding = torch.cat([shares, (shares[..., None] * means).flatten(1)], dim=1)
        weights = 1 / packed.sizes.to(h.dtype)[packed.bag]
        return Verdict(self.classify(embedding), weights, embedding)
