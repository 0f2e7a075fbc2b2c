"""Activation checkpointing: what a block keeps for its backward, and what it computes again.

Chen et al. 2016, arXiv 1604.06174; which operators are worth keeping, Korthikanti et al. 2022,
arXiv 2205.05198.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import eosin.pretrain.attention  # noqa: F401, defines the operator that is named below

Recompute: TypeAlias = Literal["none", "selective", "full"]
"""``none`` keeps all; ``selective`` keeps what matrix products and attention gave and computes
norms, activations and rotations again; ``full`` keeps a block's input alone."""

COSTLY = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.eosin.block_diagonal_attention.default,
    }
)


def run(mode: Recompute, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`function(*inputs)`, whose backward recomputes as `mode` says; gradients are the same."""
    if mode == "none" or not torch.is_grad_enabled():
        return function(*inputs)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    out: Tensor = checkpoint(function, *inputs, **options)
    return out


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    costly = operator in COSTLY or "_varlen_attn" in str(operator)  # torch's, absent before 2.10
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE
