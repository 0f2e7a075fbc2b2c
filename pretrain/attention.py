"""Self-attention over packed crops: one function, several implementations, chosen once.

All crops of a step lie one behind the other in a single token stream; `Packing` says where each
sequence starts. A token attends to its own sequence alone. Legend: T tokens of the stream,
H heads, C channels a head.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from eosin.configs.errors import ConfigError


@dataclass(frozen=True)
class Packing:
    """How a token stream is cut: groups of equally long sequences, one behind the other."""

    groups: tuple[tuple[int, int], ...]
    """(sequences, tokens a sequence) of each group, e.g. ((64, 261), (256, 54))."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sequence, in stream order."""
        return [length for count, length in self.groups for _ in range(count)]

    @property
    def tokens(self) -> int:
        """T: tokens in all."""
        return sum(count * length for count, length in self.groups)


AttentionFn: TypeAlias = Callable[[Tensor, Tensor, Tensor, Packing], Tensor]
"""(q, k, v, packing) → output, each [T, H, C]."""

AttentionName: TypeAlias = Literal["auto", "sdpa", "xformers"]


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """One `scaled_dot_product_attention` per group of equally long sequences. Runs everywhere."""
    outputs, start = [], 0
    for count, length in packing.groups:
        stop = start + count * length
        parts = (t[start:stop].unflatten(0, (count, length)) for t in (q, k, v))
        grouped = [part.transpose(1, 2) for part in parts]  # each [B, H, N, C]
        out = F.scaled_dot_product_attention(*grouped)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        start = stop
    return torch.cat(outputs)  # [T, H, C]


def xformers_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """One fused kernel over the whole stream under a block-diagonal mask. CUDA, 16-bit."""
    from xformers.ops import fmha, memory_efficient_attention

    mask = fmha.BlockDiagonalMask.from_seqlens(packing.lengths)
    out: Tensor = memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)
    return out[0]  # [T, H, C]


def choose_attention(name: AttentionName, device: torch.device, dtype: torch.dtype) -> AttentionFn:
    """The implementation called `name`; ``auto`` takes xformers on CUDA in 16 bits, else SDPA.

    Raises:
        ConfigError: xformers was asked for by name where it cannot run.
    """
    usable = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if name == "sdpa" or (name == "auto" and not (usable and _has_xformers())):
        return sdpa_attention
    if not usable:
        raise ConfigError(
            f"attention=xformers needs CUDA and 16-bit precision, not {device.type} in {dtype}; "
            "use attention=auto"
        )
    if not _has_xformers():
        raise ConfigError("attention=xformers, but xformers is not installed; pip install xformers")
    return xformers_attention


def _has_xformers() -> bool:
    return importlib.util.find_spec("xformers") is not None
