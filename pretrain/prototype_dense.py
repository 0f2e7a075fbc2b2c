"""The prototype losses where the logits fit in memory: on the CPU, each matrix computed once.

There a matrix product costs more than holding its result, so targets are kept, and the student's
logits become the gradient's matrix in place. For the legend see `prototype_loss`, which calls this.
"""

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eosin.pretrain.prototype_kernels import (
    LossKernels,
    operand,
    product,
    shifted_exp_,
    sum_dtype,
)

EXPONENT_RANGE = 60.0
"""Sums of products of exp(±30) and scalings of that range stay normal numbers in fp32."""


def is_dense(rows: int, prototypes: int, like: Tensor, kernels: LossKernels) -> bool:
    """Whether rows × prototypes logits beside the tensor `like` are to be held."""
    return like.device.type == "cpu" and 0 < rows * prototypes <= kernels.dense_elements


def scaled_logits(x: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """All logits over the temperature [M, K], e, of `x` [M, Db] and `weight` [K, Db]."""
    e = sum_dtype(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return product(x.to(e) / temperature, weight.to(e))


def dense_sinkhorn(
    x: Tensor,
    weight: Tensor,
    temperature: float,
    iterations: int,
) -> Generator[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """(log_u [K], log_v [M], targets [M, K]): `sinkhorn_scalings` on held logits, M > 0.

    Yields the log-sums over this rank's rows [K], and is sent those over all rows. Works by
    products with the matrix exp(l / τ) where its range allows, else in logarithms.
    """
    logits = scaled_logits(x, weight, temperature)
    low, high = (float(bound) for bound in logits.aminmax())
    log_v = logits.new_zeros(len(x))
    if high - low > EXPONENT_RANGE:
        for _ in range(iterations):
            log_u = -(yield torch.logsumexp(logits + log_v[:, None], dim=0))
            log_v = -torch.logsumexp(logits + log_u, dim=1)
        return log_u, log_v, (logits + log_u).add_(log_v[:, None]).exp_()
    middle = (low + high) / 2 if max(-low, high) > EXPONENT_RANGE / 2 else 0.0
    kernel = (logits.sub_(middle) if middle else logits).exp_()
    # v = exp(log_v - shift) and u = exp(log_u - top), so that no sum leaves fp32's range
    v, shift = torch.ones_like(log_v), 0.0
    with torch.autocast(x.device.type, enabled=False):
        for _ in range(iterations):
            log_u = -(yield (v @ kernel).log() + (middle + shift))
            top = float(log_u.max())
            u = (log_u - top).exp()
            v = 1 / (kernel @ u)
            shift = -middle - top
    return log_u, v.log() + shift, kernel.mul_(u).mul_(v[:, None])


class DenseCrossEntropy(torch.autograd.Function):
    """The loss where the targets are held: student logits are computed once, on the CPU."""

    @staticmethod
    def forward(
        ctx: Any,
        student_x: Tensor,
        student_weight: Tensor,
        targets: Tensor,
        mix: Tensor,
        row_weights: Tensor,
        temperature: float,
        kernels: LossKernels,
    ) -> Tensor:
        """See `prototype_cross_entropy`; targets [V, B, K]. Returns [S]."""
        x, weight = operand(student_x, kernels), operand(student_weight, kernels)
        p = scaled_logits(x.flatten(0, 1), weight, temperature).unflatten(0, x.shape[:2])
        mixed = _mixed_targets(targets, mix)  # S times [B, K], or None where nothing is asked
        cross = p.new_zeros(p.shape[:2])  # [S, B]
        with torch.autocast(p.device.type, enabled=False):
            for row, q, logits in zip(cross, mixed, p, strict=True):
                if q is not None:
                    row.copy_(torch.linalg.vecdot(q, logits))
        log_z, total = _exponentiate_(p.flatten(0, 1))
        log_z, total = log_z.view_as(cross), total.view_as(cross)
        n = mix.sum(dim=1, keepdim=True)  # [S, 1]
        loss: Tensor = ((n * log_z - cross) * row_weights).sum(dim=1)
        if any(ctx.needs_input_grad):
            # p ← (p - q / n) Z: what both gradients are products with
            for rows, q, z, n_s in zip(p, mixed, total, n, strict=True):
                if q is not None:
                    rows.addcmul_(q, (-z / n_s)[:, None])
            ctx.save_for_backward(p, x, weight, n * row_weights / (temperature * total))
            ctx.dtypes = student_x.dtype, student_weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the student's tokens and prototypes for `grad` [S]."""
        p, x, weight, row_scale = ctx.saved_tensors
        scale = (grad[:, None] * row_scale).flatten()[:, None]  # [S·B, 1]
        grad_x = grad_weight = None
        with torch.autocast(p.device.type, enabled=False):
            p = p.flatten(0, 1)
            if ctx.needs_input_grad[0]:
                grad_x = ((p @ weight.to(p.dtype)) * scale).view_as(x).to(ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                scaled = x.flatten(0, 1).to(p.dtype) * scale
                grad_weight = (p.T @ scaled).to(ctx.dtypes[1])
        return grad_x, grad_weight, *[None] * 5


def _exponentiate_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As `shifted_exp_`, but without the shift where all rows can do without."""
    low, high = logits.aminmax()
    if max(-float(low), float(high)) > EXPONENT_RANGE / 2:
        return shifted_exp_(logits)
    total = logits.exp_().sum(dim=1)
    return total.log(), total


def _mixed_targets(targets: Tensor, mix: Tensor) -> list[Tensor | None]:
    """Σ_v mix_sv q_v of every student view, [B, K]; equal rows of `mix` share one tensor."""
    mixed: dict[tuple[float, ...], Tensor | None] = {}
    keys = [tuple(row) for row in mix.tolist()]
    for key in keys:
        if key in mixed:
            continue
        parts = [(q, factor) for q, factor in zip(targets, key, strict=True) if factor]
        total = None
        for q, factor in parts:
            q = q if factor == 1.0 else q * factor
            total = q if total is None else total + q
        mixed[key] = total
    return [mixed[key] for key in keys]
