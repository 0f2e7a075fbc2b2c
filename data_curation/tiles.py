"""The verb `tile`: slides to slides.parquet, tiles.parquet and one overlay picture a slide.

Each slide is tiled by `tile_slide` in a process of its own into ``OUT/slides/SLIDE_ID``; the parts
are merged at the end. A second call reads only the slides whose file, mpp or request changed.
"""

import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from eosin.configs.errors import EosinError, InputError, TooManyFailedError
from eosin.data_curation.grid import make_grid
from eosin.data_curation.isolation import Lost, run_isolated
from eosin.data_curation.manifest import SLIDES, TILES, Status, read_table, write_table
from eosin.data_curation.pseudonyms import Pseudonyms
from eosin.data_curation.segmenter import segmenter_digest
from eosin.data_curation.slide import MAX_UPSAMPLE, Decoding, RegionError, Slide
from eosin.data_curation.slide_list import SlideSource, list_slides, slide_bytes
from eosin.data_curation.slide_metadata import SlideError
from eosin.data_curation.tile_slide import (
    FORMAT,
    MARKER,
    PART,
    TILES_FILE,
    SlideJob,
    empty_record,
    open_slide,
    tile_slide,
)
from eosin.data_curation.tissue import AUTO, RULES, rule_for
from eosin.data_curation.worker_pool import count_workers
from eosin.launch.artefacts import is_done, mark_done, read_json, stamp_of
from eosin.launch.progress import Meter, format_seconds

NATIVE = "native"
_NAMED = 5
"""Failed slides named in an error; slides.parquet names them all."""
_TOLERATE = "raise max_failed (tile.max_failed in curate)"
_PROBED_TILES = 16
_WORKER_BYTES = 400e6


