"""Small slides for the tests of curation: plain tiled TIFFs that OpenSlide opens."""

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

WriteSlide = Callable[..., Path]


@pytest.fixture(scope="session")
def write_slide() -> WriteSlide:
    """Writes RGB levels, finest first, as a pyramidal TIFF; ``mpp=None`` leaves out the scale."""

    def write(
        path: Path,
        levels: Sequence[NDArray[np.uint8]],
        mpp: tuple[float, float] | None = (1.0, 1.0),
        tile_px: int = 64,
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        scale = {}
        if mpp is not None:
            scale = {"resolution": (1e4 / mpp[0], 1e4 / mpp[1]), "resolutionunit": "CENTIMETER"}
        with tifffile.TiffWriter(path) as tiff:
            for index, pixels in enumerate(levels):
                tiff.write(
                    pixels,
                    photometric="rgb",
                    tile=(tile_px, tile_px),
                    subfiletype=1 if index else 0,
                    metadata=None,
                    **(scale if index == 0 else {}),
                )
        return path

    return write


@pytest.fixture(scope="session")
def break_tiles() -> Callable[..., None]:
    """Points the last `count` coded tiles of level 0 behind the end of the file."""

    def break_last(path: Path, count: int) -> None:
        with tifffile.TiffFile(path, mode="r+") as tiff:
            tag = tiff.pages.first.tags["TileOffsets"]
            kept = list(tag.value)[:-count]
            tag.overwrite(kept + [path.stat().st_size + 10_000] * count)

    return break_last


@pytest.fixture(scope="session")
def tissue_pixels() -> NDArray[np.uint8]:
    """512 × 512 px of glass with a disc of pink tissue (radius 150 px) and purple nuclei in it."""
    rng = np.random.default_rng(0)
    image = np.full((512, 512, 3), (243, 242, 244), np.uint8)
    cv2.circle(image, (256, 256), 150, (226, 160, 195), thickness=-1)
    for x, y in rng.integers(150, 362, (300, 2)):
        cv2.circle(image, (int(x), int(y)), 4, (95, 60, 140), thickness=-1)
    noise = rng.normal(0, 2, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)
