"""Contrast between two sets of vectors over all ranks, where a patient is never its own negative.

InfoNCE (van den Oord et al. 2018; CLIP, arXiv 2103.00020) and the sigmoid loss (SigLIP, arXiv
2303.15343, eq. 1). A row is a sample; where one side of a sample is not known, the row is no query,
no positive and no negative. Legend: b samples of this rank, B those of all, W channels.
"""

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from eosin.pretrain.collectives import Collective

ContrastName: TypeAlias = Literal["infonce", "sigmoid"]


def contrast(
    queries: Tensor,
    keys: Tensor,
    known: Tensor,
    groups: Tensor,
    scale: Tensor,
    gather: Collective,
    rank: int = 0,
    ranks: int = 1,
    *,
    loss: ContrastName = "infonce",
    bias: Tensor | None = None,
) -> Tensor:
    """Mean over all known samples of how badly queries find their keys; a scalar, fp32.

    Averaged over ranks, losses and gradients are those of one process with all samples.

    Args:
        queries: unit length, [b, W].
        keys: likewise, of the same samples.
        known: samples with both, bool [b].
        groups: number of each sample's patient, int64 [b].
        scale: of the cosines, 1 / temperature, [].
        gather: `collectives.gather_rows` of the ranks.
        rank: of this process.
        ranks: how many there are; each has b samples.
        loss: of a query.
        bias: of the sigmoid, [].
    """
    keys, everyone = gather(keys.float()), gather(groups)
    there = gather(known.to(torch.uint8)).bool()
    own = torch.arange(len(queries), device=queries.device) + rank * len(queries)
    columns = torch.arange(len(keys), device=keys.device)
    positive = own[:, None] == columns  # [b, B]
    counts = there & ((groups[:, None] != everyone) | positive)
    logits = queries.float() @ keys.T * scale
    if loss == "infonce":
        # a query that is not known has nothing to be held against; its row is left out below
        logits = logits.masked_fill(~(counts | positive), -torch.inf)
        of_query = F.cross_entropy(logits, own, reduction="none")
    else:
        assert bias is not None
        sign = 2.0 * positive - 1
        of_query = -(F.logsigmoid(sign * (logits + bias)) * counts).sum(dim=1)
    total = there.sum().clamp(min=1)
    return (of_query * known).sum() * ranks / total
