"""A shard that points into a slide, with one record that points at something else."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tifffile
from hostile.folder import INDEX, KEYS, VICTIM, digest, write_index, write_sound

SLIDE_PX, TILE_PX = 128, 32
REFERENCE = pa.schema(
    [
        pa.field("source_path", pa.string(), nullable=False),
        pa.field("source_identity", pa.string(), nullable=False),
        *(
            pa.field(name, pa.float64(), nullable=False)
            for name in ("source_mpp_x", "source_mpp_y", "level0_x", "level0_y")
        ),
        pa.field("size_px", pa.int32(), nullable=False),
        pa.field("requested_mpp", pa.float64(), nullable=False),
    ]
)


def pointing(folder: Path, change: Callable[[Path], dict[str, Any]]) -> None:
    """The sound folder with its first shard pointing into a slide beside it.

    Args:
        folder: to be written.
        change: makes what it likes in a folder beside it; other values for `VICTIM`.
    """
    write_sound(folder)
    beside = folder.with_name(f"{folder.name}-slides")
    beside.mkdir()
    slide = beside / "slide.tiff"
    pixels = np.random.default_rng(0).integers(0, 256, (SLIDE_PX, SLIDE_PX, 3), np.uint8)
    tifffile.imwrite(
        slide, pixels, tile=(64, 64), resolution=(1e4, 1e4), resolutionunit="CENTIMETER"
    )
    rows = pq.read_table(folder / "index.parquet").to_pylist()
    for number, row in enumerate(rows):
        row |= _reference(slide, number) if number < 4 else _nowhere()
        row |= change(beside) if row["key"] == VICTIM else {}
    schema = pa.schema([*INDEX, *REFERENCE], INDEX.metadata)
    write_index(folder, pa.Table.from_pylist(rows, schema))
    for left in ("000000.tar", "parts/000000.parquet"):
        (folder / left).unlink()
    part = pa.Table.from_pylist(rows[:4], schema)
    pq.write_table(part, folder / "parts" / "000000.parquet")
    described = {"count": 4, "bytes": 0, "xxh3_128": "0" * 32}
    sidecar = json.loads((folder / "000000.json").read_text())
    sidecar |= {**described, "part_xxh3_128": digest(folder / "parts" / "000000.parquet")}
    (folder / "000000.json").write_text(json.dumps(sidecar))
    marker = json.loads((folder / "shards.json").read_text())
    del marker["shards"]["000000.tar"]
    marker["shards"]["000000.slides"] = described
    marker["index_xxh3_128"] = digest(folder / "index.parquet")
    (folder / "shards.json").write_text(json.dumps(marker))


def _reference(slide: Path, number: int) -> dict[str, Any]:
    return {
        "shard": "000000.slides",
        "key": KEYS[number],
        "suffix": "slide",
        "offset": 0,
        "size": 0,
        "checksum": "",
        "width_px": TILE_PX,
        "height_px": TILE_PX,
        "source_path": str(slide),
        "source_identity": identity(slide),
        "source_mpp_x": 1.0,
        "source_mpp_y": 1.0,
        "level0_x": TILE_PX * float(number),
        "level0_y": 0.0,
        "size_px": TILE_PX,
        "requested_mpp": 1.0,
    }


def _nowhere() -> dict[str, Any]:
    texts = dict.fromkeys(("source_path", "source_identity"), "")
    numbers = dict.fromkeys(("source_mpp_x", "source_mpp_y", "level0_x", "level0_y"), 0.0)
    return {**texts, **numbers, "size_px": 0, "requested_mpp": 0.0}


def identity(path: Path) -> str:
    """Size and time of a file, as the index has them."""
    found = path.stat()
    return f"{found.st_size}:{found.st_mtime_ns}"


def named(path: str) -> Callable[[Path], dict[str, Any]]:
    """A record of the slide at this path; of its true identity, where there is such a file."""

    def change(beside: Path) -> dict[str, Any]:
        there = "\0" not in path and len(path) < 4096 and Path(path).exists()
        return {"source_path": path, "source_identity": identity(Path(path)) if there else "1:1"}

    return change


def made(make: Callable[[Path], object]) -> Callable[[Path], dict[str, Any]]:
    """A record of a slide that `make` leaves at the path that it is given."""

    def change(beside: Path) -> dict[str, Any]:
        path = beside / "hostile.tiff"
        make(path)
        return {"source_path": str(path), "source_identity": identity(path)}

    return change


def valued(**values: object) -> Callable[[Path], dict[str, Any]]:
    """A record of the sound slide with other numbers."""
    return lambda beside: dict(values)


def cut(path: Path) -> None:
    """The first half of a slide."""
    data = (path.parent / "slide.tiff").read_bytes()
    path.write_bytes(data[: len(data) // 2])


POINTERS: list[tuple[str, str, Callable[[Path], dict[str, Any]]]] = [
    ("password", "a file of the machine", named("/etc/passwd")),
    ("device", "a file without an end", named("/dev/zero")),
    ("command", "a command", named("pipe:touch executed|")),
    ("web", "an address", named("http://127.0.0.1:9/a.svs")),
    ("nul", "a path with a zero in it", named("/tmp/a\0b")),
    ("long", "a path of 100,000 characters", named("/a" * 50_000)),
    ("pipe", "a named pipe", made(os.mkfifo)),
    ("folder", "a folder", made(Path.mkdir)),
    ("cut", "half a slide", made(cut)),
    ("pickle", "a pickle", made(lambda path: path.write_bytes(b"cposix\nsystem\n."))),
    ("far", "a place beyond the slide", valued(level0_x=1e18)),
    ("nan", "a place that is no number", valued(level0_x=float("nan"))),
    ("huge", "two billion pixels", valued(size_px=2**31 - 1)),
    ("negative", "fewer than no pixels", valued(size_px=-5)),
    ("larger", "more pixels than the index says", valued(size_px=48)),
    ("no_scale", "no scale", valued(requested_mpp=0.0)),
    ("endless_scale", "a scale without bound", valued(requested_mpp=1e300)),
    ("fine_scale", "a scale of a billionth", valued(requested_mpp=1e-9)),
    ("slide_scale", "a slide's scale of less than nothing", valued(source_mpp_x=-1.0)),
    ("jpeg", "a record that says it is a JPEG", valued(suffix="jpg", size=1 << 40)),
]
