"""The look of every picture: one style, colours told apart by colour-blind readers, same bytes.

A picture is a PNG whose bytes depend on what it shows and on nothing else (no date, no version).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eosin.launch.artefacts import replacing

DPI = 192
"""Of every picture: two pixels to a CSS pixel, so that text is crisp; stated in the PNG."""
PAGE_PX = 2160
"""Width of a picture that fills the page."""

INK = "#26222f"
MUTED = "#6a6674"
HAIRLINE = "#e3e0e8"
HAEMATOXYLIN = "#3d3a8f"
EOSIN = "#c8557f"
STONE = "#aaa6b2"

_STYLE: dict[str, object] = {
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called "$x$"
    "axes.edgecolor": STONE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "grid.color": HAIRLINE,
    "grid.linewidth": 0.7,
    "xtick.color": STONE,
    "xtick.labelcolor": MUTED,
    "xtick.labelsize": 8.0,
    "ytick.color": STONE,
    "ytick.labelcolor": MUTED,
    "ytick.labelsize": 8.0,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
}


@contextmanager
def drawing(path: Path, width_px: int, height_px: int) -> Iterator[Figure]:
    """Yields an empty figure of that size in the house style; on leaving, writes it to `path`.

    The user's own matplotlib settings play no part, and none are changed for the caller.
    """
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(width_px / DPI, height_px / DPI), dpi=DPI)
        FigureCanvasAgg(figure)
        yield figure
        with replacing(path) as partial:
            figure.savefig(partial, format="png", metadata={"Software": None})


def shortened(text: str, limit: int) -> str:
    """`text` on one line of at most `limit` characters, an ellipsis standing for the rest."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"
