"""One picture a slide: its overview, outlines of tissue, pen and folds, and the tiles taken."""

import io
import math
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from eosin.data_curation.grid import Grid
from eosin.data_curation.manifest import Status
from eosin.data_curation.slide_masks import SlideMasks
from eosin.launch.artefacts import write_bytes

LONG_SIDE_PX = 1200
_CAPTION_PX = 34
_TILE = (0, 92, 175)  # blue: neither stain, and told from orange by every eye
_TISSUE = (0, 0, 0)
_UNREADABLE = (230, 120, 0)
_PEN = (0, 150, 90)
_FOLD = (200, 0, 120)
_SHADE = 0.12


def write_overlay(
    path: Path,
    masks: SlideMasks,
    grid: Grid,
    statuses: NDArray[np.object_],
    caption: str,
) -> None:
    """Writes the picture as PNG, atomically; equal arguments give equal bytes.

    Args:
        path: where to.
        masks: the slide's overview and what was found on it.
        grid: cells over the same area.
        statuses: `Status` of each cell, [rows, columns].
        caption: what stands under the picture, beside the scale bar.
    """
    overview, tissue, pixel_px = masks.overview, masks.tissue, masks.pixel_px
    height, width = overview.shape[:2]
    zoom = LONG_SIDE_PX / max(height, width)
    size = (max(1, round(width * zoom)), max(1, round(height * zoom)))
    canvas = np.asarray(Image.fromarray(overview).resize(size, Image.Resampling.LANCZOS)).copy()
    zoom_xy = (canvas.shape[1] / width, canvas.shape[0] / height)
    canvas_per_px = np.array([zoom_xy[0] / pixel_px[0], zoom_xy[1] / pixel_px[1]])
    _draw_cells(canvas, grid, statuses, canvas_per_px)
    for mask, colour in ((tissue.tissue, _TISSUE), (tissue.pen, _PEN), (masks.folds, _FOLD)):
        _draw_outline(canvas, mask, colour)
    picture = Image.new("RGB", (max(size[0], 480), size[1] + _CAPTION_PX), "white")
    picture.paste(Image.fromarray(canvas))
    _number_sections(picture, masks.sections, zoom_xy)
    _draw_caption(picture, size[1], caption, tissue.mpp[0] * width / size[0])
    content = io.BytesIO()
    picture.save(content, "PNG", compress_level=6)
    write_bytes(path, content.getvalue())


def _draw_cells(
    canvas: NDArray[np.uint8],
    grid: Grid,
    statuses: NDArray[np.object_],
    canvas_per_px: NDArray[np.float64],
) -> None:
    """Shades and outlines the cells that were read; those without tissue stay bare."""
    shaded = canvas.copy()
    corners = (grid.corners_px() - np.array(grid.origin_px)) * canvas_per_px
    ends = corners + np.array(grid.cell_px) * canvas_per_px
    boxes = []
    for row, column in np.ndindex(statuses.shape):
        status = statuses[row, column]
        if status == Status.EMPTY:
            continue
        colour = _TILE if status == Status.OK else _UNREADABLE
        start = tuple(int(v) for v in np.round(corners[row, column]))
        end = tuple(int(v) - 1 for v in np.round(ends[row, column]))
        boxes.append((start, end, colour))
        cv2.rectangle(shaded, start, end, colour, thickness=-1)
    cv2.addWeighted(shaded, _SHADE, canvas, 1 - _SHADE, 0, dst=canvas)
    for start, end, colour in boxes:
        if end[0] - start[0] >= 5:
            cv2.rectangle(canvas, start, end, colour, thickness=1)


def _draw_outline(
    canvas: NDArray[np.uint8], mask: NDArray[np.bool_], colour: tuple[int, int, int]
) -> None:
    size = (canvas.shape[1], canvas.shape[0])
    scaled = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(scaled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(canvas, contours, -1, colour, thickness=2, lineType=cv2.LINE_AA)


def _number_sections(
    picture: Image.Image, sections: NDArray[np.int32], zoom: tuple[float, float]
) -> None:
    """A number in the middle of each section, where there are several."""
    count = int(sections.max())
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=30)
    for number in range(1, count + 1 if count > 1 else 1):
        y, x = np.argwhere(sections == number).mean(0)
        at = (float(x) * zoom[0], float(y) * zoom[1])
        draw.text(at, str(number), "black", font, "mm", stroke_width=3, stroke_fill="white")


def _draw_caption(picture: Image.Image, top: int, caption: str, mpp: float) -> None:
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=16)
    draw.text((10, top + 8), caption, fill="black", font=font)
    target_mm = picture.width * mpp / 6000
    length_mm = 10.0 ** math.floor(math.log10(target_mm))
    length_mm *= max(m for m in (1, 2, 5) if length_mm * m <= target_mm)
    label = f"{length_mm:g} mm"
    right, middle = picture.width - 12, top + _CAPTION_PX // 2
    left = right - round(length_mm * 1000 / mpp)
    draw.line([(left, middle), (right, middle)], fill="black", width=4)
    width = draw.textlength(label, font=font)
    draw.text((left - width - 10, top + 8), label, fill="black", font=font)
