"""Decoders of tiles with their speed, and a slide written and read back through OpenSlide."""

import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import openslide
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from eosin.configs.errors import EosinError, printable
from eosin.data_curation.codec import decode_image, encode_tile
from eosin.data_curation.slide import SLIDE_SUFFIXES, Slide
from eosin.data_curation.synthetic import SyntheticConfig, write_slide
from eosin.launch.checks import Finding

AREA = "images"

_TILE_PX = 256
_SIZE_PX = 512
_RATE_S = 0.15
_APART = 2.0  # grey values of 255: what decoders of one standard may differ by
_SLOW_RATE = 300.0
_OTHERS = ("tifffile", "pydicom", "pyvips", "cucim", "tiffslide", "bioformats")


@dataclass(frozen=True, kw_only=True)
class Images:
    """What was decoded, and how fast."""

    simplejpeg: str
    opencv: str
    rates: dict[str, float]
    """Tiles/s of one core, of 256 px, by decoder."""
    apart: float
    """Largest difference of simplejpeg and Pillow in a tile, grey values."""
    openslide: str
    """Version of the C library."""
    slide_failure: str = ""
    """Why the slide that was written could not be read back as it is."""
    others: tuple[str, ...] = ()
    """Readers that are installed and that eosin does not use."""


def check(folder: Path) -> list[Finding]:
    """Decodes, and writes and reads a slide."""
    return judge(look())


def look() -> Images:
    """The facts; the slide is written to the folder for temporary files, and removed."""
    cv2.setNumThreads(1)
    data, rates, apart = b"", {}, 0.0
    failure = ""
    try:
        with tempfile.TemporaryDirectory(prefix="eosin-doctor-") as scratch:
            pixels, failure = _slide(Path(scratch))
    except (EosinError, OSError) as error:
        failure, pixels = printable(str(error)), np.full((_TILE_PX, _TILE_PX, 3), 200, np.uint8)
    data = encode_tile(pixels, 90).data
    with Image.open(io.BytesIO(data)) as image:
        theirs = np.asarray(image.convert("RGB"), np.int16)
    apart = float(np.abs(decode_image(data, "jpg").astype(np.int16) - theirs).max())
    encoded = np.frombuffer(data, np.uint8)
    rates = {
        "simplejpeg": _rate(lambda: decode_image(data, "jpg")),
        "opencv": _rate(lambda: cv2.imdecode(encoded, cv2.IMREAD_COLOR)),
        "Pillow": _rate(lambda: np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))),
    }
    return Images(
        simplejpeg=str(simplejpeg.__version__),
        opencv=cv2.__version__,
        rates=rates,
        apart=apart,
        openslide=str(openslide.__library_version__),
        slide_failure=failure,
        others=tuple(name for name in _OTHERS if find_spec(name) is not None),
    )


def _slide(scratch: Path) -> tuple[NDArray[np.uint8], str]:
    """A tile of a slide that is written here, and in what it is not as Pillow reads it."""
    config = SyntheticConfig(n_slides=1, size_px=_SIZE_PX)
    path = write_slide(scratch, 0, config)
    with Slide(path) as slide:
        corner = _SIZE_PX // 2 - _TILE_PX // 2
        tile = slide.read_tile(corner, corner, _TILE_PX, config.mpp)
        mpp, size = slide.mpp, slide.size_px
    with Image.open(path) as image:
        area = np.s_[corner : corner + _TILE_PX, corner : corner + _TILE_PX]
        theirs = np.asarray(image.convert("RGB"), np.int16)[area]
    if size != (_SIZE_PX, _SIZE_PX) or max(abs(m / config.mpp - 1) for m in mpp) > 1e-3:
        return tile, f"{_SIZE_PX} px at {config.mpp} µm/px came back as {size} at {mpp}"
    apart = float(np.abs(tile.astype(np.int16) - theirs).mean())
    return tile, "" if apart <= _APART else f"its pixels came back {apart:.0f} grey values off"


def _rate(decode: Callable[[], object]) -> float:
    """Calls a second of processor time, which others cannot spoil."""
    decode()
    start, calls = time.process_time(), 0
    while (spent := time.process_time() - start) < _RATE_S:
        decode()
        calls += 1
    return calls / spent


def judge(images: Images) -> list[Finding]:
    """The rows."""
    return [_decoders(images), _slides(images)]


def _decoders(images: Images) -> Finding:
    rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in images.rates.items())
    found = (
        f"simplejpeg {images.simplejpeg}, opencv {images.opencv}; tiles/s a core, {_TILE_PX} px: "
        f"{rates}"
    )
    if images.apart > 8 * _APART:
        return Finding(
            AREA, "decoders", f"{found}; {images.apart:.0f} grey values apart", "simplejpeg",
            "mend", "reinstall simplejpeg and pillow: one of them decodes wrongly",
        )  # fmt: skip
    if images.rates["simplejpeg"] < _SLOW_RATE:
        return Finding(
            AREA, "decoders", found, "simplejpeg", "note",
            "decoding is slow here: give training more loader.workers",
        )  # fmt: skip
    return Finding(AREA, "decoders", found, "simplejpeg")


def _slides(images: Images) -> Finding:
    found = f"OpenSlide {images.openslide}"
    if images.slide_failure:
        return Finding(
            AREA, "slides", f"{found}; a slide written here: {images.slide_failure}", "OpenSlide",
            "mend", "pip install --force-reinstall openslide-bin openslide-python",
        )  # fmt: skip
    suffixes = " ".join(sorted(suffix.removeprefix(".") for suffix in SLIDE_SUFFIXES))
    found += f": {suffixes}; one written and read back"
    if images.others:
        found += f"; not used: {', '.join(images.others)}"
    return Finding(AREA, "slides", found, "OpenSlide")
