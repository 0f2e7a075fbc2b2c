"""``eosin shard verify``: every shard and record against its checksum; the damaged ones by name.

Readers of tars do not notice an archive that was cut at a member's header: they see fewer tiles.
Here the sidecar, the marker, the index and the archive's own members must all agree. Where records
point into slides, these must be there and unchanged; their pixels are not read.
"""

import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from eosin.configs.errors import EosinError, InputError
from eosin.data_curation.energon_index import META_NAME
from eosin.data_curation.index_file import MAX_CELL_BYTES
from eosin.data_curation.manifest import INDEX, REFERENCE, open_table
from eosin.data_curation.shard_index import ShardIndex
from eosin.data_curation.shard_marker import (
    DESCRIBED,
    FAILED_NAME,
    INDEX_NAME,
    MARKER_NAME,
    PARTS_NAME,
    POINTING,
    SHARD_NAME,
    read_marker,
    read_sidecar,
)
from eosin.data_curation.shard_reader import read_record
from eosin.data_curation.shard_store import LocalFolder
from eosin.data_curation.shard_writer import reference_digest
from eosin.data_curation.slide_metadata import SlideError
from eosin.data_curation.slide_pool import check_identity
from eosin.data_curation.worker_pool import count_workers, run_jobs
from eosin.launch.artefacts import file_digest
from eosin.launch.progress import Meter

_NAMED = 3
_CHECKED = (*INDEX.names, *REFERENCE.names)
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Reads every byte of a folder of shards."""

    shards: Path
    """The folder that `eosin shard` wrote."""
    workers: int = 0
    """Processes; 0 is one per core."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers must be 0 or more, not {self.workers}")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong."""

    file: str
    """Below the folder of shards."""
    what: str
    record: str = ""
    """Its key, where one record is meant and not the file."""

    def __str__(self) -> str:
        record = f", record '{self.record}'" if self.record else ""
        line = f"{self.file}{record}: {self.what}"
        # Names come from the folder: none may break the line or drive the terminal.
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


@dataclass(frozen=True, kw_only=True)
class _Job:
    tar: Path
    """Or the name of a shard that points into slides."""
    described: dict[str, Any] | None
    """What the marker says of the shard."""
    rows: pa.Table | None
    """The shard's rows of the index; None where the index cannot be read."""


def verify(config: VerifyConfig) -> None:
    """Prints every problem on a line of its own, then a summary.

    Raises:
        InputError: the folder does not exist.
        EosinError: there is a problem.
    """
    problems, n_shards, n_records = find_problems(config.shards, config.workers)
    for problem in problems:
        print(f"shard verify: {config.shards}/{problem}")
    if problems:
        files = list(dict.fromkeys(problem.file for problem in problems))
        more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
        here = [name for name in files if (config.shards / name).is_file()]
        remedy = (
            "remove these files and run" if here == files else "remove those that exist and run"
        )
        if not here:
            remedy = "bring back what is missing, or run"
        raise EosinError(
            f"{config.shards}: {len(problems)} problems in {', '.join(files[:_NAMED])}{more}; "
            f"{remedy} the same 'eosin shard' again: it remakes what is missing"
        )
    print(f"shard verify: {config.shards}: {n_shards} shards, {n_records} records, all sound")


def find_problems(shards: Path, workers: int = 0) -> tuple[list[Problem], int, int]:
    """All that is wrong with a folder of shards, how many shards it has, and how many records.

    Raises:
        InputError: the folder does not exist.
    """
    if not shards.is_dir():
        raise InputError(f"{shards} is not a folder of shards: it does not exist")
    problems: list[Problem] = []
    marker = _read_marker(shards, problems)
    index = _open_index(shards, marker, problems)
    names = set(marker["shards"]) if marker else _shards_on_disk(shards)
    problems += _strangers(shards, names)
    jobs = (
        _Job(
            tar=shards / name,
            described=marker["shards"][name] if marker else None,
            rows=rows,
        )
        for name, rows in _rows_by_shard(index, sorted(names), problems)
    )
    found: dict[str, list[Problem]] = {}
    n_workers = max(1, min(count_workers(workers), len(names)))
    with Meter("shard verify", len(names), "shards") as meter:
        for job, result in run_jobs(_check_shard, jobs, n_workers):
            found[job.tar.name] = result
            meter.advance(1, job.tar.name)
    problems += [problem for name in sorted(found) for problem in found[name]]
    return problems, len(names), 0 if index is None else index.metadata.num_rows


