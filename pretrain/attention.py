"""Self-attention over packed crops: one function, several implementations, chosen once.

All crops of a step lie one behind the other in a single token stream; `Packing` says where each
sequence starts. A token attends to its own sequence alone. The implementations agree forward and
backward, and none of them breaks a compiled graph. Legend: T tokens of the stream, H heads,
C channels a head.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eosin.configs.errors import ConfigError
from eosin.pretrain.distance_attention import Places


@dataclass(frozen=True)
class Packing:
    """How a token stream is cut: groups of equally long sequences, one behind the other."""

    groups: tuple[tuple[int, int], ...]
    """(sequences, tokens a sequence) of each group, e.g. ((64, 261), (256, 54))."""
    starts: Tensor | None = field(default=None, compare=False)
    """Where each sequence starts, and T at the end, int32 [sequences + 1], on the device; the
    varlen kernel alone reads it."""
    places: Places | None = field(default=None, compare=False)
    """Where the tokens lie, for attention that asks (`slide.attention`)."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sequence, in stream order."""
        return [length for count, length in self.groups for _ in range(count)]

    @property
    def tokens(self) -> int:
        """T: tokens in all."""
        return sum(count * length for count, length in self.groups)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(length for _, length in self.groups)

    @property
    def boundaries(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """What `starts` holds, on the host, int64 [sequences + 1]."""
        return np.concatenate([[0], np.cumsum(self.lengths)])


AttentionFn: TypeAlias = Callable[[Tensor, Tensor, Tensor, Packing], Tensor]
"""(q, k, v, packing) → output, each [T, H, C]."""

AttentionName: TypeAlias = Literal["auto", "sdpa", "varlen", "xformers"]


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """One `scaled_dot_product_attention` per group of equally long sequences. Runs everywhere."""
    outputs = []
    sizes = [count * length for count, length in packing.groups]
    # split and not slices: its backward is one concatenation, theirs a zero-filled stream each
    for group, *parts in zip(packing.groups, *(t.split(sizes) for t in (q, k, v)), strict=True):
        grouped = [part.unflatten(0, group).transpose(1, 2) for part in parts]  # each [B, H, N, C]
        out = F.scaled_dot_product_attention(*grouped)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)  # [T, H, C]


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """The packed flash kernel of torch, one launch for the whole stream. CUDA, 16-bit."""
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = packing.starts, packing.longest
    if starts is None:
        starts = torch.from_numpy(packing.boundaries).to(q.device, torch.int32)
    # positional: keywords differ between torch 2.10 and 2.13; the scale is C ** -0.5 in all
    out = varlen_attn(q, k, v, starts, starts, longest, longest)
    assert isinstance(out, Tensor)
    return out  # [T, H, C]


def xformers_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """One fused kernel over the whole stream under a block-diagonal mask. CUDA, 16-bit."""
    groups = [number for group in packing.groups for number in group]
    out: Tensor = torch.ops.eosin.block_diagonal_attention(q, k, v, groups)[0]
    return out  # [T, H, C]


@functools.lru_cache(maxsize=64)
def _block_diagonal_mask(groups: tuple[int, ...], device: torch.device) -> Any:
    """The mask of a packing, flattened to (sequences, tokens, …), with its offsets on `device`."""
    from xformers.ops import fmha

    lengths = [
        length for n, length in zip(groups[::2], groups[1::2], strict=True) for _ in range(n)
    ]
    return fmha.BlockDiagonalMask.from_seqlens(lengths, device=device)


