"""A sheet of tiles and their crops as the network sees them: look at it before a long run."""

import math
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from eosin.configs.errors import EosinError
from eosin.data_curation.shard_reader import RecordError, ShardReader
from eosin.launch.artefacts import replacing
from eosin.pretrain.order import locate
from eosin.pretrain.render import render_view
from eosin.pretrain.steps import BatchPlan, Steps
from eosin.pretrain.views import View, decode_factor, draw_views

MAX_LOCALS = 6
"""Local crops that are shown of each tile."""

TILES = 8
"""Tiles that are shown."""

MAX_DAMAGED = 100
"""Tiles that may be damaged before the preview gives up."""

CELL_INCH = 1.55
"""Side of a picture; at `DPI`, a global crop of 224 px is shown at about its own size."""

CAPTION_INCH = 0.6
LEGEND = (
    "µm/px: scale of the crop (×: pixels of the tile to one of the crop) · "
    "HED: factors of haematoxylin, eosin and DAB, then shifts\n"
    "template: means they are moved to · b brightness, c contrast, s saturation (factors), h hue"
)
DPI = 144


class Shown(NamedTuple):
    """One row of the sheet."""

    tile: NDArray[np.uint8]
    mpp: float
    """µm per pixel of the tile; NaN where it is unknown."""
    views: list[View]
    crops: list[NDArray[np.uint8]]


def preview(reader: ShardReader, plan: BatchPlan, path: Path, n: int = TILES) -> None:
    """Draws the first tiles of the training, a row each: the tile, its global and local crops.

    They are crops that the training takes, with what was drawn for each beneath them; damaged tiles
    are passed over. With several resolutions each row is cut as another step would cut it, so that
    all of them come up.

    Args:
        reader: of the shards.
        plan: of the batches.
        path: the PNG to write. Equal arguments give equal bytes.
        n: tiles.

    Raises:
        EosinError: no tile can be read.
    """
    shown = first_tiles(reader, plan, n)
    n_views = len(shown[0].views)
    n_global = plan.augment.n_global
    size = (CELL_INCH * (1 + n_views), (CELL_INCH + CAPTION_INCH) * len(shown) + 0.35)
    figure = Figure(figsize=size, dpi=DPI)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02)
    grid = figure.subplots(len(shown), 1 + n_views, squeeze=False)
    titles = ["tile", *(f"global {k + 1}" for k in range(n_global))]
    titles += [f"local {k + 1}" for k in range(n_views - n_global)]
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=8)
    for (tile, mpp, views, crops), row in zip(shown, grid, strict=True):
        height_px, width_px = tile.shape[:2]
        scale = "" if math.isnan(mpp) else f"\n{mpp:g} µm/px"
        _show(row[0], tile, f"{width_px} × {height_px} px{scale}")
        for view, crop, axes in zip(views, crops, row[1:], strict=True):
            _show(axes, crop, describe(view, mpp))
    figure.supxlabel(LEGEND, fontsize=6.5)
    with replacing(path) as partial:
        figure.savefig(partial, format="png")


def first_tiles(reader: ShardReader, plan: BatchPlan, n: int) -> list[Shown]:
    """The first whole tiles in the order of the training, with their crops."""
    steps = Steps(reader, replace(plan, rank=0, world=1))
    shown: list[Shown] = []
    problems: list[str] = []
    for place in count():
        if len(shown) == n or place == steps.order.n or len(problems) == MAX_DAMAGED:
            break
        # A place stands in the step that the training takes it in; with several resolutions a row
        # is shown as its own step would cut it.
        step = place if plan.augment.resolutions else place // plan.batch_size
        augment = plan.augment_of(step)
        epochs, positions = locate(place, 1, steps.order.n)
        row = int(steps.rows_at(0, positions)[0])
        indexed = np.array([row])
        mpp, hw = reader.index.mpp(indexed), reader.index.hw(indexed)
        drawn = draw_views(augment, plan.seed, epochs, positions, hw, mpp)
        factor = int(decode_factor(augment, drawn)[0])
        try:
            tile, decoded = reader.image(row), reader.image(row, factor)
        except RecordError as error:
            problems.append(str(error))
            continue
        wanted = augment.n_global + min(augment.n_local, MAX_LOCALS)
        views = drawn.of_tile(0, augment.sizes_px)[:wanted]
        crops = [render_view(decoded, view, factor) for view in views]
        shown.append(Shown(tile, float(mpp[0]), views, crops))
    if not shown:
        raise EosinError(f"no tile can be shown: {problems[0]}")
    return shown


def describe(view: View, mpp: float) -> str:
    """What was done, in short lines: geometry and sharpness, stains, colour."""
    shrunk = math.sqrt(view.width_px * view.height_px) / view.size_px
    first = [f"×{shrunk:.2f}" if math.isnan(mpp) else f"{mpp * shrunk:.2f} µm/px"]
    if view.flip:
        first.append("flip")
    if view.quarter_turns:
        first.append(f"{90 * view.quarter_turns}°")
    if view.blur_sigma_px:
        first.append(f"blur {view.blur_sigma_px:.1f}")
    stains = [_triple("template", view.stain_mean)] if view.stain else []
    if view.hed:
        stains += [_triple("HED ×", view.hed_factor), _triple("HED", view.hed_shift, "+.2f")]
    colours = []
    if view.jitter:
        colours.append(f"b{view.brightness:.2f} c{view.contrast:.2f}")
        if not view.grey:
            colours.append(f"s{view.saturation:.2f} h{360 * view.hue_turns:+.0f}°")
    if view.grey:
        colours.append("grey")
    if view.solarize:
        colours.append("solarized")
    return "\n".join((" · ".join(first), *stains, " ".join(colours) or "no jitter"))


def _triple(name: str, values: tuple[float, float, float], form: str = ".2f") -> str:
    return f"{name} " + " ".join(format(value, form) for value in values)


def _show(axes: Axes, image: NDArray[np.uint8], caption: str) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_xlabel(caption, fontsize=5.5, labelpad=2)
    axes.set_xticks([])
    axes.set_yticks([])
