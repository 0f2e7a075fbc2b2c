"""What tensors cannot say of a network: its heads, the epsilon of its norms, its rotary base.

It is read from the ``config.json`` beside them, in timm's or transformers' form. A file alone, as
DINOv2 and DINOv3 are published, says nothing, and what its family always has is assumed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eosin.configs.errors import InputError
from eosin.data_curation.torchvision_import import import_timm
from eosin.data_curation.weight_files import Weights

HEAD_CHANNELS = 64
"""Of nearly every published network; DINOv3's 7B has 128, Virchow 80."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Of a network."""

    heads: int
    norm_eps: float
    rope_base: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    assumed: bool
    """Whether there was no config, so that all of it is only what the family always has."""


def facts_of(weights: Weights, layout: str, width: int) -> Facts:
    """The facts of a source in a layout of `weight_layouts`, D = `width`.

    Raises:
        InputError: the config beside the weights cannot be understood.
    """
    config = weights.config
    if "architecture" in config:
        return _of_timm(weights, config)
    of_dinov3 = "DINOv3" in layout
    gated = bool(config.get("use_gated_mlp", config.get("use_swiglu_ffn", False)))
    activation = config.get("hidden_act", "silu" if gated else "gelu")
    if activation != ("silu" if gated else "gelu") and (of_dinov3 or not gated):
        raise InputError(
            f"{weights.source / 'config.json'}: hidden_act={activation} is no feed-forward of "
            "ours; they are a GELU MLP and a gated one with SiLU"
        )
    heads = config.get("num_attention_heads", max(1, width // HEAD_CHANNELS))
    eps = config.get("layer_norm_eps", 1e-5 if of_dinov3 else 1e-6)
    base = config.get("rope_theta", 100.0)
    mean, std = IMAGENET
    return Facts(
        heads=_number(heads, int, weights, "num_attention_heads"),
        norm_eps=_number(eps, float, weights, "layer_norm_eps"),
        rope_base=_number(base, float, weights, "rope_theta"),
        mean=mean,
        std=std,
        assumed="num_attention_heads" not in config,
    )


def _of_timm(weights: Weights, config: Mapping[str, Any]) -> Facts:
    timm = import_timm()
    arguments = {**config.get("model_args", {}), "num_classes": 0, "depth": 1}  # as all blocks are
    data = config.get("pretrained_cfg", {})
    try:
        model = timm.create_model(str(config["architecture"]), pretrained=False, **arguments)
        block = model.blocks[0]
        return Facts(
            heads=int(block.attn.num_heads),
            norm_eps=float(block.norm1.eps),
            rope_base=float(getattr(getattr(model, "rope", None), "temperature", 100.0) or 100.0),
            mean=tuple(data.get("mean", IMAGENET[0])),
            std=tuple(data.get("std", IMAGENET[1])),
            assumed=False,
        )
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{weights.source / 'config.json'} describes no vision transformer of timm ({reason})"
        ) from error


def _number(value: object, kind: type[int] | type[float], weights: Weights, name: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{weights.source / 'config.json'}: {name}={value!r} is no number")
    return kind(value)
