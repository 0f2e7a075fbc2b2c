"""Writes an RGB picture as a pyramidal TIFF of JPEG tiles with a scale, as slide scanners do.

The layout is classic TIFF 6.0 with JPEG compression after TIFF Technical Note 2, one directory a
level. tifffile can write it only beside imagecodecs, even from tiles that are encoded already, so
the few tags stand here. Equal input gives equal bytes.
"""

import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from eosin.launch.artefacts import replacing

TILE_PX = 256
"""Side of a stored JPEG tile, and of the smallest level."""

_SHORT, _LONG, _RATIONAL, _ASCII = 3, 4, 5, 2
_FORMAT = {_SHORT: "H", _LONG: "I", _RATIONAL: "II", _ASCII: "c"}
_LARGEST_FILE = 2**32 - 1


def write_pyramid(
    path: Path, image: NDArray[np.uint8], *, mpp: float, description: str, quality: int
) -> None:
    """Writes `image` ([H, W, 3] RGB) atomically, halved until a level would be under one tile.

    Args:
        path: the file to write.
        image: level 0.
        mpp: µm per pixel of level 0; it becomes the resolution tags, which OpenSlide reports.
        description: ASCII text of the ImageDescription tag.
        quality: of the JPEG tiles, 1 to 100; chroma is halved on both axes.

    Raises:
        ValueError: the file would pass the 4 GiB of classic TIFF.
    """
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(struct.pack("<2sHI", b"II", 42, 0))
        link = 4  # where the offset of the next directory goes
        level, level_mpp = image, mpp
        while True:
            tiles = [_append(file, tile) for tile in _encoded_tiles(level, quality)]
            tags = _tags(level, level_mpp, tiles, description, reduced=level is not image)
            link = _append_directory(file, tags, link)
            if min(level.shape[:2]) < 2 * TILE_PX:
                break
            half = (level.shape[1] // 2, level.shape[0] // 2)
            level = np.asarray(cv2.resize(level, half, interpolation=cv2.INTER_AREA), np.uint8)
            level_mpp *= 2


def _encoded_tiles(image: NDArray[np.uint8], quality: int) -> Iterator[bytes]:
    """JPEG bytes row by row; tiles over the edge repeat the last row and column."""
    height, width = image.shape[:2]
    for y in range(0, height, TILE_PX):
        for x in range(0, width, TILE_PX):
            tile = image[y : y + TILE_PX, x : x + TILE_PX]
            missing = ((0, TILE_PX - tile.shape[0]), (0, TILE_PX - tile.shape[1]), (0, 0))
            padded = np.ascontiguousarray(np.pad(tile, missing, mode="edge"))
            yield simplejpeg.encode_jpeg(padded, quality, "RGB", "420")


def _append(file: BinaryIO, content: bytes) -> tuple[int, int]:
    """Writes `content` at the end, on an even offset; returns (offset, bytes)."""
    file.write(b"\0" * (file.tell() % 2))
    offset = file.tell()
    if offset + len(content) > _LARGEST_FILE:
        raise ValueError("a classic TIFF ends at 4 GiB; make the slide smaller")
    file.write(content)
    return offset, len(content)


def _tags(
    level: NDArray[np.uint8],
    mpp: float,
    tiles: Sequence[tuple[int, int]],
    description: str,
    reduced: bool,
) -> list[tuple[int, int, list[int] | bytes]]:
    """(tag, type, values) in ascending order, as TIFF asks."""
    per_cm = Fraction(10_000 / mpp).limit_denominator(10_000)  # numerator below 2**32
    resolution = [per_cm.numerator, per_cm.denominator]
    return [
        (254, _LONG, [int(reduced)]),  # NewSubfileType: bit 0 marks a reduced copy
        (256, _LONG, [level.shape[1]]),
        (257, _LONG, [level.shape[0]]),
        (258, _SHORT, [8, 8, 8]),  # BitsPerSample
        (259, _SHORT, [7]),  # Compression: JPEG
        (262, _SHORT, [6]),  # PhotometricInterpretation: YCbCr
        (270, _ASCII, description.encode("ascii") + b"\0"),
        (277, _SHORT, [3]),  # SamplesPerPixel
        (282, _RATIONAL, resolution),
        (283, _RATIONAL, resolution),
        (284, _SHORT, [1]),  # PlanarConfiguration: interleaved
        (296, _SHORT, [3]),  # ResolutionUnit: cm
        (322, _LONG, [TILE_PX]),
        (323, _LONG, [TILE_PX]),
        (324, _LONG, [offset for offset, _ in tiles]),
        (325, _LONG, [size for _, size in tiles]),
        (530, _SHORT, [2, 2]),  # YCbCrSubSampling
        (532, _RATIONAL, [0, 1, 255, 1, 128, 1, 255, 1, 128, 1, 255, 1]),  # full range, as in JFIF
    ]


def _append_directory(
    file: BinaryIO, tags: Sequence[tuple[int, int, list[int] | bytes]], link: int
) -> int:
    """Writes the directory, points `link` to it, and returns the place of the next link."""
    entries = b""
    for tag, kind, values in tags:
        if isinstance(values, bytes):
            count, packed = len(values), values
        else:
            count = len(values) // len(_FORMAT[kind])
            packed = struct.pack(f"<{len(values)}{_FORMAT[kind][0]}", *values)
        if len(packed) > 4:
            packed = struct.pack("<I", _append(file, packed)[0])
        entries += struct.pack("<HHI4s", tag, kind, count, packed)
    offset, size = _append(file, struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0))
    file.seek(link)
    file.write(struct.pack("<I", offset))
    file.seek(0, 2)
    return offset + size - 4
