"""Figures that tell a healthy run from a collapsing one; none needs labels.

They are computed on the device into one small tensor, which the host reads at a log step.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANK_ROWS = 512
"""Features that RankMe is taken over, at most; it costs the cube of their number."""
COLLAPSED_STD = 0.02
FEW_PROTOTYPES = 0.01
"""Share of the prototypes that could have been used."""
UNIFORM_TARGETS = 0.99
"""Teacher entropy as a share of its largest value."""
LOW_RANK = 0.02
"""RankMe as a share of its largest value."""
ENOUGH_SAMPLES = 16
"""Fewer say nothing about prototypes or ranks."""


class PrototypeUse(nn.Module):
    """When each prototype was last the strongest target of a sample.

    The state is one buffer, so it is saved and resumed with the model that holds this module.
    """

    last_step: Tensor
    """int32 [K]; -1: never."""

    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.register_buffer("last_step", torch.full((prototypes,), -1, dtype=torch.int32))

    @torch.no_grad()
    def record(self, step: int, strongest: Tensor, bad: Tensor | None = None) -> None:
        """Marks the strongest prototypes of a step's samples; does not wait for the device.

        Args:
            step: its number, from 0.
            strongest: int64 [M].
            bad: 1 to leave the record as it is, fp32 [].
        """
        # NaN logits may have any strongest prototype, even one that does not exist
        valid = strongest.clamp(0, len(self.last_step) - 1)
        marked = self.last_step.index_fill(0, valid, step)
        self.last_step.copy_(
            marked if bad is None else torch.where(bad != 0, self.last_step, marked)
        )

    @torch.no_grad()
    def used_since(self, step: int) -> Tensor:
        """Prototypes that were strongest in `step` or later, int64 []."""
        return (self.last_step >= max(step, 0)).sum()


@dataclass(frozen=True)
class Window:
    """The steps over which prototypes are counted, beside those of one batch."""

    used: Tensor
    """Prototypes that were strongest at least once, int64 [] (`PrototypeUse.used_since`)."""
    steps: int
    """Length; less than the usual one at the beginning of a run."""


@dataclass(frozen=True)
class Health:
    """Label-free figures of one batch; NaN where the objective has no such thing."""

    rankme: float
    """Effective rank of the teacher's CLS features (arXiv 2210.02885, eq. 1)."""
    feature_std: float
    """Mean standard deviation over samples of the unit-length CLS features, times sqrt(D)."""
    teacher_entropy: float
    """Mean entropy of the teacher's targets, in nats."""
    prototypes_used: float
    """Prototypes that are the strongest target of at least one sample of the batch."""
    prototypes_used_lately: float
    """The same over the window's steps."""
    agreement: float
    """Share of samples whose strongest prototype is the same for student and teacher."""
    samples: int
    """Teacher crops in the batch."""
    width: int
    """D, of the features."""
    prototypes: int
    """K; 0 for an objective without."""
    window_steps: int
    """Steps that `prototypes_used_lately` counts."""

    def values(self) -> dict[str, float]:
        """The figures by name, for metrics.jsonl; without those that the objective lacks."""
        figures = {
            "rankme": self.rankme,
            "feature_std": self.feature_std,
            "teacher_entropy": self.teacher_entropy,
            "prototypes_used": self.prototypes_used,
            "prototypes_used_lately": self.prototypes_used_lately,
            "agreement": self.agreement,
        }
        return {name: value for name, value in figures.items() if not math.isnan(value)}

    def alarms(self) -> list[str]:
        """What is wrong, in words, and what to try; empty when nothing is."""
        return [alarm for alarm in (self._features(), self._used(), self._entropy()) if alarm]

    def _features(self) -> str | None:
        if self.samples > 1 and self.feature_std < COLLAPSED_STD:
            return (
                f"the features have collapsed: their spread is {self.feature_std:.3f} (1 is "
                f"healthy); try a lower optim.lr, a lower temperature of the teacher, or a higher "
                f"weight of the spread term"
            )
        largest = min(self.samples, RANK_ROWS, self.width)
        if largest >= ENOUGH_SAMPLES and self.rankme < max(2.0, LOW_RANK * largest):
            return (
                f"the features fill few dimensions: RankMe is {self.rankme:.1f} of {largest}; try "
                f"a lower optim.lr, a higher momentum, or a higher weight of the spread term"
            )
        return None

    def _used(self) -> str | None:
        drawn = self.samples * self.window_steps
        could_be = min(self.prototypes, drawn)
        few = self.prototypes_used_lately <= max(1.0, FEW_PROTOTYPES * could_be)
        if drawn >= ENOUGH_SAMPLES and self.prototypes > 1 and few:
            steps = f"{self.window_steps} logged steps" if self.window_steps > 1 else "step"
            return (
                f"the teacher uses {self.prototypes_used_lately:,.0f} of {self.prototypes:,} "
                f"prototypes in the last {steps}; try a lower optim.lr, a higher momentum, or a "
                f"longer warm-up of the temperature"
            )
        return None

    def _entropy(self) -> str | None:
        largest = math.log(max(self.prototypes, 1))
        if largest > 0 and self.teacher_entropy > UNIFORM_TARGETS * largest:
            return (
                f"the teacher's targets are all but uniform: their entropy is "
                f"{self.teacher_entropy:.2f} of {largest:.2f} nats; try a lower temperature of the "
                f"teacher, or a lower optim.lr"
            )
        return None


