"""CLAM with one branch, ``clam/sb@1`` (Lu et al. 2021), from the paper.

Gated attention (512, 256), and clustering of instances: of a slide of class y, the 8 tiles with the
highest weights are positive and the 8 with the lowest negative for the classifier of y's instances;
for the classifiers of other classes the 8 highest are negative (classes exclude each other). Loss:
0.7 of the slide's and 0.3 of the instances'. Not the paper's: the instances' loss is cross-entropy,
where it has the smooth top-1 SVM. Legend as in `head`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eosin.eval.heads.abmil import GatedAttention
from eosin.eval.heads.head import Criterion, Verdict
from eosin.eval.heads.packed import Packed, bag_softmax, bag_sum, top_rows

WIDTH = 512
HIDDEN = 256
INSTANCES = 8
SHARE = 0.3


class Clam(GatedAttention):
    """See the module."""

    def __init__(self, dim: int, n_outputs: int) -> None:
        super().__init__(dim, n_outputs, WIDTH, HIDDEN)
        self.instances = nn.ModuleList(nn.Linear(WIDTH, 2) for _ in range(n_outputs))

    def forward(self, packed: Packed) -> Verdict:
        """Logits, and the tiles' weights."""
        return self._pool(packed)[0]

    def training_loss(self, packed: Packed, targets: Tensor, criterion: Criterion) -> Tensor:
        """The slide's loss and that of its extreme tiles.

        Raises:
            TypeError: targets that are no classes, int64 [B].
        """
        if targets.dim() != 1 or targets.is_floating_point():
            raise TypeError("the instances of CLAM are of classes: targets must be int64 [B]")
        verdict, h = self._pool(packed)
        own = self._instance_loss(h, verdict.weights, packed, targets)
        return (1 - SHARE) * criterion(verdict.outputs, targets) + SHARE * own

    def _pool(self, packed: Packed) -> tuple[Verdict, Tensor]:
        h = self.embed(packed.features)
        weights = bag_softmax(self.score(h), packed)
        embedding = bag_sum(h, packed, weights)
        return Verdict(self.classify(embedding), weights, embedding), h

    def _instance_loss(self, h: Tensor, weights: Tensor, packed: Packed, targets: Tensor) -> Tensor:
        """Mean over bags of the mean cross-entropy of their instances."""
        high, low = (top_rows(weights, packed, INSTANCES, largest) for largest in (True, False))
        terms, shares = [], []
        for label, classifier in enumerate(self.instances):
            of_class = targets[packed.bag[high]] == label
            for rows, truth in (
                (high[of_class], 1), (low[targets[packed.bag[low]] == label], 0),
                (high[~of_class], 0),
            ):  # fmt: skip
                wanted = torch.full((len(rows),), truth, device=h.device)
                terms.append(F.cross_entropy(classifier(h[rows]), wanted, reduction="none"))
                shares.append(packed.bag[rows])
        bag = torch.cat(shares)
        counts = torch.bincount(bag, minlength=packed.n_bags).to(h.dtype)
        return (torch.cat(terms) / counts[bag]).sum() / packed.n_bags
