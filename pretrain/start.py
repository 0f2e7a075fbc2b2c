"""Where a training starts from: drawn weights, anyone's encoder, or a whole run of ours.

Fresh heads know nothing, and their gradients ruin a trained backbone within a few hundred steps. So
the backbone may stand still until the heads have learnt what it says (`frozen_steps`), and then set
off slowly (`ramp_steps`). What is trained at all is the whole network, its last blocks, or low-rank
additions to its linear layers.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from eosin.configs.errors import EosinError, InputError
from eosin.configs.load import load_config
from eosin.pretrain.backbone_weights import load_backbone
from eosin.pretrain.checkpoint import first_whole, list_checkpoints
from eosin.pretrain.distill import Distiller
from eosin.pretrain.low_rank import LOW_RANK
from eosin.pretrain.positions import learned_positions
from eosin.pretrain.vit import VitConfig

MAY_DIFFER = frozenset({"image_px", "drop_path", "layer_scale", "low_rank", "interpolation"})
"""Settings of the network that its weights do not depend on."""


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """What the first step finds."""

    weights: Path | None = None
    """Backbone of student and teacher: an encoder folder, a run (its encoder), or anyone's weights
    (a file or folder of DINOv2, DINOv3, timm, transformers: 'eosin weights' says what it is)."""
    run: Path | None = None
    """A run of ours: student, teacher and heads of its newest checkpoint, with a new optimiser and
    new schedules. The next stage of a training: another size, a Gram term, other tiles."""
    frozen_steps: int = 0
    """Steps in which the backbone does not move, so that fresh heads learn what it says first."""
    ramp_steps: int = 0
    """Steps after those over which the backbone's learning rate rises to its schedule in a line."""
    train_blocks: int = 0
    """Only so many last blocks, the final norm and the heads are trained; 0: everything."""

    def __post_init__(self) -> None:
        """Refuses two starts, and numbers that are none."""
        if self.weights is not None and self.run is not None:
            raise ValueError(
                f"start.weights={self.weights} and start.run={self.run}: give one of them"
            )
        for name in ("frozen_steps", "ramp_steps", "train_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(f"start.{name}={getattr(self, name)} must not be negative")

    @property
    def given(self) -> bool:
        """Whether weights are not drawn."""
        return self.weights is not None or self.run is not None

    def backbone_rate(self, step: int) -> float:
        """Factor on the backbone's learning rate at `step`, from 0."""
        if step < self.frozen_steps:
            return 0.0
        if step >= self.frozen_steps + self.ramp_steps:
            return 1.0
        return (step - self.frozen_steps + 1) / (self.ramp_steps + 1)


def start_from(model: Distiller, config: StartConfig, shape: VitConfig) -> str:
    """Loads what `config` names into student and teacher, in place, before they are laid out.

    Args:
        model: with drawn weights, on the CPU.
        config: of the start; one of `weights` and `run` is given.
        shape: of the backbone.

    Returns:
        What was loaded, in words.

    Raises:
        InputError: it cannot be read, or is another network.
    """
    if config.weights is not None:
        said = load_backbone(model.student.backbone, config.weights)
        model.teacher.backbone.load_state_dict(model.student.backbone.state_dict())
    else:
        assert config.run is not None
        said = _load_run(model, config.run, shape)
    if hasattr(model, "gram_teacher"):
        model.gram_teacher.load_state_dict(model.teacher.backbone.state_dict())
    return said


def freeze(
    student: nn.Module, train_blocks: int, depth: int, low_rank: int, masked: bool = True
) -> None:
    """Leaves gradients to what is trained alone: below the first such layer nothing is computed.

    Args:
        student: a `Network`.
        train_blocks: last blocks that are trained; 0: all.
        depth: blocks in all.
        low_rank: of the backbone's additions; 0: none, and the weights themselves are trained.
        masked: whether the student's patches are hidden: else the mask token stands still.

    Raises:
        InputError: more blocks than there are.
    """
    if train_blocks > depth:
        raise InputError(f"start.train_blocks={train_blocks}, and the network has {depth} blocks")
    first = depth - train_blocks if train_blocks else 0
    for name, parameter in student.named_parameters():
        if not name.startswith("backbone."):
            continue
        parts = name.split(".")
        block = int(parts[2]) if parts[1] == "blocks" else None
        trained = parts[1] == "norm" or train_blocks == 0 or (block is not None and block >= first)
        if low_rank:
            trained = trained and (parts[-1] in LOW_RANK or parts[1] == "norm")
        if not masked:
            trained = trained and parts[1] != "mask_token"
        parameter.requires_grad_(trained)


@torch.no_grad()
def _load_run(model: Distiller, run: Path, shape: VitConfig) -> str:
    tensors, step, theirs = _read_run(run)
    _refuse_other_model(theirs, shape, run)
    own = model.state_dict()
    wanted = {n for n in own if n.startswith(("student.", "teacher."))}
    given = {n for n in tensors if n.startswith(("student.", "teacher."))}
    fresh = {n for n in wanted if n.split(".")[-1] in LOW_RANK}
    missing, extra = sorted(wanted - given - fresh), sorted(given - wanted)
    if missing or extra:
        odd = f"{len(missing)} missing ({missing[0]})" if missing else f"{len(extra)} too many "
        odd += "" if missing else f"({extra[0]})"
        raise InputError(
            f"{run}: its networks are not these: {odd}; give it the objective of that run, or take "
            f"its backbone alone with start.weights={run}"
        )
    for name in sorted(wanted - fresh):
        tensor = tensors[name]
        if name.endswith("backbone.pos_embed") and tensor.shape != own[name].shape:
            grid, side = theirs.grid, shape.grid
            tensor = learned_positions(tensor, grid, (side, side), shape.interpolation)
        if tensor.shape != own[name].shape:
            raise InputError(
                f"{run}: {name} is {list(tensor.shape)} there and {list(own[name].shape)} here; "
                "give it the heads of that run"
            )
        own[name].copy_(tensor)
    resized = (
        f", positions resampled from {theirs.image_px} px" if theirs.grid != shape.grid else ""
    )
    return f"{run}: {len(wanted - fresh)} of {len(given)} tensors after step {step}{resized}"


def _read_run(run: Path) -> tuple[dict[str, Tensor], int, VitConfig]:
    from eosin.pretrain.config import PretrainConfig  # here: a run's config holds this one

    if not (run / "config.yaml").is_file():
        raise InputError(f"start.run={run} holds no run (no config.yaml)")
    config = load_config(PretrainConfig, [run / "config.yaml"])
    found = first_whole(list_checkpoints(run / "checkpoints"), "model.")
    if found is None:
        raise EosinError(f"start.run={run} has no whole checkpoint")
    state, tensors = found
    return tensors, state.step, config.model


def _refuse_other_model(theirs: VitConfig, ours: VitConfig, run: Path) -> None:
    names = [f.name for f in fields(VitConfig) if f.name not in {*MAY_DIFFER, "rope"}]
    other = [
        f"model.{name}={getattr(theirs, name)} there and {getattr(ours, name)} here"
        for name in names
        if getattr(theirs, name) != getattr(ours, name)
    ]
    if ours.positions == "rope" and theirs.rope.base != ours.rope.base:
        other.append(f"model.rope.base={theirs.rope.base} there and {ours.rope.base} here")
    if other:
        raise InputError(f"start.run={run} is another network: {', '.join(other)}")
