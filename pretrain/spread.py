"""Spread of features on the sphere: KoLeo, and the kernel density of Virchow2 with the right sign.

Both are minimised by features that lie apart. The kernel density has as many conventions as
authors; with cos_ij the cosine of samples i and j and n the number of terms in the inner sum,

    ``mean_of_logs``   mean_i log Σ_j exp(κ cos_ij)
    ``log_of_mean``    log mean_i Σ_j exp(κ cos_ij)

and each sum over n where `density` is ``mean`` (a constant: log n). Who uses which:

| | κ | j = i | form | weight |
|---|---|---|---|---|
| Wang and Isola 2020, arXiv 2005.10242, eq. 2 | 2t = 4 | no | log_of_mean, mean, less κ | 1 |
| Virchow2, arXiv 2408.00738 | 5 | not said | kernel density | 0.05 |
| OpenMidnight | 5 | yes | *minus* mean_of_logs, sum: rewards collapse | 0.05 |
| nanopath | 10 | no | log-sum-exp, mean | 0.005, ramped |

(-t |x - y|² = 2t cos - 2t on the sphere.) All arithmetic is fp32, under autocast too.
Legend: B samples, G groups, n samples a group, D width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from eosin.pretrain.collectives import Collective, identity


@dataclass(frozen=True, kw_only=True)
class SpreadConfig:
    """Which spread, how much of it, and among which samples."""

    kind: Literal["koleo", "kde"] = "koleo"
    """Distance to the nearest neighbour (DINOv2), or kernel density (Virchow2)."""
    weight: float = 0.1
    """In the total; 0 turns it off. DINOv2 takes 0.1 for koleo, Virchow2 0.05 for kde."""
    over: Literal["group", "batch"] = "batch"
    """Neighbours within each group of `group_size` samples, the same whatever the batch is split
    over and without communication; or within the whole batch, gathered over ranks."""
    kappa: float = 5.0
    """kde: κ, the concentration of the kernel exp(κ cos); larger looks at nearer samples."""
    include_self: bool = False
    """kde: a sample's own term, exp(κ), in its density; in, it weakens the push on a sample that
    is alone, and bounds the loss from below by κ (less log n)."""
    reduction: Literal["mean_of_logs", "log_of_mean"] = "mean_of_logs"
    """kde: each sample's log density, averaged; or the log of the density averaged over all pairs,
    where the closest pairs take most of the gradient."""
    density: Literal["mean", "sum"] = "mean"
    """kde: average or sum over neighbours inside the logarithm; differs by a constant."""

    def __post_init__(self) -> None:
        """Refuses a negative weight, which would reward collapse, and a kernel without width."""
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight={self.weight} must be finite and at least 0")
        if not 0 < self.kappa <= 80:
            raise ValueError(f"kappa={self.kappa} must lie in (0, 80]")


SpreadOf: TypeAlias = Callable[[Tensor, SpreadConfig, slice | None], Tensor]


def spread_loss(
    features: Tensor,
    config: SpreadConfig,
    group_size: int,
    gather: Collective = identity,
    rank: int = 0,
    of: SpreadOf | None = None,
) -> Tensor:
    """Spread of one view's features, without the weight; a scalar in fp32.

    Over groups: the mean of the groups' losses. Over the batch: the loss of this rank's rows among
    all those that `gather` brings together, so that losses and gradients averaged over ranks are
    those of the concatenated batch. (All rows of all ranks, where the logarithm is of their mean.)

    Args:
        features: [B, D], before the head; any floating type.
        config: of the loss.
        group_size: n, samples a group; read where `over` is ``group``.
        gather: `collectives.gather_rows` of the ranks that share a batch.
        rank: of this process among them.
        of: `spread_of`, or what a compiler made of it.

    Raises:
        ValueError: group_size does not divide B.
    """
    of = of or spread_of
    if config.over == "batch":
        everyone = gather(features)
        own = slice(rank * len(features), (rank + 1) * len(features))
        whole = config.kind == "kde" and config.reduction == "log_of_mean"
        return of(everyone, config, None if whole else own)
    if group_size < 1 or len(features) % group_size:
        raise ValueError(f"group_size={group_size} must divide the batch of {len(features)}")
    features = features.unflatten(0, (-1, group_size))  # [G, n, D]
    return of(features, config, None)


def spread_of(features: Tensor, config: SpreadConfig, own: slice | None) -> Tensor:
    """The loss of rows among others, by its kind; see `koleo_loss` and `kde_loss`."""
    if config.kind == "koleo":
        return koleo_loss(features, own=own)
    return kde_loss(features, config, own)


def unit_rows(x: Tensor) -> Tensor:
    """Rows over their length, along the last dimension, fp32; zero rows stay zero.

    The largest entry is divided out first, so that no finite row overflows when squared; what is
    left has a length of at least one, or is a row without an entry above 1e-8.
    """
    x = x.float()
    largest = x.detach().abs().amax(dim=-1, keepdim=True).clamp(min=1e-8)
    return F.normalize(x / largest, dim=-1, eps=0.5)


def koleo_loss(features: Tensor, eps: float = 1e-8, own: slice | None = None) -> Tensor:
    """Minus the mean log distance to the nearest neighbour (arXiv 1806.03198, eq. 2), fp32.

    Distances are between unit vectors. Duplicates give a large finite value and no gradient; one
    sample alone gives zero.

    Args:
        features: [B, D], or [G, n, D] for the mean over groups.
        eps: added to the distance.
        own: rows whose loss is meant, of [B, D]; all are neighbours. None: all.
    """
    if features.shape[-2] < 2:
        return _zero(features)
    with torch.autocast(features.device.type, enabled=False):
        y = unit_rows(features)
        x = y if own is None else y[own]
        with torch.no_grad():
            similarity = x @ y.mT  # [..., n, n], or [own, B]
            similarity = similarity.masked_fill(_self_pairs(similarity, own), -2)
            nearest = similarity.argmax(dim=-1, keepdim=True)  # [..., n, 1]
        neighbours = y.take_along_dim(nearest, dim=-2)
        # the eps inside keeps the gradient of the root finite at zero distance
        distance = ((x - neighbours).square().sum(dim=-1) + eps**2).sqrt()
        return -torch.log(distance + eps).mean()


def kde_loss(features: Tensor, config: SpreadConfig, own: slice | None = None) -> Tensor:
    """Log density of the features under a kernel on each of them, fp32: large when collapsed.

    The gradients of a row's log density by its cosines add up to at most κ, duplicates or not. One
    sample alone gives zero.

    Args:
        features: [B, D], or [G, n, D] for the mean over groups.
        config: κ and the conventions; see the head of this file.
        own: rows whose loss is meant, of [B, D]; all count towards their density. None: all.
    """
    n = features.shape[-2]
    if n < 2:
        return _zero(features)
    with torch.autocast(features.device.type, enabled=False):
        y = unit_rows(features)
        x = y if own is None else y[own]
        exponent = config.kappa * (x @ y.mT)  # [..., n, n], or [own, B]
        if not config.include_self:
            exponent = exponent.masked_fill(_self_pairs(exponent, own), -math.inf)
        log_density = torch.logsumexp(exponent, dim=-1)  # [..., n]
        if config.density == "mean":
            log_density = log_density - math.log(n if config.include_self else n - 1)
        if config.reduction == "log_of_mean":
            log_density = torch.logsumexp(log_density, dim=-1) - math.log(n)
        return log_density.mean()


def _self_pairs(cosines: Tensor, own: slice | None) -> Tensor:
    """Where a row of a matrix of cosines [..., n, N] meets itself, bool [n, N]."""
    rows, columns = (torch.arange(size, device=cosines.device) for size in cosines.shape[-2:])
    first = 0 if own is None else int(own.start)
    return rows[:, None] + first == columns


def _zero(features: Tensor) -> Tensor:
    return (features.float() * 0).sum()
