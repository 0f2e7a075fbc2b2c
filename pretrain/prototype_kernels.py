"""What the prototype losses compute on logits a_r · b_c, without keeping the R × C matrix.

Three operations, each linear in memory: log-sum-exp, softmax average, sum of weighted values. The
plain kernels below run everywhere, block of rows by block of rows; `prototype_triton` holds the
fused ones. `choose_kernels` picks one set, once. Legend: R rows, C columns, D channels, Dv channels
of the values; e = fp32, or fp64 for fp64 operands.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from eosin.configs.errors import ConfigError

CHUNK_ELEMENTS = 2**24
"""Logits held at once by the plain kernels: 64 MiB in fp32."""

LossKernelName: TypeAlias = Literal["auto", "plain", "triton"]


class LossKernels(Protocol):
    """Streaming operations on the logits of two sets of vectors.

    Operands `a`, `b` and `values` come in `dtype` (see `operand`), biases and results in e, and so
    do all sums. No argument but `out` is written to.
    """

    @property
    def dtype(self) -> torch.dtype:
        """What operands are rounded to: fp32, bf16, or fp64 (plain alone)."""

    @property
    def dense_elements(self) -> int:
        """Logits up to which a caller on the CPU may hold the whole matrix; 0 for never."""

    def log_sum_exp(self, a: Tensor, b: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """[R]: log Σ_c exp(scale · a_r · b_c + bias_c); -inf without columns.

        Args:
            a: [R, D].
            b: [C, D].
            bias: of the columns [C]; None for zeros.
            scale: of the logits, one over a temperature.
        """

    def softmax_average(
        self, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """([R, Dv], [R]): Σ_c softmax_c(scale · a_r · b_c + bias_c) values_c, and `log_sum_exp`.

        Args:
            a: [R, D].
            b: [C, D], C > 0.
            bias: of the columns [C]; None for zeros.
            scale: of the logits.
            values: [C, Dv].
        """

    def add_weighted(
        self,
        out: Tensor,
        a: Tensor,
        b: Tensor,
        row_bias: Tensor | None,
        bias: Tensor,
        scale: float,
        values: Tensor,
    ) -> None:
        """Adds Σ_c exp(scale · a_r · b_c + row_bias_r + bias_c) values_c to `out` [R, Dv].

        The exponents are logarithms of probabilities, so none is far above zero.

        Args:
            out: [R, Dv], e, contiguous; changed in place.
            a: [R, D].
            b: [C, D].
            row_bias: [R]; None for zeros.
            bias: of the columns [C].
            scale: of the logits.
            values: [C, Dv].
        """


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """e: what sums over operands of `dtype` are held in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand(x: Tensor, kernels: LossKernels) -> Tensor:
    """`x` as the kernels take it: no graph, in their dtype, contiguous."""
    return x.detach().to(kernels.dtype).contiguous()


def product(a: Tensor, b: Tensor) -> Tensor:
    """Logits a bᵀ [R, C], e; 16-bit operands are multiplied as such on CUDA, widened elsewhere."""
    if a.dtype == sum_dtype(a.dtype):
        return a @ b.T
    if a.is_cuda:
        return torch.mm(a, b.T, out_dtype=torch.float32)
    return a.float() @ b.float().T


def logit_blocks(
    a: Tensor, b: Tensor, bias: Tensor | None, scale: float, elements: int = CHUNK_ELEMENTS
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of scale · a bᵀ + bias, at most `elements` logits (but one row) at a time.

    Yields:
        The rows and their logits [rows, C], e, free to be overwritten.
    """
    rows = max(elements // max(len(b), 1), 1)
    for start in range(0, len(a), rows):
        block = slice(start, min(start + rows, len(a)))
        with torch.autocast(a.device.type, enabled=False):
            logits = product(a[block], b)
        if scale != 1.0:
            logits *= scale
        if bias is not None:
            logits += bias
        yield block, logits


@dataclass(frozen=True)
class PlainKernels:
    """The operations in torch, on any device."""

    dtype: torch.dtype = torch.float32
    chunk_elements: int = CHUNK_ELEMENTS
    """Logits held at once; the speed is flat around the default."""

    @property
    def dense_elements(self) -> int:
        """A matrix no larger than a block is cheaper held than computed again."""
        return self.chunk_elements

    def log_sum_exp(self, a: Tensor, b: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """See `LossKernels`."""
        out = a.new_full((len(a),), float("-inf"), dtype=sum_dtype(a.dtype))
        if len(b):
            for rows, logits in logit_blocks(a, b, bias, scale, self.chunk_elements):
                out[rows] = shifted_exp_(logits)[0]
        return out

    def softmax_average(
        self, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `LossKernels`."""
        average = a.new_empty((len(a), values.shape[1]), dtype=sum_dtype(a.dtype))
        log_sum = average.new_empty(len(a))
        for rows, logits in logit_blocks(a, b, bias, scale, self.chunk_elements):
            log_sum[rows], total = shifted_exp_(logits)
            average[rows] = _weigh(logits, values) / total[:, None]
        return average, log_sum

    def add_weighted(
        self,
        out: Tensor,
        a: Tensor,
        b: Tensor,
        row_bias: Tensor | None,
        bias: Tensor,
        scale: float,
        values: Tensor,
    ) -> None:
        """See `LossKernels`."""
        for rows, logits in logit_blocks(a, b, bias, scale, self.chunk_elements):
            if row_bias is not None:
                logits += row_bias[rows, None]
            out[rows] += _weigh(logits.exp_(), values)


def shifted_exp_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Turns each row into exp(row - max) in place; (log-sum-exp, sum of the result), each [R]."""
    top = logits.amax(dim=1)
    logits.sub_(top[:, None]).exp_()
    total = logits.sum(dim=1)
    return top + total.log(), total


def _weigh(weights: Tensor, values: Tensor) -> Tensor:  # e [R, C], dtype [C, Dv] → e [R, Dv]
    with torch.autocast(weights.device.type, enabled=False):
        if weights.dtype == values.dtype:
            return weights @ values
        if weights.is_cuda:
            return torch.mm(weights.to(values.dtype), values, out_dtype=torch.float32)
        return weights @ values.float()


def choose_kernels(name: LossKernelName, device: torch.device, dtype: torch.dtype) -> LossKernels:
    """The kernels called `name`; ``auto`` takes Triton on CUDA in bf16, else the plain ones.

    Args:
        name: what the config asks for.
        device: where the losses are computed.
        dtype: precision of the operands: bf16 or fp32.

    Raises:
        ConfigError: Triton was asked for by name where it cannot run, or fp16 at all.
    """
    if dtype == torch.float16:
        raise ConfigError("the prototype losses run in bf16 or fp32: fp16 loses their gradients")
    has_triton = importlib.util.find_spec("triton") is not None
    if name == "plain" or (
        name == "auto" and not (device.type == "cuda" and dtype == torch.bfloat16 and has_triton)
    ):
        return PlainKernels(dtype)
    if device.type != "cuda":
        raise ConfigError(f"loss_kernels=triton needs CUDA, not {device.type}; use auto")
    if not has_triton:
        raise ConfigError("loss_kernels=triton, but triton is not installed; pip install triton")
    from eosin.pretrain.prototype_triton import TritonKernels

    return TritonKernels(dtype)
