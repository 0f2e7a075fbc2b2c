"""Lies of a TIFF's directories that a reader would turn into pixels, found before that.

A tile that is said to lie where the file's own header does is bytes read as colours; a picture with
fewer tiles than its size needs shows them in the wrong places. No reader can tell by the pixels.
"""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from eosin.data_curation.manifest import Status
from eosin.data_curation.slide_metadata import SlideError

MAX_PAGES = 1000
"""Directories that are looked at; a slide has some dozens."""
_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HEADER_BYTES = 8


def check_tiff_header(path: Path) -> None:
    """Refuses a TIFF that lies. What is no TIFF, or cannot be read, is left to OpenSlide to judge.

    Raises:
        SlideError: the directories contradict themselves in a way that would make up pixels.
    """
    import tifffile  # takes 0.15 s

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it minds, OpenSlide judges
    try:
        with path.open("rb") as file:
            if file.read(4) not in _MAGIC:
                return
        with tifffile.TiffFile(path) as tiff:
            pages = [(n, page) for n, page in zip(range(MAX_PAGES), tiff.pages, strict=False)]
            problems = [problem for n, page in pages if (problem := _problem(n, page))]
    except Exception:  # tifffile has many; what it cannot parse is not for it to refuse
        return
    if problems:
        raise SlideError(Status.UNREADABLE, problems[0])


def _problem(number: int, page: Any) -> str | None:
    """What is wrong with a tiled picture of the file."""
    page = page.aspage()
    if not page.is_tiled or min(page.tilewidth, page.tilelength) < 1:
        return None
    across = math.ceil(page.imagewidth / page.tilewidth)
    down = math.ceil(page.imagelength / page.tilelength)
    planes = page.samplesperpixel if page.planarconfig == 2 else 1
    needed, found = across * down * planes, len(page.dataoffsets)
    if found < needed:
        return (
            f"picture {number} of the file says {page.imagewidth}×{page.imagelength} px, which is "
            f"{needed} tiles, but lists {found}: they would be shown in wrong places"
        )
    offsets, counts = np.array(page.dataoffsets), np.array(page.databytecounts[:found])
    astray = int(((offsets[: len(counts)] < _HEADER_BYTES) & (counts > 0)).sum())
    if astray:
        return f"picture {number} of the file has {astray} tiles that lie where its header is"
    return None
