"""Mean pooling, ``mean@1``: the floor of every claim. Legend as in `head`."""

from torch import nn

from eosin.eval.heads.head import Head, Verdict, embedder
from eosin.eval.heads.packed import Packed, bag_mean

WIDTH = 256


class MeanPooling(Head):
    """One layer to 256, the mean over the bag, one linear layer."""

    def __init__(self, dim: int, n_outputs: int) -> None:
        super().__init__()
        self.embed = embedder(dim, WIDTH)
        self.classify = nn.Linear(WIDTH, n_outputs)

    def forward(self, packed: Packed) -> Verdict:
        """The verdict is the mean of what its tiles say, so each weighs the same."""
        h = self.embed(packed.features)  # [T, 256]
        embedding = bag_mean(h, packed)
        weights = 1 / packed.sizes.to(h.dtype)[packed.bag]
        return Verdict(self.classify(embedding), weights, embedding, self.classify(h))
