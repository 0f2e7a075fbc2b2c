"""PackMIL's two branches, ``packmil@1`` (arXiv 2509.20923), from the paper.

In training the tiles of every slide are parted at random: half go to the main branch, gated
attention and one verdict a slide. The other halves of four slides make one hyperslide, pooled by
the same attention, which is asked which classes are in it (focal loss, 0.25 and 2, on as many
yes-or-no questions as there are classes; weight 0.2). At test the main branch sees the whole slide.

Not the paper's: bags lie packed without padding, so nothing is asked of a pack's length; its
attention-driven downsampling, whose layers see other input at test than in training, is left out.
Legend as in `head`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eosin.eval.heads.abmil import GatedAttention
from eosin.eval.heads.head import Criterion, Drawing, Verdict
from eosin.eval.heads.packed import Packed, bag_softmax, bag_sum

WIDTH = 256
MAIN = 0.5
SLIDES = 4
SHARE = 0.2
FOCAL = (0.25, 2.0)


class PackMil(GatedAttention):
    """See the module."""

    def __init__(self, dim: int, n_outputs: int) -> None:
        super().__init__(dim, n_outputs, WIDTH)
        self.draws = Drawing()
        self.contains = nn.Linear(WIDTH, n_outputs)

    def training_loss(self, packed: Packed, targets: Tensor, criterion: Criterion) -> Tensor:
        """The slides' loss on their main parts, and the hyperslides' on the others.

        Raises:
            TypeError: targets that are no classes, int64 [B].
        """
        if targets.dim() != 1 or targets.is_floating_point():
            raise TypeError("a hyperslide mixes classes: targets must be int64 [B]")
        main, rest = self._parts(packed)
        verdict: Verdict = self.forward(packed.take(main))
        loss = criterion(verdict.outputs, targets)
        if not len(rest):
            return loss
        slide = packed.bag[rest]
        hyper = torch.unique_consecutive(slide // SLIDES, return_inverse=True)[1]
        count = int(hyper[-1]) + 1
        offsets = torch.searchsorted(hyper, torch.arange(count + 1, device=hyper.device))
        mixed = Packed(packed.features[rest], offsets, packed.cells[rest])
        h = self.embed(mixed.features)
        said = self.contains(bag_sum(h, mixed, bag_softmax(self.score(h), mixed)))
        truth = said.new_zeros(said.shape).index_put((hyper, targets[slide]), said.new_ones(()))
        return loss + SHARE * focal_yes_no(said, truth)

    def _parts(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """Rows of the main branch, at least one a bag, and of the other; both sorted."""
        drawn = self.draws.uniform(len(packed.features), packed.features.device)
        lowest = drawn.new_full((packed.n_bags,), 2.0)
        lowest = lowest.scatter_reduce(0, packed.bag, drawn, "amin")
        main = (drawn < MAIN) | (drawn == lowest[packed.bag])
        return main.nonzero()[:, 0], (~main).nonzero()[:, 0]


def focal_yes_no(logits: Tensor, truth: Tensor) -> Tensor:
    """Focal loss of independent questions (Lin et al. 2017, eq. 5), mean over all.

    Args:
        logits: [B, C].
        truth: 0 or 1, likewise.
    """
    alpha, gamma = FOCAL
    surprise = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    weight = alpha * truth + (1 - alpha) * (1 - truth)
    return (weight * (1 - (-surprise).exp()) ** gamma * surprise).mean()
