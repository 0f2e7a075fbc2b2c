"""``eosin shard``: tiles of slides, or tile images, to WebDataset shards with an index.

A folder of shards holds ``NNNNNN.tar`` (USTAR, one member a tile), a sidecar ``NNNNNN.json`` each,
``parts/NNNNNN.parquet`` (the shard's rows of the index), ``index.parquet``, ``failed.parquet`` and,
last, ``shards.json``. A shard is done when its sidecar holds the stamp of its records, so that a
rerun makes what is missing or changed, and nothing else.

With ``pixels=slides`` there are no tars: shards called ``NNNNNN.slides`` are rows of the index that
say where in a slide each tile lies, dealt out as they would be with tars.
"""

import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eosin.configs.errors import InputError, TooManyFailedError
from eosin.data_curation.codec import EncodedTile
from eosin.data_curation.deny_list import LEAKS_NAME, Gate, refuse_leaks
from eosin.data_curation.energon_index import remove_energon
from eosin.data_curation.images import image_records
from eosin.data_curation.manifest import FAILED, INDEX, SLIDES, read_table, write_table
from eosin.data_curation.pseudonyms import Pseudonyms
from eosin.data_curation.records import Failure, Records, check_rules, draw
from eosin.data_curation.shard_index import write_index
from eosin.data_curation.shard_marker import (
    DESCRIBED,
    FAILED_NAME,
    INDEX_NAME,
    MARKER_NAME,
    PARTS_NAME,
    read_marker,
    read_sidecar,
)
from eosin.data_curation.shard_writer import Pixels, ShardJob, read_tiles, write_shard
from eosin.data_curation.slide import Decoding
from eosin.data_curation.slide_tiles import (
    SlideUse,
    check_slide,
    refuse_reference_columns,
    slide_uses,
    tile_records,
)
from eosin.data_curation.worker_pool import count_workers, run_jobs
from eosin.launch.artefacts import file_digest, mark_done, stamp_of
from eosin.launch.progress import Meter, format_seconds

INDEX_LAYOUT = 2
"""Raised when index.parquet is laid out anew: it is then rewritten from the parts."""

