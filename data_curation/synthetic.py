"""Synthetic slides: real pyramidal TIFFs with known tissue, for demos and tests.

Slide `index` of a seed is a pure function of the configuration, down to its bytes. Beside each
``NAME.tiff`` lies its ground truth, ``NAME.truth.npy`` (read it with `read_truth`), and
``NAME.truth.json``, written last, with the slide's stain vectors and what spoils it.
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from eosin.configs.errors import InputError
from eosin.data_curation.pyramid import TILE_PX, write_pyramid
from eosin.data_curation.synthetic_layout import TRUTH_DOWNSAMPLE, draw_layout
from eosin.data_curation.synthetic_section import Family, draw_look, render
from eosin.data_curation.synthetic_tissue import PAINTERS
from eosin.data_curation.worker_pool import count_workers, run_jobs
from eosin.launch.artefacts import is_done, mark_done, replacing, stamp_of
from eosin.launch.progress import Meter

FORMAT = 1
"""Version of the drawing; raise it when the same configuration gives other slides."""

CLASSES = ("background", *PAINTERS)
"""Names of the tissue classes; the index is the value in a class map."""


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """A set of synthetic slides."""

    n_slides: int = 60
    """Number of slides; each is a patient of its own."""
    size_px: int = 2048
    """Side of level 0, a multiple of 256; a slide takes 0.2 GB of memory at 2048, 3 GB at 8192."""
    mpp: float = 0.5
    """µm per pixel of level 0, on both axes."""
    seed: int = 0
    """Seed of every slide, together with its index."""
    region_um: float = 380.0
    """Mean width of a region of one tissue class, µm."""
    stain: Family = "he"
    """What the slides are stained with: ``he``, ``ihc`` (DAB) or ``silver``."""
    artefact_share: float = 0.3
    """Share of slides with a pen stroke; likewise with a blurred patch, and with a fold."""

    def __post_init__(self) -> None:
        if self.n_slides < 1:
            raise ValueError(f"n_slides must be at least 1, not {self.n_slides}")
        if self.size_px % TILE_PX or not 2 * TILE_PX <= self.size_px <= 8192:
            raise ValueError(
                f"size_px must be a multiple of {TILE_PX} from 512 to 8192, not {self.size_px}"
            )
        if not 0.1 <= self.mpp <= 2:
            raise ValueError(f"mpp must lie between 0.1 and 2, not {self.mpp}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative: {self.seed}")
        if self.region_um < 100:
            raise ValueError(f"region_um must be at least 100, not {self.region_um}")
        if not 0 <= self.artefact_share <= 1:
            raise ValueError(f"artefact_share must lie in 0 to 1, not {self.artefact_share}")


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Ground truth of one slide, a cell being `TRUTH_DOWNSAMPLE` pixels of level 0 a side."""

    class_map: NDArray[np.uint8]
    """[h, w] index into `CLASSES`; 0 is glass."""
    tissue: NDArray[np.bool_]
    """[h, w]."""
    pen: NDArray[np.bool_]
    """[h, w] under a pen stroke."""
    blur: NDArray[np.bool_]
    """[h, w] out of focus."""
    fold: NDArray[np.bool_]
    """[h, w] doubled tissue."""


def slide_path(folder: Path, index: int) -> Path:
    """Where slide `index` of a set lies."""
    return folder / f"synthetic_{index:04d}.tiff"


def write_slide(folder: Path, index: int, config: SyntheticConfig) -> Path:
    """Writes slide `index` with its ground truth, unless it is there; returns the slide's path."""
    path = slide_path(folder, index)
    if _is_written(path, index, config):
        return path
    layout_rng, look_rng, render_rng = np.random.default_rng([config.seed, index]).spawn(3)
    layout = draw_layout(
        layout_rng,
        cells=config.size_px // TRUTH_DOWNSAMPLE,
        cell_um=TRUTH_DOWNSAMPLE * config.mpp,
        region_um=config.region_um,
        artefact_share=config.artefact_share,
    )
    look = draw_look(look_rng, config.stain)
    image = render(render_rng, layout, look, config.mpp)
    _marker(path).unlink(missing_ok=True)
    about = "eosin synthetic H&E"
    write_pyramid(path, image, mpp=config.mpp, description=about, quality=look.jpeg_quality)
    planes = [layout.class_map(), layout.tissue, layout.pen, layout.blur, layout.fold]
    with replacing(_truth(path)) as draft, draft.open("wb") as file:
        np.save(file, np.stack(planes, dtype=np.uint8, casting="unsafe"), allow_pickle=False)
    mark_done(
        _marker(path),
        _stamp(index, config),
        slide=path.name,
        mpp=config.mpp,
        stains=look.stains.round(6).tolist(),
        pen=bool(layout.pen.any()),
        blur=bool(layout.blur.any()),
        fold=bool(layout.fold.any()),
    )
    return path


