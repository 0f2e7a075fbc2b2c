"""Distillation: a frozen teacher of any size in the place of the moving average.

As DINOv2 made its smaller networks (arXiv 2304.07193, section 5): the student learns the DINO and
iBOT targets of a larger, trained network with its heads, which never change; the student's own
moving average is kept beside it, and is what is exported. The teacher may have patches of another
size, another normalisation, registers and positions: it is shown each crop at the size at which its
patches lie on the student's. Legend: C global crops, V views.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eosin.configs.errors import ConfigError, EosinError, InputError
from eosin.configs.load import load_config
from eosin.data_curation.encoder_interface import digest_of_weights
from eosin.launch.artefacts import SCHEMA_VERSION, read_json, write_json
from eosin.launch.process import World
from eosin.pretrain.attention import AttentionFn
from eosin.pretrain.checkpoint import first_whole, list_checkpoints
from eosin.pretrain.network import Network, ObjectiveConfig
from eosin.pretrain.vit import VitConfig

TEACHER = "teacher."
"""Prefix of the teacher's tensors in a run's checkpoint."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Whom the student learns from."""

    run: Path | None = None
    """A run of ours whose teacher, heads included, is learnt from and never changes; null: the
    student's own moving average. A released encoder gets heads first: train with
    `start.weights=` it and `start.frozen_steps=` all steps."""
    masked: bool = False
    """With a frozen teacher: whether patches are hidden from the student. DINOv2 shows all of them
    and takes iBOT's loss on the same share."""


class FrozenTeacher(nn.Module):
    """A trained network with its heads, shown the crops of a student in its own way.

    Args:
        network: with its weights.
        mean: of its crops.
        std: likewise.
        student_mean: of the crops that it is given.
        student_std: likewise.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        network: Network,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        student_mean: tuple[float, float, float],
        student_std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        own, given = torch.tensor([mean, std]), torch.tensor([student_mean, student_std])
        scale, shift = given[1] / own[1], (given[0] - own[0]) / own[1]
        self.register_buffer("scale", scale.view(3, 1, 1))
        self.register_buffer("shift", shift.view(3, 1, 1))

    def show(self, crops: Tensor, patch_px: int) -> Tensor:
        """The student's crops [C, 3, H, W], with patches of `patch_px`, as this teacher takes them.

        Resized, where its patches have another size, by bicubic convolution with antialiasing.
        """
        own_px = self.network.backbone.config.patch_px
        if own_px != patch_px:
            size = [side // patch_px * own_px for side in crops.shape[2:]]
            crops = F.interpolate(crops, size=size, mode="bicubic", antialias=True)
        return crops * self.scale + self.shift


def load_frozen_teacher(
    run: Path,
    objective: ObjectiveConfig,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    attention: AttentionFn,
) -> FrozenTeacher:
    """The teacher of a run, with its heads.

    Args:
        run: its folder.
        objective: of the student, whose heads must have as many prototypes.
        mean: of the student's crops.
        std: likewise.
        attention: kernel.

    Raises:
        InputError: no run.
        ConfigError: its heads do not match the student's.
        EosinError: it has no whole checkpoint.
    """
    from eosin.pretrain.config import PretrainConfig  # here: a run's config holds this one

    if not (run / "config.yaml").is_file():
        raise InputError(f"teacher.run={run} holds no run (no config.yaml)")
    theirs = load_config(PretrainConfig, [run / "config.yaml"])
    _refuse_other_heads(run, theirs.objective, objective)
    with torch.device("meta"):
        network = Network(theirs.model, theirs.objective, attention)
    if hasattr(network, "predictor"):
        del network.predictor
    found = first_whole(list_checkpoints(run / "checkpoints"), "model." + TEACHER)
    if found is None:
        raise EosinError(f"teacher.run={run} has no whole checkpoint")
    network.load_state_dict(found[1], strict=True, assign=True)
    return FrozenTeacher(network, theirs.mean, theirs.std, mean, std)


def keep_to_teacher(out: Path, teacher: FrozenTeacher, world: World) -> None:
    """Writes down whose weights a run learns from, or refuses others when it goes on.

    Raises:
        ConfigError: it learnt from others before.
    """
    path, digest = out / "teacher.json", digest_of_weights(teacher.network)
    if path.is_file():
        before = read_json(path)["digest"]
        if before != digest:
            raise ConfigError(
                f"{out} learnt from a teacher of other weights ({before}, now {digest}): its run "
                "went on; give another out="
            )
    elif world.leads:
        write_json(path, {"schema_version": SCHEMA_VERSION, "digest": digest})


def check_grids(model: VitConfig, teacher: FrozenTeacher) -> str:
    """How the teacher sees the student's crops, in words."""
    theirs = teacher.network.backbone.config
    side = model.grid * theirs.patch_px
    shown = "as they are" if theirs.patch_px == model.patch_px else f"at {side} px"
    return (
        f"learns from a frozen network of width {theirs.width}, depth {theirs.depth}, which is "
        f"shown crops of {model.image_px} px {shown}"
    )


def _refuse_other_heads(run: Path, theirs: ObjectiveConfig, ours: ObjectiveConfig) -> None:
    if ours.jepa.weight > 0:
        raise ConfigError("objective.jepa with teacher.run: patch regression has no heads to learn")
    wanted = []
    if ours.dino > 0:
        wanted.append(("head", theirs.head if theirs.dino > 0 else None, ours.head))
    if ours.ibot > 0:
        own = (theirs.patch_head or theirs.head) if theirs.separate_heads else theirs.head
        wanted.append(
            ("patch_head", own if theirs.ibot > 0 else None, ours.patch_head or ours.head)
        )
    for name, of_teacher, of_student in wanted:
        if of_teacher is None:
            raise ConfigError(f"teacher.run={run} has no objective.{name} to learn from")
        if of_teacher.prototypes != of_student.prototypes:
            raise ConfigError(
                f"teacher.run={run} has {of_teacher.prototypes} prototypes and objective.{name} "
                f"{of_student.prototypes}: give objective.{name}.prototypes={of_teacher.prototypes}"
            )
