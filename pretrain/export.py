"""The encoder folder: what bare `timm.create_model("local-dir:…", pretrained=True)` loads.

The `architecture` named in ``config.json`` is a timm entry point that already sets what JSON cannot
(layer classes and their epsilon); every size is overridden in `model_args`, so no argument is
needed.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from eosin.configs.errors import EosinError, InputError
from eosin.configs.load import load_config
from eosin.launch.artefacts import SCHEMA_VERSION, replacing_folder, write_text
from eosin.pretrain.checkpoint import (
    DamagedCheckpointError,
    TrainState,
    list_checkpoints,
    read_state,
    read_tensors,
    step_of,
)
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.retention import best_step
from eosin.pretrain.tensor_files import save_tensors
from eosin.pretrain.vit import Tokens, Vit, VitConfig

ARCHITECTURES = {"gelu": "vit_base_patch14_reg4_dinov2", "swiglu": "vit_giant_patch14_reg4_dinov2"}
"""timm entry points whose feed-forward is ours; sizes are overridden."""

ROPE_ARCHITECTURE = "vit_small_patch16_rope_224"
"""timm's `Eva` whose attention has a bias on its keys, which counts under rotary positions."""

CHECKSUMS = "SHA256SUMS"

TEACHER_PREFIX = "model.teacher.backbone."


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A run's checkpoint to an encoder folder; the teacher is what is exported."""

    run: Path
    """Run folder that `eosin pretrain` wrote."""
    out: Path | None = None
    """Encoder folder; ``RUN/encoder`` by default. An existing one is replaced."""
    step: str = "newest"
    """Which checkpoint: ``newest``, ``best`` by the live probe on its validation split, or a
    step."""


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


def card_at(run: PretrainConfig, state: TrainState) -> EncoderCard:
    """What an export of a run's teacher after so many steps says about itself."""
    return EncoderCard(
        steps=state.step,
        tiles_seen=state.step * run.batch_size,
        index_digest=state.index_digest,
        mpp=state.mpp,
        mean=run.mean,
        std=run.std,
    )


def export(config: ExportConfig) -> None:
    """Exports a checkpoint of a run; of the newest that is whole, where none is named.

    Raises:
        InputError: the folder holds no run, or no such checkpoint.
        EosinError: no whole checkpoint.
    """
    if not (config.run / "config.yaml").is_file():
        raise InputError(f"{config.run} holds no run (no config.yaml); 'eosin pretrain' writes one")
    run = load_config(PretrainConfig, [config.run / "config.yaml"])
    for path in _asked_for(config):
        try:
            state, teacher = read_state(path), read_tensors(path, TEACHER_PREFIX)
            break
        except DamagedCheckpointError as error:
            print(f"passed over a damaged checkpoint: {path.name}: {error}")
    else:
        raise EosinError(f"no whole checkpoint in {config.run / 'checkpoints'}")
    out = config.out or config.run / "encoder"
    write_encoder(out, run.model, teacher, card_at(run, state))
    print(f"encoder after {state.step} steps: {out}")


def _asked_for(config: ExportConfig) -> list[Path]:
    """Checkpoints that will do, in the order in which they are tried."""
    found = list_checkpoints(config.run / "checkpoints")
    if config.step == "newest" or not found:
        return found
    steps = {step_of(path): path for path in found}
    wanted: int | None
    if config.step == "best":
        wanted = best_step(config.run / "probes.jsonl", steps)
        if wanted is None:
            raise InputError(
                f"no checkpoint of {config.run} was scored; train with probe.tiles=…, or give "
                f"step=newest or one of {sorted(steps)}"
            )
    else:
        wanted = int(config.step) if config.step.isdecimal() else None
    if wanted not in steps:
        raise InputError(
            f"step={config.step}: {config.run} has checkpoints of steps {sorted(steps)}; or give "
            "newest or best"
        )
    return [steps[wanted]]


