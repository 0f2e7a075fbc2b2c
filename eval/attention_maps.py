"""Where a head looks: attention as a table, and as a mosaic of a slide's tiles."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.colors import LinearSegmentedColormap

from eosin.eval.heads.training import Bag
from eosin.eval.report import Picture
from eosin.launch.artefacts import replacing
from eosin.launch.pictures import HAEMATOXYLIN, drawing, shortened


def write_attention(
    bags: Sequence[Bag],
    weights: Sequence[npt.NDArray[np.float32]],
    out: Path,
    stem: str,
    most: int,
    caption: str,
) -> list[Picture]:
    """Writes ``attention/STEM.parquet`` and a picture of some slides.

    Args:
        bags: of S slides.
        weights: of their tiles, [N] each, which sum to 1.
        out: folder of the evaluation.
        stem: of both files.
        most: slides that are drawn.
        caption: whose attention it is.
    """
    cells = np.concatenate([bag.cells for bag in bags])
    table = pa.table(
        {
            "slide_id": [bag.slide_id for bag in bags for _ in range(len(bag.cells))],
            "column": cells[:, 0],
            "row": cells[:, 1],
            "weight": np.concatenate(weights),
        }
    )
    path = out / "attention" / f"{stem}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        pq.write_table(table, partial, compression="zstd")
    if not most:
        return []
    picture = out / "figures" / f"attention-{stem}.png"
    draw_attention(bags[:most], weights[:most], picture)
    return [Picture(path=picture, caption=caption)]


def draw_attention(
    bags: Sequence[Bag], weights: Sequence[npt.NDArray[np.float32]], path: Path
) -> None:
    """Draws the tiles of slides at their places, the darker the higher their rank in the slide."""
    colours = LinearSegmentedColormap.from_list("haematoxylin", ["#efecf5", HAEMATOXYLIN])
    shades = colours.with_extremes(bad="white")
    with drawing(path, 520 * len(bags), 560) as figure:
        figure.set_layout_engine("constrained")
        row = figure.subplots(1, len(bags), squeeze=False)[0]
        for axes, bag, of_bag in zip(row, bags, weights, strict=True):
            columns, rows = bag.cells.max(axis=0) + 1
            image = np.full((rows, columns), np.nan)
            ranks = np.argsort(np.argsort(of_bag, kind="stable"), kind="stable")
            image[bag.cells[:, 1], bag.cells[:, 0]] = ranks / max(len(ranks) - 1, 1)
            axes.imshow(image, cmap=shades, vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(shortened(bag.slide_id, 26), fontsize=8.5)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
