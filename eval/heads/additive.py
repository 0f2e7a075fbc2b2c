"""Tile-additive verdicts, ``additive@1``: a slide's number is the mean of its tiles' numbers.

As WeakSTIL has it for stromal lymphocytes: every tile is given a value of its own, and only their
mean is held against the slide's label. What the verdict is made of can so be laid over the slide,
and adds up to it. Legend as in `head`.
"""

from torch import nn

from eosin.eval.heads.head import Head, Verdict, embedder
from eosin.eval.heads.packed import Packed, bag_mean

WIDTH = 256
HIDDEN = 64


class Additive(Head):
    """A network of two layers says something of every tile; the bag is their mean."""

    def __init__(self, dim: int, n_outputs: int) -> None:
        super().__init__()
        self.embed = embedder(dim, WIDTH)
        self.hidden = embedder(WIDTH, HIDDEN, 0.0)
        self.say = nn.Linear(HIDDEN, n_outputs)

    def forward(self, packed: Packed) -> Verdict:
        """`tile_outputs` are the tiles' numbers; each weighs the same."""
        h = self.hidden(self.embed(packed.features))
        said = self.say(h)  # [T, C]
        weights = 1 / packed.sizes.to(h.dtype)[packed.bag]
        return Verdict(bag_mean(said, packed), weights, bag_mean(h, packed), said)
