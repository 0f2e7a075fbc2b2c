"""Other libraries' names for the tensors of a vision transformer, brought to ours: all or none.

Ours are timm's names for a network whose CLS and registers have no position of their own. Each
layout is a list of renamings; what several tensors of theirs make one of ours is joined, and a
position that belongs to CLS or registers is added to them, which is the same function. Every tensor
that is read ends in the network or is said to be left out, and why; one that is neither is refused
by name. Legend: D width, N patches, R registers.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from eosin.configs.errors import InputError

Resampling: TypeAlias = Literal["antialias", "offset", "exact"]
"""How learned positions are resampled: `pretrain.positions.learned_positions` says what each is."""

_BLOCK = r"^blocks\.(\d+)\."
_TRANSFORMERS = (
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.(cls|mask)_token$", r"\1_token"),
    (r"^embeddings\.patch_embeddings\.(?:projection\.)?(\w+)$", r"patch_embed.proj.\1"),
    (r"^(?:encoder|model)?\.?layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
)
_GATED = ((r"\.mlp\.gate_proj\.", ".mlp.w1."), (r"\.mlp\.up_proj\.", ".mlp.w2."))
_DOWN = (r"\.mlp\.down_proj\.", ".mlp.fc2.")
_META = (
    (r"^(register|storage)_tokens$", "reg_token"),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # chunks of blocks keep each block's own number
    (r"\.mlp\.w12\.", ".mlp.fc1."),
)
_W3 = (r"\.mlp\.w3\.", ".mlp.fc2.")
_TIMM = (
    (r"\.gamma_(\d)$", r".ls\1.gamma"),
    (r"\.mlp\.fc1_g\.", ".mlp.w1."),
    (r"\.mlp\.fc1_x\.", ".mlp.w2."),
)
_BUFFERS = r"(\.bias_mask|^rope_embed\.periods|^local_cls_norm\..*)$"
"""What DINOv3 saves beside its weights: which biases are zero, what its base says already, and a
norm that is used for local crops in training alone."""
_CLASSIFIER = r"^(head|classifier|heads)\.(weight|bias)$"


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A vision transformer in our names."""

    layout: str
    """Whose names it came in."""
    resampled: Resampling
    """How its owner resamples learned positions for another size."""
    tensors: dict[str, Tensor]
    """The whole network in our names."""
    read: int
    """Tensors of the source that are in it."""
    left_out: tuple[str, ...]
    """Tensors of the source that are no part of the network, or that say nothing."""
    filled: tuple[str, ...]
    """Tensors of ours that the layout has no place for, at the value that changes nothing."""

    def __str__(self) -> str:
        whole = self.read + len(self.left_out)
        said = f"{whole} of {whole} tensors accounted for ({self.layout}): {self.read} are loaded"
        if self.left_out:
            said += f", {len(self.left_out)} left out ({_few(self.left_out)})"
        if self.filled:
            said += f"; not in it, and set so that they change nothing: {_few(self.filled)}"
        return said


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the tensors themselves say of a network's shape."""

    width: int
    depth: int
    patch_px: int
    image_px: int | None
    """Of the learned positions; None where positions are rotary."""
    registers: int
    gated: bool
    hidden: int
    """Of each half, where it is gated."""


def to_our_names(tensors: Mapping[str, Tensor], where: str) -> Backbone:
    """Renames, joins and folds the tensors of any layout we know.

    Args:
        tensors: of a source, as `weight_files.read_weights` gives them.
        where: the source, for errors.

    Raises:
        InputError: the layout is none of those, or tensors of it are missing or too many.
    """
    layout, resampled, rules = _find_layout(tensors, where)
    left_out = [n for n in tensors if re.search(_BUFFERS, n) or re.match(_CLASSIFIER, n)]
    named = {_rename(n, rules): t for n, t in tensors.items() if n not in left_out}
    if len(named) + len(left_out) < len(tensors):
        raise InputError(f"{where}: two of its tensors have one meaning in the layout of {layout}")
    read = len(named)
    filled: list[str] = []
    masked = any(name.endswith(".bias_mask") for name in left_out)
    for block in sorted({int(m[1]) for n in named if (m := re.match(_BLOCK, n))}):
        _join_block(named, f"blocks.{block}.", masked, filled)
    _join_prefix(named, where, filled)
    found = Backbone(
        layout=layout,
        resampled=resampled,
        tensors=named,
        read=read,
        left_out=tuple(sorted(left_out)),
        filled=tuple(filled),
    )
    _refuse_unaccounted(found, where)
    return found


