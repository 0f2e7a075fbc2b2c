"""The prototype losses' three operations as Triton kernels, for NVIDIA GPUs.

One kernel, in the shape of a forward attention pass (Dao et al. 2022, arXiv 2205.14135, algorithm
1): a program holds a tile of rows, walks over the columns, and keeps a running maximum, sum and
average in fp32 registers; logits never reach memory. Few rows do not fill a GPU, so the columns are
split between programs whose partial results are put together after. Imported where it is used, for
triton is no dependency. Legend: R rows, C columns, D channels (≤ 512), P parts of the columns.
"""

import contextlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
MAX_CHANNELS = 512
MAX_PARTS = 64


@triton.jit(do_not_specialize=["n_rows", "n_columns", "part_columns"])  # type: ignore[untyped-decorator,misc,unused-ignore]
def _walk(  # type: ignore[no-untyped-def]
    a,  # [R, D]
    b,  # [C, D]
    values,  # [C, D]
    bias,  # [C]
    row_bias,  # [R]
    out,  # [P, R, D]
    log_sum,  # [P, R]
    n_rows,
    n_columns,
    part_columns,
    scale,
    n_channels: tl.constexpr,
    padded: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    has_bias: tl.constexpr,
    has_row_bias: tl.constexpr,
    softmax: tl.constexpr,
    weigh: tl.constexpr,
    values_are_b: tl.constexpr,
    precision: tl.constexpr,
):
    """A tile of rows against one part of the columns.

    softmax: writes log-sum-exps and, with weigh, averages; otherwise adds Σ exp(logit) values to
    `out`. Exponents are to the base two inside. Padded channels are zeros, padded columns -inf.
    """
    rows = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    part = tl.program_id(1)
    channels = tl.arange(0, padded)
    inside = (rows[:, None] < n_rows) & (channels[None, :] < n_channels)
    at = rows[:, None].to(tl.int64) * n_channels + channels[None, :]
    tile_a = tl.load(a + at, mask=inside, other=0.0)  # [tile_rows, D]
    shift = tl.zeros([tile_rows], tl.float32)
    if has_row_bias:
        shift = tl.load(row_bias + rows, mask=rows < n_rows, other=0.0) * LOG2_E
    top = tl.full([tile_rows], float("-inf"), tl.float32)
    total = tl.zeros([tile_rows], tl.float32)
    out_at = part.to(tl.int64) * n_rows * n_channels + at
    if weigh:
        if softmax:
            acc = tl.zeros([tile_rows, padded], tl.float32)
        else:
            acc = tl.load(out + out_at, mask=inside, other=0.0)
    first = part * part_columns
    last = tl.minimum(first + part_columns, n_columns)
    for start in range(first, last, tile_columns):
        columns = start + tl.arange(0, tile_columns)
        held = (columns[:, None] < last) & (channels[None, :] < n_channels)
        column_at = columns[:, None].to(tl.int64) * n_channels + channels[None, :]
        tile_b = tl.load(b + column_at, mask=held, other=0.0)  # [tile_columns, D]
        logits = tl.dot(tile_a, tl.trans(tile_b), input_precision=precision)
        logits = logits * (scale * LOG2_E)  # [tile_rows, tile_columns], fp32
        if has_bias:
            column_bias = tl.load(bias + columns, mask=columns < last, other=0.0)
            logits += column_bias[None, :] * LOG2_E
        logits = tl.where((columns < last)[None, :], logits, float("-inf"))
        if softmax:
            new_top = tl.maximum(top, tl.max(logits, axis=1))
            weights = tl.exp2(logits - new_top[:, None])
            fade = tl.exp2(top - new_top)
            total = total * fade + tl.sum(weights, axis=1)
            if weigh:
                acc = acc * fade[:, None]
            top = new_top
        else:
            weights = tl.exp2(logits + shift[:, None])
        if weigh:
            tile_v = tile_b if values_are_b else tl.load(values + column_at, mask=held, other=0.0)
            acc += tl.dot(weights.to(tile_v.dtype), tile_v, input_precision=precision)
    if softmax:
        tl.store(log_sum + part * n_rows + rows, (top + tl.log2(total)) / LOG2_E, rows < n_rows)
        if weigh:
            tl.store(out + out_at, acc / total[:, None], mask=inside)
    else:
        tl.store(out + out_at, acc, mask=inside)


class Tiles(NamedTuple):
    """Shape of a program's work; heuristics for the shared memory there is."""

    rows: int
    columns: int
    stages: int

    @property
    def warps(self) -> int:
        """Eight where the accumulators would fill the registers of four."""
        return 8 if self.rows >= 64 else 4


TILES = (
    Tiles(128, 128, 2), Tiles(128, 64, 2), Tiles(64, 64, 2), Tiles(64, 32, 2), Tiles(32, 32, 2),
    Tiles(32, 16, 2), Tiles(16, 16, 2), Tiles(16, 16, 1),
)  # fmt: skip
"""From the fastest to the one that fits anywhere."""

REGISTER_VALUES = 128 * 256
"""fp32 accumulators of a program, at most: half of a processor's registers."""