@dataclass(frozen=True)
class Measured:
    """The figures of one step, still on the device."""

    figures: Tensor
    """fp32 [6], in the order of `Health`'s first fields."""
    samples: int
    width: int
    prototypes: int
    window_steps: int

    def read(self) -> Health:
        """The figures on the host; waits for the device."""
        rank, std, entropy, used, lately, agreement = self.figures.tolist()
        return Health(
            rankme=rank,
            feature_std=std,
            teacher_entropy=entropy,
            prototypes_used=used,
            prototypes_used_lately=lately,
            agreement=agreement,
            samples=self.samples,
            width=self.width,
            prototypes=self.prototypes,
            window_steps=self.window_steps,
        )


@torch.no_grad()
def measure_health(
    teacher_cls: Tensor,
    entropy: Tensor,
    strongest_teacher: Tensor,
    strongest_student: Tensor,
    prototypes: int,
    window: Window | None = None,
) -> Measured:
    """Health figures of one step's outputs; `Measured.read` brings them to the host.

    Args:
        teacher_cls: CLS features of the teacher's crops [V · B, D].
        entropy: of the teacher's targets, in nats [V · B]; empty for an objective without any.
        strongest_teacher: prototype of the largest target, int64 [V · B]; empty without any.
        strongest_student: prototype of the student's largest logit, for the same crops.
        prototypes: K; 0 without any.
        window: prototypes used over some steps; None: this step's alone.
    """
    features = teacher_cls.float()
    unit = F.normalize(features, dim=-1)
    zero = unit.new_zeros(())
    std = unit.std(dim=0).mean() * unit.shape[1] ** 0.5 if len(unit) > 1 else zero
    used = zero / 0
    if prototypes:
        marks = torch.zeros(prototypes, dtype=torch.bool, device=unit.device)
        used = marks.index_fill_(0, strongest_teacher, True).sum().float()
    lately = used if window is None else window.used.float()
    agreement = (strongest_student == strongest_teacher).float().mean()  # NaN for none
    figures = [rankme(features), std, entropy.float().mean(), used, lately, agreement]
    steps = 1 if window is None else window.steps
    return Measured(torch.stack(figures), len(features), features.shape[1], prototypes, steps)


@torch.no_grad()
def rankme(features: Tensor, eps: float = 1e-7) -> Tensor:
    """Exp of the entropy of the normalised singular values of features.

    The singular values are the roots of the eigenvalues of the smaller Gram matrix, in fp64, which
    takes half the time of an SVD in fp32; on a GPU the solver waits for the device.

    Args:
        features: [B, D]; of more than `RANK_ROWS`, every so manyth is taken.
        eps: added to each share, as in the paper (arXiv 2210.02885, eq. 1).

    Returns:
        1 … min(B, D), fp32 []; NaN where a feature is not finite.
    """
    x = features[:: -(-len(features) // RANK_ROWS)].double()
    gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    finite = gram.isfinite().all()
    gram = torch.where(finite, gram, torch.zeros_like(gram))  # the solver raises on a NaN
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = values / values.sum().clamp(min=eps) + eps
    rank = torch.exp(-(p * p.log()).sum())
    return torch.where(finite, rank, torch.nan).float()
