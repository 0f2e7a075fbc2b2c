"""Weights of a backbone, ours or anyone's, into our network: every tensor accounted for, or none.

What the network is larger or finer in than the source is resampled: learned positions by the
source's own convention, a patch kernel of another size by the pseudo-inverse of resizing a patch
(FlexiViT, Beyer et al. 2023, arXiv 2212.08013, eq. 4).
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from eosin.configs.errors import InputError
from eosin.data_curation.torchvision_import import import_timm
from eosin.data_curation.weight_facts import Facts, facts_of
from eosin.data_curation.weight_files import Weights, read_weights
from eosin.data_curation.weight_layouts import Backbone, Shape, shape_of, to_our_names
from eosin.pretrain.positions import learned_positions
from eosin.pretrain.vit import Vit, VitConfig


@torch.no_grad()
def load_backbone(vit: Vit, source: Path) -> str:
    """Loads a source into `vit`, in place; nothing is loaded where anything does not fit.

    The mask token of `vit` stays where the source has none (a released encoder is shown whole
    tiles).

    Args:
        vit: a network of the same shape, but for its `image_px` and `patch_px`.
        source: an encoder folder, a run of ours, or anyone's file or folder of weights.

    Returns:
        What was loaded and what was not, in words.

    Raises:
        InputError: it cannot be read, or is not this network; the message says which settings are.
    """
    weights = read_weights(source)
    backbone = to_our_names(weights.tensors, str(weights.source))
    shape = shape_of(backbone.tensors)
    facts = facts_of(weights, backbone.layout, shape.width)
    tensors, said = _fit(backbone, shape, vit.config)
    _refuse_other_network(vit, tensors, shape, facts, weights)
    state = vit.state_dict()
    for name, tensor in tensors.items():
        if not (name == "mask_token" and name in backbone.filled):
            state[name].copy_(tensor)
    beside = f"; {len(weights.left_out)} beside the backbone" if weights.left_out else ""
    assumed = f"; {facts.heads} heads assumed, as no config says" if facts.assumed else ""
    return f"{source}: {backbone}{beside}{assumed}{said}"


def settings_of(shape: Shape, facts: Facts, backbone: Backbone) -> dict[str, object]:
    """The settings of `VitConfig` that describe a source, by name."""
    found: dict[str, object] = {
        "width": shape.width,
        "depth": shape.depth,
        "heads": facts.heads,
        "patch_px": shape.patch_px,
        "registers": shape.registers,
        "norm_eps": facts.norm_eps,
    }
    if shape.image_px is None:
        found |= {"positions": "rope", "rope.base": facts.rope_base}
    else:
        found |= {"image_px": shape.image_px, "interpolation": backbone.resampled}
    if not shape.gated:
        return {**found, "mlp_ratio": shape.hidden / shape.width}
    for ratio, multiple in ((4, 8), (4, 64), (3, 64), (6, 64)):  # DINOv2's, DINOv3's
        rounded = -(-int(int(shape.width * ratio) * 2 / 3) // multiple) * multiple
        if rounded == shape.hidden:
            return {**found, "ffn": "swiglu", "mlp_ratio": ratio, "swiglu_multiple": multiple}
    exact = (math.ceil(shape.hidden * 1.5) + 0.5) / shape.width
    return {**found, "ffn": "swiglu", "mlp_ratio": exact, "swiglu_multiple": 1}


def _fit(backbone: Backbone, shape: Shape, config: VitConfig) -> tuple[dict[str, Tensor], str]:
    """The tensors with patch kernel and positions of the network's sizes, and what was done."""
    tensors, said = dict(backbone.tensors), ""
    if shape.patch_px != config.patch_px:
        resample = import_timm().layers.resample_patch_embed
        kernel = tensors["patch_embed.proj.weight"].float()
        size = [config.patch_px, config.patch_px]
        tensors["patch_embed.proj.weight"] = resample(kernel, size)
        said += f"; patches of {shape.patch_px} px made {config.patch_px} px"
    if shape.image_px is not None and config.positions == "learned":
        grid = shape.image_px // shape.patch_px
        if grid != config.grid:
            size_now = (config.grid, config.grid)
            table = tensors["pos_embed"]
            tensors["pos_embed"] = learned_positions(table, grid, size_now, backbone.resampled)
            said += (
                f"; positions of {grid}×{grid} patches resampled to {config.grid}×{config.grid} "
                f"({backbone.resampled})"
            )
    return tensors, said


def _refuse_other_network(
    vit: Vit, tensors: dict[str, Tensor], shape: Shape, facts: Facts, weights: Weights
) -> None:
    config = vit.config
    wanted: dict[str, tuple[object, object]] = {
        "width": (config.width, shape.width),
        "depth": (config.depth, shape.depth),
        "heads": (config.heads, facts.heads),
        "registers": (config.registers, shape.registers),
        "positions": (config.positions, "rope" if shape.image_px is None else "learned"),
        "ffn": (config.ffn, "swiglu" if shape.gated else "gelu"),
        "feed-forward channels": (config.hidden, shape.hidden),
        "norm_eps": (config.norm_eps, facts.norm_eps),
    }
    if facts.assumed:
        del wanted["heads"]
    if config.positions == "rope" and shape.image_px is None:
        wanted["rope.base"] = (config.rope.base, facts.rope_base)
    other = [f"{n}={theirs} there and {ours} here" for n, (ours, theirs) in wanted.items()
             if ours != theirs]  # fmt: skip
    if other:
        raise InputError(
            f"{weights.source} is another network: {', '.join(other)}; 'eosin weights "
            f"{weights.source}' prints the settings of model.* that fit it"
        )
    state = vit.state_dict()
    unlike = [name for name, tensor in tensors.items() if tensor.shape != state[name].shape]
    if unlike:
        name = unlike[0]
        raise InputError(
            f"{weights.source}: {len(unlike)} tensors of another shape, such as {name}: "
            f"{list(tensors[name].shape)} there, {list(state[name].shape)} here"
        )
