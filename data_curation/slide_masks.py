"""Tissue, pen, folds and sections on one slide, and what they say of its tiles."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eosin.data_curation.folds import find_folds
from eosin.data_curation.glass import density_planes, estimate_glass
from eosin.data_curation.grid import Grid
from eosin.data_curation.pixel_masks import Mask
from eosin.data_curation.sections import find_sections
from eosin.data_curation.segmenter import load_segmenter
from eosin.data_curation.slide import Slide
from eosin.data_curation.tissue import RULES, Tissue, find_tissue, mask_mpp


@dataclass(frozen=True, kw_only=True)
class SlideMasks:
    """Masks over a slide's overview, [h, w]."""

    overview: NDArray[np.uint8]
    """RGB [h, w, 3]."""
    readable: Mask
    """False where the overview could not be read."""
    tissue: Tissue
    folds: Mask
    sections: NDArray[np.int32]
    """1 and on; 0 is glass."""
    pixel_px: tuple[float, float]
    """Level-0 pixels in a pixel of the overview (x, y)."""

    def fractions(self, grid: Grid) -> NDArray[np.float64]:
        """Share of tissue in each cell, [rows, columns].

        What the overview could not show counts, so that it is tried and reported, and not taken
        for glass.
        """
        return grid.fractions(self.tissue.tissue | ~self.readable, self.pixel_px)

    def columns(self, grid: Grid) -> dict[str, Any]:
        """What the masks say of each cell, in row-major order, by column of tiles.parquet."""
        most, section = np.zeros(len(grid)), np.zeros(len(grid), np.int32)
        for number in range(1, int(self.sections.max()) + 1):
            share = grid.fractions(self.sections == number, self.pixel_px).reshape(-1)
            section[share > most] = number
            most = np.maximum(most, share)
        return {
            "tissue_fraction": self.fractions(grid).reshape(-1),
            "pen_fraction": grid.fractions(self.tissue.pen, self.pixel_px).reshape(-1),
            "fold_fraction": grid.fractions(self.folds, self.pixel_px).reshape(-1),
            "section": [int(number) or None for number in section],
        }

    def record(self) -> dict[str, Any]:
        """What they say of the slide, by column of slides.parquet."""
        return {
            "tissue_area_mm2": self.tissue.area_mm2(self.tissue.tissue),
            "pen_area_mm2": self.tissue.area_mm2(self.tissue.pen),
            "n_sections": int(self.sections.max()),
        }


def find_masks(slide: Slide, tile_um: float, rule: str, segmenter: Path | None) -> SlideMasks:
    """The masks of a slide, at the scale of the classical rule or of the segmenter.

    Args:
        slide: open.
        tile_um: side of a tile.
        rule: one of `RULES`.
        segmenter: folder of a network that takes the rule's place, or None.
    """
    width, height = slide.bounds_px[2:]
    extent_um = (width * slide.mpp[0], height * slide.mpp[1])
    network = load_segmenter(segmenter) if segmenter is not None else None
    wanted = mask_mpp(extent_um, tile_um, max(slide.mpp)) if network is None else network.config.mpp
    overview, readable = slide.overview(max(wanted, *slide.mpp))
    pixel_px = (width / overview.shape[1], height / overview.shape[0])
    mpp = (pixel_px[0] * slide.mpp[0], pixel_px[1] * slide.mpp[1])
    if network is None:
        tissue = find_tissue(overview, mpp, RULES[rule])
    else:
        tissue = network.find_tissue(overview, mpp)
    pixel_um = math.sqrt(mpp[0] * mpp[1])
    planes = density_planes(overview, estimate_glass(overview))
    return SlideMasks(
        overview=overview,
        readable=readable,
        tissue=tissue,
        folds=find_folds(planes, tissue.tissue, pixel_um),
        sections=find_sections(tissue.tissue, pixel_um),
        pixel_px=pixel_px,
    )
