"""Tasks: labelled tiles with splits that no group crosses.

`listing` says what a task may be made of. Splits that are missing are carved by group.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from eosin.configs.errors import InputError
from eosin.data_curation.embed import TileImage
from eosin.eval.datasets import DATASETS, list_dataset
from eosin.eval.hdf5_tiles import list_hdf5
from eosin.eval.listing import Listing, list_folder, list_table, refuse_duplicates
from eosin.eval.results import TaskRecord
from eosin.eval.splits import SPLITS, carve_splits
from eosin.eval.tar_tiles import has_tars, list_tars
from eosin.launch.artefacts import stamp_of


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Labelled tiles to score on."""

    tiles: Path
    """A folder with one sub-folder a class; a table with path, label and maybe group, split; a
    folder of WebDataset tars; an HDF5 file with x, y and maybe group, split; or, with `dataset`,
    the folder of a public dataset."""
    name: str = ""
    """What the report calls it; from the dataset, folder or table when empty."""
    dataset: str = ""
    """A public dataset in its owner's layout: bach, bracs, breakhis, crc-100k, crc-100k-nonorm,
    gleason, mhist, pcam, unitopatho, tcga-ut, ccrcc, lc25000, starc-9, msi."""
    confounder: str = ""
    """The table's column that says where a tile is from (scanner, centre, staining): with it,
    robustness against that is measured."""

    digest: str = ""
    """The task's digest in the results.json of an earlier run: other tiles, labels, groups or
    splits are refused."""

    def __post_init__(self) -> None:
        if self.dataset and self.dataset not in DATASETS:
            raise ValueError(f"dataset={self.dataset}: there are {', '.join(DATASETS)}")


@dataclass(frozen=True, kw_only=True)
class Task:
    """Labelled tiles, N of them, sorted by tile_id."""

    name: str
    classes: list[str]
    """Sorted; labels are indices into it."""
    tile_ids: list[str]
    """Paths as the table gives them."""
    images: Sequence[TileImage]
    labels: npt.NDArray[np.int64]
    groups: list[str]
    splits: npt.NDArray[np.str_]
    """``train``, ``val`` or ``test``, [N]."""
    origins: list[str] | None
    """What `confounder` says of each; None where none is named."""
    data_digest: str
    """XXH3-128 of tile_ids, groups and the tiles' bytes: what a feature store is made of."""
    digest: str
    """XXH3-128 of the whole table and the tiles' bytes."""
    notes: tuple[str, ...]
    """What a reader of the scores must know about how the task was made."""
    dataset: str = field(default="")
    """Of `DATASETS`, where it is one."""

    def record(self) -> TaskRecord:
        """The task as ``results.json`` has it."""
        tiles = {split: int((self.splits == split).sum()) for split in SPLITS}
        groups = {split: len(set(self.groups_of(split))) for split in SPLITS}
        return TaskRecord(
            name=self.name,
            classes=self.classes,
            tiles=tiles,
            groups=groups,
            digest=self.digest,
            dataset=self.dataset,
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
    listing = _list_tiles(config)
    order = sorted(range(len(listing.tile_ids)), key=lambda i: listing.tile_ids[i])
    tile_ids = [listing.tile_ids[i] for i in order]
    refuse_duplicates(tile_ids, source)
    images = [listing.images[i] for i in order]
    names = [listing.labels[i] for i in order]
    given = None if listing.splits is None else [listing.splits[i] for i in order]
    groups = tile_ids if listing.groups is None else [listing.groups[i] for i in order]
    classes = sorted(set(names))
    if len(classes) < 2:
        raise InputError(f"{source}: only one class, '{classes[0]}'; a probe needs two")
    labels = np.searchsorted(classes, names).astype(np.int64)
    splits, notes = carve_splits(labels, groups, given, classes, seed, str(source))
    notes = [*listing.notes, *notes]
    if listing.groups is None:
        notes.insert(
            0,
            "no groups are given, so each tile is its own: if patients have several tiles, "
            "splits leak and intervals are too narrow",
        )
    with ThreadPoolExecutor(8) as pool:
        checksums = list(pool.map(lambda image: image.checksum(), images))
    notes += _note_identical_tiles(tile_ids, checksums, splits)
    digest = stamp_of(
        tiles=tile_ids,
        checksums=checksums,
        labels=names,
        groups=groups,
        splits=splits.tolist(),
    )
    if config.digest not in ("", digest):
        raise InputError(
            f"{source} is another task than task.digest={config.digest}: tiles, labels, groups or "
            f"splits differ, or the seed of carved splits; its digest is {digest}"
        )
    return Task(
        name=config.name or config.dataset or _name_of(source.resolve()),
        classes=classes,
        tile_ids=tile_ids,
        images=images,
        labels=labels,
        groups=groups,
        splits=splits,
        origins=None if listing.origins is None else [listing.origins[i] for i in order],
        data_digest=stamp_of(tiles=tile_ids, groups=groups, checksums=checksums),
        digest=digest,
        notes=tuple(notes),
        dataset=config.dataset,
    )


def _list_tiles(config: TaskConfig) -> Listing:
    source = config.tiles
    if config.confounder and (config.dataset or source.suffix.lower() not in (".csv", ".parquet")):
        raise InputError(
            f"confounder={config.confounder} names a column, and {source} is no table: list its "
            "tiles in one with path, label, group and that column"
        )
    if config.dataset:
        return list_dataset(config.dataset, source)
    if source.suffix.lower() in (".h5", ".hdf5"):
        return list_hdf5(source)
    if not source.is_dir():
        return list_table(source, config.confounder)
    return list_tars(source) if has_tars(source) else list_folder(source)


def _name_of(source: Path) -> str:
    return source.name if source.is_dir() else f"{source.parent.name}/{source.stem}"


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
