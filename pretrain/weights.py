"""The verb `weights`: what a file or folder of weights is, and the settings that take it."""

from dataclasses import dataclass
from pathlib import Path

from eosin.configs.errors import InputError
from eosin.data_curation.weight_facts import Facts, facts_of
from eosin.data_curation.weight_files import read_weights
from eosin.data_curation.weight_layouts import Shape, shape_of, to_our_names
from eosin.pretrain.backbone_weights import settings_of
from eosin.pretrain.vit import VitConfig


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Looks at weights; nothing is written."""

    source: Path
    """A file (.safetensors, .pth, .pt, .bin), the folder of a download, an encoder folder or a
    run."""


def show_weights(config: WeightsConfig) -> None:
    """Prints layout, shape, and a command that goes on from the weights.

    Raises:
        InputError: they cannot be read, or are no vision transformer that ours can be.
    """
    weights = read_weights(config.source)
    backbone = to_our_names(weights.tensors, str(weights.source))
    shape = shape_of(backbone.tensors)
    facts = facts_of(weights, backbone.layout, shape.width)
    settings = settings_of(shape, facts, backbone)
    channels = backbone.tensors["patch_embed.proj.weight"].shape[1]
    print(f"{config.source}: {backbone}")
    for line in _about(shape, facts, backbone.resampled):
        print(f"  {line}")
    if weights.left_out:
        print(f"  beside the backbone, not read: {len(weights.left_out)} tensors, such as "
              f"{weights.left_out[0]}")  # fmt: skip
    if channels != 3:
        raise InputError(f"{config.source} takes images of {channels} channels, and ours take 3")
    if "image_px" not in settings:
        settings["image_px"] = shape.patch_px * 16
    settings["layer_scale"] = 1e-5
    given = [f"model.{name}={value}" for name, value in settings.items()]
    VitConfig(**{k: v for k, v in settings.items() if "." not in k})  # type: ignore[arg-type]
    given += [f"augment.global_px={settings['image_px']}"]
    given += [f"mean=[{','.join(map(str, facts.mean))}]", f"std=[{','.join(map(str, facts.std))}]"]
    print("to go on from it:")
    print(
        "  eosin pretrain --config pretrain/eosin --config stage/continue shards=SHARDS out=RUN \\"
    )
    print(f"    start.weights={config.source} \\")
    print("    " + " ".join(f"'{g}'" if "[" in g else g for g in given))


def _about(shape: Shape, facts: Facts, resampled: str) -> list[str]:
    feed_forward = f"{'gated, ' if shape.gated else ''}{shape.hidden} channels"
    where = f"rotary, base {facts.rope_base:g}"
    if shape.image_px is not None:
        where = f"learned at {shape.image_px} px, resampled by '{resampled}'"
    heads = f"{facts.heads} heads" + (" (assumed: no config says)" if facts.assumed else "")
    return [
        f"width {shape.width}, depth {shape.depth}, {heads}, feed-forward {feed_forward}",
        f"patches of {shape.patch_px} px, {shape.registers} registers, positions {where}",
        f"norms with {facts.norm_eps:g}; normalisation {list(facts.mean)}, {list(facts.std)}"
        + (" (ImageNet's, assumed)" if facts.assumed else ""),
    ]
