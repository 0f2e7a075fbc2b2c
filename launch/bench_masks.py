"""`eosin bench masks`: masks and quality figures against the truth of synthetic slides.

The thresholds were set, and corrected, on seeds below `FIRST_SEED`; these slides have others, and
some have another scale, another spacing of regions or other stains than those had. The other side
is what is mostly done: a threshold on saturation (CLAM's figures), hue and darkness for pen, the
variance of the Laplacian for focus, density for folds.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from eosin.data_curation.pixel_masks import Mask
from eosin.data_curation.quality import measure_sharpness
from eosin.data_curation.slide import Slide
from eosin.data_curation.slide_masks import SlideMasks, find_masks
from eosin.data_curation.synthetic import SyntheticConfig, Truth, read_truth, write_slides
from eosin.data_curation.synthetic_layout import TRUTH_DOWNSAMPLE
from eosin.launch.bench import Row, more_is_better, report

FIRST_SEED = 5000
TILE_UM = 128.0

_PLAIN = SyntheticConfig(artefact_share=1.0)
SETS = {
    "H&E": ("he", _PLAIN),
    "H&E, 0.25 µm/px": ("he", replace(_PLAIN, mpp=0.25, region_um=250)),
    "H&E, 1 µm/px": ("he", replace(_PLAIN, mpp=1.0, region_um=600)),
    "IHC": ("pale", replace(_PLAIN, stain="ihc")),
    "silver": ("silver", replace(_PLAIN, stain="silver")),
}
"""By name: the rule for tissue, and how the slides are drawn."""


@dataclass(frozen=True, kw_only=True)
class BenchMasksConfig:
    """Synthetic slides whose truth is known."""

    slides: int = 8
    """Of each kind."""
    seed: int = FIRST_SEED
    """From which on kinds take one each."""
    json: Path | None = None
    """Where the rows are written, too; ``--json FILE`` is the same."""

    def __post_init__(self) -> None:
        if self.slides < 1:
            raise ValueError(f"slides={self.slides} must be at least 1")
        if self.seed < FIRST_SEED:
            raise ValueError(f"seed={self.seed}: those below {FIRST_SEED} set the thresholds")


def bench_masks(config: BenchMasksConfig) -> None:
    """Measures the masks and reports them."""
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = list(mask_rows(config, Path(folder)))
    title = f"against the truth of {config.slides} synthetic slides of each kind"
    report(title, rows, config.json)


def mask_rows(config: BenchMasksConfig, folder: Path) -> Iterator[Row]:
    """The rows of all kinds; slides are drawn into `folder`."""
    for number, (name, (rule, drawn)) in enumerate(SETS.items()):
        drawn = replace(drawn, n_slides=config.slides, seed=config.seed + number)
        slides = write_slides(folder / str(number), drawn, workers=1)
        seen = [_look(path, rule) for path in slides]
        for what, unit, score in (
            ("tissue", "Dice", _tissue),
            ("pen", "Dice", _pen),
            ("blur", "AUROC of tiles", _blur),
            ("fold", "AUROC of tiles", _fold),
        ):
            yield more_is_better(f"{what}, {name}", unit, *score(seen))


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """A slide's masks and tiles beside its truth."""

    masks: SlideMasks
    truth: Truth
    """On the pixels of the masks."""
    tiles: list[tuple[NDArray[np.uint8], slice, slice]]
    """RGB of tiles that hold tissue, and where they lie on the masks."""
    mpp: float


def _look(path: Path, rule: str) -> _Seen:
    truth = read_truth(path)
    with Slide(path) as slide:
        mpp = slide.mpp[0]
        masks = find_masks(slide, TILE_UM, rule, None)
        height, width = masks.tissue.tissue.shape
        cells = round(TILE_UM / mpp / TRUTH_DOWNSAMPLE)
        side = cells * TRUTH_DOWNSAMPLE
        per_px = width / slide.size_px[0]
        tiles = []
        for y in range(0, slide.size_px[1] - side + 1, side):
            for x in range(0, slide.size_px[0] - side + 1, side):
                at = _cells(truth.tissue & ~truth.pen, x, y, cells)
                if at.mean() >= 0.5:
                    rows, columns = (slice(round(v * per_px), round((v + side) * per_px))
                                     for v in (y, x))  # fmt: skip
                    tiles.append((slide.read_tile(x, y, side, mpp), rows, columns))
    size = (width, height)
    grown = replace(
        truth,
        tissue=_grow(truth.tissue, size),
        pen=_grow(truth.pen, size),
        blur=_grow(truth.blur, size),
        fold=_grow(truth.fold, size),
    )
    return _Seen(masks=masks, truth=grown, tiles=tiles, mpp=mpp)