# The library's call is opaque to the compiler: a mask object is no tensor. Its forward and backward
# are two operators here, so a compiled block holds them without a break in its graph.
@torch.library.custom_op("eosin::block_diagonal_attention", mutates_args=())
def _block_diagonal(
    q: Tensor, k: Tensor, v: Tensor, groups: list[int]
) -> tuple[Tensor, Tensor]:  # [T, H, C] each → [T, H, C], log-sum-exp [H, T] fp32
    from xformers.ops import fmha

    mask = _block_diagonal_mask(tuple(groups), q.device)
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(
        q[None], k[None], v[None], attn_bias=mask
    )
    if lse.shape != (1, q.shape[1], q.shape[0]):  # the padded form of the kernels for odd C
        raise RuntimeError(
            f"xformers has no packed kernel for {q.shape[2]} channels a head in {q.dtype} on "
            f"{torch.cuda.get_device_name(q.device)}; use attention=sdpa"
        )
    return out[0].contiguous(), lse[0].contiguous()


@_block_diagonal.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, groups: list[int]) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((heads, tokens), dtype=torch.float32)


@torch.library.custom_op("eosin::block_diagonal_attention_backward", mutates_args=())
def _block_diagonal_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, groups: list[int]
) -> tuple[Tensor, Tensor, Tensor]:  # grad, out, q, k, v [T, H, C], lse [H, T] → 3 × [T, H, C]
    from xformers.ops import fmha

    mask = _block_diagonal_mask(tuple(groups), q.device)
    grads = fmha.memory_efficient_attention_backward(
        grad.contiguous()[None], out[None], lse[None], q[None], k[None], v[None], attn_bias=mask
    )
    dq, dk, dv = (g[0].contiguous() for g in grads)
    return dq, dk, dv


@_block_diagonal_backward.register_fake
def _(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, groups: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_for_backward(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, list[int]], output: tuple[Tensor, Tensor]
) -> None:
    q, k, v, ctx.groups = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(
    ctx: Any, grad: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, None]:
    q, k, v, out, lse = ctx.saved_tensors
    grads = torch.ops.eosin.block_diagonal_attention_backward(grad, out, lse, q, k, v, ctx.groups)
    return (*grads, None)


torch.library.register_autograd(
    "eosin::block_diagonal_attention", _backward, setup_context=_keep_for_backward
)


def choose_attention(name: AttentionName, device: torch.device, dtype: torch.dtype) -> AttentionFn:
    """The implementation called `name`.

    ``auto`` takes, on CUDA in 16 bits, xformers where it is installed, else varlen where the GPU
    has it; everywhere else SDPA.

    Raises:
        ConfigError: an implementation was asked for by name where it cannot run.
    """
    if name == "sdpa":
        return sdpa_attention
    fused: dict[str, tuple[AttentionFn, Callable[[torch.device], str | None]]] = {
        "xformers": (xformers_attention, _lacks_xformers),
        "varlen": (varlen_attention, _lacks_varlen),
    }
    usable = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    for candidate in fused if name == "auto" else (name,):
        function, lacks = fused[candidate]
        if usable and (reason := lacks(device)) is None:
            return function
        if name != "auto" and not usable:
            raise ConfigError(
                f"attention={name} needs CUDA and 16-bit precision, not {device.type} in {dtype}; "
                "use attention=auto"
            )
        if name != "auto":
            raise ConfigError(f"attention={name}, but {reason}; or use attention=auto")
    return sdpa_attention


def _lacks_xformers(device: torch.device) -> str | None:
    """Why xformers cannot run on `device`; None when it can."""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed; pip install xformers"
    try:
        from xformers.ops import fmha
    except (ImportError, OSError) as error:  # built for another torch
        return f"xformers does not import ({error}); install the build for this torch"
    bundled = [getattr(fmha, name, None) for name in ("flash3", "flash")]
    kernels = [op for op in bundled if op is not None and op.FwOp.is_available()]
    capability = torch.cuda.get_device_capability(device)
    if not any(capability >= op.FwOp.CUDA_MINIMUM_COMPUTE_CAPABILITY for op in kernels):
        return "this xformers has no flash kernel for this GPU; use attention=sdpa"
    return None


def _lacks_varlen(device: torch.device) -> str | None:
    """Why torch's packed kernel cannot run on `device`; None when it can."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no varlen_attn; torch 2.10 has"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "torch's flash kernel needs compute capability 8.0; use attention=sdpa"
    return None
