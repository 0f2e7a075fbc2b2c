"""DINO's and iBOT's cross-entropy over K prototypes, and the teacher's targets, in linear memory.

A target matrix q [M, K] is two vectors beside the teacher's tokens and prototypes (`Scaling`), so
the M × K logits are computed where they are used and kept nowhere; but see `prototype_dense`.

With l = x w_sᵀ, p = softmax(l / τ_s), log-normalisers log Z, and weights c_svb of the pairs of
views, the loss of view s is Σ_vb c_svb (log Z_sb - x_sb · y_vb / τ_s), where y = q w_s. With
n = Σ_v c, its gradients are (n p w_s - Σ_v c y) / τ_s for x and (pᵀ (n x) - qᵀ (Σ_s c x)) / τ_s for
w_s: averages and sums over prototypes, as in attention, which `LossKernels` compute in a stream.

Legend: B samples, V teacher views, S student views, M = V · B teacher rows, K prototypes, Db
bottleneck channels; e as in `prototype_kernels`.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eosin.pretrain.collectives import LogSumOverRanks
from eosin.pretrain.prototype_dense import (
    DenseCrossEntropy,
    dense_sinkhorn,
    is_dense,
    scaled_logits,
)
from eosin.pretrain.prototype_kernels import (
    LossKernels,
    logit_blocks,
    operand,
    shifted_exp_,
    sum_dtype,
)

STUDENT_TEMPERATURE = 0.1  # DINO, arXiv 2104.14294, appendix C


@dataclass(frozen=True)
class Scaling:
    """Teacher targets q_mk = exp(l_mk / temperature + log_u_k + log_v_m); rows sum to one."""

    log_u: Tensor
    """Of the prototypes [K], fp32; free up to a constant that log_v takes back."""
    log_v: Tensor
    """Of the teacher's rows [M], fp32: minus the log-sum-exp of the rest."""
    temperature: float
    """Of the teacher."""
    targets: Tensor | None = None
    """q itself [M, K], on the CPU where it fits one chunk; spares computing it again."""

    def split(self, rows: Sequence[int]) -> list["Scaling"]:
        """The scalings of so many rows after one another."""
        if len(rows) == 1:
            return [self]
        v = self.log_v.split(list(rows))
        q = [None] * len(rows) if self.targets is None else self.targets.split(list(rows))
        return [replace(self, log_v=a, targets=b) for a, b in zip(v, q, strict=True)]

    @staticmethod
    def join(parts: Sequence["Scaling"]) -> "Scaling":
        """What `split` took apart."""
        q = [part.targets for part in parts if part.targets is not None]
        whole = torch.cat(q) if len(q) == len(parts) else None
        return replace(parts[0], log_v=torch.cat([p.log_v for p in parts]), targets=whole)


@dataclass(frozen=True)
class TargetFigures:
    """What the health figures need of the targets."""

    entropy: Tensor
    """Of each row, nats [M], fp32."""
    strongest: Tensor
    """Prototype with the largest target, int64 [M]."""


def sinkhorn_scaling(
    x: Tensor,
    weight: Tensor,
    temperature: float,
    kernels: LossKernels,
    iterations: int = 3,
    over_ranks: LogSumOverRanks | None = None,
) -> Scaling:
    """`sinkhorn_scalings` of one head's logits."""
    [scaling] = sinkhorn_scalings([(x, weight)], temperature, kernels, iterations, over_ranks)
    return scaling


