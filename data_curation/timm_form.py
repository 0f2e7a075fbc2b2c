"""Our network as timm describes it: an architecture, its arguments, and timm's names of tensors.

The architecture is an entry point of timm that already sets what JSON cannot hold (layer classes
and their epsilon); every size is overridden by arguments.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

ARCHITECTURES = {False: "vit_base_patch14_reg4_dinov2", True: "vit_giant_patch14_reg4_dinov2"}
"""By whether the feed-forward is gated: timm entry points that have ours."""
ROPE_ARCHITECTURE = "vit_small_patch16_rope_224"
"""timm's `Eva` whose attention has a bias on its keys, which counts under rotary positions."""
DINOV3_ARCHITECTURE = "vit_small_patch16_dinov3_qkvb"
"""timm's `Eva` with DINOv3's epsilon; `attn_type` gives it the other one's attention."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """A vision transformer with CLS and registers that have no position of their own."""

    width: int
    depth: int
    heads: int
    patch_px: int
    image_px: int
    """Of the learned positions, or of the input where positions are rotary."""
    registers: int
    hidden: int
    """Of the feed-forward; of each half, where it is gated."""
    gated: bool
    norm_eps: float
    rope_base: float | None
    """None: learned positions."""
    layer_scale: float = 1e-5
    """At its start; of no effect on what is loaded."""
    any_size: bool = True
    """Whether timm gives its features at every size."""
    channels: int = 3


def timm_architecture(form: Form) -> str:
    """The entry point."""
    if form.rope_base is None:
        return ARCHITECTURES[form.gated]
    return ROPE_ARCHITECTURE if form.norm_eps == 1e-6 else DINOV3_ARCHITECTURE


def timm_arguments(form: Form) -> dict[str, Any]:
    """What the entry point is given; all of it JSON."""
    return {
        "img_size": form.image_px,
        "patch_size": form.patch_px,
        "embed_dim": form.width,
        "depth": form.depth,
        "num_heads": form.heads,
        "init_values": form.layer_scale,
        "dynamic_img_size": form.any_size,
        "global_pool": "token",
        **(_learned(form) if form.rope_base is None else _rotary(form)),
        **({} if form.channels == 3 else {"in_chans": form.channels}),
    }


def timm_tensors(form: Form, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in our names under timm's; timm has no mask token, and no registers where none are.

    Args:
        form: of the network.
        tensors: of all of it, in our names.
    """
    kept = {name: t for name, t in tensors.items() if name != "mask_token" and t.numel()}
    if form.rope_base is None:
        return kept
    # timm's Eva holds LayerScale in the block itself
    return {
        name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): tensor
        for name, tensor in kept.items()
    }


def _learned(form: Form) -> dict[str, Any]:
    halves = 2 if form.gated else 1  # this entry point takes both halves together
    return {
        "mlp_ratio": _ratio(form.hidden * halves, form.width),
        "reg_tokens": form.registers,
        "no_embed_class": True,
    }


def _rotary(form: Form) -> dict[str, Any]:
    return {
        "mlp_ratio": _ratio(form.hidden, form.width),
        "swiglu_mlp": form.gated,
        "num_reg_tokens": form.registers,
        "use_fc_norm": False,
        "attn_type": "rope",
        "qkv_bias": True,
        "rope_type": "dinov3",
        "rope_temperature": form.rope_base,
        "rope_grid_indexing": "ij",
        "rope_rotate_half": True,
    }


def _ratio(hidden: int, width: int) -> float:
    """The ratio of which timm's ``int(width * ratio)`` is exactly `hidden`."""
    ratio = hidden / width
    while int(width * ratio) < hidden:
        ratio = math.nextafter(ratio, math.inf)
    return ratio
