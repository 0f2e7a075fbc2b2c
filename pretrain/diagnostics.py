"""Figures that tell a healthy run from a collapsing one; none needs labels."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from eosin.pretrain.distill import Outputs


@dataclass(frozen=True)
class Health:
    """Label-free figures of one batch."""

    rankme: float
    """Effective rank of the teacher's CLS features (arXiv 2210.02885, eq. 1)."""
    feature_std: float
    """Mean standard deviation over samples of the unit-length CLS features, times sqrt(D)."""
    teacher_entropy: float
    """Mean entropy of the teacher's targets, in nats."""
    prototypes_used: int
    """Prototypes that are the strongest target of at least one sample."""
    agreement: float
    """Share of samples whose strongest prototype is the same for student and teacher."""

    def values(self) -> dict[str, float]:
        """The figures by name, for metrics.jsonl."""
        return asdict(self)

    def alarm(self, batch: int) -> str | None:
        """What is wrong, in words; None when nothing is."""
        if self.feature_std < 0.02:
            return f"features have collapsed: their spread is {self.feature_std:.3f} (1 is healthy)"
        if batch >= 16 and self.prototypes_used <= max(1, batch // 64):
            return f"the teacher uses {self.prototypes_used} prototypes for {batch} samples"
        return None


@torch.no_grad()
def measure_health(outputs: Outputs) -> Health:
    """Health figures of one step's outputs; waits for the device."""
    features = outputs.teacher_cls.float()  # [V · B, D]
    unit = torch.nn.functional.normalize(features, dim=-1)
    std = unit.std(dim=0).mean() * unit.shape[1] ** 0.5 if len(unit) > 1 else unit.new_zeros(())
    targets = outputs.targets.flatten(0, 1)  # [V · B, K]
    entropy = -(targets * targets.clamp(min=1e-12).log()).sum(dim=1).mean()
    strongest = targets.argmax(dim=1)
    # the student's view v is compared with the teacher's same view
    agreement = (outputs.student_logits.flatten(0, 1).argmax(dim=1) == strongest).float().mean()
    return Health(
        rankme=rankme(features),
        feature_std=float(std),
        teacher_entropy=float(entropy),
        prototypes_used=len(strongest.unique()),
        agreement=float(agreement),
    )


@torch.no_grad()
def rankme(features: Tensor, eps: float = 1e-7) -> float:
    """Exp of the entropy of the normalised singular values of features, [B, D] → 1 … min(B, D)."""
    values = torch.linalg.svdvals(features.float())
    p = values / values.sum().clamp(min=eps) + eps
    return float(torch.exp(-(p * p.log()).sum()))