def _read_marker(shards: Path, problems: list[Problem]) -> dict[str, Any] | None:
    try:
        return read_marker(shards)
    except InputError as error:
        problems.append(Problem(file=MARKER_NAME, what=str(error)))
        return None


def _open_index(
    shards: Path, marker: dict[str, Any] | None, problems: list[Problem]
) -> pq.ParquetFile | None:
    for name in (INDEX_NAME, FAILED_NAME):
        path = shards / name
        if not path.is_file():
            problems.append(Problem(file=name, what="missing"))
        elif marker and file_digest(path) != marker[f"{path.stem}_xxh3_128"]:
            problems.append(Problem(file=name, what="not what was written: checksum mismatch"))
    if not (shards / INDEX_NAME).is_file():
        return None
    named = any(problem.file == INDEX_NAME for problem in problems)
    try:
        index = open_table(shards / INDEX_NAME, INDEX)
        if marker is not None and not named:  # what was written may still be no index of these
            ShardIndex(LocalFolder(shards, check_sizes=False))
    except InputError as error:
        problems.append(Problem(file=INDEX_NAME, what=f"unreadable: {error}"))
        return None
    return index


def _rows_by_shard(
    index: pq.ParquetFile | None, names: Iterable[str], problems: list[Problem]
) -> Iterator[tuple[str, pa.Table | None]]:
    """The rows of each shard, as far as they can be read; only one shard's are in memory."""
    groups = [] if index is None else _names_in_groups(index)
    columns = [n for n in _CHECKED if index is not None and n in index.schema_arrow.names]
    for name in names:
        if index is None:
            yield name, None
            continue
        wanted = [number for number, (low, high) in enumerate(groups) if low <= name <= high]
        try:
            _refuse_bomb(index, wanted, columns)
            rows = index.read_row_groups(wanted, columns)
            yield name, rows.filter(pc.equal(rows["shard"], name))
        except (pa.ArrowException, OSError) as error:
            first_line = str(error).strip().partition("\n")[0]
            what = f"unreadable: the rows of {name}: {first_line}"
            problems.append(Problem(file=INDEX_NAME, what=what))
            yield name, None


def _refuse_bomb(index: pq.ParquetFile, groups: Sequence[int], columns: Sequence[str]) -> None:
    """Raises ArrowInvalid where cells are longer than any that was ever written."""
    for group in groups:
        rows = index.metadata.row_group(group)
        for name in columns:
            size = rows.column(index.schema_arrow.get_field_index(name)).total_uncompressed_size
            if size > MAX_CELL_BYTES * (rows.num_rows + 1):
                raise pa.ArrowInvalid(f"{size} bytes of '{name}' in {rows.num_rows} rows")


def _names_in_groups(index: pq.ParquetFile) -> list[tuple[str, str]]:
    """The first and last name of a shard in each row group, by its statistics."""
    column = index.schema_arrow.get_field_index("shard")
    found = []
    for number in range(index.metadata.num_row_groups):
        statistics = index.metadata.row_group(number).column(column).statistics
        known = statistics is not None and statistics.has_min_max
        found.append((statistics.min, statistics.max) if known else ("", "~"))
    return found


def _shards_on_disk(shards: Path) -> set[str]:
    """Names of the tars that are there, or that a sidecar there describes."""
    names = set()
    for path in shards.iterdir():
        if path.suffix == ".tar":
            names.add(path.name)
        elif path.suffix == ".json":
            names.add(f"{path.stem}{POINTING if _describes_no_tar(path) else '.tar'}")
    return {name for name in names if SHARD_NAME.fullmatch(name)}


def _describes_no_tar(sidecar: Path) -> bool:
    """Whether a sidecar is of a shard that points into slides: no tar has 0 bytes."""
    try:
        return bool(read_sidecar(sidecar)["bytes"] == 0)
    except (InputError, OSError):
        return False


def _strangers(shards: Path, names: set[str]) -> Iterator[Problem]:
    """Files that no shard has."""
    known = {MARKER_NAME, INDEX_NAME, FAILED_NAME, *names}
    known |= {f"{Path(name).stem}.json" for name in names}
    known |= {f"{PARTS_NAME}/{Path(name).stem}.parquet" for name in names}
    known |= {f"{name}.idx" for name in names}  # of `eosin shard energon`
    for path in sorted(shards.rglob("*")):
        name = path.relative_to(shards).as_posix()
        if name.split("/")[0] == META_NAME:
            continue
        if name not in known and not (path.is_dir() and name == PARTS_NAME):
            yield Problem(file=name, what="extra: no shard of this folder")