_OURS = re.compile(r"\.?(\d{6})\.(tar|tar\.idx|json|parquet)(\.partial)?")
_NAMED = 3  # examples in a line that names some of many
_TRIED = 16  # tiles that a plan reads
_LIGHT_JOBS = 16  # jobs of some milliseconds that are worth starting a process for
_WORKER_MB = 200  # memory of a worker, as measured; it holds one tile at a time


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """How tiles become shards."""

    keep: list[str] = field(default_factory=list)
    """Rules that a tile must satisfy, all of them: ``column=value|value``, ``column!=value``; the
    columns are those of the table, e.g. ``'keep=[split!=test]'``."""
    records_per_shard: int = 2048
    """Tiles in a shard, at most; all shards are about equally full."""
    mix_slides: int = 64
    """Slides whose tiles are shuffled together (0: all). More mixes better for readers that only
    stream; fewer opens each slide less often. `eosin pretrain` reads by index: any will do."""
    pixels: Pixels = "copy"
    """``copy``: tiles become images in tars. ``slides``: an index alone, whose records are read
    from the slides whenever they are needed: no second copy, but the slides must stay as they are,
    reading is slower, and a region that cannot be decoded is found only then. But for such tiles,
    keys, shards and order are the same. A low `mix_slides` saves opening slides again and again."""
    jpeg_quality: int = 90
    """Of tiles copied from slides, encoded 4:4:4; images that exist already are copied as they are
    encoded."""
    pass_through: bool = True
    """Whether tiles that a slide holds as JPEGs of their own (at its own scale, on its own grid)
    are copied as they are, which is quicker and loses nothing; all others are encoded."""
    decoding: Decoding = "exact"
    """``scaled``: where tiles are 2, 4 or 8 times as coarse as the level of the slide that they are
    cut from, its JPEGs are decoded at a part of their size: quicker, and close to the exact mean.
    `shards.json` says which it was."""
    keep_metadata: bool = False
    """Whether EXIF, comments and texts stay in images that exist already: places where names of
    patients hide. Dropping them changes no pixel."""
    seed: int = 0
    """Deals the tiles out to shards."""
    workers: int = 0
    """Processes; 0 is one per core. The shards do not depend on it."""
    max_failed: float = 0.01
    """Fraction of tiles that may be missing or unreadable before the command ends with an error
    (everything else is finished and kept)."""

    def __post_init__(self) -> None:
        check_rules(self.keep)
        for name, low, high in (
            ("records_per_shard", 1, 1_000_000),
            ("mix_slides", 0, 1 << 32),
            ("jpeg_quality", 1, 100),
            ("seed", 0, (1 << 64) - 1),
            ("workers", 0, 4096),
            ("max_failed", 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must be {low} to {high}, not {value}")


@dataclass(frozen=True, kw_only=True)
class ShardConfig(ShardOptions):
    """Tiles to shards: of `images` or of `tiles`."""

    out: Path
    """Folder of the shards."""
    images: Path | None = None
    """A folder of JPEG and PNG tiles, or a CSV table with `path` and any of `group`, `mpp`, …"""
    tiles: Path | None = None
    """A folder that `eosin tile` or `eosin curate` wrote."""
    selection: Path | None = None
    """A selection.parquet of those tiles; without it, all tiles that could be read."""
    pseudonyms: Path | None = None
    """Key file (`openssl rand -hex 32`): keys, groups and slide_ids of images become keyed hashes,
    and their paths are left out. For tiles see `eosin tile`."""
    deny: Path | None = None
    """YAML file of what must not be trained on (`deny_list.DenyList`): nothing is built while the
    tiles hold any of it."""
    prints: Path | None = None
    """Prints of the tiles, where `deny` names images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.images is None) == (self.tiles is None):
            raise ValueError("give either images (tiles that exist) or tiles (of 'eosin tile')")
        if self.selection is not None and self.tiles is None:
            raise ValueError("selection goes with tiles, not with images")
        if self.decoding == "scaled" and (self.images is not None or self.pixels == "slides"):
            raise ValueError("decoding=scaled goes with tiles whose pixels are copied")
        if self.pseudonyms is not None and self.images is None:
            raise ValueError("pseudonyms goes with images; tiles have theirs from 'eosin tile'")
        if self.pixels == "slides" and self.images is not None:
            raise ValueError("pixels=slides goes with tiles, not with images")


def shard(config: ShardConfig) -> None:
    """Writes the shards that are missing or out of date, then the index, then the marker.

    Raises:
        LeakError: a tile is on the deny list; shards of an earlier call count as unfinished then.
        InputError: there are no tiles, or a table cannot be used.
        TooManyFailedError: more tiles failed than `max_failed` allows; the others are
            in the shards.
    """
    records = _gather(config)
    _refuse_missing(records, config)
    if config.deny is not None:
        _refuse_denied(records, config, Gate(config.deny, config.prints))
    dealt = deal(records, config.records_per_shard, config.mix_slides, config.seed)
    stamps, todo = _survey(config, records, dealt)
    marker, whole = config.out / MARKER_NAME, stamp_of(shards=stamps, index=INDEX_LAYOUT)
    if todo or not _is_finished(config.out, whole):
        marker.unlink(missing_ok=True)
        if todo:
            remove_energon(config.out)
        _write_shards(config, records, dealt, todo)
        _remove_strangers(config, len(dealt))
        _finish(config, len(dealt), whole)
    _conclude(config, len(records), len(todo))


def _is_finished(out: Path, stamp: str) -> bool:
    """Whether the marker is sound and has this stamp, and the tables are there."""
    try:
        marker = read_marker(out)
    except InputError:
        return False
    tables = (out / INDEX_NAME, out / FAILED_NAME)
    return marker["stamp"] == stamp and all(table.is_file() for table in tables)


def plan(config: ShardConfig) -> str:
    """What `shard` would do, from a trial of a few tiles in this process."""
    records = _gather(config)
    _refuse_missing(records, config)
    dealt = deal(records, config.records_per_shard, config.mix_slides, config.seed)
    _, todo = _survey(config, records, dealt)
    if config.pixels == "slides":
        return (
            f"{len(records)} tiles in {len(dealt)} shards of {config.out}, {len(todo)} to be made: "
            f"no pixels are copied; {len(_uses_of(records, dealt, todo))} slides are opened once "
            "to see that they serve their tiles"
        )
    rows = np.unique(np.linspace(0, len(records) - 1, _TRIED).astype(np.int64))
    started = time.monotonic()
    tiles = list(read_tiles(_job(config, records, [rows], 0)))
    seconds = (time.monotonic() - started) / len(rows)
    read = [len(tile.data) for tile in tiles if isinstance(tile, EncodedTile)]
    n_todo = sum(len(dealt[n]) for n in todo)
    workers = count_workers(config.workers)
    return (
        f"{len(records)} tiles in {len(dealt)} shards of {config.out}, {len(todo)} to be made: "
        f"{n_todo} tiles, about {np.mean(read or [0]) * n_todo / 1e6:.0f} MB and "
        f"{format_seconds(seconds * n_todo / workers)} on {workers} workers of about "
        f"{_WORKER_MB} MB each (from a trial of {len(rows)} tiles, of which {len(read)} were read)"
    )


def deal(
    records: Records, records_per_shard: int, mix_slides: int, seed: int
) -> list[NDArray[np.int64]]:
    """Which rows of `records` go into which shard: a function of keys, slides and `seed`.

    Slides are shuffled, the tiles of every `mix_slides` of them are shuffled together, and the row
    of tiles that results is cut into equal pieces. Inside a shard the rows ascend, so that each
    slide is opened once.
    """
    tickets = np.array([draw(seed, key) for key in records.labels["key"].to_pylist()], np.uint64)
    window = np.zeros(len(records), np.int64)
    if mix_slides:
        slides = records.labels["slide_id"].to_pylist()
        shuffled = sorted({s for s in slides if s is not None}, key=lambda s: draw(seed, s))
        window_of = {slide: rank // mix_slides for rank, slide in enumerate(shuffled)}
        window = np.array([window_of.get(slide, 0) for slide in slides], np.int64)
    order = np.lexsort((tickets, window))
    n_shards = -(-len(order) // records_per_shard)
    return [np.sort(piece) for piece in np.array_split(order, n_shards)]


def _gather(config: ShardConfig) -> Records:
    if config.images is not None:
        pseudonyms = Pseudonyms(config.pseudonyms) if config.pseudonyms else None
        return image_records(config.images, config.keep, pseudonyms)
    assert config.tiles is not None  # by the config's own check
    records = tile_records(config.tiles, config.selection, config.keep)
    if config.pixels == "slides":
        refuse_reference_columns(records)
    return records


def _refuse_missing(records: Records, config: ShardConfig) -> None:
    """Ends at once where a table names more files that are not there than may fail."""
    identities = records.source["identity"].to_pylist()
    rows = [row for row, identity in enumerate(identities) if not identity]
    if len(rows) > config.max_failed * len(records):
        paths = records.source["path"].take(rows).unique().to_pylist()
        more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
        raise InputError(
            f"{config.images or config.tiles}: {len(rows)} of {len(records)} tiles have no file: "
            f"{', '.join(paths[:_NAMED])}{more}; mend the paths, or raise max_failed "
            "(shard.max_failed in curate)"
        )


def _refuse_denied(records: Records, config: ShardConfig, gate: Gate) -> None:
    slides = read_table(config.tiles / "slides.parquet", SLIDES) if config.tiles else None
    labels = records.labels.select(["key", "group", "slide_id"])
    leaks = gate.leaks(labels.rename_columns(["tile_id", "group", "slide_id"]), slides)
    if leaks.num_rows:
        (config.out / MARKER_NAME).unlink(missing_ok=True)
    refuse_leaks(leaks, gate.path, config.out / LEAKS_NAME)


def _job(
    config: ShardConfig,
    records: Records,
    dealt: Sequence[NDArray[np.int64]],
    number: int,
    refused: Mapping[SlideUse, Failure] | None = None,
) -> ShardJob:
    return ShardJob(
        out=config.out,
        name=f"{number:06d}",
        records=records.take(pa.array(dealt[number])),
        from_slides=config.tiles is not None,
        jpeg_quality=config.jpeg_quality,
        pass_through=config.pass_through,
        decoding=config.decoding,
        keep_metadata=config.keep_metadata,
        pixels=config.pixels,
        refused=refused or {},
    )


def _survey(
    config: ShardConfig, records: Records, dealt: Sequence[NDArray[np.int64]]
) -> tuple[list[str], list[int]]:
    """The stamp that each shard must have, and the shards that are not there with it."""
    stamps, todo = [], []
    for number in range(len(dealt)):
        job = _job(config, records, dealt, number)
        stamps.append(job.stamp())
        if not job.is_finished(stamps[-1]):
            todo.append(number)
    return stamps, todo


def _write_shards(
    config: ShardConfig, records: Records, dealt: Sequence[NDArray[np.int64]], todo: list[int]
) -> None:
    refused = {}
    if config.pixels == "slides":
        refused = _refuse_slides(config, _uses_of(records, dealt, todo))
    jobs: Iterator[ShardJob] = (_job(config, records, dealt, number, refused) for number in todo)
    n_jobs = len(todo) if config.pixels == "copy" else len(todo) // _LIGHT_JOBS
    workers = max(1, min(count_workers(config.workers), n_jobs))
    n_todo = sum(len(dealt[number]) for number in todo)
    with Meter("shard", len(records), "tiles", done=len(records) - n_todo) as meter:
        for job, _ in run_jobs(write_shard, jobs, workers):
            meter.advance(len(job.records), job.shard.name)


def _uses_of(
    records: Records, dealt: Sequence[NDArray[np.int64]], todo: list[int]
) -> list[SlideUse]:
    """The slides behind the shards `todo`, each once."""
    rows = np.concatenate([np.empty(0, np.int64), *(dealt[number] for number in todo)])
    source = records.source.take(pa.array(rows)).select(SlideUse._fields)
    return sorted(slide_uses(source.group_by(SlideUse._fields).aggregate([])))


def _refuse_slides(config: ShardConfig, uses: list[SlideUse]) -> dict[SlideUse, Failure]:
    """The slides that cannot serve their tiles; each is opened once."""
    workers = max(1, min(count_workers(config.workers), len(uses) // _LIGHT_JOBS))
    refused = {}
    with Meter("shard", len(uses), "slides") as meter:
        for use, failure in run_jobs(check_slide, uses, workers):
            if failure is not None:
                refused[use] = failure
            meter.advance(1, use.path)
    return refused


def _finish(config: ShardConfig, n_shards: int, stamp: str) -> None:
    """Writes the tables and the marker from what the shards' sidecars and parts say."""
    out, suffix = config.out, "tar" if config.pixels == "copy" else "slides"
    names = [f"{number:06d}" for number in range(n_shards)]
    parts = (read_table(out / PARTS_NAME / f"{name}.parquet", INDEX) for name in names)
    write_index(parts, out / INDEX_NAME)
    sidecars = {f"{name}.{suffix}": read_sidecar(out / f"{name}.json") for name in names}
    failed = [{"shard": name, **row} for name, car in sidecars.items() for row in car["failed"]]
    write_table(pa.Table.from_pylist(failed, FAILED), out / FAILED_NAME, FAILED)
    mark_done(
        out / MARKER_NAME,
        stamp,
        shards={name: {key: car[key] for key in DESCRIBED} for name, car in sidecars.items()},
        decoding=config.decoding,
        failed=len(failed),
        with_metadata=sum(car["with_metadata"] for car in sidecars.values()),
        index_xxh3_128=file_digest(out / INDEX_NAME),
        failed_xxh3_128=file_digest(out / FAILED_NAME),
    )


def _remove_strangers(config: ShardConfig, n_shards: int) -> None:
    """Removes shards of an earlier run that was larger or copied, and what a killed one left."""
    for folder in (config.out, config.out / PARTS_NAME):
        for path in folder.iterdir():
            match = _OURS.fullmatch(path.name)
            if match is None:
                continue
            copied = match[2].startswith("tar") and config.pixels == "slides"
            if match[3] or copied or int(match[1]) >= n_shards:
                path.unlink()


def _conclude(config: ShardConfig, n_records: int, n_made: int) -> None:
    """The closing line, the first failures by name, and the error where they are too many."""
    marker = read_marker(config.out)
    shards = marker["shards"].values()
    failed = read_table(config.out / FAILED_NAME, FAILED)
    for row in failed.slice(0, _NAMED).to_pylist():
        print(f"shard: {row['source']}, '{row['key']}': {row['reason']}", file=sys.stderr)
    if marker["with_metadata"]:
        print(
            f"shard: {marker['with_metadata']} images carry EXIF or comments, kept as they are: "
            "look into them before the shards leave the house",
            file=sys.stderr,
        )
    size = f"{sum(shard['bytes'] for shard in shards) / 1e6:.1f} MB"
    if config.pixels == "slides":
        size = "the pixels stay in the slides"
    print(
        f"shard: {sum(shard['count'] for shard in shards)} tiles in {len(shards)} shards "
        f"({n_made} made now, {size}), {failed.num_rows} failed → {config.out}"
    )
    if failed.num_rows > config.max_failed * n_records:
        raise TooManyFailedError(
            f"{failed.num_rows} of {n_records} tiles failed, more than max_failed="
            f"{config.max_failed:g} allows; {config.out / FAILED_NAME} names them, all others are "
            "in the shards"
        )
