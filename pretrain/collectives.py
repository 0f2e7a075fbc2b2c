"""What crosses ranks inside the objective: sums, log-sums and gathered rows.

Each function takes a process group, or None for a run of one process, and returns the operation;
without a group that is the identity. Nothing here knows a default group. A collective is one call
on every rank, so a rank without rows (no masked patch) calls it with the same shape as the others.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

Collective: TypeAlias = Callable[[Tensor], Tensor]
LogSumOverRanks: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]
"""Log-sum-exp of each entry over the ranks, given what bounds it on all of them, or None."""


def identity(x: Tensor) -> Tensor:
    """Of one process: what the others hold is what it holds."""
    return x


def sum_over_ranks(group: dist.ProcessGroup | None) -> Collective:
    """Elementwise sum, any shape, equal on all ranks; carries no gradient."""
    return _reduce(group, dist.ReduceOp.SUM)


def max_over_ranks(group: dist.ProcessGroup | None) -> Collective:
    """Elementwise maximum, any shape, equal on all ranks; carries no gradient."""
    return _reduce(group, dist.ReduceOp.MAX)


def _reduce(group: dist.ProcessGroup | None, operation: Any) -> Collective:
    @torch.no_grad()
    def reduced(x: Tensor) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, operation, group=group)
        return out

    return identity if group is None else reduced


def mean_over_ranks(group: dist.ProcessGroup | None) -> Collective:
    """Elementwise mean, each rank counting alike; carries no gradient.

    Where ranks hold different numbers of rows, sum the rows and their count instead.
    """
    if group is None:
        return identity
    total, ranks = sum_over_ranks(group), group.size()
    return lambda x: total(x) / ranks


def lse_over_ranks(group: dist.ProcessGroup | None) -> LogSumOverRanks:
    """Elementwise log Σ_ranks exp(x), any shape, floating; carries no gradient.

    What bounds the sum is taken out first, so no x overflows: a bound that is given, equal on all
    ranks and close enough that exp(x - bound) is a number, or the maximum over the ranks, which
    takes a second exchange. A rank without rows gives -inf, the logarithm of its empty sum, and
    changes nothing; -inf everywhere stays -inf.
    """

    @torch.no_grad()
    def log_total(x: Tensor, bound: Tensor | None = None) -> Tensor:
        if group is None:
            return x
        top = bound
        if top is None:
            top = x.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
            top = torch.where(torch.isneginf(top), 0.0, top)  # -inf less -inf would be NaN
        scaled = (x - top).exp()
        dist.all_reduce(scaled, dist.ReduceOp.SUM, group=group)
        return scaled.log() + top

    return log_total


def gather_rows(group: dist.ProcessGroup | None) -> Collective:
    """[B, …] of every rank to [ranks · B, …] in rank order, on every rank; differentiable.

    B is the same on all ranks. The backward pass sums over the ranks what each of them sends to a
    row. So when every rank computes one and the same loss of all the rows, and gradients of the
    parameters are then *averaged* over ranks (as DDP and FSDP do), the result is the gradient of
    that loss in one process that holds the whole batch.
    """

    def gather(x: Tensor) -> Tensor:
        out: Tensor = _GatherRows.apply(x, group)
        return out

    return identity if group is None else gather


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty((group.size() * len(x), *x.shape[1:]))
        # the newer of its names, where this torch has it
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        gather(out, x.contiguous(), group=group)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # All-reduce and not reduce-scatter, which gloo lacks: features of a batch are small.
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, dist.ReduceOp.SUM, group=ctx.group)
        return total.chunk(ctx.group.size())[ctx.group.rank()], None