@torch.no_grad()
def sinkhorn_scalings(
    heads: Sequence[tuple[Tensor, Tensor]],
    temperature: float,
    kernels: LossKernels,
    iterations: int = 3,
    over_ranks: LogSumOverRanks | None = None,
) -> list[Scaling]:
    """Targets balanced over prototypes (Sinkhorn-Knopp, SwAV arXiv 2006.09882, eq. 5).

    In logarithms, u = -log Σ_m exp(l / τ + v) makes prototypes share alike and
    v = -log Σ_k exp(l / τ + u) makes samples sum to one. Constants cancel, so this is SwAV's
    algorithm on exp(l / τ), for logits of any size.

    The heads go on in step, and share what they exchange. After the first iteration u bounds what
    the next one sums: with rows that sum to one, a prototype's Σ_m exp(l / τ + u + v) lies between
    1 / MK and M. So a sum over ranks relative to -u neither overflows nor vanishes, and the largest
    term need be found over the ranks in the first iteration alone.

    Args:
        heads: of each, teacher tokens after the bottleneck [M, Db], M may be 0, and effective
            prototypes [K, Db].
        temperature: τ of the teacher.
        kernels: see `choose_kernels`.
        iterations: of both scalings.
        over_ranks: called `iterations` times with [Σ K] on every rank, those without rows included
            (theirs are -inf).

    Raises:
        ValueError: temperature or iterations not above zero.
    """
    if temperature <= 0 or iterations < 1:
        raise ValueError(f"temperature={temperature}, iterations={iterations} must be above zero")
    runs = [_sinkhorn(x, weight, temperature, kernels, iterations) for x, weight in heads]
    sums, bound = [next(run) for run in runs], None
    for _ in range(iterations - 1):
        sums, bound = _exchanged(sums, bound, over_ranks)
        sums = [run.send(total) for run, total in zip(runs, sums, strict=True)]
    sums, _ = _exchanged(sums, bound, over_ranks)
    return [_end(run, total) for run, total in zip(runs, sums, strict=True)]


def _exchanged(
    sums: list[Tensor], bound: Tensor | None, over_ranks: LogSumOverRanks | None
) -> tuple[list[Tensor], Tensor | None]:
    """The heads' log-sums over the ranks, by one call; and what bounds the next ones."""
    if over_ranks is None:
        return sums, None
    total = over_ranks(torch.cat(sums), bound)
    return list(total.split([len(part) for part in sums])), _finite(total)


def _sinkhorn(
    x: Tensor, weight: Tensor, temperature: float, kernels: LossKernels, iterations: int
) -> Generator[Tensor, Tensor, Scaling]:
    """Yields the log-sums over this rank's rows [K], and is sent those over all rows."""
    x, weight = operand(x, kernels), operand(weight, kernels)
    if is_dense(len(x), len(weight), x, kernels):
        log_u, log_v, targets = yield from dense_sinkhorn(x, weight, temperature, iterations)
        return Scaling(log_u, log_v, temperature, targets)
    log_v = x.new_zeros(len(x), dtype=sum_dtype(x.dtype))
    for _ in range(iterations):
        log_u = -_finite((yield kernels.log_sum_exp(weight, x, log_v, 1 / temperature)))
        log_v = -kernels.log_sum_exp(x, weight, log_u, 1 / temperature)
    return Scaling(log_u, log_v, temperature)


def _end(run: Generator[Tensor, Tensor, Scaling], total: Tensor) -> Scaling:
    """What a run returns when it is sent its last sums."""
    try:
        run.send(total)
    except StopIteration as end:
        scaling: Scaling = end.value
        return scaling
    raise AssertionError("a run asks for as many sums as it has iterations")


