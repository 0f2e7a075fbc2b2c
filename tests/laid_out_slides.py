"""Drawn slides whose labels are known: how tissues lie, a needle, and how much of one kills.

Level 0 is 16 x 16 squares of 64 px, each cut from a drawn sheet of one tissue, so that a square
says nothing of its neighbours. Two tissues take equal parts, in halves or in patches; a third, rare
one stands in four neighbouring squares of every second slide; a fourth takes a share that the
hazard follows. The three are drawn independently.
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
SHEETS = 3
"""Drawn of each."""


@dataclass(frozen=True)
class LaidOut:
    """One slide's labels."""

    slide_id: str
    kind: str
    needle: bool
    share: float
    time: float
    event: bool


def write_laid_out(folder: Path, n: int, seed: int = 0, needle_side: int = 2) -> list[LaidOut]:
    """Writes n slides, and ``slides.csv`` beside their folder: slide, kind, needle, time, event.

    Args:
        folder: of the slides.
        n: how many.
        seed: of all that is drawn.
        needle_side: of the rare tissue, in squares.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sheets = [_squares(value, seed) for value in (PLAIN, OTHER, NEEDLE, DEADLY)]
    found = [_write(folder, at, sheets, seed, needle_side) for at in range(n)]
    lines = ["slide,kind,needle,time,event"]
    lines += [
        f"{s.slide_id},{s.kind},{'yes' if s.needle else 'no'},{s.time:.4f},{int(s.event)}"
        for s in found
    ]
    (folder.parent / "slides.csv").write_text("\n".join(lines) + "\n")
    return found


def _squares(value: int, seed: int) -> np.ndarray:
    """Squares of one tissue, uint8 [N, 64, 64, 3], all of one staining and scanner."""
    rng, look = np.random.default_rng([seed, value]), draw_look(np.random.default_rng(seed), "he")
    cells = SIDE * TILE_PX // TRUTH_DOWNSAMPLE
    whole, none = np.ones((cells, cells), np.bool_), np.zeros((cells, cells), np.bool_)
    squares = []
    for _ in range(SHEETS):
        layout = Layout(
            region=np.zeros((cells, cells), np.int32), classes=np.array([value]), tissue=whole,
            pen=none, blur=none, fold=none,
        )  # fmt: skip
        sheet = render(rng, layout, look, MPP)
        cut = sheet.reshape(SIDE, TILE_PX, SIDE, TILE_PX, 3).swapaxes(1, 2)
        squares.append(cut.reshape(-1, TILE_PX, TILE_PX, 3))
    return np.concatenate(squares)


def _write(folder: Path, at: int, sheets: list[np.ndarray], seed: int, needle_side: int) -> LaidOut:
    rng = np.random.default_rng([seed, at])
    kind, needle = ("halves", "patches")[at % 2], bool(at // 2 % 2)
    share = float(rng.uniform(0.0, 0.3))
    classes = np.where(tissue_map(kind, SIDE, rng) == 1, OTHER, PLAIN)
    _put(classes, DEADLY, round(share * SIDE**2), rng)
    if needle:
        x, y = rng.integers(1, SIDE - needle_side, 2)
        classes[y : y + needle_side, x : x + needle_side] = NEEDLE
    life = float(rng.exponential(1 / np.exp(14 * share)))
    lost = float(rng.exponential(1.5 / np.exp(2.1)))
    image = np.empty((SIDE, TILE_PX, SIDE, TILE_PX, 3), np.uint8)
    for (row, column), value in np.ndenumerate(classes):
        sheet = sheets[value - 1]
        image[row, :, column] = sheet[rng.integers(len(sheet))]
    side = SIDE * TILE_PX
    name = f"s{at:03d}"
    write_pyramid(
        folder / f"{name}.tiff", image.reshape(side, side, 3), mpp=MPP, description="drawn",
        quality=90,
    )  # fmt: skip
    return LaidOut(name, kind, needle, share, min(life, lost), life <= lost)


def _put(classes: np.ndarray, value: int, count: int, rng: np.random.Generator) -> None:
    """Gives `count` squares to a class, half of them from either tissue, one by one."""
    for tissue in (PLAIN, OTHER):
        own = np.flatnonzero(classes.ravel() == tissue)
        chosen = rng.choice(own, min(count // 2, len(own)), replace=False)
        classes.ravel()[chosen] = value
