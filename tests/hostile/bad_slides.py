"""Bad slides: files that a scanner, a copy or a liar may leave, each with what must become of it.

They are made from one good slide, by `write_bad_slides`. ``refused``: the slide has a status other
than ok, and no tile. ``partly``: what can be read is read, and equals the good slide's pixels; the
rest are rows with a reason. ``either``: readers of different versions may say one or the other.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import simplejpeg
import tifffile
from numpy.typing import NDArray

from eosin.data_curation.pyramid import write_pyramid

SIDE_PX, TILE_PX, MPP = 512, 128, 0.5
Fate = Literal["refused", "partly", "either"]
RGB = NDArray[np.uint8]


def good_pixels() -> RGB:
    """Tissue all over, smooth enough for JPEG, nowhere twice the same."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 1, (24, 24)).astype(np.float32)
    field = cv2.resize(coarse, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_CUBIC)[..., None]
    eosin, haematoxylin = np.array([225.0, 150.0, 190.0]), np.array([120.0, 80.0, 160.0])
    return np.clip(eosin + (haematoxylin - eosin) * field, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class BadSlide:
    """One file and its fate."""

    name: str
    """Of the file, with its extension."""
    fate: Fate
    write: Callable[[Path], object]


def _write(
    path: Path,
    levels: list[RGB] | None = None,
    *,
    description: str | None = None,
    mpp: float | None = MPP,
    tiled: bool = True,
    **options: object,
) -> None:
    """A pyramidal TIFF, good unless the arguments make it bad."""
    if levels is None:
        whole = good_pixels()
        levels = [whole, cv2.resize(whole, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)]
    scale: dict[str, object] = {}
    if mpp is not None:
        scale = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    if tiled:
        options["tile"] = (TILE_PX, TILE_PX)
    with tifffile.TiffWriter(path) as tiff:
        for number, pixels in enumerate(levels):
            tiff.write(
                pixels,
                photometric=options.pop("photometric", "rgb" if pixels.ndim == 3 else "minisblack"),
                subfiletype=int(number > 0),
                description=description if not number else None,
                metadata=None,
                **(scale if not number else {}),
                **options,
            )  # type: ignore[arg-type]


def _jpeg_slide(path: Path, spoil: Callable[[int, bytes], bytes]) -> None:
    """A slide of JPEG tiles, those of the first level as `spoil` (of number and bytes) leaves them.

    What it leaves is no longer than it was.
    """
    write_pyramid(path, good_pixels(), mpp=MPP, description="", quality=95)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tags = tiff.pages[0].tags  # type: ignore[union-attr]
        offsets, counts = tags["TileOffsets"].value, tags["TileByteCounts"].value
        data = bytearray(path.read_bytes())
        sizes = []
        for number, (offset, count) in enumerate(zip(offsets, counts, strict=True)):
            spoilt = spoil(number, bytes(data[offset : offset + count]))
            assert len(spoilt) <= count
            data[offset : offset + len(spoilt)] = spoilt
            sizes.append(len(spoilt))
        tags["TileByteCounts"].overwrite(tuple(sizes))
        at = tags["TileByteCounts"].valueoffset
        width = tags["TileByteCounts"].valuebytecount
    changed = path.read_bytes()[at : at + width]
    path.write_bytes(bytes(data[:at]) + changed + bytes(data[at + width :]))


def _tag(name: str, value: object, page: int = 0, **options: object) -> Callable[[Path], None]:
    """The good slide with a tag of a page overwritten."""

    def write(path: Path) -> None:
        _write(path)
        with tifffile.TiffFile(path, mode="r+") as tiff:
            tag = tiff.pages[page].tags[name]  # type: ignore[union-attr]
            new = value(tag.value) if callable(value) else value
            tag.overwrite(new, **options)

    return write


def _raw_tag(name: str, raw: bytes) -> Callable[[Path], None]:
    """The good slide with the bytes of a tag's value in its entry overwritten."""

    def write(path: Path) -> None:
        _write(path)
        with tifffile.TiffFile(path) as tiff:
            offset = tiff.pages[0].tags[name].offset  # type: ignore[union-attr]
        data = bytearray(path.read_bytes())
        data[offset + 8 : offset + 8 + len(raw)] = raw
        path.write_bytes(data)

    return write


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """The good slide with its bytes changed."""

    def write(path: Path) -> None:
        _write(path)
        path.write_bytes(change(path.read_bytes()))

    return write


def _first_ifd(data: bytes) -> int:
    return int(struct.unpack_from("<I", data, 4)[0])


def _next_ifd_at(data: bytes) -> int:
    """Where the first directory says where the next one lies."""
    first = _first_ifd(data)
    return first + 2 + 12 * int(struct.unpack_from("<H", data, first)[0])


def _patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def _noise(n: int) -> bytes:
    return np.random.default_rng(1).bytes(n)


def _some(values: tuple[int, ...], new: int, which: slice) -> tuple[int, ...]:
    changed = list(values)
    changed[which] = [new] * len(changed[which])
    return tuple(changed)


_APERIO = "Aperio Image Library v12\r\n512x512 [0,0 512x512] (128x128) |AppMag = 20|MPP = {}"
_FAR = 1 << 30


def bad_slides() -> list[BadSlide]:
    """All of them."""
    u32 = struct.Struct("<I").pack
    jpeg = lambda spoil: lambda path: _jpeg_slide(path, spoil)  # noqa: E731
    whole = good_pixels()
    wrong = simplejpeg.encode_jpeg(np.ascontiguousarray(whole[:64, :64]), 95, "RGB", "444")
    half = cv2.resize(whole, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    cases: list[tuple[str, Fate, Callable[[Path], object]]] = [
        # What is no slide, or not all of one.
        ("empty.svs", "refused", lambda path: path.write_bytes(b"")),
        ("four_bytes.tiff", "refused", lambda path: path.write_bytes(b"II*\0")),
        ("header_alone.tiff", "refused", _bytes(lambda data: data[:8])),
        ("half.tiff", "either", _bytes(lambda data: data[: len(data) // 2])),
        ("without_end.tiff", "either", _bytes(lambda data: data[:-100])),
        ("svs_noise.svs", "refused", lambda path: path.write_bytes(_noise(100_000))),
        ("noise_behind_header.tiff", "refused", _bytes(lambda d: d[:8] + _noise(len(d) - 8))),
        ("text.svs", "refused", lambda path: path.write_text("404 Not Found\n" * 99)),
        ("page.ndpi", "refused", lambda path: path.write_text("<html>Sign in</html>")),
        ("archive.tiff", "refused", lambda path: path.write_bytes(b"PK\3\4" + _noise(999))),
        ("photo.tif", "refused", lambda path: path.write_bytes(simplejpeg.encode_jpeg(whole))),
        ("dcm_nothing.dcm", "refused", lambda path: path.write_bytes(bytes(132) + b"DICM")),
        ("dcm_noise.dcm", "refused", lambda path: path.write_bytes(_noise(5000))),
        ("alone.mrxs", "refused", lambda path: path.write_bytes(b"")),
        ("bif_noise.bif", "refused", lambda path: path.write_bytes(b"II*\0" + _noise(5000))),
        ("scn_noise.scn", "refused", lambda path: path.write_bytes(b"MM\0*" + _noise(5000))),
        (
            "vms_noise.vms",
            "refused",
            lambda path: path.write_text("[Virtual Microscope Specimen]\n"),
        ),
        ("czi_noise.czi", "refused", lambda path: path.write_bytes(b"ZISRAWFILE" + _noise(5000))),
        # Directories that lead astray.
        ("ifd_beyond.tiff", "refused", _bytes(lambda d: _patched(d, 4, u32(_FAR)))),
        ("ifd_zero.tiff", "refused", _bytes(lambda d: _patched(d, 4, u32(0)))),
        (
            "ifd_itself.tiff",
            "refused",
            _bytes(lambda d: _patched(d, _next_ifd_at(d), u32(_first_ifd(d)))),
        ),
        (
            "ifd_next_beyond.tiff",
            "either",
            _bytes(lambda d: _patched(d, _next_ifd_at(d), u32(_FAR))),
        ),
        (
            "ifd_many_tags.tiff",
            "refused",
            _bytes(lambda d: _patched(d, _first_ifd(d), b"\xff\xff")),
        ),
        # Sizes that cannot be.
        ("width_0.tiff", "refused", _raw_tag("ImageWidth", u32(0))),
        ("width_2_31.tiff", "refused", _raw_tag("ImageWidth", u32((1 << 31) - 1))),
        ("height_2_32.tiff", "refused", _raw_tag("ImageLength", u32((1 << 32) - 1))),
        ("width_twice.tiff", "refused", _tag("ImageWidth", 2 * SIDE_PX)),
        ("tile_width_0.tiff", "refused", _raw_tag("TileWidth", u32(0))),
        ("tile_width_2_30.tiff", "refused", _raw_tag("TileWidth", u32(1 << 30))),
        ("tile_length_65520.tiff", "either", _raw_tag("TileLength", u32(65520))),
        # Tiles that are not there.
        ("offsets_0.tiff", "refused", _tag("TileOffsets", lambda v: _some(v, 0, slice(None)))),
        (
            "offsets_beyond.tiff",
            "refused",
            _tag("TileOffsets", lambda v: _some(v, _FAR, slice(None))),
        ),
        (
            "some_offsets_beyond.tiff",
            "partly",
            _tag("TileOffsets", lambda v: _some(v, _FAR, slice(5, 9))),
        ),
        ("counts_0.tiff", "refused", _tag("TileByteCounts", lambda v: _some(v, 0, slice(None)))),
        (
            "some_counts_0.tiff",
            "partly",
            _tag("TileByteCounts", lambda v: _some(v, 0, slice(5, 9))),
        ),
        (
            "some_counts_short.tiff",
            "partly",
            _tag("TileByteCounts", lambda v: _some(v, 99, slice(5, 9))),
        ),
        (
            "counts_larger.tiff",
            "either",
            _tag("TileByteCounts", lambda v: _some(v, 65535, slice(None))),
        ),
        # Pixels of another kind than the tags say.
        ("compression_unknown.tiff", "refused", _raw_tag("Compression", struct.pack("<H", 65000))),
        ("compression_jpeg.tiff", "refused", _raw_tag("Compression", struct.pack("<H", 7))),
        ("compression_lzw.tiff", "refused", _raw_tag("Compression", struct.pack("<H", 5))),
        ("compression_jpeg2000.tiff", "refused", _raw_tag("Compression", struct.pack("<H", 33005))),
        ("bits_16.tiff", "partly", lambda path: _write(path, [whole.astype(np.uint16) * 257])),
        (
            "planes.tiff",
            "partly",
            lambda path: _write(path, [np.moveaxis(whole, 2, 0).copy()], planarconfig="separate"),
        ),
        ("strips.tiff", "either", lambda path: _write(path, tiled=False)),
        # JPEG tiles.
        ("jpeg_zeros.tiff", "partly", jpeg(lambda n, d: bytes(len(d)) if n == 1 else d)),
        ("jpeg_cut.tiff", "partly", jpeg(lambda n, d: d[: len(d) // 2] if n == 1 else d)),
        ("jpeg_noise.tiff", "partly", jpeg(lambda n, d: _noise(len(d)) if n == 1 else d)),
        ("jpeg_empty.tiff", "partly", jpeg(lambda n, d: b"" if n == 1 else d)),
        ("jpeg_smaller.tiff", "partly", jpeg(lambda n, d: wrong if n == 1 else d)),
        ("jpeg_all_cut.tiff", "refused", jpeg(lambda n, d: d[:40])),
        # Levels that do not fit.
        (
            "level_other_aspect.tiff",
            "either",
            lambda path: _write(path, [whole, half[:100].copy()]),
        ),
        ("level_larger.tiff", "either", lambda path: _write(path, [half, whole])),
        (
            "level_cut.tiff",
            "either",
            _tag("TileOffsets", lambda v: _some(v, _FAR, slice(None)), page=1),
        ),
        # Scales.
        ("mpp_none.tiff", "refused", lambda path: _write(path, mpp=None)),
        ("mpp_1000.tiff", "refused", lambda path: _write(path, mpp=1000.0)),
        ("mpp_tiny.tiff", "refused", lambda path: _write(path, mpp=1e-4)),
        ("resolution_0.tiff", "refused", _tag("XResolution", (0, 1))),
        ("resolution_by_0.tiff", "refused", _tag("XResolution", (20000, 0))),
        ("resolution_one_axis.tiff", "refused", _tag("YResolution", (1, 1))),
        (
            "mpp_nan.svs",
            "refused",
            lambda path: _write(path, description=_APERIO.format("nan"), mpp=None),
        ),
        (
            "mpp_negative.svs",
            "refused",
            lambda path: _write(path, description=_APERIO.format("-0.5"), mpp=None),
        ),
        (
            "mpp_word.svs",
            "refused",
            lambda path: _write(path, description=_APERIO.format("half"), mpp=None),
        ),
        ("description_long.tiff", "either", lambda path: _write(path, description="x" * 5_000_000)),
    ]
    return [BadSlide(*case) for case in cases]


def write_bad_slides(folder: Path) -> list[BadSlide]:
    """Writes all of them, and ``good.tiff``, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "good.tiff")
    cases = bad_slides()
    for case in cases:
        case.write(folder / case.name)
    return cases
