"""Labelled tiles as their owner keeps them: what every kind of source is brought to.

A source is a folder with a sub-folder a class, a table, tars of a WebDataset, HDF5, or a public
dataset as its owner publishes it (`datasets`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from eosin.configs.errors import InputError
from eosin.data_curation.embed import FileTile, TileImage
from eosin.data_curation.images import read_text_table, refuse_repeated
from eosin.eval.splits import SPLITS

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp"}
"""Files that are tiles, in any case."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """N labelled tiles, in any order."""

    tile_ids: list[str]
    images: list[TileImage]
    labels: list[str]
    """Names of classes."""
    groups: list[str] | None = None
    """None: not known."""
    splits: list[str] | None = None
    """train, val or test; None: not given."""
    origins: list[str] | None = None
    """Where each is from (scanner, centre), where a column was named for it."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the scores must know."""


def list_folder(folder: Path) -> Listing:
    """One sub-folder a class: the label is the first folder's name.

    Raises:
        InputError: there is no tile in it, or its folders are splits.
    """
    paths = images_below(folder)
    seen = [path for path in paths if len(path.parts) > 1]
    if not seen:
        raise InputError(f"{folder} holds no tiles: wanted one sub-folder of images a class")
    if {path.parts[0] for path in seen} <= set(SPLITS):
        raise InputError(
            f"{folder} has a folder a split, not a class: list its tiles in a table with path, "
            "label and split"
        )
    return Listing(
        tile_ids=[str(path) for path in seen],
        images=[FileTile(folder / path) for path in seen],
        labels=[path.parts[0] for path in seen],
    )


def images_below(folder: Path) -> list[Path]:
    """All image files below a folder, relative to it, sorted; none whose name begins with a dot."""
    found = [
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    return sorted(path for path in found if not any(part.startswith(".") for part in path.parts))


def list_table(path: Path, origin: str = "") -> Listing:
    """A CSV or Parquet table with path and label, and maybe group, split and a column of origins.

    Args:
        path: of the table; paths in it are relative to its folder.
        origin: the column that says where tiles are from; "" for none.

    Raises:
        InputError: a column or a tile is missing, or a cell is empty.
    """
    table = read_table(path, ("path", "label", *([origin] if origin else [])), ("group", "split"))
    columns = {name: table[name].to_pylist() for name in table.column_names}
    tile_ids: list[str] = columns["path"]
    refuse_duplicates(tile_ids, path)
    paths = [path.parent / tile_id for tile_id in tile_ids]
    refuse_missing(paths, path)
    return Listing(
        tile_ids=tile_ids,
        images=[FileTile(tile) for tile in paths],
        labels=columns["label"],
        groups=columns.get("group"),
        splits=columns.get("split"),
        origins=columns[origin] if origin else None,
    )


def read_table(path: Path, required: Sequence[str], also: Sequence[str] = ()) -> pa.Table:
    """The required columns of a CSV or Parquet table as text, and those of `also` that it has.

    Raises:
        InputError: a column is missing, the table is empty, or a cell is.
    """
    if path.suffix.lower() == ".parquet":
        table = _read_parquet(path, required)
    else:
        table = read_text_table(path, required)
    if not table.num_rows:
        raise InputError(f"{path} has no rows")
    wanted = dict.fromkeys([*required, *(name for name in also if name in table.column_names)])
    table = table.select(list(wanted))
    for name in table.column_names:
        missing = [i for i, value in enumerate(table[name].to_pylist()) if not value]
        if missing:
            raise InputError(
                f"{path}: column '{name}' is empty in {len(missing)} rows, first in row "
                f"{missing[0] + 1}; fill it in, or leave the whole column out"
            )
    return table


def read_columns(path: Path) -> list[str]:
    """The names of a CSV or Parquet table's columns.

    Raises:
        InputError: it cannot be read.
    """
    if path.suffix.lower() == ".parquet":
        return list(_read_parquet(path, ()).column_names)
    return list(read_text_table(path, ()).column_names)


def _read_parquet(path: Path, required: Sequence[str]) -> pa.Table:
    try:
        refuse_repeated(pq.read_schema(path).names, path)
        table = pq.read_table(path)
        table = table.cast(pa.schema([(name, pa.string()) for name in table.column_names]))
    except (pa.ArrowException, OSError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise InputError(f"{path} is not a readable Parquet table: {first_line}") from error
    missing = [name for name in required if name not in table.column_names]
    if missing:
        raise InputError(f"{path} has no column '{missing[0]}'")
    return table


def refuse_duplicates(tile_ids: Sequence[str], source: Path) -> None:
    """Raises an error that names the first tile that is there twice."""
    twice = [a for a, b in pairwise(sorted(tile_ids)) if a == b]
    if twice:
        raise InputError(f"{source} names '{twice[0]}' more than once; keep one row a tile")


def refuse_missing(paths: Sequence[Path], source: Path) -> None:
    """Raises an error that names the first tiles that do not exist."""
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"{source}: {len(missing)} of {len(paths)} tiles do not exist "
            f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''})"
        )