def _find_layout(
    tensors: Mapping[str, Tensor], where: str
) -> tuple[str, Resampling, tuple[tuple[str, str], ...]]:
    names = tensors.keys()
    if "embeddings.cls_token" in names:
        gated = any(".mlp.gate_proj." in name for name in names)
        up = _GATED if gated else ((r"\.mlp\.up_proj\.", ".mlp.fc1."),)
        version = 2 if "embeddings.position_embeddings" in names else 3
        how: Resampling = "antialias" if "embeddings.register_tokens" in names else "exact"
        return f"transformers, DINOv{version}", how, (*_TRANSFORMERS, *up, _DOWN)
    if "storage_tokens" in names or "rope_embed.periods" in names:
        return "DINOv3", "antialias", (*_META, _W3)
    if "cls_token" in names and "patch_embed.proj.weight" in names:
        chunked = any(re.match(r"^blocks\.\d+\.\d+\.", name) for name in names)
        if "register_tokens" in names:
            return "DINOv2 with registers", "antialias", (*_META, _W3)
        if chunked or "mask_token" in names or any(".mlp.w12." in name for name in names):
            return "DINOv2", "offset", (*_META, _W3)
        return "timm", "antialias", _TIMM
    raise InputError(
        f"{where}: its tensors ({_few(tuple(names))}) are in no layout that is known: DINOv2, "
        "DINOv3, timm, or transformers' DINOv2 and DINOv3"
    )


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _join_block(named: dict[str, Tensor], block: str, masked: bool, filled: list[str]) -> None:
    """Joins query, key and value, and both halves of a gated feed-forward; fills what is absent.

    Args:
        named: tensors, changed in place.
        block: prefix of the block's names.
        masked: whether the keys' bias is masked, so that it is zero whatever is saved.
        filled: names of what is filled in are added.
    """
    for kind in ("weight", "bias"):
        parts = [
            named.pop(f"{block}attn.{part}.{kind}", None) for part in ("query", "key", "value")
        ]
        there = [part for part in parts if part is not None]
        if there:  # DINOv3 has no bias on its keys, which is a bias of zero
            named[f"{block}attn.qkv.{kind}"] = torch.cat(
                [torch.zeros_like(there[0]) if part is None else part for part in parts]
            )
        halves = [named.pop(f"{block}mlp.{half}.{kind}", None) for half in ("w1", "w2")]
        gate, up = halves
        if gate is not None and up is not None:
            named[f"{block}mlp.fc1.{kind}"] = torch.cat([gate, up])
    query, value = (named.pop(f"{block}attn.{part}_bias", None) for part in ("q", "v"))
    if query is not None and value is not None:  # timm's Eva
        named[f"{block}attn.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    projection = named.get(f"{block}attn.proj.weight")  # [D, D]
    width = 0 if projection is None else len(projection)
    bias = named.get(f"{block}attn.qkv.bias")
    if bias is None and width:
        named[f"{block}attn.qkv.bias"] = torch.zeros(3 * width)
        filled.append(f"{block}attn.qkv.bias")
    elif bias is not None and masked:
        of_query, _, of_value = bias.chunk(3)
        zero = torch.zeros_like(of_query)
        named[f"{block}attn.qkv.bias"] = torch.cat([of_query, zero, of_value])
    if f"{block}ls1.gamma" not in named and f"{block}ls2.gamma" not in named and width:
        for scale in ("ls1", "ls2"):
            named[f"{block}{scale}.gamma"] = torch.ones(width)
            filled.append(f"{block}{scale}.gamma")


def _join_prefix(named: dict[str, Tensor], where: str, filled: list[str]) -> None:
    """Positions of CLS and registers go into the tokens; a missing mask token is zero."""
    if "cls_token" not in named:
        raise InputError(f"{where} has no class token, and our network reads one")
    width = named["cls_token"].shape[-1]
    named["cls_token"] = named["cls_token"].reshape(1, 1, width)
    if "mask_token" in named:
        named["mask_token"] = named["mask_token"].reshape(1, width)
    else:
        named["mask_token"] = torch.zeros(1, width)
        filled.append("mask_token")
    if "reg_token" not in named:
        named["reg_token"] = torch.zeros(1, 0, width)
    positions = named.get("pos_embed")
    if positions is None:
        return
    registers = named["reg_token"].shape[1]
    for prefix in (0, 1, 1 + registers):
        side = round((positions.shape[1] - prefix) ** 0.5)
        if side > 0 and side**2 == positions.shape[1] - prefix:
            break
    else:
        raise InputError(
            f"{where}: {positions.shape[1]} positions are no square of patches, with or without "
            f"CLS and {registers} registers"
        )
    if prefix:
        named["cls_token"] = named["cls_token"] + positions[:, :1]
    if prefix > 1:
        named["reg_token"] = named["reg_token"] + positions[:, 1:prefix]
    named["pos_embed"] = positions[:, prefix:].clone()


def _refuse_unaccounted(found: Backbone, where: str) -> None:
    try:
        shape = shape_of(found.tensors)
    except (KeyError, ValueError) as error:
        raise InputError(f"{where} ({found.layout}) has no tensor for our {error}") from error
    have = found.tensors
    wanted = _expected(shape, have["patch_embed.proj.weight"].shape[1])
    missing, extra = sorted(wanted.keys() - have.keys()), sorted(have.keys() - wanted.keys())
    unlike = [n for n in wanted if n in have and tuple(have[n].shape) != wanted[n]]
    problems = (("missing", missing), ("unexpected", extra), ("of another shape", unlike))
    said = [f"{len(names)} {what} ({_few(tuple(names))})" for what, names in problems if names]
    if said:
        raise InputError(
            f"{where} ({found.layout}) is not the network that our names describe: "
            f"{', '.join(said)}; nothing was loaded"
        )


def shape_of(tensors: Mapping[str, Tensor]) -> Shape:
    """The shape that tensors in our names speak of.

    Raises:
        KeyError: one that says it is missing.
    """
    kernel = tensors["patch_embed.proj.weight"]  # [D, 3, patch, patch]
    parts = Counter(int(m[1]) for name in tensors if (m := re.match(_BLOCK, name)))
    fc1, fc2 = tensors["blocks.0.mlp.fc1.weight"], tensors["blocks.0.mlp.fc2.weight"]
    positions = tensors.get("pos_embed")
    return Shape(
        width=kernel.shape[0],
        # a block of which one tensor is there is a tensor too many, not a block of which most miss
        depth=1 + max(block for block, count in parts.items() if count > 7),
        patch_px=kernel.shape[-1],
        image_px=None if positions is None else round(positions.shape[1] ** 0.5) * kernel.shape[-1],
        registers=tensors["reg_token"].shape[1],
        gated=fc1.shape[0] == 2 * fc2.shape[1],
        hidden=fc2.shape[1],
    )


def _expected(shape: Shape, channels: int) -> dict[str, tuple[int, ...]]:
    """All tensors of the network, with their shapes."""
    width, hidden = shape.width, shape.hidden
    found: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, channels, shape.patch_px, shape.patch_px),
        "cls_token": (1, 1, width),
        "reg_token": (1, shape.registers, width),
        "mask_token": (1, width),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if shape.image_px is not None:
        found["pos_embed"] = (1, (shape.image_px // shape.patch_px) ** 2, width)
    rows = hidden * (2 if shape.gated else 1)
    parts: dict[str, tuple[int, ...]] = {
        "norm1.weight": (width,), "norm1.bias": (width,),
        "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
        "ls1.gamma": (width,), "ls2.gamma": (width,),
        "norm2.weight": (width,), "norm2.bias": (width,),
        "mlp.fc1.weight": (rows, width), "mlp.fc1.bias": (rows,),
        "mlp.fc2.weight": (width, hidden), "mlp.fc2.bias": (width,),
    }  # fmt: skip
    found |= {f"blocks.{i}.{n}": s for i in range(shape.depth) for n, s in parts.items()}
    return found


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
