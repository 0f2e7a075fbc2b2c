"""Small tables of a curated set, made up, for tests of what works on tables alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from eosin.data_curation.manifest import CLUSTERS, SLIDES, TILES, make_tile_id, write_table
from eosin.launch.artefacts import mark_done


def write_tables(
    folder: Path,
    tiles_of: dict[str, int],
    slide_columns: dict[str, dict[str, str]] | None = None,
    tile_columns: dict[str, Any] | None = None,
) -> list[str]:
    """Writes slides.parquet and tiles.parquet; the ids of the tiles, in their order.

    Args:
        folder: made where it is missing.
        tiles_of: slides by name, with the number of their tiles; ``p-s`` is of the patient ``p``.
        slide_columns: further columns of slides, by slide.
        tile_columns: columns of tiles in place of the made-up ones, N values each.
    """
    names = sorted(tiles_of)
    slides: dict[str, Any] = {f.name: pa.nulls(len(names), f.type) for f in SLIDES}
    slides |= {"slide_id": names, "path": [f"{name}.tiff" for name in names]}
    slides |= {"group": [name.split("-")[0] for name in names]}
    for name in ("n_cells", "n_ok"):
        slides[name] = [tiles_of[slide] for slide in names]
    slides |= {"n_unreadable": [0] * len(names), "status": ["ok"] * len(names)}
    slides |= {"reason": [""] * len(names)}
    table = pa.table({n: pa.array(v, SLIDES.field(n).type) for n, v in slides.items()})
    for column, values in (slide_columns or {}).items():
        table = table.append_column(column, pa.array([values.get(s) for s in names], pa.string()))
    write_table(table, folder / "slides.parquet", SLIDES)

    slide = [name for name in names for _ in range(tiles_of[name])]
    place = [i for name in names for i in range(tiles_of[name])]
    n = len(slide)
    columns: dict[str, Any] = {f.name: pa.nulls(n, f.type) for f in TILES}
    columns |= {
        "tile_id": [
            make_tile_id(s, 256 * (i % 100), 256 * (i // 100), 0.5)
            for s, i in zip(slide, place, strict=True)
        ],
        "slide_id": slide,
        "group": [s.split("-")[0] for s in slide],
        "column": [i % 100 for i in place],
        "row": [i // 100 for i in place],
        "level0_x": [256.0 * (i % 100) for i in place],
        "level0_y": [256.0 * (i // 100) for i in place],
        "size_px": [256] * n,
        "requested_mpp": [0.5] * n,
        "effective_mpp_x": [0.5] * n,
        "effective_mpp_y": [0.5] * n,
        "tissue_fraction": np.ones(n, np.float32),
        "status": ["ok"] * n,
        "reason": [""] * n,
    }  # fmt: skip
    columns |= {k: v for k, v in (tile_columns or {}).items() if k in TILES.names}
    tiles = pa.table({f.name: pa.array(columns[f.name], f.type) for f in TILES})
    for column, values in (tile_columns or {}).items():
        if column not in TILES.names:
            tiles = tiles.append_column(column, pa.array(values))
    write_table(tiles, folder / "tiles.parquet", TILES)
    return list(columns["tile_id"])


def write_clusters(
    folder: Path, ids: list[str], level_1: list[int], stamp: str = "clusters", **more: Any
) -> None:
    """Writes clusters.parquet and its marker, of the tiles `ids`."""
    table = pa.table(
        {
            "tile_id": ids,
            "slide_id": [name.split("_")[0] for name in ids],
            "level_1": pa.array(level_1, pa.int32()),
            "distance": pa.array(more.pop("distance", np.arange(len(ids)) % 7), pa.float32()),
        }
    )
    for name, values in more.items():
        kind = pa.float32() if "distance" in name else pa.int32()
        table = table.append_column(name, pa.array(values, kind))
    write_table(table, folder / "clusters.parquet", CLUSTERS)
    mark_done(folder / "clusters.json", stamp)
