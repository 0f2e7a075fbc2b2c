"""Drawn slides whose labels are known: how tissues lie, a needle, and how much of one kills.

Level 0 is 16 x 16 squares of 64 px. Two tissues take equal parts of it, in halves or in patches; a
third, rare one stands in four neighbouring squares of every second slide; a fourth takes a share
that the hazard follows. The three are drawn independently.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from slide_bags import tissue_map

from eosin.data_curation.pyramid import write_pyramid
from eosin.data_curation.synthetic_layout import TRUTH_DOWNSAMPLE, Layout
from eosin.data_curation.synthetic_section import draw_look, render

SIDE, TILE_PX, MPP = 16, 64, 0.5
PLAIN, OTHER, NEEDLE, DEADLY = 1, 2, 3, 4
"""Classes of `synthetic_tissue.PAINTERS`, from 1."""


@dataclass(frozen=True)
class LaidOut:
    """One slide's labels."""

    slide_id: str
    kind: str
    needle: bool
    share: float
    time: float
    event: bool


def write_laid_out(folder: Path, n: int, seed: int = 0) -> list[LaidOut]:
    """Writes n slides, and ``slides.csv`` with slide, kind, needle, os_time and os_event."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [_write(folder, at, seed) for at in range(n)]
    lines = ["slide,kind,needle,os_time,os_event"]
    lines += [
        f"{s.slide_id},{s.kind},{'yes' if s.needle else 'no'},{s.time:.4f},{int(s.event)}"
        for s in found
    ]
    (folder.parent / "slides.csv").write_text("\n".join(lines) + "\n")
    return found


def _write(folder: Path, at: int, seed: int) -> LaidOut:
    rng = np.random.default_rng([seed, at])
    kind, needle = ("halves", "patches")[at % 2], bool(at // 2 % 2)
    share = float(rng.uniform(0.0, 0.3))
    classes = np.where(tissue_map(kind, SIDE, rng) == 1, OTHER, PLAIN)
    _put(classes, DEADLY, round(share * SIDE**2), rng)
    if needle:
        x, y = rng.integers(1, SIDE - 2, 2)
        classes[y : y + 2, x : x + 2] = NEEDLE
    life = float(rng.exponential(1 / np.exp(14 * share)))
    lost = float(rng.exponential(1.5 / np.exp(2.1)))
    region = np.kron(classes - 1, np.ones((TILE_PX // TRUTH_DOWNSAMPLE,) * 2, np.int32))
    none = np.zeros(region.shape, np.bool_)
    layout = Layout(
        region=region.astype(np.int32), classes=np.arange(1, 5), tissue=~none, pen=none, blur=none,
        fold=none,
    )  # fmt: skip
    look = draw_look(
        np.random.default_rng(seed), "he"
    )  # one for all: no slide is told by its stain
    image = render(rng, layout, look, MPP)
    name = f"s{at:03d}"
    write_pyramid(folder / f"{name}.tiff", image, mpp=MPP, description="drawn", quality=90)
    return LaidOut(name, kind, needle, share, min(life, lost), life <= lost)


def _put(classes: np.ndarray, value: int, count: int, rng: np.random.Generator) -> None:
    """Gives `count` squares to a class, half of them from either tissue, one by one."""
    for tissue in (PLAIN, OTHER):
        own = np.flatnonzero(classes.ravel() == tissue)
        chosen = rng.choice(own, min(count // 2, len(own)), replace=False)
        classes.ravel()[chosen] = value
