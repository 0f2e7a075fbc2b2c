"""A slide to look at: its overview, and what is said of its tiles laid over it at their places.

Legend: N tiles.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from eosin.configs.errors import InputError
from eosin.data_curation.manifest import SLIDES, TILES, read_table
from eosin.data_curation.slide import RegionError, Slide
from eosin.data_curation.slide_metadata import SlideError

LONG_SIDE_PX = 1100
"""Of an overview."""

RGB = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class TilePlace:
    """Where a tile lies."""

    left_px: float
    """In level-0 pixels, as `top_px`."""
    top_px: float
    size_px: int
    """Of the tile, at its own scale."""
    mpp: float
    """Of the tile."""


@dataclass(frozen=True, kw_only=True)
class SlideView:
    """A slide with its tiles."""

    slide_id: str
    path: Path
    mpp: tuple[float, float]
    """Of level 0, as the tiles were placed by."""
    places: Mapping[str, TilePlace]
    """By tile_id."""

    def overview(self) -> tuple[RGB, tuple[float, float], float]:
        """The whole scanned area, with its longer side at `LONG_SIDE_PX`.

        Returns:
            RGB uint8 [h, w, 3]; the corner (x, y) of it in level-0 pixels; its µm/px.

        Raises:
            InputError: the slide cannot be opened any more.
        """
        with self._open() as slide:
            left, top, width, height = slide.bounds_px
            mpp = max(width * self.mpp[0], height * self.mpp[1]) / LONG_SIDE_PX
            picture, _ = slide.overview(mpp)
        return picture, (left, top), mpp

    def read(self, tile_ids: Sequence[str]) -> list[RGB]:
        """Tiles at their own scale; grey where one cannot be read."""
        found = []
        with self._open() as slide:
            for tile_id in tile_ids:
                place = self.places[tile_id]
                try:
                    tile = slide.read_tile(place.left_px, place.top_px, place.size_px, place.mpp)
                except RegionError:
                    tile = np.full((place.size_px, place.size_px, 3), 128, np.uint8)
                found.append(tile)
        return found

    def boxes(
        self, tile_ids: Sequence[str], corner: tuple[float, float], mpp: float
    ) -> npt.NDArray[np.int64]:
        """Tiles in pixels of an overview: left, top, right, bottom, [N, 4]."""
        found = np.empty((len(tile_ids), 4))
        for row, tile_id in enumerate(tile_ids):
            place = self.places[tile_id]
            side_um = place.size_px * place.mpp
            x = (place.left_px - corner[0]) * self.mpp[0]
            y = (place.top_px - corner[1]) * self.mpp[1]
            found[row] = (x, y, x + side_um, y + side_um)
        boxes: npt.NDArray[np.int64] = np.round(found / mpp).astype(np.int64)
        return boxes

    def _open(self) -> Slide:
        try:
            return Slide(self.path, mpp=self.mpp)
        except SlideError as error:
            raise InputError(f"{self.path}: {error}; tile the slides again") from error


def slides_of(tiles: Path) -> set[str]:
    """The slides that a folder of `eosin tile` knows.

    Raises:
        InputError: it is none.
    """
    return set(read_table(tiles / "slides.parquet", SLIDES)["slide_id"].to_pylist())


def view_slides(tiles: Path, slide_ids: Sequence[str]) -> list[SlideView]:
    """Slides of a folder of `eosin tile`, in the order of `slide_ids`.

    Raises:
        InputError: a table is missing, or does not know a slide.
    """
    slides = read_table(tiles / "slides.parquet", SLIDES)
    cells = read_table(tiles / "tiles.parquet", TILES)
    rows = {row["slide_id"]: row for row in slides.to_pylist()}
    unknown = [slide_id for slide_id in slide_ids if slide_id not in rows]
    if unknown:
        raise InputError(f"{tiles / 'slides.parquet'} knows no slide '{unknown[0]}'")
    columns = ("tile_id", "level0_x", "level0_y", "size_px", "requested_mpp")
    found = []
    for slide_id in slide_ids:
        own = cells.filter(pc.equal(cells["slide_id"], slide_id)).select(list(columns))
        found.append(
            SlideView(
                slide_id=slide_id,
                path=Path(rows[slide_id]["path"]),
                mpp=(rows[slide_id]["mpp_x"], rows[slide_id]["mpp_y"]),
                places={
                    cell["tile_id"]: TilePlace(
                        left_px=cell["level0_x"],
                        top_px=cell["level0_y"],
                        size_px=cell["size_px"],
                        mpp=cell["requested_mpp"],
                    )
                    for cell in own.to_pylist()
                },
            )
        )
    return found


def lay_over(
    overview: RGB, boxes: npt.NDArray[np.int64], colours: RGB, strength: float = 0.6
) -> RGB:
    """The overview in grey, with each tile's box in its colour: tissue shows through.

    Args:
        overview: uint8 [h, w, 3].
        boxes: left, top, right, bottom, int64 [N, 4].
        colours: uint8 [N, 3].
        strength: of the colour, 0 to 1.
    """
    grey = cv2.cvtColor(overview, cv2.COLOR_RGB2GRAY)
    picture = np.repeat(grey[:, :, None], 3, axis=2)
    coloured = picture.copy()
    for (left, top, right, bottom), colour in zip(boxes, colours, strict=True):
        coloured[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = colour
    changed = (coloured != picture).any(axis=2, keepdims=True)
    mixed = strength * coloured + (1 - strength) * picture
    found: RGB = np.where(changed, mixed, picture).round().astype(np.uint8)
    return found
