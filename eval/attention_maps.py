"""Where a head looks, or what tiles say: a table, and pictures on the slide or as a mosaic.

A map is a head's weights of a slide's tiles, or, where its verdict is the mean of what its tiles
say, the probabilities of classes by each. Legend: N tiles of a slide, C classes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap
from scipy.stats import rankdata

from eosin.eval.heads.training import Bag
from eosin.eval.report import Picture
from eosin.eval.slide_view import SlideView, lay_over
from eosin.launch.artefacts import replacing
from eosin.launch.pictures import HAEMATOXYLIN, PAGE_PX, drawing, shortened

Weights = npt.NDArray[np.float32]
SHOWN = 8
"""Heaviest tiles that are shown beside a slide."""


def write_attention(
    bags: Sequence[Bag],
    weights: Sequence[Weights],
    out: Path,
    stem: str,
    most: int,
    caption: str,
    views: Sequence[SlideView] = (),
) -> list[Picture]:
    """Writes ``attention/STEM.parquet`` and pictures of some slides.

    Args:
        bags: of S slides.
        weights: the map of each: weights [N], which sum to 1, or probabilities [N, C].
        out: folder of the evaluation.
        stem: of the files.
        most: slides that are drawn.
        caption: whose attention it is.
        views: of the slides that are drawn instead, each of one of the bags; where there are none,
            tiles stand in a mosaic.
    """
    cells = np.concatenate([bag.cells for bag in bags])
    table = pa.table(
        {
            "slide_id": [bag.slide_id for bag in bags for _ in range(len(bag.cells))],
            "tile_id": [tile_id for bag in bags for tile_id in bag.tile_ids],
            "column": cells[:, 0],
            "row": cells[:, 1],
            **_columns(np.concatenate(weights)),
        }
    )
    weights = [shown_of(of_bag) for of_bag in weights]
    path = out / "attention" / f"{stem}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        pq.write_table(table, partial, compression="zstd")
    if not most:
        return []
    if not views:
        picture = out / "figures" / f"attention-{stem}.png"
        draw_mosaic(bags[:most], weights[:most], picture)
        return [Picture(path=picture, caption=caption)]
    pictures = []
    rows = {bag.slide_id: row for row, bag in enumerate(bags)}
    for view in views:
        bag, of_bag = bags[rows[view.slide_id]], weights[rows[view.slide_id]]
        picture = out / "figures" / f"attention-{stem}-{bag.slide_id}.png"
        draw_on_slide(view, bag.tile_ids, of_bag, picture)
        pictures.append(Picture(path=picture, caption=f"{caption}: {bag.slide_id}"))
    return pictures


def _columns(maps: Weights) -> dict[str, Weights]:
    if maps.ndim == 1:
        return {"weight": maps}
    return {f"probability_{label}": maps[:, label] for label in range(maps.shape[1])}


def shown_of(of_bag: Weights) -> Weights:
    """What is drawn of a map: the weights, or the probability of the slide's likeliest class."""
    return of_bag if of_bag.ndim == 1 else of_bag[:, int(of_bag.mean(axis=0).argmax())]


def ranks_of(weights: Weights) -> npt.NDArray[np.float64]:
    """Each weight's rank among those of its slide, from 0 to 1; equal ones have equal ranks."""
    ranks = rankdata(weights, method="average") - 1
    found: npt.NDArray[np.float64] = ranks / max(len(ranks) - 1, 1)
    return found


def draw_on_slide(view: SlideView, tile_ids: Sequence[str], weights: Weights, path: Path) -> None:
    """Draws a slide, the ranks of its tiles over it, and its heaviest tiles with their shares."""
    overview, corner, mpp = view.overview()
    boxes = view.boxes(tile_ids, corner, mpp)
    colours = colormaps["cividis"](ranks_of(weights))[:, :3]
    laid = lay_over(overview, boxes, (colours * 255).round().astype(np.uint8))
    heaviest = np.argsort(-weights, kind="stable")[:SHOWN]
    tiles = view.read([tile_ids[i] for i in heaviest])
    tall = overview.shape[0] / overview.shape[1] * PAGE_PX / 2
    with drawing(path, PAGE_PX, round(tall + PAGE_PX / SHOWN + 160)) as figure:
        figure.set_layout_engine("constrained")
        heights = [tall + 60, PAGE_PX / SHOWN + 60]
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, image, title in zip(
            above.subplots(1, 2),
            (overview, laid),
            (shortened(view.slide_id, 60), f"{len(tile_ids)} tiles: yellow weighs most"),
            strict=True,
        ):
            axes.imshow(image)
            axes.set_title(title, fontsize=8.5)
            axes.set_axis_off()
        for left, top, right, bottom in boxes[heaviest]:
            above.axes[0].plot(
                [left, right, right, left, left], [top, top, bottom, bottom, top],
                color=HAEMATOXYLIN, linewidth=1.2,
            )  # fmt: skip
        for axes, place in zip(below.subplots(1, SHOWN), range(SHOWN), strict=True):
            axes.set_axis_off()
            if place < len(tiles):
                axes.imshow(tiles[place])
                over = float(weights[heaviest[place]] / weights.mean())
                axes.set_title(f"{over:.2g}× the mean", fontsize=8)


def draw_mosaic(bags: Sequence[Bag], weights: Sequence[Weights], path: Path) -> None:
    """Draws the tiles of slides at their places, the darker the higher their rank in the slide."""
    colours = LinearSegmentedColormap.from_list("haematoxylin", ["#efecf5", HAEMATOXYLIN])
    shades = colours.with_extremes(bad="white")
    with drawing(path, 520 * len(bags), 560) as figure:
        figure.set_layout_engine("constrained")
        row = figure.subplots(1, len(bags), squeeze=False)[0]
        for axes, bag, of_bag in zip(row, bags, weights, strict=True):
            columns, rows = bag.cells.max(axis=0) + 1
            image = np.full((rows, columns), np.nan)
            image[bag.cells[:, 1], bag.cells[:, 0]] = ranks_of(of_bag)
            axes.imshow(image, cmap=shades, vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(shortened(bag.slide_id, 26), fontsize=8.5)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
