"""One shard: a USTAR archive with the same bytes whoever writes it, its index rows, its sidecar.

Or, with ``pixels=slides``, no archive: index rows that say where in a slide each tile lies.
"""

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import xxhash

from eosin.configs.errors import InputError
from eosin.data_curation.codec import EncodedTile
from eosin.data_curation.images import read_images
from eosin.data_curation.manifest import INDEX, REFERENCE, write_table
from eosin.data_curation.records import Failure, Records
from eosin.data_curation.shard_marker import PARTS_NAME, read_sidecar
from eosin.data_curation.slide import Decoding
from eosin.data_curation.slide_tiles import SlideUse, read_slide_tiles, slide_uses
from eosin.launch.artefacts import file_digest, is_done, mark_done, replacing, stamp_of

FORMAT = 2
"""Raised when the same input gives other bytes than before; shards are then remade."""

SLIDE_SUFFIX = "slide"
"""Suffix of a record whose pixels are in a slide."""

Pixels = Literal["copy", "slides"]
"""Where the pixels of a shard are: in a tar of its own, or only in the slides."""

_BLOCK = 512
_FACTS = ("suffix", "offset", "size", "checksum", "width_px", "height_px")
_INDEX_OF_REFERENCES = pa.schema([*INDEX, *REFERENCE])


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """All that a worker needs to write one shard."""

    out: Path
    name: str
    """``000000``: the shard is ``000000.tar``, or ``000000.slides``."""
    records: Records
    from_slides: bool
    jpeg_quality: int
    """Of tiles read from slides; images that exist already are not encoded again."""
    keep_metadata: bool = False
    """Of images that exist already: whether EXIF, comments and texts stay in them."""
    pass_through: bool = True
    """Of tiles read from slides: whether those that the slide holds as JPEGs keep their bytes."""
    decoding: Decoding = "exact"
    """Of tiles read from slides: see `slide.Decoding`."""
    pixels: Pixels = "copy"
    refused: Mapping[SlideUse, Failure] = field(default_factory=dict)
    """With ``pixels=slides``: slides that cannot serve their tiles."""

    @property
    def shard(self) -> Path:
        """The archive; with ``pixels=slides`` a name only, in the index and the marker."""
        return self.out / f"{self.name}.{'tar' if self.pixels == 'copy' else 'slides'}"

    @property
    def sidecar(self) -> Path:
        """Count, bytes and hash of the archive; written last, so it says that the rest is there."""
        return self.out / f"{self.name}.json"

    @property
    def part(self) -> Path:
        """This shard's rows of the index."""
        return self.out / PARTS_NAME / f"{self.name}.parquet"

    def stamp(self) -> str:
        """The hash of everything that the shard's bytes and rows depend on."""
        labels, source = self.records.labels.to_pydict(), self.records.source
        if self.pixels == "slides":  # whose rows hold the path
            return stamp_of(
                format=FORMAT, pixels="slides", labels=labels, source=source.to_pydict()
            )
        return stamp_of(
            format=FORMAT,
            jpeg_quality=self.jpeg_quality if self.from_slides else None,
            pass_through=self.pass_through if self.from_slides else None,
            **({"decoding": self.decoding} if self.decoding != "exact" else {}),
            keep_metadata=None if self.from_slides else self.keep_metadata,
            labels=labels,
            source=source.drop_columns("path").to_pydict(),
        )

    def is_finished(self, stamp: str) -> bool:
        """Whether the shard is there, complete, and made with `stamp`."""
        if not (is_done(self.sidecar, stamp) and self.part.is_file()):
            return False
        try:
            described = read_sidecar(self.sidecar)
        except InputError:
            return False
        if self.pixels == "slides":
            return True
        return self.shard.is_file() and bool(self.shard.stat().st_size == described["bytes"])


def write_shard(job: ShardJob) -> None:
    """Writes a shard: archive, index rows, sidecar, in this order and each in one piece."""
    job.sidecar.unlink(missing_ok=True)
    if job.pixels == "slides":
        _write_references(job)
    else:
        _write_archive(job)


def _write_archive(job: ShardJob) -> None:
    facts: dict[str, list[Any]] = {name: [] for name in _FACTS}
    kept: list[int] = []
    failed: list[dict[str, str]] = []
    with_metadata = 0
    with replacing(job.shard) as partial, partial.open("wb") as file:
        writer = TarWriter(file)
        keys = job.records.labels["key"].to_pylist()
        for row, (key, tile) in enumerate(zip(keys, read_tiles(job), strict=True)):
            if isinstance(tile, Failure):
                failed.append(_failed_row(job.records, row, tile))
                continue
            kept.append(row)
            with_metadata += tile.has_metadata
            for name, value in writer.add(key, tile).items():
                facts[name].append(value)
        digest, size = writer.close()
    write_table(_index_rows(job, kept, facts), job.part, INDEX)
    _mark(job, len(kept), size, digest, failed, with_metadata)


