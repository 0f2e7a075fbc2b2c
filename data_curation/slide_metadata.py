"""What a slide's metadata says of its scale: µm per pixel, pyramid levels, scanned area, scanner.

Nothing is guessed. A slide without a plausible scale on both axes is refused with what was read and
how to supply one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eosin.configs.errors import EosinError
from eosin.data_curation.manifest import Status

MPP_RANGE = (0.05, 10.0)
"""Plausible µm per pixel of a scan; a TIFF writer's default resolution of 1 px/mm reads as 1000."""
MAX_ANISOTROPY = 0.05
"""Largest relative difference between mpp_x and mpp_y that is still a scan and not a mistake."""
MAX_CODED_TILE_PX = 1 << 26
"""Pixels in one coded tile of the file; more is a decompression bomb."""

_SCANNER_PROPERTIES = (
    "aperio.ScanScope ID",
    "hamamatsu.Product",
    "leica.device-model",
    "philips.DICOM_MANUFACTURERS_MODEL_NAME",
    "ventana.ScannerModel",
    "mirax.GENERAL.SLIDE_SCANNER",
    "dicom.ManufacturerModelName",
    "tiff.Model",
)
_UM_PER_UNIT = {"inch": 25_400.0, "centimeter": 10_000.0}


class SlideError(EosinError):
    """A slide that cannot be used; `status` says which row it becomes in slides.parquet."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of the pyramid."""

    index: int
    size_px: tuple[int, int]
    downsample: tuple[float, float]
    """Level-0 pixels in a pixel of this level, per axis."""
    openslide_downsample: float
    """What OpenSlide divides locations by (a mean of both axes)."""


def pyramid_levels(
    properties: Mapping[str, str], sizes: Sequence[tuple[int, int]], downsamples: Sequence[float]
) -> list[Level]:
    """The levels of a pyramid, from OpenSlide's sizes and downsamples.

    Raises:
        SlideError: a level is coded in tiles too large to decode safely.
    """
    levels = []
    full = sizes[0]
    for index, size in enumerate(sizes):
        prefix = f"openslide.level[{index}].tile-"
        coded = [int(properties.get(prefix + side, 0)) for side in ("width", "height")]
        if coded[0] * coded[1] > MAX_CODED_TILE_PX:
            reason = f"level {index} is coded in tiles of {coded[0]}×{coded[1]} px; too large"
            raise SlideError(Status.UNREADABLE, reason)
        level = Level(
            index=index,
            size_px=size,
            downsample=(_downsample(full[0], size[0]), _downsample(full[1], size[1])),
            openslide_downsample=downsamples[index],
        )
        levels.append(level)
    return levels


def _downsample(full_px: int, level_px: int) -> float:
    """Level-0 pixels in a level pixel along one axis.

    A pyramid of whole factors cuts or pads the last pixel, so 5477 over 2738 is 2, not 2.0004; any
    other ratio is taken as it is, unrounded.
    """
    ratio = full_px / level_px
    whole = max(1, round(ratio))
    return float(whole) if level_px in (full_px // whole, -(-full_px // whole)) else ratio


def metadata_mpp(properties: Mapping[str, str]) -> tuple[float, float]:
    """The scan's µm per level-0 pixel (x, y).

    Raises:
        SlideError: the file does not say (status `no_mpp`).
    """
    values = [_number(properties.get(f"openslide.mpp-{axis}")) for axis in "xy"]
    unit = _UM_PER_UNIT.get(properties.get("tiff.ResolutionUnit", ""))
    if None in values and unit is not None:
        resolutions = [_number(properties.get(f"tiff.{axis}Resolution")) for axis in "XY"]
        values = [unit / r if r else None for r in resolutions]
    x, y = values
    if x is None or y is None:
        raise SlideError(
            Status.NO_MPP,
            "its metadata gives no µm/px; give one in the column 'mpp' of a slide table",
        )
    return x, y


def check_mpp(mpp: tuple[float, float], source: str) -> None:
    """Refuses a scale that no scanner has (status `implausible_mpp`); `source` is named."""
    x, y = mpp
    low, high = MPP_RANGE
    mend = "correct the slide table" if source == "table" else "give 'mpp' in a slide table"
    if not (low <= x <= high and low <= y <= high):
        reason = f"{source} says {x:g} × {y:g} µm/px, outside {low:g} to {high:g}; {mend}"
        raise SlideError(Status.IMPLAUSIBLE_MPP, reason)
    if abs(x / y - 1) > MAX_ANISOTROPY:
        reason = f"{source} says {x:g} × {y:g} µm/px: the axes differ by over 5 %; {mend}"
        raise SlideError(Status.IMPLAUSIBLE_MPP, reason)


def scanner_name(properties: Mapping[str, str]) -> str | None:
    """Vendor and model or serial number of the scanner, as far as the file says."""
    vendor = properties.get("openslide.vendor")
    model = next((properties[key] for key in _SCANNER_PROPERTIES if properties.get(key)), None)
    return " ".join(part for part in (vendor, model) if part) or None


def scanned_bounds_px(
    properties: Mapping[str, str], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """The scanned area (x, y, width, height) in level-0 pixels; the whole slide by default."""
    x, y = (int(properties.get(f"openslide.bounds-{axis}", 0)) for axis in "xy")
    width = int(properties.get("openslide.bounds-width", size[0] - x))
    height = int(properties.get("openslide.bounds-height", size[1] - y))
    return x, y, min(width, size[0] - x), min(height, size[1] - y)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
