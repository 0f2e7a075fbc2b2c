"""Stain templates: a crop's stain statistics moved to those of a slide that might have been.

A template is a mean and a standard deviation of each stain's amount, drawn from normal
distributions that were fitted over the tiles of a data set (Shen et al., "RandStainNA: Learning
Stain-Agnostic Features from Histology Slides by Bridging Stain Augmentation and Normalization",
arXiv 2206.12694). Two things differ: the space is HED alone, in which the change is an affine map
in optical density and so joins that of the stain jitter; and it is bounded, so that a crop of
nothing but glass stays glass. Glass beside tissue is tinted with it, as mean and spread are all
that is matched.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eosin.pretrain import colour

MAX_STAIN_FACTOR = 3.0
"""How many times the spread of a stain is stretched or shrunk at most."""

Triple = tuple[float, float, float]
"""Of haematoxylin, eosin and DAB."""

_STATISTICS = ("mean", "mean_std", "std", "std_std")


@dataclass(frozen=True, kw_only=True)
class StainTemplateConfig:
    """Distribution of the templates. Triples are of haematoxylin, eosin and DAB, in natural OD.

    The defaults were measured on 1282 H&E tiles of four sources that look nothing alike: 540 tiles
    of LC25000, 521 of 45 breast slides at about 4 µm/px, 43 and 178 of two whole slides. They are
    wide for that, up to colours that no laboratory makes: `eosin stain` fits those of your shards.
    """

    probability: float = 0.0
    """Probability that a crop is moved to a template."""
    mean: tuple[float, float, float] = (0.43, 0.27, 0.20)
    """Mean over tiles of the tile's mean amount."""
    mean_std: tuple[float, float, float] = (0.35, 0.13, 0.30)
    """Standard deviation over tiles of the tile's mean amount; 0 always draws `mean`."""
    std: tuple[float, float, float] = (0.31, 0.23, 0.16)
    """Mean over tiles of the standard deviation within the tile."""
    std_std: tuple[float, float, float] = (0.17, 0.13, 0.09)
    """Standard deviation over tiles of the standard deviation within the tile."""

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must lie in [0, 1], not {self.probability}")
        for name in _STATISTICS:
            values = getattr(self, name)
            if not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} must be finite, not {values}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {self.std}")
        for name in ("mean_std", "std_std"):
            if min(getattr(self, name)) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")


def move_to_template(
    mean: Triple, std: Triple, template_mean: Triple, template_std: Triple
) -> tuple[Triple, Triple]:
    """The map amount ← factor · amount + shift that gives a crop the template's statistics.

    factor = template_std / std, within [1/`MAX_STAIN_FACTOR`, `MAX_STAIN_FACTOR`]. Where it would
    have to be w times the upper bound, the mean moves 1/w of the way only: a crop without tissue
    has no spread and stays as it is, where the plain formula would paint the glass.

    Args:
        mean: of the crop's amounts of each stain.
        std: of the crop's amounts.
        template_mean: where the means go.
        template_std: where the standard deviations go; one of 0 or below is out of bounds.

    Returns:
        factor and shift of each stain.
    """
    factors, shifts = [], []
    for here, spread, there, wanted in zip(mean, std, template_mean, template_std, strict=True):
        reach = MAX_STAIN_FACTOR * spread
        factor = min(max(wanted, spread / MAX_STAIN_FACTOR), reach) / max(spread, _TINY)
        share = min(1.0, reach / max(wanted, _TINY))
        factors.append(factor)
        shifts.append(here + share * (there - here) - factor * here)
    return _triple(factors), _triple(shifts)


_TINY = 1e-6
"""In optical density; far below what one level makes."""

_DIGITS = 4
"""What fitted figures are rounded to."""


def chain(
    factor: Triple, shift: Triple, next_factor: Triple, next_shift: Triple
) -> tuple[Triple, Triple]:
    """Factor and shift of one change of the amounts followed by another."""
    parts = zip(factor, shift, next_factor, next_shift, strict=True)
    both = [(after * f, after * s + moved) for f, s, after, moved in parts]
    return _triple([f for f, _ in both]), _triple([s for _, s in both])


def fit_stain_template(
    images: Iterable[NDArray[np.uint8]], probability: float = 0.5
) -> StainTemplateConfig:
    """The distribution of templates over `images`, each uint8 [H, W, 3] of any size.

    Args:
        images: tiles of tissue, each counting the same.
        probability: handed on to the result.

    Raises:
        ValueError: there are fewer than two images, or one stain varies within none of them.
    """
    densities = (colour.optical_density(image) for image in images)
    moments = np.array([colour.stain_moments(density) for density in densities])  # [N, 2, 3]
    if len(moments) < 2:
        raise ValueError(f"a distribution needs at least 2 images, not {len(moments)}")
    mean, std = np.round(moments.mean(0), _DIGITS).tolist()
    mean_std, std_std = np.round(moments.std(0), _DIGITS).tolist()
    return StainTemplateConfig(
        probability=probability,
        mean=_triple(mean),
        mean_std=_triple(mean_std),
        std=_triple(std),
        std_std=_triple(std_std),
    )


def _triple(values: Sequence[float]) -> Triple:
    first, second, third = values
    return first, second, third
