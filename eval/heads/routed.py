"""A mixture of frozen heads of other cohorts, routed by the slide (MoE-PKT of Path-PKT).

Not a head on tiles: its bag is what every frozen head makes of a slide, one row each, with the mean
of the slide's tiles beside it (`frozen_bag`). Each row goes through a layer of its own with ReLU; a
linear router looks at the mean, and the largest shares of its softmax weigh them, as they are. Two
terms keep the router awake: balance over the batch, and small logits (0.01 each). Deviation: the
router sees the mean of the tiles, where the source has an AB-MIL; the balance is over the batch,
where the source's is over one bag and so cannot balance. Legend as in `head`; K frozen heads, E
channels of their embeddings, D features.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from eosin.eval.heads.head import Criterion, Dropout, Head, Verdict
from eosin.eval.heads.packed import Packed
from eosin.eval.heads.training import Bag, Fitted

WIDTH = 128
TOP = 5
BALANCE, LOGITS = 0.01, 0.01


def frozen_bag(bag: Bag, heads: Sequence[Fitted]) -> Bag:
    """What frozen heads make of a slide: K rows of E + D numbers.

    Args:
        bag: of the slide's tiles.
        heads: K, fitted elsewhere; their embeddings are of one width.
    """
    mean = bag.features.astype(np.float32).mean(axis=0)
    rows = [np.concatenate([head.embedding(bag), mean]) for head in heads]
    cells = np.stack([np.arange(len(rows)), np.zeros(len(rows), np.int64)], axis=1)
    return Bag(
        slide_id=bag.slide_id,
        tile_ids=[f"{bag.slide_id} by head {number}" for number in range(len(rows))],
        features=np.stack(rows),
        cells=cells,
    )


class Routed(Head):
    """See the module.

    Args:
        dim: E + D.
        n_outputs: C.
        heads: K.
        embedding: E.
    """

    def __init__(self, dim: int, n_outputs: int, heads: int, embedding: int) -> None:
        super().__init__()
        self.heads, self.embedding = heads, embedding
        self.experts = nn.ModuleList(nn.Linear(embedding, WIDTH) for _ in range(heads))
        self.router = nn.Linear(dim - embedding, heads)
        self.dropout = Dropout()
        self.classify = nn.Linear(WIDTH, n_outputs)
        self._routed: tuple[Tensor, Tensor] | None = None

    def forward(self, packed: Packed) -> Verdict:
        """Logits; a row's weight is its share of the router, over those that count."""
        rows = packed.features.unflatten(0, (-1, self.heads))  # [B, K, E + D]
        logits = self.router(rows[:, 0, self.embedding :])  # [B, K]
        shares = logits.softmax(dim=1)
        top = shares.topk(min(TOP, self.heads), dim=1)
        kept = torch.zeros_like(shares).scatter(1, top.indices, top.values)
        said = torch.stack(
            [
                torch.relu(expert(rows[:, at, : self.embedding]))
                for at, expert in enumerate(self.experts)
            ],
            dim=1,
        )  # [B, K, W]
        mixed = self.dropout((said * kept[:, :, None]).sum(dim=1))
        self._routed = logits, shares
        weights = (kept / kept.sum(dim=1, keepdim=True)).flatten()
        return Verdict(self.classify(mixed), weights, mixed)

    def training_loss(self, packed: Packed, targets: Tensor, criterion: Criterion) -> Tensor:
        """The criterion, and what keeps the router from one head and from large logits."""
        loss = super().training_loss(packed, targets, criterion)
        assert self._routed is not None
        logits, shares = self._routed
        used = shares.mean(dim=0)  # of the batch
        balance = self.heads * used.square().sum()
        return loss + BALANCE * balance + LOGITS * logits.logsumexp(dim=1).square().mean()
