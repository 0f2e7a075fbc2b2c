"""A sheet of tiles and their crops as the network sees them: look at it before a long run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from eosin.launch.artefacts import replacing
from eosin.pretrain.augment import AugmentConfig, View, draw_view, render_view

MAX_LOCALS = 6
"""Local crops that are shown of each tile."""

CELL_INCH = 1.55
"""Side of a picture; at `DPI`, a global crop of 224 px is shown at about its own size."""

DPI = 144


def preview_sheet(
    tiles: Sequence[NDArray[np.uint8]],
    config: AugmentConfig,
    seed: int,
    path: Path,
    n: int = 6,
) -> None:
    """Draws the first `n` tiles, a row each: the tile, its global crops, its local crops.

    The crops are those of the first epoch if the tiles stood at positions 0, 1, …; beneath each
    stands what was drawn for it.

    Args:
        tiles: RGB, uint8 [H, W, 3], of any sizes.
        config: the augmentation to show.
        seed: of the crops.
        path: the PNG to write. Equal arguments give equal bytes.
        n: rows at most.
    """
    shown = list(tiles[:n])
    n_views = config.n_global + min(config.n_local, MAX_LOCALS)
    figure = Figure(
        figsize=(CELL_INCH * (1 + n_views), (CELL_INCH + 0.35) * len(shown) + 0.35), dpi=DPI
    )
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02)
    grid = figure.subplots(len(shown), 1 + n_views, squeeze=False)
    titles = ["tile", "global 1", "global 2", *(f"local {k + 1}" for k in range(n_views - 2))]
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=8)
    for position, (tile, row) in enumerate(zip(shown, grid, strict=True)):
        height_px, width_px = tile.shape[:2]
        _show(row[0], tile, f"{width_px} × {height_px} px")
        for index, axes in enumerate(row[1:]):
            view = draw_view(config, seed, 0, position, index, (height_px, width_px))
            _show(axes, render_view(tile, view), _describe(view, height_px * width_px))
    with replacing(path) as partial:
        figure.savefig(partial, format="png")


def _show(axes: Axes, image: NDArray[np.uint8], caption: str) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_xlabel(caption, fontsize=6, labelpad=2)
    axes.set_xticks([])
    axes.set_yticks([])


def _describe(view: View, tile_area_px: int) -> str:
    """What was done, in two short lines: geometry and sharpness, then colour."""
    area = view.width_px * view.height_px / tile_area_px
    first = [f"{area:.0%}"]
    if view.flip:
        first.append("flip")
    if view.quarter_turns:
        first.append(f"{90 * view.quarter_turns}°")
    if view.blur_sigma_px:
        first.append(f"blur {view.blur_sigma_px:.1f}")
    named = (
        ("stain", view.hed),
        ("colour", view.jitter),
        ("grey", view.grey),
        ("solarized", view.solarize),
    )
    second = [name for name, applied in named if applied]
    return " · ".join(first) + "\n" + (" · ".join(second) or "own colour")
