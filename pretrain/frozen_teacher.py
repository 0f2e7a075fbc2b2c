"""Distillation: frozen teachers of any size in the place of the moving average.

As DINOv2 made its smaller networks (arXiv 2304.07193, section 5): the student learns the DINO and
iBOT targets of a larger, trained network with its heads, which never change; the student's own
moving average is kept beside it, and is what is exported. A teacher may have patches of another
size, another normalisation, registers and positions: it is shown each crop at the size at which its
patches lie on the student's. Of several teachers each has heads of its own in the student, and
weighs the same. Legend: C global crops, V views.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

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
    student's own moving average. A released encoder gets heads first: ``--config stage/heads``
    with `start.weights=` it."""
    also: list[Path] = field(default_factory=list)
    """Further runs that are learnt from beside `run`, each by heads of its own in the student;
    they may have other numbers of prototypes. Every loss is the mean over the teachers."""
    masked: bool = False
    """With a frozen teacher: whether patches are hidden from the student. DINOv2 shows all of them
    and takes iBOT's loss on the same share."""

    def __post_init__(self) -> None:
        """Refuses further teachers without a first, and one teacher twice."""
        if self.also and self.run is None:
            raise ValueError("teacher.also names further teachers: name the first in teacher.run")
        if len(set(self.runs)) < len(self.runs):
            raise ValueError(f"the same teacher twice: {', '.join(map(str, self.runs))}")

    @property
    def runs(self) -> list[Path]:
        """All of them."""
        return [] if self.run is None else [self.run, *self.also]


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

    def heads_for(self, objective: ObjectiveConfig) -> ObjectiveConfig:
        """A student's objective with as many prototypes as this teacher has."""
        head, patch_head = objective.head, objective.patch_head
        if objective.dino > 0:
            head = replace(head, prototypes=self.network.head.config.prototypes)
        if objective.separate_heads:
            own = getattr(self.network, self.network.objective.patch_head_name)
            patch_head = replace(patch_head or objective.head, prototypes=own.config.prototypes)
        return replace(objective, head=head, patch_head=patch_head)


def load_frozen_teachers(
    config: TeacherConfig,
    objective: ObjectiveConfig,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    attention: AttentionFn,
) -> list[FrozenTeacher]:
    """All teachers that a config names; see `load_frozen_teacher`.

    Raises:
        ConfigError: several, with targets that have a moving centre.
    """
    if config.also and objective.targets == "centre":
        raise ConfigError("objective.targets=centre keeps one centre, and teacher.also has more")
    return [
        load_frozen_teacher(run, objective, mean, std, attention, first=run == config.run)
        for run in config.runs
    ]


def load_frozen_teacher(
    run: Path,
    objective: ObjectiveConfig,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    attention: AttentionFn,
    first: bool = True,
) -> FrozenTeacher:
    """The teacher of a run, with its heads.

    Args:
        run: its folder.
        objective: of the student, whose heads must have as many prototypes as those of the first.
        mean: of the student's crops.
        std: likewise.
        attention: kernel.
        first: whether it is the one whose prototypes `objective` has.

    Raises:
        InputError: no run.
        ConfigError: its heads do not match the student's.
        EosinError: it has no whole checkpoint.
    """
    theirs = read_shape(run)
    _refuse_other_heads(run, theirs.objective, objective, first)
    with torch.device("meta"):
        network = theirs.build(attention)
    found = first_whole(list_checkpoints(run / "checkpoints"), "model." + TEACHER)
    if found is None:
        raise EosinError(f"teacher.run={run} has no whole checkpoint")
    network.load_state_dict(found[1], strict=True, assign=True)
    return FrozenTeacher(network, theirs.mean, theirs.std, mean, std)


class TeacherShape(NamedTuple):
    """What a run's config says of the teacher that it leaves."""

    model: VitConfig
    objective: ObjectiveConfig
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def build(self, attention: AttentionFn) -> Network:
        """The network, its weights undefined."""
        network = Network(self.model, self.objective, attention)
        if hasattr(network, "predictor"):
            del network.predictor
        return network


def read_shape(run: Path) -> TeacherShape:
    """The shape of a run's teacher.

    Raises:
        InputError: no run.
    """
    from eosin.pretrain.config import PretrainConfig  # here: a run's config holds this one

    if not (run / "config.yaml").is_file():
        raise InputError(f"teacher.run={run} holds no run (no config.yaml)")
    theirs = load_config(PretrainConfig, [run / "config.yaml"])
    return TeacherShape(theirs.model, theirs.objective, theirs.mean, theirs.std)


def keep_to_teachers(out: Path, teachers: Sequence[FrozenTeacher], world: World) -> None:
    """Writes down whose weights a run learns from, or refuses others when it goes on.

    Raises:
        ConfigError: it learnt from others before.
    """
    path = out / "teacher.json"
    digest = "+".join(digest_of_weights(teacher.network) for teacher in teachers)
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


def _refuse_other_heads(
    run: Path, theirs: ObjectiveConfig, ours: ObjectiveConfig, first: bool
) -> None:
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
        if first and of_teacher.prototypes != of_student.prototypes:
            raise ConfigError(
                f"teacher.run={run} has {of_teacher.prototypes} prototypes and objective.{name} "
                f"{of_student.prototypes}: give objective.{name}.prototypes={of_teacher.prototypes}"
            )
