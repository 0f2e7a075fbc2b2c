"""The encoder folder: what bare `timm.create_model("local-dir:…", pretrained=True)` loads.

The `architecture` named in ``config.json`` is a timm entry point that already sets the feed-forward
(GELU or SwiGLU) and registers; every size is overridden in `model_args`, so no argument is needed.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from eosin.configs.errors import EosinError, InputError
from eosin.configs.load import load_config
from eosin.launch.artefacts import SCHEMA_VERSION, read_json, replacing_folder, write_text
from eosin.pretrain.checkpoint import (
    TrainState,
    find_damage,
    list_checkpoints,
    save_tensors,
)
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.vit import Tokens, Vit, VitConfig

ARCHITECTURES = {"gelu": "vit_base_patch14_reg4_dinov2", "swiglu": "vit_giant_patch14_reg4_dinov2"}
"""timm entry points whose feed-forward is ours; sizes are overridden."""

CHECKSUMS = "SHA256SUMS"

TEACHER_PREFIX = "teacher.backbone."


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A run's newest checkpoint to an encoder folder; the teacher is what is exported."""

    run: Path
    """Run folder that `eosin pretrain` wrote."""
    out: Path | None = None
    """Encoder folder; ``RUN/encoder`` by default. An existing one is replaced."""


@dataclass(frozen=True, kw_only=True)
class EncoderCard:
    """What an encoder folder says about itself."""

    steps: int
    tiles_seen: int
    index_digest: str
    mpp: float | None
    """Scale of the training tiles; None where it is unknown or mixed."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def export(config: ExportConfig) -> None:
    """Exports the newest whole checkpoint of a run.

    Raises:
        InputError: the folder holds no run.
        EosinError: no whole checkpoint.
    """
    if not (config.run / "config.yaml").is_file():
        raise InputError(f"{config.run} holds no run (no config.yaml); 'eosin pretrain' writes one")
    run = load_config(PretrainConfig, [config.run / "config.yaml"])
    whole = [p for p in list_checkpoints(config.run / "checkpoints") if find_damage(p) is None]
    if not whole:
        raise EosinError(f"no whole checkpoint in {config.run / 'checkpoints'}")
    state = TrainState(**read_json(whole[0] / "manifest.json")["state"])
    tensors = load_file(whole[0] / "model.safetensors")
    teacher = {
        name.removeprefix(TEACHER_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(TEACHER_PREFIX)
    }
    card = EncoderCard(
        steps=state.step,
        tiles_seen=state.step * run.batch_size,
        index_digest=state.index_digest,
        mpp=state.mpp,
        mean=run.mean,
        std=run.std,
    )
    out = config.out or config.run / "encoder"
    write_encoder(out, run.model, teacher, card)
    print(f"encoder after {card.steps} steps: {out}")


def write_encoder(out: Path, model: VitConfig, state: dict[str, Tensor], card: EncoderCard) -> None:
    """Writes the encoder folder under a temporary name and puts it in place of `out`.

    Args:
        out: the folder; an encoder folder that is there is replaced, anything else is refused.
        model: shape of the encoder.
        state: tensors of a `Vit`, by its names.
        card: provenance and preprocessing.
    """
    # timm has no mask token, and no register token where there are no registers
    kept = {k: v.float() for k, v in state.items() if k != "mask_token" and v.numel()}
    tile = golden_tile(model.image_px)
    with replacing_folder(out, CHECKSUMS) as partial:
        save_tensors(partial / "model.safetensors", kept, format="pt")
        write_text(partial / "config.json", json.dumps(timm_config(model, card), indent=1) + "\n")
        write_text(partial / "README.md", model_card(model, card))
        Image.fromarray(tile).save(partial / "golden.png")
        golden = {"cls": golden_features(model, state, tile, card)}
        save_tensors(partial / "golden.safetensors", golden)
        sums = [
            f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
            for path in sorted(partial.iterdir())
        ]
        write_text(partial / CHECKSUMS, "".join(sums))


def timm_config(model: VitConfig, card: EncoderCard) -> dict[str, Any]:
    """The content of ``config.json``."""
    return {
        "architecture": ARCHITECTURES[model.ffn],
        "num_classes": 0,
        "num_features": model.width,
        "global_pool": "token",
        "model_args": {
            "img_size": model.image_px,
            "patch_size": model.patch_px,
            "embed_dim": model.width,
            "depth": model.depth,
            "num_heads": model.heads,
            "mlp_ratio": model.hidden * (2 if model.ffn == "swiglu" else 1) / model.width,
            "init_values": model.layer_scale,
            "reg_tokens": model.registers,
            "no_embed_class": True,
            "dynamic_img_size": True,
            "global_pool": "token",
        },
        "pretrained_cfg": {
            "tag": "eosin",
            "custom_load": False,
            "input_size": [3, model.image_px, model.image_px],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(card.mean),
            "std": list(card.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "eosin": {
            "schema_version": SCHEMA_VERSION,
            "pooling": "cls",
            "mpp": card.mpp,
            "steps": card.steps,
            "tiles_seen": card.tiles_seen,
            "index_digest": card.index_digest,
        },
    }


def model_card(model: VitConfig, card: EncoderCard) -> str:
    """The folder's README."""
    scale = f"{card.mpp} µm/px" if card.mpp is not None else "not known: the tiles carried none"
    return f"""\
# Encoder trained with eosin

```python
import timm
encoder = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))
features = encoder(transform(tile)[None])  # [1, {model.width}]
```

| | |
|---|---|
| network | ViT, width {model.width}, depth {model.depth}, {model.heads} heads, patch \
{model.patch_px} px, {model.registers} registers, {model.ffn} |
| input | {model.image_px} px, mean {list(card.mean)}, std {list(card.std)} |
| scale of the training tiles | {scale} |
| training | {card.steps} steps, {card.tiles_seen} tiles seen, shards {card.index_digest} |
| features | the CLS token after the final norm; patch tokens start at \
`encoder.num_prefix_tokens` = {model.prefix} |

`golden.png` is a drawn tile and `golden.safetensors` its features in fp32: an installation that
gives other numbers differs in weights, preprocessing or precision. `SHA256SUMS` covers every file.
"""


def golden_tile(side_px: int) -> NDArray[np.uint8]:
    """A drawn tile, uint8 [side, side, 3]: smooth colours and disks, the same on every machine."""
    y, x = np.mgrid[:side_px, :side_px] / side_px
    tile = np.stack([200 + 40 * x, 150 + 60 * y, 190 + 30 * (x - y)], axis=-1)
    rng = np.random.default_rng(0)
    for cx, cy, radius in rng.uniform((0, 0, 0.02), (1, 1, 0.06), (30, 3)):
        tile[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = (90, 60, 140)
    drawn: NDArray[np.uint8] = np.clip(tile, 0, 255).astype(np.uint8)
    return drawn


@torch.no_grad()
def golden_features(
    model: VitConfig, state: dict[str, Tensor], tile: NDArray[np.uint8], card: EncoderCard
) -> Tensor:
    """CLS features of the golden tile by our own network, fp32 [D]."""
    vit = Vit(model)
    vit.load_state_dict({k: v.float().cpu() for k, v in state.items()}, strict=True)
    image = torch.from_numpy(tile).permute(2, 0, 1)[None].float() / 255  # [1, 3, H, W]
    mean, std = torch.tensor(card.mean)[:, None, None], torch.tensor(card.std)[:, None, None]
    tokens: Tokens = vit.eval()([(image - mean) / std])[0]
    return tokens.cls[0].clone()