def write_encoder(out: Path, model: VitConfig, state: dict[str, Tensor], card: EncoderCard) -> None:
    """Writes the encoder folder under a temporary name and puts it in place of `out`.

    Args:
        out: the folder; an encoder folder that is there is replaced, anything else is refused.
        model: shape of the encoder.
        state: tensors of a `Vit`, by its names.
        card: provenance and preprocessing.
    """
    # timm has no mask token, and no register token where there are no registers
    kept = {
        timm_name(model, k): v.float() for k, v in state.items() if k != "mask_token" and v.numel()
    }
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


def timm_name(model: VitConfig, name: str) -> str:
    """What timm calls one of our tensors."""
    if model.positions == "rope":  # timm's Eva holds LayerScale in the block itself
        return name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2")
    return name


def timm_config(model: VitConfig, card: EncoderCard) -> dict[str, Any]:
    """The content of ``config.json``."""
    rope = model.positions == "rope"
    return {
        "architecture": ROPE_ARCHITECTURE if rope else ARCHITECTURES[model.ffn],
        "num_classes": 0,
        "num_features": model.width,
        "global_pool": "token",
        "model_args": {
            "img_size": model.image_px,
            "patch_size": model.patch_px,
            "embed_dim": model.width,
            "depth": model.depth,
            "num_heads": model.heads,
            "init_values": model.layer_scale,
            "dynamic_img_size": any_size(model),
            "global_pool": "token",
            **(_rope_args(model) if rope else _learned_args(model)),
        },
        "pretrained_cfg": {
            "tag": "eosin",
            "custom_load": False,
            "input_size": [3, model.image_px, model.image_px],
            "fixed_input_size": not any_size(model),
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


def any_size(model: VitConfig) -> bool:
    """Whether timm gives our features at every size: it resamples a table with antialiasing."""
    return model.positions == "rope" or model.interpolation == "antialias"


def _learned_args(model: VitConfig) -> dict[str, Any]:
    halves = 2 if model.ffn == "swiglu" else 1  # this entry point takes both halves together
    return {
        "mlp_ratio": _ratio(model.hidden * halves, model.width),
        "reg_tokens": model.registers,
        "no_embed_class": True,
    }


def _rope_args(model: VitConfig) -> dict[str, Any]:
    return {
        "mlp_ratio": _ratio(model.hidden, model.width),
        "swiglu_mlp": model.ffn == "swiglu",
        "num_reg_tokens": model.registers,
        "use_fc_norm": False,
        "rope_type": "dinov3",
        "rope_temperature": model.rope.base,
        "rope_grid_indexing": "ij",
        "rope_rotate_half": True,
    }


def _ratio(hidden: int, width: int) -> float:
    """The ratio of which timm's ``int(width * ratio)`` is exactly `hidden`."""
    ratio = hidden / width
    while int(width * ratio) < hidden:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def model_card(model: VitConfig, card: EncoderCard) -> str:
    """The folder's README."""
    scale = f"{card.mpp} µm/px" if card.mpp is not None else "not known: the tiles carried none"
    positions = "learned positions"
    if model.positions == "rope":
        positions = f"axial rotary positions of base {model.rope.base:g}"
    sizes = "" if any_size(model) else " and no other (timm resamples positions in another way)"
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
{model.patch_px} px, {model.registers} registers, {model.ffn}, {positions} |
| input | {model.image_px} px{sizes}, mean {list(card.mean)}, std {list(card.std)} |
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
    with torch.device("meta"):  # or weights would be drawn, from the global generator
        vit = Vit(model)
    vit.load_state_dict({k: v.float().cpu() for k, v in state.items()}, strict=True, assign=True)
    image = torch.from_numpy(tile).permute(2, 0, 1)[None].float() / 255  # [1, 3, H, W]
    mean, std = torch.tensor(card.mean)[:, None, None], torch.tensor(card.std)[:, None, None]
    tokens: Tokens = vit.eval()([(image - mean) / std])[0]
    return tokens.cls[0].clone()
