"""Gram anchoring: the student keeps the patch similarities of an earlier teacher.

DINOv3 (arXiv 2508.10104, §4.2): L_gram = ‖X_S X_Sᵀ - X_G X_Gᵀ‖²_F with unit rows, here averaged
over the entries. Features may turn as they like as long as what is similar stays similar.
Legend: C crops, N patches a crop, D width, U Gram matrices (crops, or one for the batch). fp32.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from eosin.pretrain.spread import unit_rows


@dataclass(frozen=True, kw_only=True)
class GramConfig:
    """How much anchoring, to which teacher, from when on."""

    weight: float = 0.0
    """In the total; 0 turns it off. DINOv3: 2 in the Gram stage, 1.5 at high resolution."""
    level: Literal["image", "batch"] = "image"
    """Similarities within each crop (DINOv3), or among all patches of the batch on one rank."""
    tokens: Literal["all", "masked", "unmasked"] = "all"
    """Which patches of the student's masked crops take part."""
    remove_negative: bool = False
    """Set negative similarities of both to zero first; off in DINOv3's recipes."""
    teacher: Literal["refreshed", "frozen"] = "refreshed"
    """A copy of the moving-average teacher that is taken anew now and then, or an encoder of
    another run that never changes."""
    start: int = 0
    """First step with the loss; where the teacher is refreshed, its first copy is taken then."""
    refresh_every: int = 10_000
    """refreshed: steps between two copies (DINOv3)."""
    max_refreshes: int = 3
    """refreshed: copies after the first (DINOv3: 3); 0 keeps the first."""
    frozen_from: Path | None = None
    """frozen: the encoder folder."""

    def __post_init__(self) -> None:
        """Refuses values out of range, and a teacher that is not said or said twice."""
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight={self.weight} must be finite and at least 0")
        for name, least in (("start", 0), ("refresh_every", 1), ("max_refreshes", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if (self.teacher == "frozen") != (self.frozen_from is not None):
            raise ValueError(
                f"teacher={self.teacher} with frozen_from={self.frozen_from}: a frozen teacher "
                "needs an encoder folder, and a refreshed one takes none"
            )


def gram_active(step: int, config: GramConfig) -> bool:
    """Whether step number `step`, from 0, has the loss."""
    return config.weight > 0 and step >= config.start


def gram_refresh_due(step: int, config: GramConfig) -> bool:
    """Whether the Gram teacher becomes a copy of the teacher before step `step`, from 0.

    True at `start` and then every `refresh_every` steps, 1 + `max_refreshes` times in all. A pure
    function of the step: a resumed run that loads the Gram teacher with its checkpoint goes on as
    if it had not stopped.
    """
    if config.teacher == "frozen" or not gram_active(step, config):
        return False
    copies, rest = divmod(step - config.start, config.refresh_every)
    return rest == 0 and copies <= config.max_refreshes


def gram_loss(
    student_patches: Tensor,
    teacher_patches: Tensor,
    config: GramConfig,
    masks: Tensor | None = None,
) -> Tensor:
    """Mean squared difference of the patches' cosines, without the weight; a scalar in fp32.

    Image level: the mean over pairs of patches in each crop, then over the crops that have a patch
    that takes part. Batch level: the mean over all pairs. A pair of a patch with itself counts.

    Args:
        student_patches: [C, N, D], any floating type.
        teacher_patches: [C, N, D] of the Gram teacher, on the student's grid; no gradient.
        config: of the loss.
        masks: the student's masked patches, bool [C, N]; needed unless all tokens take part.

    Raises:
        ValueError: the config asks for some of the tokens and no masks are given.
    """
    with torch.autocast(student_patches.device.type, enabled=False):
        student, teacher = unit_rows(student_patches), unit_rows(teacher_patches.detach())
        taken = student.new_ones(student.shape[:2])  # [C, N]
        if config.tokens != "all":
            if masks is None:
                raise ValueError(f"tokens={config.tokens} needs masks")
            taken = (masks if config.tokens == "masked" else ~masks).to(student.dtype)
            student, teacher = student * taken[..., None], teacher * taken[..., None]
        if config.level == "batch":
            student, teacher, taken = (x.flatten(0, 1)[None] for x in (student, teacher, taken))
        counts = taken.sum(dim=1)  # [U]; rows that do not take part are zero in both
        if not config.remove_negative and student.shape[1] > student.shape[2]:
            squares = _from_channels(student, teacher)
        else:
            squares = _from_similarities(student, teacher, config.remove_negative)
        means = squares / counts.square().clamp(min=1)
        return means.sum() / (counts > 0).sum().clamp(min=1)


def _from_similarities(student: Tensor, teacher: Tensor, remove_negative: bool) -> Tensor:
    """Σ of the squared differences of [U, N, N], two such matrices in memory; [U]."""
    target = teacher @ teacher.mT
    if remove_negative:
        difference = (student @ student.mT).relu() - target.relu()
    else:
        difference = torch.baddbmm(target, student, student.mT, beta=-1)
    return difference.square().sum(dim=(1, 2))


def _from_channels(student: Tensor, teacher: Tensor) -> Tensor:
    """The same sum from matrices [U, D, D] alone, for N > D; [U].

    With Δ = S - T and Σ = S + T, S Sᵀ - T Tᵀ = ½ (Δ Σᵀ + Σ Δᵀ), whose squared norm is
    ½ (⟨ΔᵀΔ, ΣᵀΣ⟩ + ⟨ΣᵀΔ, ΔᵀΣ⟩). Every term is of second order in Δ, so nothing is lost to rounding
    when the student is close to its teacher.
    """
    delta, total = student - teacher, student + teacher
    mixed = total.mT @ delta  # [U, D, D]
    first = (delta.mT @ delta) * (total.mT @ total)
    return 0.5 * (first + mixed * mixed.mT).sum(dim=(1, 2))
