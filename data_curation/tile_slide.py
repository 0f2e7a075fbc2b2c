"""One slide to its part of the tables: overview, tissue, grid, and the quality of each tile read.

Runs in a process of its own. It writes a folder: ``tiles.parquet`` (without what the slide list
says of the slide), ``overlay.png``, and last the marker ``slide.json`` with the slide's row.
"""

import dataclasses
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eosin.data_curation.glass import estimate_glass
from eosin.data_curation.grid import Grid, make_grid
from eosin.data_curation.manifest import TILES, Status, make_tile_id, write_table
from eosin.data_curation.overlay import write_overlay
from eosin.data_curation.quality import Quality, measure_quality
from eosin.data_curation.slide import Decoding, RegionError, Slide
from eosin.data_curation.slide_list import SlideSource
from eosin.data_curation.slide_masks import find_masks
from eosin.data_curation.slide_metadata import SlideError
from eosin.data_curation.slide_stains import (
    LEAST_TISSUE,
    MOST_TILES,
    SlideStains,
    StainSample,
    evenly,
)
from eosin.data_curation.tiff_header import check_tiff_header
from eosin.launch.artefacts import mark_done

FORMAT = 4
"""Raise it when the same slide and request would give other rows: everything is made again."""

LISTED = ("group", "stain")
"""Columns that come from the slide list, joined when the parts are merged."""
PART = pa.schema([field for field in TILES if field.name not in LISTED])
MARKER, TILES_FILE, OVERLAY_FILE = "slide.json", "tiles.parquet", "overlay.png"

RETRIED = frozenset({Status.UNREADABLE, Status.CRASHED, Status.TIMEOUT})
"""What may have been the storage's or the machine's fault: such a slide gets no marker."""

_BLOCK_ROWS = 8
"""Cells are read in bands of so many rows, so that coded tiles are decoded once, from the cache."""


@dataclass(frozen=True, kw_only=True)
class SlideJob:
    """What a worker needs to know."""

    source: SlideSource
    folder: Path
    stamp: str
    mpp: float | None
    """µm per tile pixel; None: the slide's own."""
    size_px: int
    step_px: int
    min_tissue: float
    tissue_rule: str
    """One of `tissue.RULES`."""
    segmenter: Path | None
    """Folder of a network that takes the place of the classical masks."""
    with_vahadane: bool
    decoding: Decoding
    max_upsample: float


def tile_slide(job: SlideJob) -> dict[str, Any]:
    """Tiles one slide into `job.folder` and returns its row of slides.parquet, as plain values.

    A slide that cannot be used is a row with a status and a reason, not an exception.
    """
    cv2.setNumThreads(1)
    cv2.ocl.setUseOpenCL(False)
    (job.folder / MARKER).unlink(missing_ok=True)  # it would vouch for what is written now
    record = empty_record()
    try:
        check_tiff_header(job.source.path)
        with open_slide(job) as slide:
            record |= _describe(slide)
            mpp = job.mpp or max(slide.mpp)
            slide.level_for(mpp)
            record |= _tile(slide, job, mpp)
    except SlideError as error:
        record |= {"status": str(error.status), "reason": error.reason}
    except MemoryError:
        record |= {"status": str(Status.CRASHED), "reason": "out of memory"}
    if record["n_cells"] == 0:
        for name in (TILES_FILE, OVERLAY_FILE):
            (job.folder / name).unlink(missing_ok=True)
    if record["status"] not in RETRIED:
        mark_done(job.folder / MARKER, job.stamp, slide=record)
    return record


def open_slide(job: SlideJob) -> Slide:
    """The slide, as the job wants it read.

    Raises:
        SlideError: see `Slide`.
    """
    source = job.source
    return Slide(source.path, source.mpp, decoding=job.decoding, max_upsample=job.max_upsample)


def empty_record() -> dict[str, Any]:
    """The measured part of a slide's row before anything is known."""
    unknown = ("width_px", "height_px", "mpp_x", "mpp_y", "mpp_source", "scanner", "quickhash",
               "decoding")  # fmt: skip
    return {
        **dict.fromkeys(unknown),
        "tissue_area_mm2": None,
        "pen_area_mm2": None,
        "n_sections": None,
        **asdict(SlideStains()),
        "n_cells": 0,
        "n_ok": 0,
        "n_unreadable": 0,
        "status": str(Status.OK),
        "reason": "",
    }


def _describe(slide: Slide) -> dict[str, Any]:
    return {
        "width_px": slide.size_px[0],
        "height_px": slide.size_px[1],
        "mpp_x": slide.mpp[0],
        "mpp_y": slide.mpp[1],
        "mpp_source": slide.mpp_source,
        "scanner": slide.scanner,
        "quickhash": slide.quickhash,
        "decoding": slide.decoding,
    }


