"""What a slide encoder learns: a list of terms, each with a target and a weight; null is off."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eosin.pretrain.network import ObjectiveConfig
from eosin.pretrain.slide.contrast import ContrastName
from eosin.pretrain.slide.labels import LabelsConfig


@dataclass(frozen=True, kw_only=True)
class RegressConfig:
    """Hidden tokens to their input features (masked embedding modelling)."""

    weight: float = 1.0
    loss: Literal["cosine", "smooth_l1"] = "cosine"
    """Between prediction and standardised feature."""
    hidden: int = 0
    """Channels of a hidden layer of each source's predictor; 0: a linear one."""

    def __post_init__(self) -> None:
        if self.weight <= 0 or self.hidden < 0:
            raise ValueError(f"regress: weight={self.weight} > 0 and hidden={self.hidden} ≥ 0")


@dataclass(frozen=True, kw_only=True)
class ContrastConfig:
    """Global views of a sample against each other (InfoNCE)."""

    weight: float = 1.0
    temperature: float = 0.2
    width: int = 256
    """Of the projection."""
    hidden: int = 1024
    """Channels of its hidden layer."""
    teacher: bool = True
    """Keys are the moving average's, and the student has a predictor more (MoCo v3, arXiv
    2104.02057); else they are its own, with gradients."""

    def __post_init__(self) -> None:
        if self.weight <= 0 or not 0 < self.temperature < math.inf:
            raise ValueError(
                f"contrast: weight={self.weight} and temperature={self.temperature} must be above 0"
            )


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """The slide's vector against paired vectors of any modality."""

    table: Path
    """Parquet with key (slide or group, as `bags.unit` has it), modality, vector."""
    weight: float = 1.0
    loss: ContrastName = "infonce"
    pairs: Literal["star", "all"] = "star"
    """The slide with each modality, or every two of all of them."""
    temperature: float = 0.07
    """At the start; it is learnt (CLIP)."""
    width: int = 256
    """Of the projections."""
    hidden: int = 512
    """Channels of the hidden layer of a modality's projection; 0: a linear one."""

    def __post_init__(self) -> None:
        if self.weight <= 0 or not 0 < self.temperature < math.inf:
            raise ValueError(
                f"align: weight={self.weight} and temperature={self.temperature} must be above 0"
            )


@dataclass(frozen=True, kw_only=True)
class SlideObjectiveConfig:
    """The terms; at least one is on."""

    distil: ObjectiveConfig | None = None
    """DINO between views, iBOT on hidden tokens, spread: the tile trainer's, without `gram` and
    `jepa`."""
    regress: RegressConfig | None = None
    contrast: ContrastConfig | None = None
    align: AlignConfig | None = None
    labels: LabelsConfig | None = None

    def __post_init__(self) -> None:
        if not any((self.distil, self.regress, self.contrast, self.align, self.labels)):
            raise ValueError(
                "objective: nothing to learn; give distil, regress, contrast, align or labels"
            )
        if self.distil is not None and (self.distil.gram.weight or self.distil.jepa.weight):
            raise ValueError("objective.distil: gram and jepa are of patches of images; leave them")

    @property
    def hides(self) -> bool:
        """Whether a term is of tokens that the student does not see."""
        return self.regress is not None or (self.distil is not None and self.distil.ibot > 0)

    @property
    def teaches(self) -> bool:
        """Whether a term asks the moving average."""
        by_average = self.contrast is not None and self.contrast.teacher
        return self.distil is not None or by_average
