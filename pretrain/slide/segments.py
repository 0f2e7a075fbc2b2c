"""Sums and softmax over the tokens of each sequence of a packed stream.

Legend: T tokens, Q sequences, H heads, W channels.
"""

import torch
from torch import Tensor


def segment_softmax(scores: Tensor, segment: Tensor, count: int) -> Tensor:
    """The softmax within each segment: [T, H] → [T, H].

    Args:
        scores: [T, H].
        segment: of each row, int64 [T].
        count: Q.
    """
    scores = scores.float()
    index = segment[:, None].expand_as(scores)
    top = scores.new_full((count, scores.shape[1]), -torch.inf)
    top = top.scatter_reduce(0, index, scores.detach(), "amax")
    raised = (scores - top[segment]).exp()
    total = segment_sum(raised, segment, count)
    return raised / total[segment]


def segment_sum(values: Tensor, segment: Tensor, count: int) -> Tensor:
    """Sums over segments: [T, W] → [Q, W]; zeros for one without rows."""
    return values.new_zeros(count, *values.shape[1:]).index_add(0, segment, values)


def segment_mean(values: Tensor, segment: Tensor, count: int) -> Tensor:
    """Means over segments, in fp32: [T, W] → [Q, W]; zeros for one without rows."""
    values = values.float()
    ones = segment_sum(values.new_ones(len(values), 1), segment, count)
    return segment_sum(values, segment, count) / ones.clamp(min=1)