def _cells(plane: Mask, x: int, y: int, cells: int) -> Mask:
    row, column = y // TRUTH_DOWNSAMPLE, x // TRUTH_DOWNSAMPLE
    return plane[row : row + cells, column : column + cells]


def _grow(plane: Mask, size: tuple[int, int]) -> Mask:
    return cv2.resize(plane.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0


def _tissue(seen: list[_Seen]) -> tuple[float, float]:
    """Of tissue that is clear of pen."""
    truth = [s.truth.tissue & ~s.truth.pen for s in seen]
    ours = [s.masks.tissue.tissue for s in seen]
    return _dice(ours, truth), _dice([_saturated(s.masks.overview) for s in seen], truth)


def _pen(seen: list[_Seen]) -> tuple[float, float]:
    truth = [s.truth.pen for s in seen]
    ours = [s.masks.tissue.pen for s in seen]
    return _dice(ours, truth), _dice([_inky(s.masks.overview) for s in seen], truth)


def _blur(seen: list[_Seen]) -> tuple[float, float]:
    """Tiles that are out of focus by half and more, among all."""
    return _areas(
        seen,
        lambda s, rows, columns: float(s.truth.blur[rows, columns].mean()) >= 0.5,
        lambda s, rgb, *_: -measure_sharpness(rgb, s.mpp),
        lambda s, rgb, *_: -float(cv2.Laplacian(_grey(rgb), cv2.CV_32F).var()),
    )


def _fold(seen: list[_Seen]) -> tuple[float, float]:
    """Tiles with a fold over a twentieth and more, among all."""
    return _areas(
        seen,
        lambda s, rows, columns: float(s.truth.fold[rows, columns].mean()) >= 0.05,
        lambda s, _, rows, columns: float(s.masks.folds[rows, columns].mean()),
        lambda s, rgb, *_: -float(_grey(rgb).mean()),
    )


def _areas(
    seen: list[_Seen],
    is_bad: Callable[[_Seen, slice, slice], bool],
    *scores: Callable[[_Seen, NDArray[np.uint8], slice, slice], float],
) -> tuple[float, float]:
    """Areas under the ROC of ours and the baseline, over all tiles."""
    bad = [is_bad(s, rows, columns) for s in seen for _, rows, columns in s.tiles]
    ours, baseline = (
        float(roc_auc_score(bad, [score(s, *tile) for s in seen for tile in s.tiles]))
        for score in scores
    )
    return ours, baseline


def _grey(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), np.uint8)


def _dice(found: list[Mask], truth: list[Mask]) -> float:
    """Over the pixels of all slides."""
    both = sum(int((f & t).sum()) for f, t in zip(found, truth, strict=True))
    return 2 * both / max(1, sum(int(mask.sum()) for mask in (*found, *truth)))


def _saturated(rgb: NDArray[np.uint8]) -> Mask:
    """CLAM's rule with its figures: median of 7, saturation above 8, closing by 4."""
    saturation = cv2.medianBlur(cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)[..., 1], 7)
    stained = (saturation > 8).astype(np.uint8)
    return cv2.morphologyEx(stained, cv2.MORPH_CLOSE, np.ones((4, 4), np.uint8)) > 0


def _inky(rgb: NDArray[np.uint8]) -> Mask:
    """Saturated hues that no stain has, and black."""
    hue, saturation, value = cv2.split(cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV))
    foreign = (hue > 35) & (hue < 118) | (hue < 6) | (hue > 175)
    return np.asarray((saturation > 100) & foreign | (value < 60), np.bool_)
