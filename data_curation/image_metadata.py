"""Takes EXIF, comments and texts out of JPEG and PNG files without touching a pixel.

What is left is what a decoder needs: the segments and chunks that say how to read the pixels.
"""

import struct

_KEPT_CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"sBIT"}
_PNG_START_BYTES = 8
_APP0, _APP14, _COMMENT, _START_OF_SCAN, _END = 0xE0, 0xEE, 0xFE, 0xDA, 0xD9
_JFIF_BYTES = 18  # marker, length and header; a thumbnail may follow
_NO_LENGTH = {0x01, *range(0xD0, 0xD9)}


def without_metadata(data: bytes, suffix: str) -> bytes:
    """`data` without anything that does not serve to decode its pixels.

    Args:
        data: a sound JPEG or PNG file.
        suffix: ``jpg`` or ``png``.
    """
    return _plain_jpeg(data) if suffix == "jpg" else _plain_png(data)


def _plain_png(data: bytes) -> bytes:
    kept, at = [data[:_PNG_START_BYTES]], _PNG_START_BYTES
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, end = data[at + 4 : at + 8], at + 12 + length
        if kind in _KEPT_CHUNKS:
            kept.append(data[at:end])
        at = end
        if kind == b"IEND":
            break
    return b"".join(kept)


def _plain_jpeg(data: bytes) -> bytes:
    """All segments but application data and comments; JFIF without thumbnail and Adobe's stay.

    Those two say in which colours the pixels are. After the end of the image nothing is kept.
    """
    kept, at = [data[:2]], 2
    while at + 2 <= len(data):
        if data[at + 1] == 0xFF:  # fill bytes before a marker
            at += 1
            continue
        marker = data[at + 1]
        if marker == _END:
            kept.append(data[at : at + 2])
            break
        length = 0 if marker in _NO_LENGTH else struct.unpack_from(">H", data, at + 2)[0]
        end = at + 2 + length
        if marker == _START_OF_SCAN:
            end = _end_of_scan(data, end)
        if marker == _APP0 and data[at + 4 : at + 9] == b"JFIF\0":
            header = data[at + 4 : at + _JFIF_BYTES - 2]
            kept.append(b"\xff\xe0\x00\x10" + header + b"\0\0")
        elif marker == _APP14 or not (_APP0 <= marker < 0xF0 or marker == _COMMENT):
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _end_of_scan(data: bytes, at: int) -> int:
    """Where the entropy-coded data that begin at `at` end: at a marker that is no restart."""
    while True:
        at = data.find(b"\xff", at)
        if at < 0 or at + 1 >= len(data):
            return len(data)
        if data[at + 1] == 0 or 0xD0 <= data[at + 1] <= 0xD7:
            at += 2
        elif data[at + 1] == 0xFF:
            at += 1
        else:
            return at
