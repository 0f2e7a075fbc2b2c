"""DSMIL, ``dsmil@1`` (Li et al. 2021), from the paper.

One stream says something of every tile and takes the largest for each class; the other weighs all
tiles by how like they are, in a learnt space of 128, to that critical tile of the class, and the
weighted means of all classes go to a layer over them. The verdict is the mean of both streams, the
loss the mean of their losses. Legend as in `head`.
"""

import torch
from torch import Tensor, nn

from eosin.eval.heads.head import Criterion, Dropout, Head, Verdict, embedder
from eosin.eval.heads.packed import Packed, bag_max, bag_softmax, bag_sum

WIDTH = 256
QUERY = 128


class Dsmil(Head):
    """See the module."""

    def __init__(self, dim: int, n_outputs: int) -> None:
        super().__init__()
        self.embed = embedder(dim, WIDTH, 0.0)
        self.instances = nn.Linear(WIDTH, n_outputs)
        self.query = nn.Sequential(nn.Linear(WIDTH, QUERY), nn.ReLU(), nn.Linear(QUERY, QUERY))
        self.value = nn.Sequential(Dropout(), nn.Linear(WIDTH, WIDTH))
        self.classify = nn.Conv1d(n_outputs, n_outputs, WIDTH)

    def forward(self, packed: Packed) -> Verdict:
        """Both streams' mean; a tile weighs by its mean over classes."""
        top, pooled, weights, embedding = self._streams(packed)
        return Verdict((top + pooled) / 2, weights, embedding)

    def training_loss(self, packed: Packed, targets: Tensor, criterion: Criterion) -> Tensor:
        """The mean of the two streams' losses."""
        top, pooled, _, _ = self._streams(packed)
        return (criterion(top, targets) + criterion(pooled, targets)) / 2

    def _streams(self, packed: Packed) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h = self.embed(packed.features)
        said = self.instances(h)  # [T, C]
        top = bag_max(said, packed)  # [B, C]
        query, value = self.query(h), self.value(h)
        critical = _first_of(said.detach() == top.detach()[packed.bag], packed)  # [B, C]
        likeness = torch.einsum("tq,tcq->tc", query, query[critical][packed.bag]) * QUERY**-0.5
        weights = bag_softmax(likeness, packed)  # [T, C]
        means = torch.stack(
            [bag_sum(value, packed, weights[:, c].contiguous()) for c in range(said.shape[1])], 1
        )  # [B, C, W]
        pooled: Tensor = self.classify(means)[:, :, 0]
        return top, pooled, weights.mean(dim=1), means.flatten(1)


def _first_of(holds: Tensor, packed: Packed) -> Tensor:
    """The first row of each bag at which something holds: bool [T, C] → int64 [B, C]."""
    rows = torch.arange(len(holds), device=holds.device)[:, None]
    far = torch.where(holds, rows, len(holds))
    none = far.new_full((packed.n_bags, holds.shape[1]), len(holds))
    index = packed.bag[:, None].expand_as(far)
    return none.scatter_reduce(0, index, far, "amin")
