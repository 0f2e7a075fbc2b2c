"""Encoded tiles: JPEG and PNG, strictly decoded, and nothing else.

A tile that decodes only "somehow" (truncated, with a broken stream) would be trained on as grey
bands, so every warning of the decoder is an error here. The pixels of an existing image are never
encoded again; `image_metadata` takes EXIF and comments out.
"""

import io
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile

from eosin.configs.errors import EosinError

MAX_PIXELS = 1 << 26
"""Pixels that a tile image may have (8192 × 8192); more is taken for a decompression bomb."""

MAX_BYTES = 4 * MAX_PIXELS
"""Bytes that an encoded tile image may have: 8-bit RGBA without any compression."""

FACTORS = (1, 2, 4, 8)
"""Scales 1/f at which a tile can be decoded."""

MAX_SCANS = 100
"""Scans of a JPEG; each is a pass over the whole image, however few its bytes."""

_JPEG_START = b"\xff\xd8\xff"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_SCAN = b"\xff\xda"
_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA"}
_METADATA = {"exif", "comment", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}


class ImageError(EosinError):
    """An image that cannot be used as a tile; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class EncodedTile:
    """The bytes of one tile image and what is known of them after a full decode."""

    data: bytes
    suffix: str
    """``jpg`` or ``png``, by the content."""
    width_px: int
    height_px: int
    has_metadata: bool
    """Whether EXIF, XMP, text or a comment is inside: a place where names of patients hide."""


def encode_tile(pixels: NDArray[np.uint8], quality: int) -> EncodedTile:
    """Encodes RGB `pixels` [H, W, 3] as baseline JPEG 4:4:4.

    Chroma keeps its full resolution: in stained tissue the colour is the signal.
    """
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "444")
    height, width = pixels.shape[:2]
    return EncodedTile(
        data=data, suffix="jpg", width_px=width, height_px=height, has_metadata=False
    )


def inspect_image(data: bytes) -> EncodedTile:
    """Decodes an image file's content completely and returns it with its facts.

    Raises:
        ImageError: neither JPEG nor PNG, damaged, beyond `MAX_PIXELS`, deeper than 8 bits, or
            partly transparent.
    """
    suffix = image_suffix(data)
    pixels = decode_image(data, suffix)
    height, width = pixels.shape[:2]
    with _open(data, suffix) as image:
        has_metadata = bool(_METADATA & image.info.keys() or getattr(image, "text", None))
    return EncodedTile(
        data=data, suffix=suffix, width_px=width, height_px=height, has_metadata=has_metadata
    )


def image_suffix(data: bytes) -> str:
    """``jpg`` or ``png``, from the first bytes.

    Raises:
        ImageError: it is neither.
    """
    if data.startswith(_JPEG_START):
        return "jpg"
    if data.startswith(_PNG_START):
        return "png"
    raise ImageError("neither a JPEG nor a PNG" if data else "an empty file")


def decode_image(
    data: bytes, suffix: str, factor: int = 1, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Decodes an encoded tile to RGB, uint8 [H, W, 3], where H and W are ceil(full / factor).

    Args:
        data: the encoded image.
        suffix: ``jpg`` or ``png``, as in the index.
        factor: 1, 2, 4 or 8. A JPEG is decoded at this scale from the low frequencies of its
            blocks (libjpeg's DCT scaling), anything else whole and then averaged in boxes.
        out: uint8 [H', W', 3] with H' ≥ H and W' ≥ W: the upper left corner is written to, without
            a copy where it is [H, W, 3] and contiguous; what is returned is a view of it.

    Raises:
        ImageError: the image is damaged, beyond `MAX_PIXELS`, deeper than 8 bits, partly
            transparent, of another suffix, or larger than `out`.
    """
    if suffix == "jpg":
        return _decode_jpeg(data, factor, out)
    if suffix == "png":
        return reduce_pixels(_decode_png(data), factor, out)
    raise ImageError(f"'{suffix}' is no kind of tile image")


def reduce_pixels(
    pixels: NDArray[np.uint8], factor: int, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """RGB `pixels` averaged in boxes of `factor` × `factor`, cut at the right and lower edge.

    Args:
        pixels: uint8 [H, W, 3].
        factor: see `decode_image`.
        out: likewise.

    Raises:
        ImageError: the result is larger than `out`.
    """
    _check_factor(factor)
    if factor > 1:
        pixels = np.asarray(Image.fromarray(pixels).reduce(factor))
    if out is None:
        return pixels
    corner = _corner(out, *pixels.shape[:2])
    corner[...] = pixels
    return corner


def _decode_jpeg(data: bytes, factor: int, out: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    _check_factor(factor)
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        scans = data.count(_SCAN)
        if scans > MAX_SCANS:
            raise ImageError(f"JPEG of {scans} scans; a tile has at most {MAX_SCANS}")
        if colours in ("CMYK", "YCCK"):
            raise ImageError(f"JPEG in {colours}, a printer's colours without a defined RGB")
        # The decoder takes the smallest of its scales that is no smaller than asked.
        height, width = -(-height // factor), -(-width // factor)
        scale = {"min_height": height, "min_width": width, "min_factor": factor}
        if out is None:
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", strict=True, **scale)
            return pixels
        corner = _corner(out, height, width)
        if corner.flags.c_contiguous:
            simplejpeg.decode_jpeg(data, "RGB", strict=True, buffer=corner, **scale)
        else:
            corner[...] = simplejpeg.decode_jpeg(data, "RGB", strict=True, **scale)
    except ValueError as error:
        raise ImageError(f"damaged JPEG: {error}") from error
    return corner


def _corner(out: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    if out.shape[0] < height or out.shape[1] < width:
        raise ImageError(
            f"{width}×{height} pixels where {out.shape[1]}×{out.shape[0]} were expected"
        )
    return out[:height, :width]


def _check_factor(factor: int) -> None:
    if factor not in FACTORS:
        raise ValueError(f"factor must be one of {FACTORS}, not {factor}")


def _decode_png(data: bytes) -> NDArray[np.uint8]:
    with _open(data, "png") as image:
        if image.mode not in _PNG_MODES:
            raise ImageError(f"PNG of mode {image.mode}; a tile has 8 bits a channel")
        try:
            image.load()
            if image.has_transparency_data:
                image = image.convert("RGBA")
                if image.getextrema()[3][0] < 255:
                    raise ImageError("PNG with transparent pixels, which have no colour")
            return np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise ImageError(f"damaged PNG: {error}") from error


def _open(data: bytes, suffix: str) -> Any:
    """A lazily opened Pillow image, of this one format and bounded size."""
    try:
        if suffix == "png":
            # Before Pillow sees it: its own bound is a warning, and far above a tile.
            width, height, depth = struct.unpack_from(">IIB", data, 16)
            _check_size(width, height)
            if depth > 8:  # Pillow would drop the lower half of each value without a word
                raise ImageError(f"PNG of {depth} bits a channel; a tile has 8 bits")
        image: ImageFile.ImageFile = Image.open(
            io.BytesIO(data), formats=["PNG" if suffix == "png" else "JPEG"]
        )
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise ImageError(f"damaged {suffix.upper()}: {error}") from error
    return image


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise ImageError(f"{width}×{height} pixels; a tile has 1 to {MAX_PIXELS}")
