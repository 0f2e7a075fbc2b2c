"""Slides in formats that OpenSlide does not read, by fastslide where it is installed.

Philips iSyntax, Olympus VSI; and CZI and DICOM whose compression OpenSlide does not know. What
OpenSlide refuses for another reason stays refused: another reader might make up pixels.
"""

from pathlib import Path
from typing import Any

import numpy as np
import openslide
from PIL import Image

from eosin.data_curation.manifest import Status
from eosin.data_curation.slide_metadata import SlideError

ONLY_FASTSLIDE = frozenset((".i2syntax", ".isyntax", ".vsi"))
ALSO_FASTSLIDE = frozenset((".czi", ".dcm"))
"""Read by OpenSlide, unless it does not know the format."""


class FastSlideHandle:
    """A slide that fastslide reads, with what `Slide` uses of OpenSlide's interface.

    Raises:
        SlideError: fastslide is not installed, refuses the file, or it is no 8-bit RGB.
    """

    def __init__(self, path: Path) -> None:
        try:
            import fastslide  # optional
        except ImportError as error:
            raise SlideError(
                Status.UNREADABLE,
                f"OpenSlide does not read this; pip install 'eosin[fastslide]' for {path.suffix}",
            ) from error
        try:
            self._slide = fastslide.FastSlide.from_file_path(str(path))
        except (RuntimeError, ValueError, OSError) as error:
            raise SlideError(Status.UNREADABLE, f"not readable: {_first(error, path)}") from error
        slide, self._path = self._slide, path
        if slide.num_channels != 3 or np.dtype(slide.dtype) != np.uint8:
            kind = f"{slide.num_channels} channels of {slide.dtype}"
            slide.close()
            raise SlideError(Status.UNREADABLE, f"not a picture in 8-bit RGB, but {kind}")
        self.dimensions: tuple[int, int] = tuple(slide.dimensions)
        self.level_dimensions = tuple(tuple(size) for size in slide.level_dimensions)
        self.level_downsamples = tuple(float(factor) for factor in slide.level_downsamples)
        (x, y), (width, height) = slide.bounds
        mpp_x, mpp_y = slide.mpp
        self.properties = {
            "openslide.vendor": f"fastslide {slide.format}",
            "openslide.mpp-x": str(mpp_x),
            "openslide.mpp-y": str(mpp_y),
            "openslide.bounds-x": str(x),
            "openslide.bounds-y": str(y),
            "openslide.bounds-width": str(width),
            "openslide.bounds-height": str(height),
            openslide.PROPERTY_NAME_QUICKHASH1: str(slide.quickhash),
        }

    def read_region(
        self, location: tuple[int, int], level: int, size: tuple[int, int]
    ) -> Image.Image:
        """RGBA of a region; `location` in level-0 pixels, as OpenSlide takes it.

        Raises:
            OpenSlideError: it cannot be decoded, or reaches beyond the level.
        """
        at = tuple(round(side / self.level_downsamples[level]) for side in location)
        edge = self.level_dimensions[level]
        if min(at) < 0 or any(a + s > e for a, s, e in zip(at, size, edge, strict=True)):
            raise openslide.OpenSlideError(
                f"{size} px at {at} reach beyond level {level} of {edge}"
            )
        try:
            pixels = np.asarray(self._slide.read_region(at, level, size).numpy())
        except (RuntimeError, ValueError, OSError) as error:
            raise openslide.OpenSlideError(_first(error, self._path)) from error
        if pixels.shape != (size[1], size[0], 3):
            raise openslide.OpenSlideError(f"gives {pixels.shape} where {size} px were asked for")
        return Image.fromarray(pixels).convert("RGBA")

    def set_cache(self, _: Any) -> None:
        """Nothing: OpenSlide's cache holds OpenSlide's tiles."""

    def close(self) -> None:
        """Closes the slide."""
        self._slide.close()


def _first(error: Exception, path: Path) -> str:
    """The first line of an error, without the file's name: it may name a person."""
    return str(error).splitlines()[0].replace(str(path), "the file")
