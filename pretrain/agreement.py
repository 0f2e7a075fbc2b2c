"""DINO and iBOT between a student's and a teacher's logits, whatever they are logits of.

Legend: B samples, V global views, L local views, S = V + L, M masked tokens, K prototypes, Db
bottleneck.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eosin.pretrain.collectives import Collective, LogSumOverRanks
from eosin.pretrain.ema import follow
from eosin.pretrain.network import HeadLogits, Logits, ObjectiveConfig
from eosin.pretrain.prototype_kernels import LossKernels
from eosin.pretrain.prototype_loss import (
    centred_scaling,
    mean_logits,
    prototype_cross_entropy,
    sinkhorn_scalings,
)
from eosin.pretrain.targets import Targets, join_logits


class HeadTargets(NamedTuple):
    """What a teacher's heads say of the CLS tokens and of the masked ones."""

    cls: Targets | None
    masked: Targets | None


@torch.no_grad()
def scaled_targets(
    parts: Sequence[HeadLogits],
    objective: ObjectiveConfig,
    temperature: float,
    kernels: LossKernels,
    centres: Mapping[str, Tensor],
    over_ranks: LogSumOverRanks | None,
) -> list[HeadTargets]:
    """Targets of one teacher for the parts of a step, scaled together.

    Args:
        parts: its logits.
        objective: whose `targets` say how they are scaled.
        temperature: of the teacher.
        kernels: see `choose_kernels`.
        centres: with ``targets=centre``, of each head's logits (``cls``, ``masked``) [K].
        over_ranks: sums of the ranks that share the step; None for one process.
    """
    cls = [part.cls for part in parts if part.cls is not None]
    masked = [part.masked for part in parts if part.masked is not None]
    heads = {name: of for name, of in (("cls", cls), ("masked", masked)) if of}
    whole = {name: join_logits(of) for name, of in heads.items()}
    if objective.targets == "sinkhorn":
        scalings = sinkhorn_scalings(
            list(whole.values()), temperature, kernels, over_ranks=over_ranks
        )
    else:
        scalings = [
            centred_scaling(*logits, centres[name], temperature, kernels)
            for name, logits in whole.items()
        ]
    made: dict[str, list[Targets]] = {}
    for (name, of), scaling in zip(heads.items(), scalings, strict=True):
        made[name] = [
            Targets(logits, rows)
            for logits, rows in zip(of, scaling.split([len(p.x) for p in of]), strict=True)
        ]
    none = [None] * len(parts)
    return [
        HeadTargets(*both)
        for both in zip(made.get("cls", none), made.get("masked", none), strict=True)
    ]


def pairs_loss(
    student: Logits,
    teacher: Targets,
    views: int,
    n_local: int,
    batch: int,
    local_weight: float,
    kernels: LossKernels,
) -> Tensor:
    """Cross-entropies of each student view with the teacher's other views, [S].

    Args:
        student: of S · B tokens, view-major.
        teacher: of V · B tokens, likewise.
        views: V.
        n_local: L.
        batch: B.
        local_weight: factor on the pairs of a local view.
        kernels: see `choose_kernels`.
    """
    # Every pair of different views weighs the same: 1/18 with 8 local crops (DINOv2).
    n_pairs = views * (views - 1) + n_local * views
    mix = student.x.new_ones(views + n_local, views)
    mix[:views].fill_diagonal_(0)
    mix[views:] *= local_weight
    return prototype_cross_entropy(
        student.x.unflatten(0, (-1, batch)),
        student.prototypes,
        teacher.logits.x.unflatten(0, (-1, batch)),
        teacher.logits.prototypes,
        teacher.scaling,
        mix / n_pairs,
        student.x.new_full((batch,), 1 / batch),
        kernels=kernels,
    )


def masked_loss(student: Logits, teacher: Targets, weights: Tensor, kernels: LossKernels) -> Tensor:
    """Weighted cross-entropy of masked tokens (iBOT), a scalar.

    Args:
        student: of M tokens.
        teacher: of the same.
        weights: fp32 [M].
        kernels: see `choose_kernels`.
    """
    return prototype_cross_entropy(
        student.x[None],
        student.prototypes,
        teacher.logits.x[None],
        teacher.logits.prototypes,
        teacher.scaling,
        torch.ones(1, 1, device=student.x.device),
        weights,
        kernels=kernels,
    )[0]


def follow_logits(
    centre: Tensor, logits: Logits, momentum: float, total: Collective, bad: Tensor | None
) -> None:
    """Centre ← m · centre + (1 - m) · mean logits over ranks; as it is where none has a row.

    Args:
        centre: [K], changed in place.
        logits: of this rank.
        momentum: m.
        total: sums over ranks.
        bad: 1 to leave it as it is, fp32 [].
    """
    x = logits.x.float()
    sums = total(torch.cat([x.sum(dim=0), x.new_full((1,), len(x))]))
    mean = mean_logits((sums[:-1] / sums[-1].clamp(min=1))[None], logits.prototypes)
    none = (sums[-1] == 0).float()
    stay = none if bad is None else torch.maximum(bad, none)
    follow([centre], [mean], momentum, stay)
