"""SC-MIL's curriculum, ``abmil/contrastive@1`` (Juyal et al. 2024), from the paper.

Gated attention with a second layer on its embedding, to 128 channels of unit length: bags of one
class are drawn together and those of others apart (supervised contrastive loss at 0.1). It begins
with that alone and ends with the classes' loss alone: its share falls in a line with the training.
It needs several bags of a class in a batch. Legend as in `head`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from eosin.eval.heads.abmil import GatedAttention
from eosin.eval.heads.head import Criterion, Verdict
from eosin.eval.heads.losses import supervised_contrast
from eosin.eval.heads.packed import Packed

WIDTH = 256
PROJECTED = 128
TEMPERATURE = 0.1


class Contrastive(GatedAttention):
    """See the module."""

    def __init__(self, dim: int, n_outputs: int) -> None:
        super().__init__(dim, n_outputs, WIDTH)
        self.project = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, PROJECTED)
        )

    def training_loss(self, packed: Packed, targets: Tensor, criterion: Criterion) -> Tensor:
        """(1 - progress) of the contrast and `progress` of the criterion.

        Raises:
            TypeError: targets that are no classes, int64 [B].
        """
        if targets.dim() != 1 or targets.is_floating_point():
            raise TypeError("bags are alike by class: targets must be int64 [B]")
        verdict: Verdict = self(packed)
        unit = F.normalize(self.project(verdict.embedding), dim=1)
        contrast = supervised_contrast(unit, targets, TEMPERATURE)
        own = criterion(verdict.outputs, targets)
        return (1 - self.progress) * contrast + self.progress * own
