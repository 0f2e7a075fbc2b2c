"""What passes from the teacher's side of a step to the losses, the moving averages and the figures.

A step's samples may be taken in parts, one after another; what was made of the parts joins again.
Legend: C global crops, N patches a crop, M rows of logits, K prototypes, D width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eosin.pretrain.network import Logits
from eosin.pretrain.prototype_loss import Scaling


class Targets(NamedTuple):
    """The teacher's side of one cross-entropy: its logits, scaled to targets; no M × K tensor."""

    logits: Logits
    scaling: Scaling


class Taught(NamedTuple):
    """What the teacher says of some samples' global crops."""

    features: Tensor  # CLS [C, D]
    cls: Targets | None
    masked: Targets | None
    patches: Tensor | None  # [C, N, D], where a loss needs all of them


class Outputs(NamedTuple):
    """What the health figures and the moving centres are computed from; no gradients."""

    features: Tensor  # the teacher's CLS [C, D]
    cls: Targets | None
    masked: Targets | None
    student: Logits | None  # of the global crops' CLS tokens, M = C


def join_logits(parts: Sequence[Logits]) -> Logits:
    """The logits of one head for all parts of a step."""
    return parts[0] if len(parts) == 1 else parts[0]._replace(x=torch.cat([p.x for p in parts]))


def join_outputs(parts: Sequence[Outputs]) -> Outputs:
    """The outputs of all parts of a step."""
    if len(parts) == 1:
        return parts[0]
    student = [part.student for part in parts if part.student is not None]
    return Outputs(
        features=torch.cat([part.features for part in parts]),
        cls=_join_targets([part.cls for part in parts if part.cls is not None]),
        masked=_join_targets([part.masked for part in parts if part.masked is not None]),
        student=join_logits(student) if student else None,
    )


def _join_targets(parts: Sequence[Targets]) -> Targets | None:
    if not parts:
        return None
    scaling = Scaling.join([part.scaling for part in parts])
    return Targets(join_logits([part.logits for part in parts]), scaling)
