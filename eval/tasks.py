"""Tasks: labelled tiles with splits that no group crosses.

A task is a folder with one sub-folder a class, or a table (CSV or Parquet) with the columns
``path`` (relative to the table) and ``label``, and if known ``group`` (the patient, else the
slide) and ``split`` (train, val, test). Splits that are missing are carved by group.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from eosin.configs.errors import InputError
from eosin.data_curation.images import read_text_table, refuse_repeated
from eosin.eval.results import TaskRecord
from eosin.eval.splits import SPLITS, carve_splits
from eosin.launch.artefacts import file_digest, stamp_of

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp"}
"""Files that are tiles in a folder per class, in any case."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Labelled tiles to score on."""

    tiles: Path
    """A folder with one sub-folder a class, or a table with path, label and maybe group, split."""
    name: str = ""
    """What the report calls it; from the folder's or table's name when empty."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Labelled tiles, N of them, sorted by tile_id."""

    name: str
    classes: list[str]
    """Sorted; labels are indices into it."""
    tile_ids: list[str]
    """Paths as the table gives them."""
    paths: list[Path]
    labels: npt.NDArray[np.int64]
    groups: list[str]
    splits: npt.NDArray[np.str_]
    """``train``, ``val`` or ``test``, [N]."""
    data_digest: str
    """XXH3-128 of tile_ids, groups and the tiles' bytes: what a feature store is made of."""
    digest: str
    """XXH3-128 of the whole table and the tiles' bytes."""
    notes: tuple[str, ...]
    """What a reader of the scores must know about how the task was made."""

    def record(self) -> TaskRecord:
        """The task as ``results.json`` has it."""
        tiles = {split: int((self.splits == split).sum()) for split in SPLITS}
        groups = {split: len(set(self.groups_of(split))) for split in SPLITS}
        return TaskRecord(
            name=self.name, classes=self.classes, tiles=tiles, groups=groups, digest=self.digest
        )

    def groups_of(self, split: str) -> list[str]:
        """The groups of the split's tiles, one entry a tile."""
        return [g for g, s in zip(self.groups, self.splits, strict=True) if s == split]


def load_task(config: TaskConfig, seed: int) -> Task:
    """Reads a task, checks it, carves what splits are missing and takes the tiles' checksums.

    Raises:
        InputError: it cannot be scored on honestly; the message says why.
    """
    source = config.tiles
    if not source.exists():
        raise InputError(f"task {source} does not exist; give a folder or a table of tiles")
    table = _folder_per_class(source) if source.is_dir() else _read_table(source)
    table = table.sort_by("path")
    tile_ids: list[str] = table["path"].to_pylist()
    _refuse_duplicates(tile_ids, source)
    root = source if source.is_dir() else source.parent
    paths = [root / tile_id for tile_id in tile_ids]
    _refuse_missing(paths, source)
    names: list[str] = table["label"].to_pylist()
    classes = sorted(set(names))
    if len(classes) < 2:
        raise InputError(f"{source}: only one class, '{classes[0]}'; a probe needs two")
    labels = np.searchsorted(classes, names).astype(np.int64)
    has_groups = "group" in table.column_names
    groups = table["group"].to_pylist() if has_groups else tile_ids
    given = table["split"].to_pylist() if "split" in table.column_names else None
    splits, notes = carve_splits(labels, groups, given, classes, seed, str(source))
    if not has_groups:
        notes.insert(
            0,
            "no groups are given, so each tile is its own: if patients have several tiles, "
            "splits leak and intervals are too narrow",
        )
    checksums = _checksums(paths)
    notes += _note_identical_tiles(tile_ids, checksums, splits)
    return Task(
        name=config.name or _name_of(source.resolve()),
        classes=classes,
        tile_ids=tile_ids,
        paths=paths,
        labels=labels,
        groups=groups,
        splits=splits,
        data_digest=stamp_of(tiles=tile_ids, groups=groups, checksums=checksums),
        digest=stamp_of(
            tiles=tile_ids,
            checksums=checksums,
            labels=names,
            groups=groups,
            splits=splits.tolist(),
        ),
        notes=tuple(notes),
    )


def _name_of(source: Path) -> str:
    return source.name if source.is_dir() else f"{source.parent.name}/{source.stem}"


def _folder_per_class(folder: Path) -> pa.Table:
    """Path (relative to `folder`) and label (the first folder's name) of all images below."""
    found = [
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    seen = [p for p in found if len(p.parts) > 1 and not any(q.startswith(".") for q in p.parts)]
    if not seen:
        raise InputError(f"{folder} holds no tiles: wanted one sub-folder of images a class")
    if {path.parts[0] for path in seen} <= set(SPLITS):
        raise InputError(
            f"{folder} has a folder a split, not a class: list its tiles in a table with path, "
            "label and split"
        )
    return pa.table({"path": [str(p) for p in seen], "label": [p.parts[0] for p in seen]})


def _read_table(path: Path) -> pa.Table:
    """The table's columns path, label, group and split as text, those that it has."""
    required = ("path", "label")
    if path.suffix.lower() == ".parquet":
        table = _read_parquet(path, required)
    else:
        table = read_text_table(path, required)
    if not table.num_rows:
        raise InputError(f"{path} has no rows")
    names = [name for name in ("path", "label", "group", "split") if name in table.column_names]
    table = table.select(names)
    for name in names:
        missing = [i for i, value in enumerate(table[name].to_pylist()) if not value]
        if missing:
            raise InputError(
                f"{path}: column '{name}' is empty in {len(missing)} rows, first in row "
                f"{missing[0] + 1}; fill it in, or leave the whole column out"
            )
    return table


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


def _refuse_duplicates(tile_ids: list[str], source: Path) -> None:
    """`tile_ids` are sorted."""
    twice = [a for a, b in pairwise(tile_ids) if a == b]
    if twice:
        raise InputError(f"{source} names '{twice[0]}' more than once; keep one row a tile")


def _refuse_missing(paths: list[Path], source: Path) -> None:
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"{source}: {len(missing)} of {len(paths)} tiles do not exist "
            f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''})"
        )


def _checksums(paths: list[Path]) -> list[str]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(file_digest, paths))


def _note_identical_tiles(
    tile_ids: list[str], checksums: list[str], splits: npt.NDArray[np.str_]
) -> list[str]:
    """A note when bytes of a test tile are also in train or val."""
    seen = {c for c, s in zip(checksums, splits, strict=True) if s != "test"}
    leaked = [
        tile_id
        for tile_id, checksum, split in zip(tile_ids, checksums, splits, strict=True)
        if split == "test" and checksum in seen
    ]
    if not leaked:
        return []
    return [
        f"{len(leaked)} test tiles are byte for byte also in train or val, such as {leaked[0]}: "
        "the scores are too high"
    ]