def _write_references(job: ShardJob) -> None:
    """The rows of tiles that stay in their slides, and a sidecar: no slide is read here."""
    uses = slide_uses(job.records.source)
    kept = [row for row, use in enumerate(uses) if use not in job.refused]
    failed = [
        _failed_row(job.records, row, job.refused[use])
        for row, use in enumerate(uses)
        if use in job.refused
    ]
    source = job.records.source.take(pa.array(kept, pa.int64()))
    n, side_px = len(kept), source["size_px"].to_pylist()
    facts: dict[str, list[Any]] = {
        "suffix": [SLIDE_SUFFIX] * n,
        "offset": [0] * n,
        "size": [0] * n,
        "checksum": [""] * n,
        "width_px": side_px,
        "height_px": side_px,
    }
    rows = _index_rows(job, kept, facts)
    for name in REFERENCE.names:
        rows = rows.append_column(name, source[name.removeprefix("source_")])
    write_table(rows, job.part, _INDEX_OF_REFERENCES)
    _mark(job, n, 0, reference_digest(rows), failed, 0)


def reference_digest(rows: pa.Table) -> str:
    """The hash that stands for the bytes of a shard whose `rows` point into slides.

    Keys, the slides' identities and the places in them: what decides the pixels. Paths do not, so
    that slides can move (with their times) without becoming other data to a run.

    Args:
        rows: the shard's rows of the index, all of them in their order.
    """
    names = ["key", *REFERENCE.names]
    names.remove("source_path")
    return stamp_of(rows=rows.select(names).to_pydict())


def _mark(
    job: ShardJob, count: int, size: int, digest: str, failed: list[dict[str, str]], exif: int
) -> None:
    mark_done(
        job.sidecar,
        job.stamp(),
        count=count,
        bytes=size,
        xxh3_128=digest,
        part_xxh3_128=file_digest(job.part),
        failed=failed,
        with_metadata=exif,
    )


class TarWriter:
    """Appends tiles to a USTAR archive with nothing in it that varies: no time, owner or mode."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._state = xxhash.xxh3_128()
        self._position = 0

    def add(self, key: str, tile: EncodedTile) -> dict[str, Any]:
        """Appends a tile; returns what the index says of it, the offset of its first byte too."""
        header = tarfile.TarInfo(f"{key}.{tile.suffix}")
        header.size = len(tile.data)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self._position
        self._write(tile.data)
        self._write(bytes(-self._position % _BLOCK))
        return {
            "suffix": tile.suffix,
            "offset": offset,
            "size": len(tile.data),
            "checksum": xxhash.xxh3_128_hexdigest(tile.data),
            "width_px": tile.width_px,
            "height_px": tile.height_px,
        }

    def close(self) -> tuple[str, int]:
        """Ends the archive; returns its XXH3-128 and its bytes."""
        self._write(bytes(2 * _BLOCK))
        self._write(bytes(-self._position % tarfile.RECORDSIZE))
        return self._state.hexdigest(), self._position

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._state.update(data)
        self._position += len(data)


def read_tiles(job: ShardJob) -> Iterator[EncodedTile | Failure]:
    """The encoded tile of each record in turn, or why there is none."""
    if job.from_slides:
        return read_slide_tiles(
            job.records.source,
            job.jpeg_quality,
            pass_through=job.pass_through,
            decoding=job.decoding,
        )
    return read_images(job.records.source, keep_metadata=job.keep_metadata)


def _failed_row(records: Records, row: int, failure: Failure) -> dict[str, str]:
    """A row of `manifest.FAILED` without its shard."""
    # An image's path as it was given, or a tile's slide; an image with a pseudonym has neither.
    column = "path" if "path" in records.labels.column_names else "slide_id"
    if records.labels[column][row].as_py() is None:
        column = "key"
    key, source = (str(records.labels[name][row].as_py()) for name in ("key", column))
    return {"key": key, "source": source, **asdict(failure)}


def _index_rows(job: ShardJob, kept: list[int], facts: dict[str, list[Any]]) -> pa.Table:
    rows = job.records.labels.take(pa.array(kept, pa.int64()))
    rows = rows.append_column("shard", pa.array([job.shard.name] * len(kept), pa.string()))
    for name, values in facts.items():
        rows = rows.append_column(name, pa.array(values, INDEX.field(name).type))
    return rows
