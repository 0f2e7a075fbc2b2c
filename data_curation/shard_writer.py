"""One shard: a USTAR archive with the same bytes whoever writes it, its index rows, its sidecar."""

import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import xxhash

from eosin.configs.errors import InputError
from eosin.data_curation.codec import EncodedTile
from eosin.data_curation.images import read_images
from eosin.data_curation.manifest import INDEX, write_table
from eosin.data_curation.records import Failure, Records
from eosin.data_curation.shard_reader import PARTS_NAME, read_sidecar
from eosin.data_curation.slide_tiles import read_slide_tiles
from eosin.launch.artefacts import file_digest, is_done, mark_done, replacing, stamp_of

FORMAT = 1
"""Raised when the same input gives other bytes than before; shards are then remade."""

_BLOCK = 512
_FACTS = ("suffix", "offset", "size", "checksum", "width_px", "height_px")


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """All that a worker needs to write one shard."""

    out: Path
    name: str
    """``000000``: the shard is ``000000.tar``."""
    records: Records
    from_slides: bool
    jpeg_quality: int
    """Of tiles read from slides; images that exist already keep their bytes."""

    @property
    def tar(self) -> Path:
        """The archive."""
        return self.out / f"{self.name}.tar"

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
        source = self.records.source.drop_columns("path")
        return stamp_of(
            format=FORMAT,
            jpeg_quality=self.jpeg_quality if self.from_slides else None,
            labels=self.records.labels.to_pydict(),
            source=source.to_pydict(),
        )

    def is_finished(self, stamp: str) -> bool:
        """Whether the shard is there, complete, and made with `stamp`."""
        if not (is_done(self.sidecar, stamp) and self.tar.is_file() and self.part.is_file()):
            return False
        try:
            described = read_sidecar(self.sidecar)
        except InputError:
            return False
        return bool(self.tar.stat().st_size == described["bytes"])


def write_shard(job: ShardJob) -> None:
    """Writes a shard: archive, index rows, sidecar, in this order and each in one piece."""
    job.sidecar.unlink(missing_ok=True)
    facts: dict[str, list[Any]] = {name: [] for name in _FACTS}
    kept: list[int] = []
    failed: list[dict[str, str]] = []
    with_metadata = 0
    with replacing(job.tar) as partial, partial.open("wb") as file:
        writer = TarWriter(file)
        keys = job.records.labels["key"].to_pylist()
        for row, (key, tile) in enumerate(zip(keys, read_tiles(job), strict=True)):
            if isinstance(tile, Failure):
                failed.append({"key": key, "source": _source_of(job.records, row), **asdict(tile)})
                continue
            kept.append(row)
            with_metadata += tile.has_metadata
            for name, value in writer.add(key, tile).items():
                facts[name].append(value)
        digest, size = writer.close()
    write_table(_index_rows(job, kept, facts), job.part, INDEX)
    mark_done(
        job.sidecar,
        job.stamp(),
        count=len(kept),
        bytes=size,
        xxh3_128=digest,
        part_xxh3_128=file_digest(job.part),
        failed=failed,
        with_metadata=with_metadata,
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
        return read_slide_tiles(job.records.source, job.jpeg_quality)
    return read_images(job.records.source)


def _source_of(records: Records, row: int) -> str:
    """An image's path as it was given, or a tile's slide."""
    column = "path" if "path" in records.labels.column_names else "slide_id"
    return str(records.labels[column][row].as_py())


def _index_rows(job: ShardJob, kept: list[int], facts: dict[str, list[Any]]) -> pa.Table:
    rows = job.records.labels.take(pa.array(kept, pa.int64()))
    rows = rows.append_column("shard", pa.array([job.tar.name] * len(kept), pa.string()))
    for name, values in facts.items():
        rows = rows.append_column(name, pa.array(values, INDEX.field(name).type))
    return rows