def write_slides(folder: Path, config: SyntheticConfig, workers: int) -> list[Path]:
    """Writes the slides that are missing, on `workers` processes; returns all paths in order.

    Args:
        folder: where they go; it is made when missing.
        config: what is drawn.
        workers: processes; 0 is one per core, 1 is this process.

    Raises:
        EosinError: a worker process died; what was finished is kept.
    """
    paths = [slide_path(folder, index) for index in range(config.n_slides)]
    missing = [index for index, path in enumerate(paths) if not _is_written(path, index, config)]
    if not missing:
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    done = config.n_slides - len(missing)
    job = partial(_write_on_one_core, folder, config)
    with Meter("synthetic slides", config.n_slides, "slides", done) as meter:
        for _, path in run_jobs(job, missing, min(count_workers(workers), len(missing))):
            meter.advance(note=path.name)
    return paths


def _write_on_one_core(folder: Path, config: SyntheticConfig, index: int) -> Path:
    """`write_slide` without OpenCV's threads, which would fight over the cores of a pool."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        return write_slide(folder, index, config)
    finally:
        cv2.setNumThreads(threads)


def read_truth(slide: Path) -> Truth:
    """The ground truth of a slide that `write_slide` wrote.

    Raises:
        InputError: there is none beside the slide, or it is damaged.
    """
    path = _truth(slide)
    if not path.is_file():
        raise InputError(f"{slide} has no ground truth; {path.name} should lie beside it")
    try:
        planes = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise InputError(f"{path} is not a readable ground truth: {error}") from error
    if planes.ndim != 3 or len(planes) != 5 or planes.dtype != np.uint8:
        raise InputError(f"{path} is not a ground truth: {planes.dtype} of shape {planes.shape}")
    tissue, pen, blur, fold = planes[1:].astype(np.bool_)
    return Truth(class_map=planes[0], tissue=tissue, pen=pen, blur=blur, fold=fold)


def class_of_region(
    truth: Truth, level0_x: float, level0_y: float, width_px: float, height_px: float
) -> tuple[int, float]:
    """The majority class of a rectangle of level 0 and its share of the rectangle, 0 to 1.

    Glass counts as class 0. Cells of the truth count by how much of them the rectangle covers; what
    lies outside the slide counts as glass.
    """
    spans = []
    for start, length, cells in (
        (level0_y, height_px, truth.class_map.shape[0]),
        (level0_x, width_px, truth.class_map.shape[1]),
    ):
        edges = np.arange(cells + 1) * float(TRUTH_DOWNSAMPLE)
        clipped = np.clip(edges, start, start + length)
        spans.append(np.diff(clipped) / length)  # [cells] share of the side within each cell
    weights = spans[0][:, None] * spans[1]
    shares = np.bincount(truth.class_map.ravel(), weights.ravel(), minlength=len(CLASSES))
    shares[0] += 1 - shares.sum()
    winner = int(shares.argmax())
    return winner, float(shares[winner])


def _truth(slide: Path) -> Path:
    return slide.with_suffix(".truth.npy")


def _marker(slide: Path) -> Path:
    return slide.with_suffix(".truth.json")


def _stamp(index: int, config: SyntheticConfig) -> str:
    values = asdict(config)
    del values["n_slides"]  # more slides leave the ones that are there as they are
    return stamp_of(format=FORMAT, index=index, **values)


def _is_written(path: Path, index: int, config: SyntheticConfig) -> bool:
    return path.is_file() and is_done(_marker(path), _stamp(index, config))
