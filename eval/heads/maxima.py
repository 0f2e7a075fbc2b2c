"""Max pooling, ``max@1``: each channel by the tile that has most of it. Legend as in `head`."""

import torch
from torch import nn

from eosin.eval.heads.head import Head, Verdict, embedder
from eosin.eval.heads.packed import Packed, bag_max

WIDTH = 256


class MaxPooling(Head):
    """One layer to 256, the largest of each channel over the bag, one linear layer."""

    def __init__(self, dim: int, n_outputs: int) -> None:
        super().__init__()
        self.embed = embedder(dim, WIDTH)
        self.classify = nn.Linear(WIDTH, n_outputs)

    def forward(self, packed: Packed) -> Verdict:
        """A tile weighs by the share of channels that it alone or with others has most of."""
        h = self.embed(packed.features)  # [T, 256]
        embedding = bag_max(h, packed)  # [B, 256]
        with torch.no_grad():
            won = (h == embedding[packed.bag]) & (h > 0)
            shares = won.to(h.dtype).sum(dim=1) + 1e-12
            total = shares.new_zeros(packed.n_bags).index_add(0, packed.bag, shares)
        return Verdict(self.classify(embedding), shares / total[packed.bag], embedding)
