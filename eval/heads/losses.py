"""Losses of verdicts on bags: classes, ordered classes, and bags that should be alike.

Legend: B bags, C classes, W channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from eosin.eval.heads.head import Criterion


def balanced_weights(counts: Tensor) -> Tensor:
    """Weights of classes by which all count alike: n / (C · n_c); 0 for a class without bags.

    Args:
        counts: of the training bags, [C].
    """
    counts = counts.float()
    weights = counts.sum() / (len(counts) * counts.clamp_min(1))
    return torch.where(counts > 0, weights, 0.0)


def cross_entropy(weights: Tensor | None = None, gamma: float = 0.0) -> Criterion:
    """Cross-entropy of classes, or focal loss (Lin et al. 2017, eq. 5), mean over bags.

    A bag counts by its class's weight; the mean is over bags, not over weights, so a batch that
    happens to hold light classes weighs less.

    Args:
        weights: of classes, [C].
        gamma: how much less a bag counts that is already told; 0: cross-entropy.
    """

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        surprise = F.cross_entropy(outputs, targets, reduction="none")
        if gamma:
            surprise = (1 - (-surprise).exp()) ** gamma * surprise
        if weights is not None:
            surprise = surprise * weights.to(surprise.device)[targets]
        return surprise.mean()

    return criterion


def ordinal(outputs: Tensor, targets: Tensor) -> Tensor:
    """Ordered classes as C - 1 questions, "is it higher than k?" (Niu et al. 2016).

    Args:
        outputs: logits of "higher than k", [B, C - 1].
        targets: classes, int64 [B].
    """
    levels = torch.arange(outputs.shape[1], device=outputs.device)
    truth = (targets[:, None] > levels).to(outputs.dtype)
    return F.binary_cross_entropy_with_logits(outputs, truth, reduction="none").sum(dim=1).mean()


def ordinal_class(outputs: Tensor) -> Tensor:
    """The class that `ordinal` logits [B, C - 1] speak for: how many questions are answered yes."""
    return (outputs > 0).sum(dim=1)


def supervised_contrast(unit: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, eq. 2), mean over bags with a like one.

    Args:
        unit: embeddings of unit length, [B, W].
        targets: classes, int64 [B].
        temperature: of the cosines.

    Returns:
        A scalar; 0 where no two bags are of one class.
    """
    cosines = unit @ unit.T / temperature
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    alike = (targets[:, None] == targets) & ~itself
    log_share = cosines - cosines.masked_fill(itself, -torch.inf).logsumexp(dim=1, keepdim=True)
    counts = alike.sum(dim=1)
    of_bag = -(log_share * alike).sum(dim=1) / counts.clamp_min(1)
    known = counts > 0
    return (of_bag * known).sum() / known.sum().clamp_min(1)
