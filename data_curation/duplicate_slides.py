"""Slides that were scanned twice: alike as a whole, and then alike cell by cell.

A slide's print is that of the square around its tissue, so where the glass lay in the scanner, what
scanner it was and at what scale it scanned do not matter; nor does it if the glass lay turned.
Neighbouring sections of a block look alike as a whole too. So the two pictures of a pair are laid
over each other, and spots of one are looked for in the other at a scale of cells: those of another
section are not there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch

from eosin.data_curation.duplicate_match import turned
from eosin.data_curation.duplicate_search import Pairs, Spectra, find_pairs
from eosin.data_curation.slide import RegionError, Slide
from eosin.data_curation.slide_metadata import SlideError
from eosin.data_curation.tile_print import DIM, picture_of
from eosin.data_curation.tissue import find_tissue, mask_mpp
from eosin.data_curation.worker_pool import run_jobs
from eosin.launch.progress import Meter

SAME_CELLS = 0.45
"""Median correlation of the spots from which two slides are one glass."""

_ALIKE = 0.55  # of the prints of two slides that are looked at closely
_VIEW_PX = 512
_REACH = 2.2  # half side of the square, in deviations of the tissue's longer axis
_SPOTS = 9
_SPOT_UM, _SPOT_PX = 96.0, 96
_SEARCH_UM = 48.0  # around where a spot should be
_DETAIL_PX = 8.0  # sigma of what is taken out of a spot: its shade
_SMALLEST_SCALE = 0.8  # of one view to the other: both squares are set by the same tissue


@dataclass(frozen=True, kw_only=True)
class SlideFile:
    """What a slide is opened by."""

    path: Path
    mpp: tuple[float, float]
    """µm per level-0 pixel (x, y)."""


@dataclass(frozen=True, eq=False)
class _View:
    """The square around a slide's tissue."""

    grey: npt.NDArray[np.uint8]
    """[_VIEW_PX, _VIEW_PX]."""
    tissue: npt.NDArray[np.bool_]
    """Likewise."""
    corner_um: tuple[float, float]
    """Of the square, from the slide's level-0 corner."""
    side_um: float


