"""Bytes that stand where an image should: each made from nothing, and small on disk."""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterable

import numpy as np
import simplejpeg
from hostile.folder import HEIGHT_PX, WIDTH_PX, pixels
from PIL import Image

EXECUTED = "executed"
"""The file, in the working folder, that appears when any of this is ever run."""

PNG_START = b"\x89PNG\r\n\x1a\n"


def pickled() -> bytes:
    """A pickle (protocol 0) that leaves `EXECUTED` when it is loaded."""
    return f"cposix\nsystem\n(S'touch {EXECUTED}'\ntR.".encode()


def script() -> bytes:
    """A Python program that leaves `EXECUTED`."""
    return f"import os\nos.system('touch {EXECUTED}')\n".encode()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width_px: int, height_px: int, depth: int = 8, colour: int = 2, laced: int = 0) -> bytes:
    """The IHDR of a PNG; colour 0 is grey, 2 RGB, 3 palette, 6 RGBA."""
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width_px, height_px, depth, colour, 0, 0, laced))


def rows(width_px: int = WIDTH_PX, height_px: int = HEIGHT_PX, bytes_a_pixel: int = 3) -> bytes:
    """A coded PNG of one grey, unfiltered."""
    return zlib.compress((b"\0" + bytes([90]) * (width_px * bytes_a_pixel)) * height_px)


def png(*chunks: bytes, head: bytes | None = None, data: bytes | None = None) -> bytes:
    """A PNG with further chunks before its pixels."""
    body = [PNG_START, header(WIDTH_PX, HEIGHT_PX) if head is None else head, *chunks]
    return b"".join([*body, chunk(b"IDAT", rows() if data is None else data), chunk(b"IEND", b"")])


def png_bomb() -> bytes:
    """60000 × 60000 pixels in a few hundred bytes."""
    return png(head=header(60000, 60000))


def png_text_bomb(kind: bytes = b"zTXt") -> bytes:
    """60 MB of text (or of a colour profile) compressed into 60 kB, before the pixels."""
    return png(chunk(kind, b"Comment\0\0" + zlib.compress(bytes(60_000_000))))


def png_long_data() -> bytes:
    """A header of 24 × 20 pixels and pixels for 40 MB behind it."""
    return png(data=zlib.compress(bytes(40_000_000)))


def png_broken_sum() -> bytes:
    """A checksum of IDAT that is wrong in one bit."""
    data = bytearray(png())
    data[-17] ^= 1  # IEND takes the last 12 bytes
    return bytes(data)


def png_palette_beyond() -> bytes:
    """A palette of one colour, and pixels that ask for the ninetieth."""
    head = header(WIDTH_PX, HEIGHT_PX, colour=3)
    return png(chunk(b"PLTE", b"\1\2\3"), head=head, data=rows(bytes_a_pixel=1))


def png_many_chunks(count: int = 20_000) -> bytes:
    """Empty chunks of text, by the thousand."""
    return png(*[chunk(b"tEXt", b"k\0")] * count)


def png_huge_chunk() -> bytes:
    """A chunk that says it is 2 GB long in a file of a few hundred bytes."""
    return png(struct.pack(">I", 0x7FFFFFFF) + b"tEXt" + b"k\0v")


def apng(frames: int = 1000) -> bytes:
    """An animation of one frame that says it has a thousand."""
    control = struct.pack(">IIIIIHHBB", 0, WIDTH_PX, HEIGHT_PX, 0, 0, 1, 1, 0, 0)
    return png(chunk(b"acTL", struct.pack(">II", frames, 0)), chunk(b"fcTL", control))


def pillow(mode: str, kind: str, **options: object) -> bytes:
    """Noise in a mode and a format of Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(pixels("a1")).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def png_deep() -> bytes:
    """16 bits a channel."""
    return png(head=header(WIDTH_PX, HEIGHT_PX, depth=16), data=rows(bytes_a_pixel=6))


def png_transparent() -> bytes:
    """Every pixel half transparent."""
    return png(head=header(WIDTH_PX, HEIGHT_PX, colour=6), data=rows(bytes_a_pixel=4))


def jpeg() -> bytes:
    """A sound one."""
    return bytes(simplejpeg.encode_jpeg(pixels("a1")))


def segment(marker: int, data: bytes) -> bytes:
    """A segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def with_segments(image: bytes, *segments: bytes) -> bytes:
    """A JPEG with segments behind its first marker."""
    return image[:2] + b"".join(segments) + image[2:]


