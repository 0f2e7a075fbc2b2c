"""Published encoders whose own repositories want another library or their own code to run.

Midnight, Phikon-v2 and Hibou are in the form of `transformers`, GenBio-PathFM in that of DINOv3.
Their tensors are brought to our names, each of them accounted for, and into a network of timm: no
code that a repository brings along is run. Shapes: B tiles, N tokens, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eosin.configs.errors import InputError
from eosin.data_curation.published_encoders import IMAGENET
from eosin.data_curation.timm_form import Form, timm_architecture, timm_arguments, timm_tensors
from eosin.data_curation.torchvision_import import import_timm
from eosin.data_curation.weight_facts import facts_of
from eosin.data_curation.weight_files import read_weights
from eosin.data_curation.weight_layouts import shape_of, to_our_names

INPUT_PX = 224


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What is known of an encoder beside its weights."""

    hub: str
    """``ORG/NAME`` on the Hugging Face hub."""
    files: tuple[str, ...]
    """What is downloaded from there."""
    pooling: str
    """What its publication evaluates."""
    normalisation: tuple[tuple[float, float, float], tuple[float, float, float]]
    """Mean and standard deviation."""
    interpolation: str = "bicubic"
    by_channel: bool = False
    """Whether red, green and blue go through the network one by one."""
    norm_eps: float = 1e-6
    """Of the layer norms, where no config says."""

    def preprocessing(self) -> dict[str, Any]:
        """Of timm's data config."""
        mean, std = self.normalisation
        return {
            "input_size": (3, INPUT_PX, INPUT_PX),
            "mean": mean,
            "std": std,
            "crop_pct": 1.0,
            "interpolation": self.interpolation,
        }


_TRANSFORMERS = ("config.json", "model.safetensors")
_HIBOU = ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))
CONVERTED = {
    "midnight-12k": Converted(
        hub="kaiko-ai/midnight",
        files=_TRANSFORMERS,
        pooling="clsmean",
        normalisation=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ),
    "phikon-v2": Converted(
        hub="owkin/phikon-v2", files=_TRANSFORMERS, pooling="cls", normalisation=IMAGENET
    ),
    "hibou-b": Converted(
        hub="histai/hibou-b", files=_TRANSFORMERS, pooling="cls", normalisation=_HIBOU
    ),
    "hibou-l": Converted(
        hub="histai/hibou-L", files=_TRANSFORMERS, pooling="cls", normalisation=_HIBOU
    ),
    "genbio-pathfm": Converted(
        hub="genbio-ai/genbio-pathfm",
        files=("model.pth",),
        pooling="cls",
        normalisation=((0.697, 0.575, 0.728), (0.188, 0.240, 0.187)),
        interpolation="bilinear",
        by_channel=True,
    ),
}
"""By the name behind ``published:``. Sources: their model cards, eva (73b61a7), HistAI/hibou
(06102fd), genbio-ai/genbio-pathfm (7f670aa)."""


class ByChannel(nn.Module):
    """A network of one channel, run on red, green and blue: their features one after another."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.num_features = 3 * network.num_features
        self.num_prefix_tokens = network.num_prefix_tokens
        self.patch_embed, self.cls_token = network.patch_embed, network.cls_token
        self.global_pool, self.pretrained_cfg = "token", network.pretrained_cfg

    def forward_features(self, images: Tensor) -> Tensor:  # [B, 3, H, W] → [B, N, 3 · D]
        """Tokens after the final norm."""
        tokens: Tensor = self.network.forward_features(images.flatten(0, 1)[:, None])
        joined: Tensor = tokens.unflatten(0, (-1, 3)).transpose(1, 2).flatten(2)
        return joined


def load_converted(name: str, folder: Path | None) -> tuple[Any, Callable[[], Any]]:
    """A published encoder of `CONVERTED`.

    Args:
        name: of it.
        folder: where its files were downloaded to; None: the hub, or its cache.

    Returns:
        The network with its weights, and what builds it at random ones.

    Raises:
        InputError: its files cannot be had, or are not this network's.
    """
    known = CONVERTED[name]
    source = _download(name, known) if folder is None else folder
    if not any((source / file).is_file() for file in known.files):
        raise InputError(f"{source} holds no download of {known.hub}: no {known.files[-1]}")
    weights = read_weights(source)
    backbone = to_our_names(weights.tensors, f"published:{name} from {weights.source}")
    shape = shape_of(backbone.tensors)
    facts = facts_of(weights, backbone.layout, shape.width)
    form = Form(
        width=shape.width,
        depth=shape.depth,
        heads=facts.heads,
        patch_px=shape.patch_px,
        image_px=shape.image_px or INPUT_PX,
        registers=shape.registers,
        hidden=shape.hidden,
        gated=shape.gated,
        norm_eps=known.norm_eps,
        rope_base=None if shape.image_px else facts.rope_base,
        any_size=bool(shape.image_px),
        channels=1 if known.by_channel else 3,
    )

    def build() -> Any:
        model = import_timm().create_model(
            timm_architecture(form), pretrained=False, num_classes=0, **timm_arguments(form)
        )
        if form.rope_base is not None:
            _round_turns(model, form, form.rope_base)
        return ByChannel(model) if known.by_channel else model

    model = build()
    network = model.network if known.by_channel else model
    try:
        network.load_state_dict(timm_tensors(form, backbone.tensors), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"published:{name}: {weights.source} is not that network: {reason}"
        ) from error
    return model, build


def _round_turns(model: Any, form: Form, base: float) -> None:
    """Makes the cosines and sines of the rotary positions those of bfloat16 arithmetic.

    DINOv3's code computes them so, in training and when it is run; at fp32 they differ by 1 %.
    """
    side, channels = form.image_px // form.patch_px, form.width // form.heads
    half = torch.bfloat16
    exponents = 2 * torch.arange(channels // 4, dtype=half) / (channels // 2)
    periods = base**exponents
    axis = torch.arange(0.5, side, dtype=half) / side
    places = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).flatten(0, 1)
    angles = 2 * torch.pi * (2.0 * places - 1.0)[:, :, None] / periods  # [N, 2, C / 4]
    angles = angles.flatten(1, 2).tile(2)  # [N, C]
    table = torch.cat([angles.sin(), angles.cos()], dim=-1).float()  # [N, 2 · C]
    if model.rope.pos_embed_cached.shape != table.shape:
        raise InputError("this timm keeps rotary positions in another way; install timm 1.0.31")
    model.rope.pos_embed_cached.copy_(table)


def _download(name: str, known: Converted) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(known.hub, allow_patterns=list(known.files)))
    except Exception as error:  # the hub raises by reason: network, account, terms, name
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"published:{name}: {known.hub} cannot be had ({reason}); accept its terms and log in, "
            f"or download {' and '.join(known.files)} and write published:{name}:FOLDER"
        ) from error