def choose_tiles(channels: int, itemsize: int, weigh: bool, shared_bytes: int) -> Tiles:
    """The first of `TILES` whose operands fit in shared memory and accumulators in registers.

    Args:
        channels: D, padded to a power of two.
        itemsize: bytes of an operand.
        weigh: whether values are summed, so that their tiles and the accumulators are held too.
        shared_bytes: of shared memory a program may have.
    """
    for tiles in TILES:
        columns_held = tiles.columns * tiles.stages * (2 if weigh else 1)
        fits = (tiles.rows + columns_held) * channels * itemsize <= shared_bytes - 8192
        accumulators = tiles.rows * ((channels if weigh else 0) + tiles.columns)
        if fits and accumulators <= REGISTER_VALUES + 128 * 64:
            return tiles
    return TILES[-1]


@dataclass(frozen=True)
class TritonKernels:
    """The operations of `LossKernels` on CUDA, for bf16 and, slowly but exactly, for fp32."""

    dtype: torch.dtype = torch.bfloat16
    programs: int | None = None
    """Programs that a launch aims at; None for two a processor of the device."""

    @property
    def dense_elements(self) -> int:
        """No matrix is held."""
        return 0

    def log_sum_exp(self, a: Tensor, b: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """See `LossKernels`."""
        if len(a) == 0 or len(b) == 0:
            return a.new_full((len(a),), float("-inf"), dtype=torch.float32)
        log_sum, _ = self._launch(a, b, bias, None, scale, None, None)
        return torch.logsumexp(log_sum, dim=0) if len(log_sum) > 1 else log_sum[0]

    def softmax_average(
        self, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `LossKernels`."""
        if len(a) == 0:
            return a.new_zeros((0, values.shape[1]), dtype=torch.float32), a.new_zeros(
                0, dtype=torch.float32
            )
        log_sums, averages = self._launch(a, b, bias, None, scale, values, None)
        if len(log_sums) == 1:
            return averages[0], log_sums[0]
        log_sum = torch.logsumexp(log_sums, dim=0)
        share = (log_sums - log_sum).exp_()  # [P, R]
        return (averages * share[:, :, None]).sum(dim=0), log_sum

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
        if len(a) and len(b):
            self._launch(a, b, bias, row_bias, scale, values, out)

    def _launch(
        self,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        row_bias: Tensor | None,
        scale: float,
        values: Tensor | None,
        add_to: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(log-sum-exps [P, R], averages [P, R, D]) of the parts; or adds to `add_to` [R, D]."""
        (R, D), C = a.shape, len(b)
        if D > MAX_CHANNELS or b.shape[1] != D or (values is not None and values.shape != b.shape):
            raise ValueError(
                f"channels {D} and {b.shape[1]} must agree and be at most {MAX_CHANNELS}, "
                "and values must have the shape of the columns"
            )
        padded = max(triton.next_power_of_2(D), 16)
        processors, shared_bytes = _hardware(a.device)
        tiles = choose_tiles(padded, a.element_size(), values is not None, shared_bytes)
        row_tiles, column_tiles = triton.cdiv(R, tiles.rows), triton.cdiv(C, tiles.columns)
        wanted = max((self.programs or 2 * processors) // row_tiles, 1)
        part_columns = triton.cdiv(column_tiles, min(wanted, MAX_PARTS)) * tiles.columns
        parts = triton.cdiv(C, part_columns)

        log_sum = a.new_empty((parts, R) if add_to is None else (1, 1), dtype=torch.float32)
        if add_to is None:
            shape = (parts, R, D) if values is not None else (1, 1, 1)
            out = a.new_empty(shape, dtype=torch.float32)
        else:
            out = add_to[None] if parts == 1 else a.new_zeros((parts, R, D), dtype=torch.float32)
        unused = log_sum  # a pointer where the kernel reads none
        on_device = torch.cuda.device(a.device) if a.is_cuda else contextlib.nullcontext()
        with on_device:
            _walk[row_tiles, parts](
                a.contiguous(), b.contiguous(), b if values is None else values.contiguous(),
                unused if bias is None else bias.contiguous(),
                unused if row_bias is None else row_bias.contiguous(),
                out, log_sum, R, C, part_columns, scale,
                n_channels=D, padded=padded, tile_rows=tiles.rows, tile_columns=tiles.columns,
                has_bias=bias is not None, has_row_bias=row_bias is not None,
                softmax=add_to is None, weigh=values is not None, values_are_b=values is b,
                precision="ieee" if a.dtype == torch.float32 else "tf32",
                num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True,
            )  # fmt: skip
        if add_to is not None and parts > 1:
            add_to += out.sum(dim=0)
        return log_sum, out


def _hardware(device: torch.device) -> tuple[int, int]:
    """(processors, bytes of shared memory a program may have); Triton's interpreter has one."""
    if device.type != "cuda":
        return 1, 2**17
    properties = torch.cuda.get_device_properties(device)
    shared: int = getattr(
        properties, "shared_memory_per_block_optin", properties.shared_memory_per_block
    )
    return properties.multi_processor_count, shared