def _tile(slide: Slide, job: SlideJob, mpp: float) -> dict[str, Any]:
    grid = make_grid(slide.bounds_px, slide.mpp, mpp=mpp, size_px=job.size_px, step_px=job.step_px)
    if len(grid) == 0:
        return {"status": str(Status.EMPTY), "reason": "smaller than one tile"}
    masks = find_masks(slide, job.size_px * mpp, job.tissue_rule, job.segmenter)
    fractions = masks.fractions(grid)
    stains = StainSample(estimate_glass(masks.overview))
    cells = _read_cells(slide, grid, fractions, job, mpp, stains)
    columns = masks.columns(grid) | _columns(slide, grid, cells, job, mpp)
    table = {name: pa.array(columns[name], PART.field(name).type) for name in PART.names}
    write_table(pa.table(table), job.folder / TILES_FILE, PART)
    counts = Counter(cell.status for cell in cells)
    statuses = np.array([cell.status for cell in cells], np.object_).reshape(fractions.shape)
    caption = (
        f"{job.source.slide_id} · {len(cells)} cells of {job.size_px} px at mpp {mpp:g}, "
        f"{counts[Status.OK]} with tissue"
    )
    write_overlay(job.folder / OVERLAY_FILE, masks, grid, statuses, caption)
    return {
        **_summarise(cells, counts),
        **masks.record(),
        **asdict(stains.estimate(job.with_vahadane)),
    }


@dataclass(frozen=True, kw_only=True)
class _Cell:
    status: Status
    reason: str = ""
    quality: Quality | None = None


def _read_cells(
    slide: Slide,
    grid: Grid,
    fractions: NDArray[np.float64],
    job: SlideJob,
    mpp: float,
    stains: StainSample,
) -> list[_Cell]:
    """What each cell holds, in row-major order; some of the tiles go into `stains` on the way."""
    too_little = _Cell(
        status=Status.EMPTY, reason=f"tissue fraction below min_tissue={job.min_tissue:g}"
    )
    cells = [too_little] * len(grid)
    corners = grid.corners_px()
    wanted = [(int(row), int(column)) for row, column in np.argwhere(fractions >= job.min_tissue)]
    full = [cell for cell in wanted if fractions[cell] >= LEAST_TISSUE]
    sampled = {full[place] for place in evenly(len(full), MOST_TILES)}
    for row, column in sorted(wanted, key=lambda cell: (cell[0] // _BLOCK_ROWS, cell[1], cell[0])):
        x, y = (float(v) for v in corners[row, column])
        try:
            rgb = slide.read_tile(x, y, job.size_px, mpp)
        except RegionError as error:
            cell = _Cell(status=Status.UNREADABLE, reason=str(error))
        else:
            cell = _Cell(status=Status.OK, quality=measure_quality(rgb, mpp))
            if (row, column) in sampled:
                stains.add(rgb)
        cells[row * grid.columns + column] = cell
    return cells


def _columns(
    slide: Slide, grid: Grid, cells: list[_Cell], job: SlideJob, mpp: float
) -> dict[str, Any]:
    """Where each cell lies and what was measured on its pixels."""
    count = len(cells)
    corners = grid.corners_px().reshape(count, 2)
    rows, columns = np.divmod(np.arange(count), grid.columns)
    slide_id = job.source.slide_id
    effective = [grid.cell_px[axis] * slide.mpp[axis] / job.size_px for axis in (0, 1)]
    measured = {
        field.name: [getattr(c.quality, field.name) if c.quality else None for c in cells]
        for field in dataclasses.fields(Quality)
    }
    return {
        "tile_id": [make_tile_id(slide_id, float(x), float(y), mpp) for x, y in corners],
        "slide_id": [slide_id] * count,
        "column": columns,
        "row": rows,
        "level0_x": corners[:, 0],
        "level0_y": corners[:, 1],
        "size_px": np.full(count, job.size_px),
        "requested_mpp": np.full(count, mpp),
        "effective_mpp_x": np.full(count, effective[0]),
        "effective_mpp_y": np.full(count, effective[1]),
        **measured,
        "status": [str(cell.status) for cell in cells],
        "reason": [cell.reason for cell in cells],
    }


def _summarise(cells: list[_Cell], counts: Counter[Status]) -> dict[str, Any]:
    status, reason = Status.OK, ""
    if counts[Status.EMPTY] == len(cells):
        status, reason = Status.EMPTY, "no tile has tissue"
    elif counts[Status.OK] == 0:
        first = next(cell.reason for cell in cells if cell.status == Status.UNREADABLE)
        status, reason = Status.UNREADABLE, f"no tile with tissue could be read: {first}"
    return {
        "n_cells": len(cells),
        "n_ok": counts[Status.OK],
        "n_unreadable": counts[Status.UNREADABLE],
        "status": str(status),
        "reason": reason,
    }
