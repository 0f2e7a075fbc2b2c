"""Gated attention pooling, ``abmil/gated@1`` (Ilse et al. 2018, eq. 9).

Features go through one layer to 256 with ReLU and dropout 0.25; a tile's weight is the softmax over
the bag of ``w · (tanh(V h) ⊙ sigmoid(U h))`` with 128 hidden units; the weighted mean goes to one
linear layer. The bag is whole at training and at test. Shapes: N tiles, D features, C classes.
"""

import torch
from torch import Tensor, nn

WIDTH = 256
HIDDEN = 128
DROPOUT = 0.25


class GatedAttention(nn.Module):
    """See the module."""

    def __init__(self, dim: int, n_classes: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(dim, WIDTH), nn.ReLU(), nn.Dropout(DROPOUT))
        self.tanh, self.gate = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.weigh = nn.Linear(HIDDEN, 1)
        self.classify = nn.Linear(WIDTH, n_classes)

    def forward(self, bag: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [C] and the tiles' weights [N], which sum to 1.

        Args:
            bag: [N, D].
            cells: not used: the order and place of tiles change nothing.
        """
        h = self.embed(bag)  # [N, 256]
        scores = self.weigh(torch.tanh(self.tanh(h)) * torch.sigmoid(self.gate(h)))  # [N, 1]
        weights = scores.softmax(dim=0)
        return self.classify((weights * h).sum(dim=0)), weights[:, 0]
