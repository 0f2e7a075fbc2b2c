"""The encoder folder: what bare `timm.create_model("local-dir:…", pretrained=True)` loads.

No argument is needed: `timm_form` says how.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from eosin.configs.errors import EosinError, InputError
from eosin.configs.load import load_config
from eosin.data_curation.timm_form import Form, timm_architecture, timm_arguments, timm_tensors
from eosin.launch.artefacts import SCHEMA_VERSION, replacing_folder, write_text
from eosin.pretrain.checkpoint import (
    TrainState,
    first_whole,
    list_checkpoints,
    step_of,
)
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.golden import golden_record, golden_tile
from eosin.pretrain.low_rank import merge_additions
from eosin.pretrain.model_card import EncoderCard, model_card
from eosin.pretrain.other_forms import FormName, write_onnx, write_transformers
from eosin.pretrain.retention import best_step
from eosin.pretrain.tensor_files import save_tensors
from eosin.pretrain.vit import VitConfig

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


@dataclass(frozen=True)
class Exported:
    """What an export is made of."""

    run: PretrainConfig
    state: TrainState
    teacher: dict[str, Tensor]

    def card(self, licence: str = "", sections: dict[str, str] | None = None) -> EncoderCard:
        """What the encoder says about itself."""
        return replace(card_at(self.run, self.state), licence=licence, sections=sections or {})


def read_export(config: ExportConfig) -> Exported:
    """The checkpoint of a run that is to be exported; the newest whole one, where none is named.

    Raises:
        InputError: the folder holds no run, or no such checkpoint.
        EosinError: no whole checkpoint.
    """
    if not (config.run / "config.yaml").is_file():
        raise InputError(f"{config.run} holds no run (no config.yaml); 'eosin pretrain' writes one")
    run = load_config(PretrainConfig, [config.run / "config.yaml"])
    found = first_whole(_asked_for(config), TEACHER_PREFIX)
    if found is None:
        raise EosinError(f"no whole checkpoint in {config.run / 'checkpoints'}")
    return Exported(run, *found)


def export(config: ExportConfig) -> None:
    """Exports a checkpoint of a run, without what a release adds. See `read_export`."""
    found = read_export(config)
    out = config.out or config.run / "encoder"
    write_encoder(out, found.run.model, found.teacher, found.card())
    print(f"encoder after {found.state.step} steps: {out}")


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


def write_encoder(
    out: Path,
    model: VitConfig,
    state: dict[str, Tensor],
    card: EncoderCard,
    forms: Sequence[FormName] = (),
) -> None:
    """Writes the encoder folder under a temporary name and puts it in place of `out`.

    Args:
        out: the folder; an encoder folder that is there is replaced, anything else is refused.
        model: shape of the encoder.
        state: tensors of a `Vit`, by its names.
        card: provenance and preprocessing.
        forms: other forms, each in a sub-folder of its name.

    Raises:
        ConfigError: there is no such form of this network.
    """
    state, model = merge_additions(state), replace(model, low_rank=0)
    kept = {name: t.float() for name, t in timm_tensors(form_of(model), state).items()}
    tile = golden_tile(model.image_px)
    golden, drift = golden_record(model, state, tile, card.mean, card.std)
    with replacing_folder(out, CHECKSUMS) as partial:
        save_tensors(partial / "model.safetensors", kept, format="pt")
        config = timm_config(model, card, drift)
        write_text(partial / "config.json", json.dumps(config, indent=1) + "\n")
        write_text(partial / "README.md", model_card(model, card, any_size(model), drift))
        (partial / "golden").mkdir()
        Image.fromarray(tile).save(partial / "golden" / "tile.png")
        # not beside the weights: timm 1.0.20 fails where a folder has two files of tensors
        save_tensors(partial / "golden" / "features.safetensors", golden)
        if "transformers" in forms:
            write_transformers(partial / "transformers", model, state, card)
        if "onnx" in forms:
            write_onnx(partial / "onnx", partial, model.image_px)
        sums = [
            f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(partial)}\n"
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        ]
        write_text(partial / CHECKSUMS, "".join(sums))


def form_of(model: VitConfig) -> Form:
    """The network as timm is told of it."""
    return Form(
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        patch_px=model.patch_px,
        image_px=model.image_px,
        registers=model.registers,
        hidden=model.hidden,
        gated=model.ffn == "swiglu",
        norm_eps=model.norm_eps,
        rope_base=model.rope.base if model.positions == "rope" else None,
        layer_scale=model.layer_scale,
        any_size=any_size(model),
    )


def timm_config(
    model: VitConfig, card: EncoderCard, drift: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The content of ``config.json``; `drift` of the golden features is written into it."""
    form = form_of(model)
    return {
        "architecture": timm_architecture(form),
        "num_classes": 0,
        "num_features": model.width,
        "global_pool": "token",
        "model_args": timm_arguments(form),
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
            "licence": card.licence,
            "made_with": {name: metadata.version(name) for name in ("eosin", "torch")},
            "golden_drift": drift or {},
        },
    }


def any_size(model: VitConfig) -> bool:
    """Whether timm gives our features at every size: it resamples a table with antialiasing."""
    return model.positions == "rope" or model.interpolation == "antialias"
