"""Small pictures of slides, and where tiles lie on them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg

from eosin.data_curation.slide import Slide
from eosin.data_curation.slide_metadata import SlideError

_QUALITY = 80


@dataclass(frozen=True, eq=False)
class SlideMap:
    """A slide, as small as it serves to show places on it."""

    jpeg: bytes
    width_px: int
    height_px: int
    left: float
    """Of the picture, in level-0 pixels of the slide; likewise `top`."""
    top: float
    step_x: float
    """Level-0 pixels to a pixel of the picture; likewise `step_y`."""
    step_y: float

    def place(self, level0_x: float, level0_y: float) -> tuple[float, float]:
        """Where a level-0 position lies in the picture, in its pixels."""
        return (level0_x - self.left) / self.step_x, (level0_y - self.top) / self.step_y


def draw_map(path: Path, mpp: tuple[float, float], side_px: int) -> SlideMap | None:
    """The scanned area of a slide with its longer side at most `side_px`; None if not readable."""
    try:
        with Slide(path, mpp) as slide:
            left, top, width, height = slide.bounds_px
            longer_um = max(width * slide.mpp[0], height * slide.mpp[1])
            rgb, _ = slide.overview(max(longer_um / side_px, *slide.mpp))
    except SlideError:
        return None
    rgb = np.ascontiguousarray(rgb)
    return SlideMap(
        jpeg=simplejpeg.encode_jpeg(rgb, quality=_QUALITY, colorsubsampling="444"),
        width_px=rgb.shape[1],
        height_px=rgb.shape[0],
        left=left,
        top=top,
        step_x=width / rgb.shape[1],
        step_y=height / rgb.shape[0],
    )