def find_slide_pairs(slides: Sequence[SlideFile], workers: int) -> Pairs:
    """Pairs of slides that show one glass, with the median correlation of their spots.

    A slide that cannot be read, or has no tissue, is in no pair.
    """
    prints = np.zeros((len(slides), DIM), np.float32)
    row_of = {slide: row for row, slide in enumerate(slides)}
    with Meter("dedupe", len(slides), "slides") as meter:
        for slide, found in run_jobs(_picture, slides, max(1, min(workers, len(slides) // 4))):
            prints[row_of[slide], : len(found)] = found
            meter.advance(1)
    alike = find_pairs(prints, None, Spectra(prints, turns=True), _ALIKE)
    pairs = list(zip(alike.first.tolist(), alike.second.tolist(), strict=True))
    similarity = np.array([compare(slides[a], slides[b]) for a, b in pairs], np.float32)
    same = similarity >= SAME_CELLS
    return Pairs(alike.first[same], alike.second[same], similarity[same])


def compare(one: SlideFile, other: SlideFile) -> float:
    """Median over spots of the tissue of their correlation with the same place of the other slide.

    Between -1 and 1; 0 where the two cannot be laid over each other or read.
    """
    try:
        with Slide(one.path, one.mpp) as a, Slide(other.path, other.mpp) as b:
            view_a, view_b = _view(a), _view(b)
            if view_a is None or view_b is None:
                return 0.0
            found = [_register(view_a.grey, way) for way in _ways(view_b.grey)]
            turn, (score, matrix) = max(enumerate(found), key=lambda entry: entry[1][0])
            if score <= 0:
                return 0.0
            spots = [
                _spot_similarity(a, b, view_a, view_b, place, turn, matrix)
                for place in _spots(view_a)
            ]
    except (SlideError, RegionError):
        return 0.0
    known = [value for value in spots if value is not None]
    return float(np.median(known)) if len(known) * 2 > len(spots) else 0.0


def _picture(slide: SlideFile) -> npt.NDArray[np.float32]:
    try:
        with Slide(slide.path, slide.mpp) as opened:
            view = _view(opened)
    except SlideError:
        view = None
    if view is None:
        return np.zeros(0, np.float32)
    return picture_of(np.repeat(view.grey[:, :, None], 3, 2))


def _view(slide: Slide) -> _View | None:
    left, top, width, height = slide.bounds_px
    extent_um = (width * slide.mpp[0], height * slide.mpp[1])
    overview, _ = slide.overview(mask_mpp(extent_um, min(extent_um) / 8, max(slide.mpp)))
    step = (extent_um[0] / overview.shape[1], extent_um[1] / overview.shape[0])
    mask = find_tissue(overview, step).tissue
    y, x = np.nonzero(mask)
    if not len(x):
        return None
    centre = (float(x.mean()), float(y.mean()))
    side_um = 2 * _REACH * max(float(x.std()) * step[0], float(y.std()) * step[1], 4 * max(step))
    scale = (step[0] * _VIEW_PX / side_um, step[1] * _VIEW_PX / side_um)
    matrix = np.array(
        [
            [scale[0], 0, _VIEW_PX / 2 - scale[0] * centre[0]],
            [0, scale[1], _VIEW_PX / 2 - scale[1] * centre[1]],
        ]
    )
    grey = cv2.cvtColor(overview, cv2.COLOR_RGB2GRAY)
    if max(scale) < 1:
        grey = cv2.GaussianBlur(grey, (0, 0), 0.4 / max(scale))
    size = (_VIEW_PX, _VIEW_PX)
    glass = float(np.percentile(grey, 99))
    warped = cv2.warpAffine(grey, matrix, size, flags=cv2.INTER_LINEAR, borderValue=(glass,))
    placed = cv2.warpAffine(mask.astype(np.uint8), matrix, size, flags=cv2.INTER_NEAREST)
    return _View(
        grey=np.asarray(warped, np.uint8),
        tissue=placed > 0,
        corner_um=(
            left * slide.mpp[0] + centre[0] * step[0] - side_um / 2,
            top * slide.mpp[1] + centre[1] * step[1] - side_um / 2,
        ),
        side_um=side_um,
    )


def _ways(grey: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
    """As `duplicate_match.turned`."""
    return [way[0].numpy() for way in turned(torch.from_numpy(grey)[None])]


def _register(
    fixed: npt.NDArray[np.uint8], moving: npt.NDArray[np.uint8]
) -> tuple[float, npt.NDArray[np.float64]]:
    """How well `moving` lies over `fixed` at best, and the matrix [2, 3] from fixed to moving px.

    By enhanced correlation (Evangelidis and Psarakis, TPAMI 2008), coarse then fine.
    """
    matrix, score = np.eye(2, 3, dtype=np.float32), 0.0
    for px in (64, 256, _VIEW_PX):
        a, b = (
            cv2.resize(side, (px, px), interpolation=cv2.INTER_AREA) for side in (fixed, moving)
        )
        here = matrix.copy()
        here[:, 2] *= px / _VIEW_PX
        criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 60, 1e-4)
        motion = cv2.MOTION_EUCLIDEAN if px == 64 else cv2.MOTION_AFFINE
        try:
            score, here = cv2.findTransformECC(a, b, here, motion, criteria, None, 5)  # type: ignore[call-overload]
        except cv2.error:  # it does not converge: they are not the same
            return 0.0, matrix.astype(np.float64)
        matrix = here
        matrix[:, 2] *= _VIEW_PX / px
    singular = np.linalg.svd(matrix[:, :2], compute_uv=False)
    if singular.min() < _SMALLEST_SCALE or singular.max() > 1 / _SMALLEST_SCALE:
        return 0.0, matrix.astype(np.float64)
    return score, matrix.astype(np.float64)


def _spots(view: _View) -> list[tuple[float, float]]:
    """Places (x, y) of a view inside its tissue, spread over it."""
    inner = cv2.erode(view.tissue.astype(np.uint8), np.ones((9, 9), np.uint8))
    y, x = np.nonzero(inner if inner.any() else view.tissue)
    places = np.linspace(0, len(x) - 1, _SPOTS + 2)[1:-1].astype(int)
    return [(float(x[place]) + 0.5, float(y[place]) + 0.5) for place in places]


def _spot_similarity(
    a: Slide,
    b: Slide,
    view_a: _View,
    view_b: _View,
    place: tuple[float, float],
    turn: int,
    matrix: npt.NDArray[np.float64],
) -> float | None:
    """The highest correlation of a spot of `a` near its place in `b`; None where it is not read."""
    there = _turned_back(matrix @ np.array([*place, 1.0]), turn)
    spot = _read_spot(a, view_a, place, _SPOT_UM)
    around = _read_spot(b, view_b, there, _SPOT_UM + 2 * _SEARCH_UM)
    if spot is None or around is None:
        return None
    around = np.ascontiguousarray(_ways(around)[turn])
    detail_a, detail_b = (_detail(image) for image in (spot, around))
    if float(detail_a.std()) < 1.0:
        return None  # nothing to see
    return float(cv2.matchTemplate(detail_b, detail_a, cv2.TM_CCOEFF_NORMED).max())


def _turned_back(place: npt.NDArray[np.float64], turn: int) -> tuple[float, float]:
    """Where a place of the view turned that way lies in the view as it is."""
    x, y = float(place[0]), float(place[1])
    for _ in range(turn % 4):  # rot90 takes (x, y) to (y, side - x)
        x, y = _VIEW_PX - y, x
    return (_VIEW_PX - x, y) if turn >= 4 else (x, y)


def _read_spot(
    slide: Slide, view: _View, place: tuple[float, float], side_um: float
) -> npt.NDArray[np.uint8] | None:
    mpp = max(_SPOT_UM / _SPOT_PX, *slide.mpp)
    size_px = round(side_um / mpp)
    um = [view.corner_um[axis] + place[axis] * view.side_um / _VIEW_PX for axis in (0, 1)]
    corner = [(um[axis] - size_px * mpp / 2) / slide.mpp[axis] for axis in (0, 1)]
    try:
        tile = slide.read_tile(corner[0], corner[1], size_px, mpp)
    except RegionError:
        return None
    px = round(side_um * _SPOT_PX / _SPOT_UM)
    grey = cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.resize(grey, (px, px), interpolation=cv2.INTER_LINEAR), np.uint8)


def _detail(grey: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    plane = grey.astype(np.float32)
    smooth = cv2.GaussianBlur(plane, (0, 0), 1.0)
    return np.asarray(smooth - cv2.GaussianBlur(plane, (0, 0), _DETAIL_PX), np.float32)