def _check_shard(job: _Job) -> list[Problem]:
    """All that is wrong with one shard: sidecar, part, size, hash, records, members."""
    sidecar = job.tar.with_suffix(".json")
    described = job.described
    problems: list[Problem] = []
    try:
        written = read_sidecar(sidecar)
        problems += _check_part(job.tar, written["part_xxh3_128"])
        if described is None:
            described = written
        elif any(written[key] != described[key] for key in DESCRIBED):
            problems.append(Problem(file=sidecar.name, what="not what shards.json says of it"))
    except FileNotFoundError:
        problems.append(Problem(file=sidecar.name, what="missing"))
    except InputError:
        problems.append(Problem(file=sidecar.name, what="damaged"))
    try:
        if job.tar.suffix == POINTING:
            problems += _check_references(job.tar, job.rows, described)
            return problems
        if not job.tar.is_file():
            raise FileNotFoundError(job.tar)
        if described is not None:
            problems += _check_file(job.tar, described)
        if job.rows is not None:
            problems += _check_records(job.tar, job.rows)
    except FileNotFoundError:
        problems.append(Problem(file=job.tar.name, what="missing"))
    except OSError as error:
        problems.append(Problem(file=job.tar.name, what=f"unreadable: {error.strerror}"))
    return problems


def _check_part(tar: Path, digest: str) -> Iterator[Problem]:
    part = tar.parent / PARTS_NAME / f"{tar.stem}.parquet"
    if not part.is_file():
        yield Problem(file=f"{PARTS_NAME}/{part.name}", what="missing")
    elif file_digest(part) != digest:
        yield Problem(file=f"{PARTS_NAME}/{part.name}", what="damaged: checksum mismatch")


def _check_file(tar: Path, described: dict[str, Any]) -> Iterator[Problem]:
    size = tar.stat().st_size
    if size < described["bytes"]:
        yield Problem(file=tar.name, what=f"truncated: {size} of {described['bytes']} bytes")
    elif size > described["bytes"]:
        yield Problem(file=tar.name, what=f"too long: {size} bytes, not {described['bytes']}")
    elif file_digest(tar) != described["xxh3_128"]:
        yield Problem(file=tar.name, what="damaged: checksum mismatch")


def _check_records(tar: Path, rows: pa.Table) -> Iterator[Problem]:
    """Every row of the index against the bytes at its place and the tar's member there."""
    members = _members(tar)
    size = tar.stat().st_size
    with tar.open("rb") as file:
        for row in rows.to_pylist():
            name = f"{row['key']}.{row['suffix']}"
            listed = members.pop(name, None)
            what = ""
            if not 0 <= row["offset"] <= row["offset"] + row["size"] <= size:
                what = "missing: beyond the end of the shard"
            else:
                data = read_record(file.fileno(), row["offset"], row["size"])
                if xxhash.xxh3_128_hexdigest(data) != row["checksum"]:
                    what = "damaged: checksum mismatch"
                elif listed != (row["offset"], row["size"]):
                    what = "missing: a reader of the tar does not find it"
            if what:
                yield Problem(file=tar.name, record=row["key"], what=what)
    for name in members:
        yield Problem(file=tar.name, record=name, what="extra: the index does not have it")


def _check_references(
    shard: Path, rows: pa.Table | None, described: dict[str, Any] | None
) -> Iterator[Problem]:
    """The rows against their hash, and each slide against what it was when they were written."""
    if rows is None:
        return
    lacking = [name for name in REFERENCE.names if name not in rows.column_names]
    if lacking:
        yield Problem(file=shard.name, what=f"damaged: the index lacks {', '.join(lacking)}")
        return
    if described is not None and reference_digest(rows) != described["xxh3_128"]:
        yield Problem(file=shard.name, what="damaged: checksum mismatch")
    slides = rows.select(["source_path", "source_identity"]).group_by(
        ["source_path", "source_identity"], use_threads=False
    )
    for slide in slides.aggregate([]).to_pylist():
        try:
            check_identity(slide["source_path"], slide["source_identity"])
        except SlideError as error:
            yield Problem(file=shard.name, what=error.reason)


def _members(tar: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of each member, as any reader finds them, as far as it gets."""
    found: dict[str, tuple[int, int]] = {}
    size = tar.stat().st_size
    with tar.open("rb") as file:
        while any(block := file.read(tarfile.BLOCKSIZE)):
            try:
                member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
            except (tarfile.HeaderError, ValueError):
                break
            start = file.tell()
            if member.type not in _PLAIN or not 0 <= member.size <= size - start:
                break
            found[member.name] = (start, member.size)
            file.seek(-(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, os.SEEK_CUR)
    return found