@dataclass(frozen=True, kw_only=True)
class TileOptions:
    """How slides are cut into tiles."""

    mpp: float | int | str = 0.5
    """µm per tile pixel; a slide scanned more coarsely is refused. ``native``: each slide's own
    scale (the coarser of its axes), whatever it is; its own JPEG tiles can then go into shards as
    they are."""
    size_px: int = 256
    """Side of a tile in pixels."""
    step_px: int = 0
    """From one tile to the next in pixels; 0: the size, so that tiles neither overlap nor gap."""
    min_tissue: float = 0.05
    """Share of tissue below which a tile is not read; selection has its own, higher one."""
    tissue_rule: str = AUTO
    """What counts as tissue: ``he``, ``pale`` (immunohistochemistry) or ``silver``; ``auto`` goes
    by each slide's stain in the table of slides."""
    segmenter: Path | None = None
    """Folder of a segmentation network that takes the place of the classical masks of tissue (and
    of pen, where it knows pen): ``segmenter.yaml`` and an ONNX file or safetensors weights."""
    vahadane: bool = False
    """Also estimate each slide's stains by Vahadane's method, about a second a slide."""
    max_upsample: float = 0.0
    """How much coarser than `mpp` a slide may be scanned, as a share: at mpp=0.5, 0.05 admits one
    of 0.525 µm/px. Its tiles are enlarged by as much; the two mpp of slides.parquet show it."""
    decoding: Decoding = "exact"
    """Of the pixels that tiles are measured on. ``scaled``: JPEGs of a level that is 2, 4 or 8
    times as fine as the tiles are decoded at a part of their size: quicker, not quite their mean.
    slides.parquet says which it was; what goes into shards is `shard.decoding`'s."""
    pseudonyms: Path | None = None
    """Key file (`openssl rand -hex 32`): slide_ids and groups become keyed hashes here and in all
    that is made from this; slides.parquet alone has the slides' paths beside them."""
    workers: int = 0
    """Processes; 0: one per core."""
    timeout_s: float = 7200.0
    """Seconds after which a slide is given up."""
    max_memory_gb: float = 8.0
    """Memory that a process may hold, on Linux; a slide that asks for more is given up."""
    max_failed: float = 0.01
    """Share of slides (and of the tiles with tissue) that may fail without failing the command."""

    def __post_init__(self) -> None:
        if isinstance(self.mpp, str) and self.mpp != NATIVE:
            raise ValueError(f"mpp is a number of µm per pixel, or {NATIVE}, not '{self.mpp}'")
        if not isinstance(self.mpp, str) and not self.mpp > 0:
            raise ValueError(f"mpp must be positive, not {self.mpp}")
        positive = ("size_px", "timeout_s", "max_memory_gb")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 <= self.max_upsample <= MAX_UPSAMPLE:
            raise ValueError(f"max_upsample is 0 to {MAX_UPSAMPLE}, not {self.max_upsample}")
        if self.tissue_rule not in (AUTO, *RULES):
            known = ", ".join([AUTO, *RULES])
            raise ValueError(f"tissue_rule is one of {known}, not '{self.tissue_rule}'")
        for name in ("step_px", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.min_tissue <= 1:
            raise ValueError(f"min_tissue must be between 0 and 1, not {self.min_tissue}")
        if not 0 <= self.max_failed <= 1:
            raise ValueError(f"max_failed must be between 0 and 1, not {self.max_failed}")


@dataclass(frozen=True, kw_only=True)
class TileConfig(TileOptions):
    """Slides to tiles: where tissue lies, on a grid at an exact mpp, and how good each tile is.

    `slides` is a folder, one slide, or a CSV table with a column `path` (relative to the table)
    and, where wanted, `mpp` (or `mpp_x` and `mpp_y`), `group` (patient) and `stain`; its other
    columns go along to the shards' index, and `shard.keep` may name them.
    """

    slides: Path
    out: Path
    """Folder for slides.parquet, tiles.parquet and slides/SLIDE_ID/overlay.png."""
    only: Path | None = None
    """File of slide_ids, one a line: these alone are tiled, and neither merged nor judged; a call
    without it does the rest."""


def tile(config: TileConfig) -> None:
    """Tiles every slide that is not tiled yet, and merges the tables.

    Raises:
        InputError: nothing usable under `slides`.
        TooManyFailedError: more than `max_failed` of the slides or of the tiles could not be used;
            everything else is finished and merged.
        EosinError: there is no tissue at all.
    """
    started = time.monotonic()
    sources = _chosen(_sources(config), config.only)
    config.out.mkdir(parents=True, exist_ok=True)
    jobs = [_job(source, config) for source in sources]
    records = {job.source.slide_id: _finished(job) for job in jobs}
    todo = [job for job in jobs if records[job.source.slide_id] is None]
    if todo:
        records |= _tile_all(todo, len(jobs) - len(todo), config)
    rows = [(source, records[source.slide_id] or empty_record()) for source in sources]
    if config.only is None:
        _merge(rows, jobs, config)
    print(_summary(rows, len(todo), time.monotonic() - started))
    if config.only is None:
        _judge(rows, config)


def pieces(config: TileConfig) -> dict[str, int]:
    """The slides that are not tiled yet, with the size of their files in bytes."""
    jobs = [_job(source, config) for source in _sources(config)]
    return {
        job.source.slide_id: slide_bytes(job.source.path) for job in jobs if _finished(job) is None
    }


def _sources(config: TileConfig) -> list[SlideSource]:
    """The slides, under their pseudonyms where there is a key."""
    sources = list_slides(config.slides)
    if config.pseudonyms is None:
        return sources
    hidden = Pseudonyms(config.pseudonyms)
    renamed = [
        replace(s, slide_id=hidden.of(s.slide_id), group=hidden.of(s.group)) for s in sources
    ]
    return sorted(renamed, key=lambda source: source.slide_id)


def _chosen(sources: list[SlideSource], only: Path | None) -> list[SlideSource]:
    """The slides that the file `only` names; all of them without it.

    Raises:
        InputError: the file is missing, or names what is no slide here.
    """
    if only is None:
        return sources
    if not only.is_file():
        raise InputError(f"only={only}: no such file")
    names = set(only.read_text().split())
    unknown = sorted(names - {source.slide_id for source in sources})
    if unknown:
        raise InputError(f"{only} names {unknown[0]}, which is no slide here")
    return [source for source in sources if source.slide_id in names]


def _tile_all(todo: list[SlideJob], done: int, config: TileConfig) -> dict[str, dict[str, Any]]:
    """Tiles each slide of `todo` in a process of its own; the records by slide_id."""
    records = {}
    workers = min(count_workers(config.workers), len(todo))
    with Meter("tile", total=done + len(todo), unit="slides", done=done) as meter:
        results = run_isolated(
            tile_slide,
            todo,
            workers=workers,
            timeout_s=config.timeout_s,
            max_bytes=round(config.max_memory_gb * 1e9),
        )
        for job, result in results:
            if isinstance(result, Lost):
                lost = {"status": str(result.status), "reason": result.reason}
                result = empty_record() | lost
            records[job.source.slide_id] = result
            meter.advance(note=job.source.slide_id)
    return records


def plan(config: TileConfig) -> str:
    """What `tile` would do: slides, cells, time and memory. Reads metadata and a few tiles."""
    sources = _chosen(_sources(config), config.only)
    jobs = [_job(source, config) for source in sources]
    todo = [job for job in jobs if _finished(job) is None]
    cells, refused = 0, []
    seconds: float | None = None
    for job in todo:
        try:
            with open_slide(job) as slide:
                mpp = job.mpp or max(slide.mpp)
                slide.level_for(mpp)
                grid = make_grid(
                    slide.bounds_px,
                    slide.mpp,
                    mpp=mpp,
                    size_px=job.size_px,
                    step_px=job.step_px,
                )
                cells += len(grid)
                if seconds is None and len(grid):
                    seconds = _seconds_per_tile(slide, job)
        except SlideError as error:
            refused.append(f"  {job.source.slide_id}: {error.status}: {error.reason}")
    workers = min(count_workers(config.workers), max(1, len(todo)))
    lines = [f"{len(jobs)} slides, {len(jobs) - len(todo)} of them done; {len(todo)} to tile"]
    lines += [f"{len(refused)} would be refused:", *refused] if refused else []
    if not todo:
        return lines[0]
    scale = "each slide's own scale" if config.mpp == NATIVE else f"{config.mpp:g} µm/px"
    lines.append(f"{cells} cells of {config.size_px} px at {scale}; tissue is read")
    if seconds is not None:
        most = format_seconds(cells * seconds / workers)
        lines.append(f"at most {most} with {workers} workers ({1 / seconds:.0f} tiles/s each)")
    lines.append(f"about {workers * _WORKER_BYTES / 1e9:.1f} GB of memory")
    return "\n".join(lines)


def _seconds_per_tile(slide: Slide, job: SlideJob) -> float | None:
    """Time of a tile, from a few spread over the slide; None where one is not readable."""
    x, y, width, height = slide.bounds_px
    mpp = job.mpp or max(slide.mpp)
    cell = (job.size_px * mpp / slide.mpp[0], job.size_px * mpp / slide.mpp[1])
    started = time.monotonic()
    for index in range(_PROBED_TILES):
        left = x + (width - cell[0]) * (index % 4) / 3
        top = y + (height - cell[1]) * (index // 4) / 3
        try:
            slide.read_tile(left, top, job.size_px, mpp)
        except RegionError:
            return None
    return (time.monotonic() - started) / _PROBED_TILES


def _job(source: SlideSource, config: TileConfig) -> SlideJob:
    file = source.path.stat()
    step_px = config.step_px or config.size_px
    rule = rule_for(source.stain) if config.tissue_rule == AUTO else config.tissue_rule
    request = {
        "mpp": config.mpp if isinstance(config.mpp, str) else float(config.mpp),
        "size_px": config.size_px,
        "step_px": step_px,
        "min_tissue": config.min_tissue,
        "tissue_rule": rule,
        "segmenter": segmenter_digest(config.segmenter) if config.segmenter is not None else None,
        "vahadane": config.vahadane,
        "decoding": config.decoding,
        "max_upsample": float(config.max_upsample),
    }
    stamp = stamp_of(
        format=FORMAT,
        request=request,
        slide_mpp=source.mpp,
        file={"bytes": file.st_size, "mtime_ns": file.st_mtime_ns},
    )
    folder = config.out / "slides" / source.slide_id
    return SlideJob(
        source=source,
        folder=folder,
        stamp=stamp,
        mpp=None if isinstance(config.mpp, str) else float(config.mpp),
        size_px=config.size_px,
        step_px=step_px,
        min_tissue=config.min_tissue,
        tissue_rule=rule,
        segmenter=config.segmenter,
        with_vahadane=config.vahadane,
        decoding=config.decoding,
        max_upsample=config.max_upsample,
    )


def _finished(job: SlideJob) -> dict[str, Any] | None:
    """The record of a slide that an earlier call tiled under the same stamp."""
    marker = job.folder / MARKER
    if not is_done(marker, job.stamp):
        return None
    record: dict[str, Any] = read_json(marker)["slide"]
    return record if not record["n_cells"] or (job.folder / TILES_FILE).is_file() else None


def _merge(
    rows: list[tuple[SlideSource, dict[str, Any]]], jobs: list[SlideJob], config: TileConfig
) -> None:
    """Writes slides.parquet and tiles.parquet, unless they already hold exactly this."""
    slides = [
        {
            "slide_id": source.slide_id,
            "path": str(source.path),
            "group": source.group,
            "stain": source.stain,
            **record,
            **source.labels,
        }
        for source, record in rows
    ]
    stamp = stamp_of(format=FORMAT, slides=slides, parts=[job.stamp for job in jobs])
    marker = config.out / "tiles.json"
    tiles_path, slides_path = config.out / "tiles.parquet", config.out / "slides.parquet"
    if is_done(marker, stamp) and tiles_path.is_file() and slides_path.is_file():
        return
    marker.unlink(missing_ok=True)
    parts = [
        _listed(read_table(job.folder / TILES_FILE, PART), source)
        for job, (source, record) in zip(jobs, rows, strict=True)
        if record["n_cells"]
    ]
    tiles = pa.concat_tables([TILES.empty_table(), *parts])
    labels = [pa.field(name, pa.string()) for name in rows[0][0].labels]
    write_table(tiles, tiles_path, TILES)
    table = pa.Table.from_pylist(slides, pa.schema([*SLIDES, *labels]))
    write_table(table, slides_path, SLIDES)
    mark_done(marker, stamp, slides=len(slides), tiles=tiles.num_rows)


def _listed(part: pa.Table, source: SlideSource) -> pa.Table:
    """A part with the columns that the slide list gives, in the order of the schema."""
    count = part.num_rows
    part = part.append_column("group", pa.array([source.group] * count, pa.string()))
    part = part.append_column("stain", pa.array([source.stain] * count, pa.string()))
    return part.select(TILES.names).cast(TILES)


def _summary(rows: list[tuple[SlideSource, dict[str, Any]]], n_tiled: int, seconds: float) -> str:
    statuses = Counter(record["status"] for _, record in rows)
    by_status = ", ".join(f"{statuses[s]} {s}" for s in Status if statuses[s])
    cells, ok, unreadable = (
        sum(record[name] for _, record in rows) for name in ("n_cells", "n_ok", "n_unreadable")
    )
    return (
        f"tile: {len(rows)} slides ({by_status}) · {cells} cells, {ok} with tissue and read, "
        f"{unreadable} unreadable · {n_tiled} slides tiled now in {format_seconds(seconds)}"
    )


def _judge(rows: list[tuple[SlideSource, dict[str, Any]]], config: TileConfig) -> None:
    """Raises where more failed than `max_failed` allows."""
    kept = f"everything else is finished in {config.out}"
    failed = [
        f"{source.slide_id} ({record['status']}: {record['reason']})"
        for source, record in rows
        if record["status"] not in (Status.OK, Status.EMPTY)
    ]
    more = f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
    named = f"{len(failed)} of {len(rows)} slides failed: {'; '.join(failed[:_NAMED])}{more}"
    if len(failed) > config.max_failed * len(rows):
        raise TooManyFailedError(f"{named}; {kept}; mend them, or {_TOLERATE}")
    if failed:
        print(f"tolerated: {named}")
    ok, bad = (sum(record[name] for _, record in rows) for name in ("n_ok", "n_unreadable"))
    if bad > config.max_failed * (ok + bad):
        raise TooManyFailedError(
            f"{bad} of {ok + bad} tiles could not be read (column 'reason' of tiles.parquet); "
            f"{kept}; mend their slides, or {_TOLERATE}"
        )
    if ok == 0:
        raise EosinError(f"no tile with tissue on {len(rows)} slides; look at the overlays; {kept}")