@torch.no_grad()
def centred_scaling(
    x: Tensor, weight: Tensor, centre: Tensor, temperature: float, kernels: LossKernels
) -> Scaling:
    """Targets softmax((l - centre) / τ) (DINO, arXiv 2104.14294, eq. 4).

    Args:
        x: teacher tokens after the bottleneck [M, Db]; M may be 0.
        weight: effective prototypes [K, Db].
        centre: moving average of the logits [K]; see `mean_logits`.
        temperature: τ of the teacher.
        kernels: see `choose_kernels`.

    Raises:
        ValueError: temperature not above zero.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above zero")
    x, weight = operand(x, kernels), operand(weight, kernels)
    log_u = -centre.detach().to(sum_dtype(x.dtype)) / temperature
    if is_dense(len(x), len(weight), x, kernels):
        logits = scaled_logits(x, weight, temperature).add_(log_u)
        log_sum, total = shifted_exp_(logits)
        return Scaling(log_u, -log_sum, temperature, logits.div_(total[:, None]))
    log_v = -kernels.log_sum_exp(x, weight, log_u, 1 / temperature)
    return Scaling(log_u, log_v, temperature)


@torch.no_grad()
def mean_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Mean logit of every prototype [K], fp32: what DINO's centre follows; zeros for M = 0.

    The product is linear, so over ranks the mean of `x` is all that need be exchanged.

    Args:
        x: tokens after the bottleneck [M, Db].
        weight: effective prototypes [K, Db].
    """
    e = sum_dtype(weight.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return weight.to(e) @ (x.to(e).sum(dim=0) / max(len(x), 1))


def prototype_cross_entropy(
    student_x: Tensor,
    student_weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    scaling: Scaling,
    mix: Tensor,
    row_weights: Tensor,
    *,
    kernels: LossKernels,
    student_temperature: float = STUDENT_TEMPERATURE,
) -> Tensor:
    """Σ_b row_weights_b Σ_v mix_sv CE(q_vb, softmax(l_sb / τ_s)) of each student view, [S], fp32.

    DINO is S student and V teacher views with 1 / B a sample; iBOT is S = V = 1 with one over the
    masked patches of the crop and over the crops. Gradients reach `student_x` and `student_weight`
    alone, once (no second derivatives). No argument is written to.

    Args:
        student_x: tokens after the bottleneck [S, B, Db].
        student_weight: effective prototypes [K, Db].
        teacher_x: likewise of the teacher [V, B, Db], view-major as the rows of `scaling`.
        teacher_weight: likewise [K, Db].
        scaling: of the teacher's V · B rows; made from these very `teacher_x` and weights.
        mix: weight of every pair of views [S, V], not negative.
        row_weights: of every sample [B].
        kernels: the ones that `scaling` was made with.
        student_temperature: τ_s.

    Returns:
        [S]; zeros (with zero gradients) for B = 0.

    Raises:
        ValueError: shapes that do not fit together, or a temperature not above zero.
    """
    (S, B, _), V = student_x.shape, len(teacher_x)
    if teacher_x.shape[1] != B or len(scaling.log_v) != V * B or mix.shape != (S, V):
        raise ValueError(
            f"student {tuple(student_x.shape)}, teacher {tuple(teacher_x.shape)}, "
            f"{len(scaling.log_v)} scaled rows and mix {tuple(mix.shape)} do not fit together"
        )
    if len(row_weights) != B or len(scaling.log_u) != len(student_weight):
        raise ValueError(
            f"{len(row_weights)} row weights for B={B}, "
            f"{len(scaling.log_u)} scaled columns for {len(student_weight)} prototypes"
        )
    if student_temperature <= 0:
        raise ValueError(f"student_temperature={student_temperature} must be above zero")
    e = sum_dtype(kernels.dtype)
    mix = mix.detach().to(student_x.device, e)
    row_weights = row_weights.detach().to(student_x.device, e)
    out: Tensor
    if B == 0 or S == 0:
        out = _Nothing.apply(student_x, student_weight)
    elif scaling.targets is not None and is_dense(S * B, len(student_weight), student_x, kernels):
        targets = scaling.targets.unflatten(0, (V, B))
        out = DenseCrossEntropy.apply(
            student_x, student_weight, targets, mix, row_weights, student_temperature, kernels
        )
    else:
        teacher = operand(teacher_x, kernels).flatten(0, 1), operand(teacher_weight, kernels)
        out = _Streamed.apply(
            student_x, student_weight, teacher, scaling, mix, row_weights, student_temperature,
            kernels,
        )  # fmt: skip
    return out


@torch.no_grad()
def target_figures(
    x: Tensor, weight: Tensor, scaling: Scaling, kernels: LossKernels
) -> TargetFigures:
    """Entropy and strongest prototype of every row of targets, for the health figures.

    Args:
        x: the teacher's tokens that `scaling` was made from [M, Db].
        weight: effective prototypes [K, Db].
        scaling: their targets.
        kernels: the ones that `scaling` was made with.
    """
    x, weight = operand(x, kernels), operand(weight, kernels)
    entropy = scaling.log_v.new_empty(len(x))
    strongest = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for rows, log_q in logit_blocks(x, weight, scaling.log_u, 1 / scaling.temperature):
        log_q += scaling.log_v[rows, None]
        strongest[rows] = log_q.argmax(dim=1)
        entropy[rows] = -(log_q.exp() * log_q).sum(dim=1)
    return TargetFigures(entropy, strongest)


@torch.no_grad()
def strongest_prototype(x: Tensor, weight: Tensor, kernels: LossKernels) -> Tensor:
    """Prototype with the largest logit of every row, int64 [M].

    Args:
        x: tokens after the bottleneck [M, Db].
        weight: effective prototypes [K, Db].
        kernels: see `choose_kernels`; their precision counts.
    """
    x, weight = operand(x, kernels), operand(weight, kernels)
    out = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for rows, logits in logit_blocks(x, weight, None, 1.0):
        out[rows] = logits.argmax(dim=1)
    return out


class _Nothing(torch.autograd.Function):
    """Zeros [S] of no samples, with zero gradients, so that every rank has the same graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_zeros(len(x), dtype=sum_dtype(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return torch.zeros_like(x), torch.zeros_like(weight)


class _Streamed(torch.autograd.Function):
    """The loss and its gradients as averages over prototypes; no matrix is held."""

    @staticmethod
    def forward(
        ctx: Any,
        student_x: Tensor,
        student_weight: Tensor,
        teacher: tuple[Tensor, Tensor],
        scaling: Scaling,
        mix: Tensor,
        row_weights: Tensor,
        temperature: float,
        kernels: LossKernels,
    ) -> Tensor:
        S, B, _ = student_x.shape
        x, weight = operand(student_x, kernels).flatten(0, 1), operand(student_weight, kernels)
        n = mix.sum(dim=1, keepdim=True)  # [S, 1]
        y, log_sum = kernels.softmax_average(
            *teacher, scaling.log_u, 1 / scaling.temperature, weight
        )  # [V·B, Db], [V·B]
        # no matrix product, so that autocast and TF32 leave it alone
        pull = (mix[:, :, None, None] * y.unflatten(0, (-1, B))).sum(dim=1)  # [S, B, Db]
        if ctx.needs_input_grad[0]:
            average, log_z = kernels.softmax_average(x, weight, None, 1 / temperature, weight)
            away = n[:, :, None] * average.unflatten(0, (S, B))
            ctx.unit_grad = (away - pull) * (row_weights / temperature)[:, None]  # [S, B, Db]
        else:
            log_z = kernels.log_sum_exp(x, weight, None, 1 / temperature)
        cross = (x.unflatten(0, (S, B)) * pull).sum(dim=2) / temperature  # [S, B]
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, weight, *teacher, log_z, log_sum, mix, row_weights)
            ctx.scaling, ctx.temperature, ctx.kernels = scaling, temperature, kernels
            ctx.dtypes = student_x.dtype, student_weight.dtype
        loss: Tensor = ((n * log_z.unflatten(0, (S, B)) - cross) * row_weights).sum(dim=1)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, teacher_x, teacher_weight, log_z, log_sum, mix, row_weights = ctx.saved_tensors
        scaling, kernels = ctx.scaling, ctx.kernels
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad[:, None, None] * ctx.unit_grad).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            scaled = x.unflatten(0, (len(mix), -1)) * (
                grad[:, None] * row_weights / ctx.temperature
            ).unsqueeze(2)  # [S, B, Db], e
            own = (mix.sum(dim=1)[:, None, None] * scaled).flatten(0, 1).to(weight.dtype)
            pull = -(mix[:, :, None, None] * scaled[:, None]).sum(dim=0)  # [V, B, Db]
            out = torch.zeros_like(weight, dtype=sum_dtype(weight.dtype))
            kernels.add_weighted(out, weight, x, None, -log_z, 1 / ctx.temperature, own)
            kernels.add_weighted(
                out, teacher_weight, teacher_x, scaling.log_u, -log_sum,
                1 / scaling.temperature, pull.flatten(0, 1).to(weight.dtype),
            )  # fmt: skip
            grad_weight = out.to(ctx.dtypes[1])
        return grad_x, grad_weight, *[None] * 6


def _finite(log_sum: Tensor) -> Tensor:
    """Without rows on any rank the sums are empty; any scaling serves, zero say."""
    return log_sum.masked_fill(log_sum == float("-inf"), 0.0)
