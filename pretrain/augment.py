"""What may happen to the crops of a tile: sizes, geometry, colour, and how often.

The recipe is DINOv2's (Oquab et al., 2023), with the orientations and the stain changes of
pathology beside it. Every probability here is the one with which the thing happens: DINOv2's code
hands 1 - p to the blur, so its published weights saw (0.0, 0.9, 0.5) where its source reads (1.0,
0.1, 0.5).
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from eosin.pretrain.stain import StainTemplateConfig

RenderPlace = Literal["worker", "device"]
DecodeSize = Literal["scaled", "full"]


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """Sides of the crops in a share of the steps."""

    global_px: int
    """Side of the global crops."""
    local_px: int
    """Side of the local crops."""
    share: float
    """Of the steps, on any positive scale."""

    def __post_init__(self) -> None:
        for name in ("global_px", "local_px", "share"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} of a resolution must be positive and finite, not {value}")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Sizes and strengths of the crops of one tile. Pixels are those of the crop."""

    global_px: int = 224
    """Side of the two global crops."""
    local_px: int = 98
    """Side of the local crops."""
    n_global: int = 2
    """Global crops; the objective swaps two, so nothing but 2 is taken."""
    n_local: int = 8
    """Local crops; 0 for none."""
    global_scale: tuple[float, float] = (0.32, 1.0)
    """Share of the tile's area that a global crop covers, drawn uniformly."""
    local_scale: tuple[float, float] = (0.05, 0.32)
    """Share of the tile's area that a local crop covers."""
    global_zoom: tuple[float, float] | None = None
    """Pixels of the tile to one of a global crop, drawn uniformly in its logarithm, in place of
    `global_scale`: the crop keeps its magnification and moves about a larger tile, as the
    extended-context crops of Virchow2 (Zimmermann et al., 2024) do. A tile that cannot hold the
    largest such box is refused."""
    local_zoom: tuple[float, float] | None = None
    """The same for the local crops, in place of `local_scale`."""
    mpp: float | None = None
    """Micrometres to a pixel of the crop at a zoom of 1, so that crops have one physical scale
    whatever that of their tiles; None: that of each tile. Needs both zooms."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the part that is cut out, drawn uniformly in its logarithm."""
    flip: float = 0.5
    """Probability of a left-right flip."""
    turn: float = 0.75
    """Probability of a turn by 90, 180 or 270 degrees, equally often. With `flip` 0.5, 0.75 makes
    all eight orientations equally frequent: tissue has no upright."""
    jitter: float = 0.8
    """Probability that brightness, contrast, saturation and hue are changed, all together."""
    brightness: float = 0.2
    """Factor drawn from 1 ± this."""
    contrast: float = 0.2
    """Factor drawn from 1 ± this."""
    saturation: float = 0.1
    """Factor drawn from 1 ± this."""
    hue: float = 0.05
    """Rotation drawn from ± this, in full turns; 0.5 is every hue."""
    grey: float = 0.2
    """Probability that a crop loses its colour."""
    hed: float = 0.5
    """Probability that the amounts of haematoxylin, eosin and DAB are changed."""
    hed_factor: float = 0.05
    """Each amount is multiplied by a factor drawn from 1 ± this."""
    hed_shift: float = 0.05
    """Each amount is shifted by a number drawn from ± this, in natural optical density."""
    stain: StainTemplateConfig = field(default_factory=StainTemplateConfig)
    """The stain statistics of other tiles, which crops are moved to."""
    first_global_blur: float = 0.0
    """Probability that the first global crop is blurred."""
    second_global_blur: float = 0.9
    """Probability that the second global crop is blurred."""
    local_blur: float = 0.5
    """Probability that a local crop is blurred."""
    blur_sigma_px: tuple[float, float] = (0.1, 1.2)
    """Standard deviation of the blur, drawn uniformly. DINOv2 goes up to 2.0, at which nuclei in
    small crops lose their chromatin."""
    second_global_solarize: float = 0.0
    """Probability that levels from 128 up are inverted in the second global crop. DINOv2 has 0.2;
    inverted tissue is no tissue, so it is off unless a recipe asks for it."""
    resolutions: list[Resolution] = field(default_factory=list)
    """Sides of the crops by share of the steps, in place of `global_px` and `local_px`, each
    ``{global_px: 392, local_px: 168, share: 1}``; all crops of a step have those of one entry.
    Empty: one resolution throughout."""
    render: RenderPlace = "worker"
    """Where crops are made: by the workers, or from whole tiles on the trainer's device, which
    should be a GPU."""
    decode: DecodeSize = "scaled"
    """``scaled``: a JPEG of which every crop is a reduction is decoded at 1/2, 1/4 or 1/8 of its
    size, in less time; ``full``: always whole."""

    def __post_init__(self) -> None:
        if self.n_global != 2:
            raise ValueError(f"n_global must be 2, not {self.n_global}")
        if self.global_px < 1 or self.local_px < 1 or self.n_local < 0:
            raise ValueError(
                "global_px and local_px must be positive and n_local not negative, "
                f"not {self.global_px}, {self.local_px}, {self.n_local}"
            )
        for name in _PROBABILITIES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability, not {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation", "hed_factor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must lie in [0, 0.5] turns, not {self.hue}")
        if not 0 <= self.hed_shift < math.inf:
            raise ValueError(f"hed_shift must be finite and not negative, not {self.hed_shift}")
        for name in ("global_scale", "local_scale", "ratio", "blur_sigma_px"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise ValueError(f"{name} must be (low, high) with 0 < low <= high: {low}, {high}")
        for name in ("global_scale", "local_scale"):
            if getattr(self, name)[1] > 1:
                raise ValueError(f"{name} must not exceed 1, not {getattr(self, name)[1]}")
        for name in ("global_zoom", "local_zoom"):
            zoom = getattr(self, name)
            if zoom is not None and not 0 < zoom[0] <= zoom[1] < math.inf:
                raise ValueError(f"{name} must be (low, high) with 0 < low <= high, not {zoom}")
        if self.mpp is not None and not 0 < self.mpp < math.inf:
            raise ValueError(f"mpp must be positive, not {self.mpp}")
        if self.mpp is not None and None in (self.global_zoom, self.local_zoom):
            raise ValueError(
                f"mpp={self.mpp} needs global_zoom and local_zoom, not "
                f"{self.global_zoom} and {self.local_zoom}: shares of a tile have no fixed scale"
            )

    @property
    def n_views(self) -> int:
        """Crops of a tile: views 0 and 1 are global, those from 2 on are local."""
        return self.n_global + self.n_local

    @property
    def sizes_px(self) -> list[int]:
        """Side of each view's crop."""
        return [self.global_px] * self.n_global + [self.local_px] * self.n_local


_PROBABILITIES = (
    *("flip", "turn", "jitter", "grey", "hed"),
    *("first_global_blur", "second_global_blur", "local_blur", "second_global_solarize"),
)