def resized_header(width_px: int, height_px: int) -> bytes:
    """A sound JPEG whose frame says that it has another size."""
    image = bytearray(jpeg())
    at = image.index(b"\xff\xc0")
    image[at + 5 : at + 9] = struct.pack(">HH", height_px, width_px)
    return bytes(image)


def deep_jpeg() -> bytes:
    """A frame of 12 bits a channel."""
    image = bytearray(jpeg())
    image[image.index(b"\xff\xc0") + 4] = 12
    return bytes(image)


def many_scans(side_px: int) -> bytes:
    """A progressive JPEG of 883 lawful scans: few bytes for the file, a pass each for a decoder.

    One grey component; each of 63 coefficients is sent in 14 scans of one bit more each (ITU T.81,
    annex G), all of them runs of blocks without anything in them.
    """
    n_blocks = (side_px // 8) ** 2
    dc = segment(0xC4, b"\0" + bytes([1] + [0] * 15) + b"\0")  # "0": no difference
    symbols = [0xE0, *(power << 4 for power in range(14))]  # "0" for runs from 2^14 on, "1pppp"
    ac = segment(0xC4, b"\x10" + bytes([1, 0, 0, 0, 14] + [0] * 11) + bytes(symbols))
    frame = segment(0xC2, struct.pack(">BHHBBBB", 8, side_px, side_px, 1, 1, 0x11, 0))
    runs = _bits(_runs_of_nothing(n_blocks))
    scans = [_scan(0, 0, 0, 0) + _bits(["0" * n_blocks])]
    for coefficient in range(1, 64):
        scans.append(_scan(coefficient, coefficient, 0, 13) + runs)
        scans += [_scan(coefficient, coefficient, bit + 1, bit) + runs for bit in range(12, -1, -1)]
    table = segment(0xDB, b"\0" + bytes([1] * 64))
    return b"".join([b"\xff\xd8", table, frame, dc, ac, *scans, b"\xff\xd9"])


def _scan(first: int, last: int, high: int, low: int) -> bytes:
    return segment(0xDA, bytes([1, 1, 0, first, last, high << 4 | low]))


def _runs_of_nothing(n_blocks: int) -> Iterable[str]:
    """End-of-band runs over all blocks: the code of a power of two, then the rest in binary."""
    while n_blocks:
        power = min(n_blocks.bit_length() - 1, 14)
        length = min(n_blocks, 2 ** (power + 1) - 1)
        rest = f"{length - 2**power:0{power}b}" if power else ""
        yield ("0" if power == 14 else f"1{power:04b}") + rest
        n_blocks -= length


def _bits(parts: Iterable[str]) -> bytes:
    """Bits to bytes, filled up with ones, with a zero behind each 0xFF."""
    text = "".join(parts)
    text += "1" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")


def huge_metadata() -> bytes:
    """A sound JPEG with 6 MB of EXIF and comments before its pixels."""
    return with_segments(jpeg(), *[segment(0xE1, b"Exif\0\0" + bytes(65_000))] * 90)


def zip_bomb() -> bytes:
    """A zip of 50 MB of zeros."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.jpg", bytes(50_000_000))
    return buffer.getvalue()


def svg() -> bytes:
    """XML that names a file of the machine, and expands an entity many times."""
    return b"""<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "aaaaaaaaaa">
<!ENTITY x SYSTEM "file:///etc/passwd">]><svg><image href="file:///etc/passwd"/>&x;&a;</svg>"""


def large_png(side_px: int) -> bytes:
    """A square of one colour."""
    return png(head=header(side_px, side_px), data=rows(side_px, side_px))


def array_file() -> bytes:
    """A NumPy file of objects, which unpickles where that is allowed."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "|O", "fortran_order": False, "shape": (1,)}
    )
    return buffer.getvalue() + pickled()
