"""Published pathology encoders in timm's form, with what has to be said to load each of them.

Their folders on the hub cannot hold all of it: JSON has no place for a class such as SwiGLU. Most
want an account that accepted the owner's terms; a folder that was downloaded elsewhere does too.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eosin.configs.errors import InputError
from eosin.data_curation.torchvision_import import import_timm

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
H_OPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))


@dataclass(frozen=True, kw_only=True)
class Published:
    """What is known of an encoder beside its weights."""

    hub: str
    """``ORG/NAME`` on the Hugging Face hub."""
    architecture: str
    """Of timm."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """What its user has to pass; `SWIGLU` where it has that."""
    swiglu: bool = False
    """Whether its MLPs are SwiGLU, which is passed as classes."""
    configured: dict[str, Any] = field(default_factory=dict)
    """What its own config.json adds to the architecture."""
    pooling: str
    """What its publication evaluates."""
    normalisation: tuple[tuple[float, float, float], tuple[float, float, float]] = IMAGENET
    """Mean and standard deviation."""
    crop_pct: float = 1.0
    """Side of the input as a share of the resized tile's."""
    interpolation: str = "bicubic"
    millions: float
    """Of parameters."""

    def all_arguments(self) -> dict[str, Any]:
        """What has to be passed, classes included."""
        found = {"num_classes": 0, **self.arguments}
        if self.swiglu:
            layers = import_timm().layers
            found |= {"mlp_layer": layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
        return found

    def preprocessing(self) -> dict[str, Any]:
        """Of timm's data config, what its publication states, whatever the hub's config says."""
        mean, std = self.normalisation
        return {
            "mean": mean,
            "std": std,
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
        }


_DYNAMIC = {"init_values": 1e-5, "dynamic_img_size": True}
PUBLISHED = {
    "uni": Published(
        hub="MahmoodLab/uni",
        architecture="vit_large_patch16_224",
        arguments=_DYNAMIC,
        pooling="cls",
        interpolation="bilinear",
        millions=303.4,
    ),
    "uni2-h": Published(
        hub="MahmoodLab/UNI2-h",
        architecture="vit_giant_patch14_224",
        arguments={
            **_DYNAMIC, "img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24,
            "embed_dim": 1536, "mlp_ratio": 2.66667 * 2, "no_embed_class": True, "reg_tokens": 8,
        },
        swiglu=True,
        pooling="cls",
        interpolation="bilinear",
        millions=681.4,
    ),
    "virchow": Published(
        hub="paige-ai/Virchow",
        architecture="vit_huge_patch14_224",
        swiglu=True,
        configured={"mlp_ratio": 5.3375, "init_values": 1e-5},
        pooling="clsmean",
        millions=631.2,
    ),
    "virchow2": Published(
        hub="paige-ai/Virchow2",
        architecture="vit_huge_patch14_224",
        swiglu=True,
        configured={"mlp_ratio": 5.3375, "init_values": 1e-5, "reg_tokens": 4},
        pooling="clsmean",
        millions=631.2,
    ),
    "h-optimus-0": Published(
        hub="bioptimus/H-optimus-0",
        architecture="vit_giant_patch14_reg4_dinov2",
        arguments=_DYNAMIC,
        configured={"img_size": 224},
        pooling="cls",
        normalisation=H_OPTIMUS,
        millions=1134.8,
    ),
    "h-optimus-1": Published(
        hub="bioptimus/H-optimus-1",
        architecture="vit_giant_patch14_reg4_dinov2",
        arguments=_DYNAMIC,
        configured={"img_size": 224},
        pooling="cls",
        normalisation=H_OPTIMUS,
        millions=1134.8,
    ),
    "h0-mini": Published(
        hub="bioptimus/H0-mini",
        architecture="vit_base_patch14_reg4_dinov2",
        swiglu=True,
        configured={"img_size": 224, "mlp_ratio": 5.33334},
        pooling="cls",
        normalisation=H_OPTIMUS,
        millions=85.7,
    ),
    "prov-gigapath": Published(
        hub="prov-gigapath/prov-gigapath",
        architecture="vit_giant_patch14_dinov2",
        configured={"img_size": 224, "patch_size": 16, "mlp_ratio": 5.33334},
        pooling="cls",
        crop_pct=0.875,
        millions=1134.9,
    ),
}  # fmt: skip
"""By the name behind ``published:``. Sources: their model cards, and how TRIDENT (a91fa84) and eva
(73b61a79) load them."""


def load_published(name: str, folder: Path | None) -> Any:
    """The network with its weights.

    Args:
        name: of `PUBLISHED`.
        folder: where its files were downloaded to; None: the hub, or its cache.

    Raises:
        InputError: its weights cannot be had.
    """
    known = PUBLISHED[name]
    if folder is not None and not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no download of {known.hub}: it has no config.json")
    source = f"hf-hub:{known.hub}" if folder is None else f"local-dir:{folder}"
    try:
        return import_timm().create_model(source, pretrained=True, **known.all_arguments())
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"published:{name}: {known.hub} cannot be had or loaded ({reason}); accept its terms "
            f"and log in, or download it and write published:{name}:FOLDER"
        ) from error
