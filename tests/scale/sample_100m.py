"""Draws 10 million of 100 million made-up tiles by four strata and two caps.

Run by `make scale`; ends with 1 where a bound is broken. It takes some minutes, most of them to
write the table.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eosin.data_curation.manifest import (
    SELECTION,
    SLIDES,
    TILES,
    full_schema,
    open_table,
    write_table,
)
from eosin.data_curation.sample import SampleConfig, sample

SECONDS, MEMORY_GB = 180.0, 8.0
"""Bounds: of the draw, and of its peak of memory."""
TREE = ["organ", "stain", "site", "scanner"]
CAPS = {"slide_id": 400, "group": 4000}
COLUMNS = 40  # of a slide's grid


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slides", type=int, default=100_000)
    parser.add_argument("--tiles", type=int, default=1000, help="of a slide")
    parser.add_argument("--measure", type=Path, help="a folder that was written before")
    options = parser.parse_args()
    if options.measure is not None:
        return measure(options.measure)
    with tempfile.TemporaryDirectory() as name:
        started = time.monotonic()
        write(Path(name), options.slides, options.tiles)
        size = (Path(name) / "tiles.parquet").stat().st_size
        print(f"written in {time.monotonic() - started:.0f} s: {size / 1e9:.1f} GB", flush=True)
        # Of its own, so that its peak of memory is that of the draw.
        command = [sys.executable, __file__, "--measure", name]
        return subprocess.run(command, check=False).returncode


def write(folder: Path, n_slides: int, n_tiles: int) -> None:
    """slides.parquet and tiles.parquet, values of unequal frequency."""
    rng = np.random.default_rng(0)
    names = [f"slide{number:07d}" for number in range(n_slides)]
    patient = np.minimum(rng.geometric(30 / n_slides, n_slides), n_slides // 2)

    def of(values: int, name: str) -> list[str]:
        share = 1 / np.arange(1, values + 1)
        return [f"{name}{v}" for v in rng.choice(values, n_slides, p=share / share.sum())]

    slides = {field.name: pa.nulls(n_slides, field.type) for field in SLIDES}
    slides |= {"slide_id": names, "path": names, "group": [f"p{number}" for number in patient]}
    slides |= {"stain": of(4, "stain"), "scanner": of(6, "scanner")}
    slides |= {name: [0] * n_slides for name in ("n_cells", "n_ok", "n_unreadable")}
    slides |= {"status": ["ok"] * n_slides, "reason": [""] * n_slides}
    table = pa.table({name: pa.array(v, SLIDES.field(name).type) for name, v in slides.items()})
    for name, values in (("organ", of(30, "organ")), ("site", of(20, "site"))):
        table = table.append_column(name, pa.array(values))
    write_table(table, folder / "slides.parquet", SLIDES)
    schema = full_schema(TILES, TILES)
    at_once = max(1, 1_000_000 // n_tiles)
    with pq.ParquetWriter(folder / "tiles.parquet", schema, compression="zstd") as writer:
        for first in range(0, n_slides, at_once):
            some = table.slice(first, at_once)
            writer.write_table(tiles_of(some, n_tiles, rng).select(schema.names).cast(schema))


def tiles_of(slides: pa.Table, n_tiles: int, rng: np.random.Generator) -> pa.Table:
    """The rows of these slides."""
    count = slides.num_rows * n_tiles
    which = pa.array(np.repeat(np.arange(slides.num_rows), n_tiles))
    place = np.tile(np.arange(n_tiles), slides.num_rows)
    x, y = 256 * (place % COLUMNS), 256 * (place // COLUMNS)
    slide = slides["slide_id"].take(which)
    words = [slide, *(pa.array(v).cast(pa.string()) for v in (x, y)), "500"]
    fixed = {"requested_mpp": 0.5, "effective_mpp_x": 0.5, "effective_mpp_y": 0.5}
    columns = {name: np.full(count, value) for name, value in fixed.items()}
    figures = ("white_fraction", "dark_fraction", "pen_fraction")
    columns |= {name: (0.11 * rng.random(count)).astype(np.float32) for name in figures}
    table = pa.table(
        {
            **{field.name: pa.nulls(count, field.type) for field in TILES if field.nullable},
            **columns,
            "tile_id": pc.binary_join_element_wise(*words, "_"),
            "slide_id": slide,
            "group": slides["group"].take(which),
            "stain": slides["stain"].take(which),
            "column": (place % COLUMNS).astype(np.int32),
            "row": (place // COLUMNS).astype(np.int32),
            "level0_x": x.astype(float),
            "level0_y": y.astype(float),
            "size_px": np.full(count, 256, np.int32),
            "tissue_fraction": (0.3 + 0.7 * rng.random(count)).astype(np.float32),
            "sharpness": (1.7 + rng.random(count)).astype(np.float32),
            "status": pa.repeat("ok", count),
            "reason": pa.repeat("", count),
        }
    )
    return table


def measure(folder: Path) -> int:
    started = time.monotonic()
    total = open_table(folder / "tiles.parquet", TILES).metadata.num_rows // 10
    out = folder / "selection.parquet"
    sample(SampleConfig(tiles=folder, out=out, tree=TREE, caps=CAPS, total=total))
    seconds = time.monotonic() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    drawn = open_table(out, SELECTION).metadata.num_rows
    print(f"drawn {drawn:,} in {seconds:.0f} s (at most {SECONDS:.0f}), peak {memory:.1f} GB "
          f"(at most {MEMORY_GB:.0f})")  # fmt: skip
    return int(seconds > SECONDS or memory > MEMORY_GB or drawn != total)


if __name__ == "__main__":
    sys.exit(main())
