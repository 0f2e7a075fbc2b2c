"""A small folder of shards written by hand, and what makes it agree with itself again.

Nothing of the writer under test is used: whoever sends hostile shards has no reason to either.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import xxhash
from PIL import Image

WIDTH_PX, HEIGHT_PX = 24, 20
KEYS = tuple(f"{shard}{number}" for shard in "ab" for number in range(4))
"""Of the sound folder: four records in each of two shards."""
VICTIM = "a1"
"""The record that a hostile one takes the place of; its row is 1."""

_TEXT = ("shard", "key", "suffix", "checksum", "group", "slide_id", "cluster", "stain")
_OPTIONAL = {"slide_id", "mpp", "cluster", "stain"}
_KINDS = {"offset": pa.int64(), "size": pa.int64(), "mpp": pa.float64()}
_COLUMNS = (
    *("shard", "key", "suffix", "offset", "size", "checksum", "width_px", "height_px"),
    *("group", "slide_id", "mpp", "cluster", "stain"),
)
INDEX = pa.schema(
    [
        pa.field(
            name,
            pa.string() if name in _TEXT else _KINDS.get(name, pa.int32()),
            nullable=name in _OPTIONAL,
        )
        for name in _COLUMNS
    ],
    {"schema_version": "1"},
)
FAILED = pa.schema(
    [
        pa.field(name, pa.string(), nullable=False)
        for name in ("shard", "key", "source", "status", "reason")
    ],
    {"schema_version": "1"},
)


@dataclass(frozen=True)
class Record:
    """What the index says of a record, and its bytes."""

    key: str
    data: bytes
    suffix: str = "jpg"
    width_px: int = WIDTH_PX
    height_px: int = HEIGHT_PX


def pixels(key: str) -> np.ndarray:
    """Noise that differs from key to key: uint8 [HEIGHT_PX, WIDTH_PX, 3]."""
    seed = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16)
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT_PX, WIDTH_PX, 3), np.uint8)


def sound(key: str) -> Record:
    """A JPEG, or a PNG where the key ends with an even number."""
    if int(key[-1]) % 2:
        return Record(key, simplejpeg.encode_jpeg(pixels(key)))
    buffer = io.BytesIO()
    Image.fromarray(pixels(key)).save(buffer, "PNG")
    return Record(key, buffer.getvalue(), "png")


def write_sound(folder: Path) -> None:
    """The eight records of `KEYS`, all sound."""
    write(folder, [sound(key) for key in KEYS])


def write_with(folder: Path, data: bytes, suffix: str, width_px: int, height_px: int) -> None:
    """The sound folder with one record's bytes replaced; index and hashes agree with them."""
    hostile = Record(VICTIM, data, suffix, width_px, height_px)
    write(folder, [hostile if key == VICTIM else sound(key) for key in KEYS])


def write(folder: Path, records: Sequence[Record]) -> None:
    """Writes the records, those of a letter to a shard, and everything else that belongs there."""
    (folder / "parts").mkdir(parents=True)
    rows = []
    for number, letter in enumerate(sorted({record.key[0] for record in records})):
        name = f"{number:06d}"
        mine = [record for record in records if record.key[0] == letter]
        data, offsets = archive(mine)
        (folder / f"{name}.tar").write_bytes(data)
        part = [_row(f"{name}.tar", r, at) for r, at in zip(mine, offsets, strict=True)]
        pq.write_table(pa.Table.from_pylist(part, INDEX), folder / "parts" / f"{name}.parquet")
        rows += part
    pq.write_table(pa.Table.from_pylist([], FAILED), folder / "failed.parquet")
    write_index(folder, pa.Table.from_pylist(rows, INDEX))
    seal(folder)


def archive(records: Sequence[Record]) -> tuple[bytes, list[int]]:
    """A USTAR archive of the records, and where the bytes of each begin."""
    data, offsets = b"", []
    for record in records:
        header = tarfile.TarInfo(f"{record.key}.{record.suffix}")
        header.size = len(record.data)
        data += header.tobuf(tarfile.USTAR_FORMAT)
        offsets.append(len(data))
        data += record.data + bytes(-len(record.data) % 512)
    return data + bytes(1024) + bytes(-(len(data) + 1024) % tarfile.RECORDSIZE), offsets


def write_index(folder: Path, rows: pa.Table) -> None:
    """Writes the index with one row group a shard, as the product does."""
    group = 4 if rows.num_rows < 100 else rows.num_rows
    with pq.ParquetWriter(folder / "index.parquet", rows.schema, compression="zstd") as writer:
        for start in range(0, rows.num_rows, group):
            writer.write_table(rows.slice(start, group))


def edit_index(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """The sound folder with another index, whose hash the marker has."""
    write_sound(folder)
    write_index(folder, change(pq.read_table(folder / "index.parquet")))
    seal(folder)


def edit_victim(folder: Path, **values: Any) -> None:
    """The sound folder with other values in one row of the index."""

    def change(rows: pa.Table) -> pa.Table:
        listed = rows.to_pylist()
        listed[KEYS.index(VICTIM)].update(values)
        return pa.Table.from_pylist(listed, rows.schema)

    edit_index(folder, change)


def edit_marker(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The sound folder with another marker."""
    write_sound(folder)
    marker = json.loads((folder / "shards.json").read_text())
    change(marker)
    (folder / "shards.json").write_text(json.dumps(marker))


def seal(folder: Path) -> None:
    """Makes sidecars and marker say what the files of the folder are, whatever they are."""
    described: dict[str, Mapping[str, Any]] = {}
    for tar in sorted(folder.glob("*.tar")):
        part = folder / "parts" / f"{tar.stem}.parquet"
        described[tar.name] = {"count": 4, "bytes": tar.stat().st_size, "xxh3_128": digest(tar)}
        sidecar = {
            **described[tar.name],
            "schema_version": 1,
            "stamp": "",
            "part_xxh3_128": digest(part),
            "failed": [],
            "with_metadata": 0,
        }
        tar.with_suffix(".json").write_text(json.dumps(sidecar))
    marker = {
        "schema_version": 1,
        "stamp": "",
        "shards": described,
        "failed": 0,
        "with_metadata": 0,
        "index_xxh3_128": digest(folder / "index.parquet"),
        "failed_xxh3_128": digest(folder / "failed.parquet"),
    }
    (folder / "shards.json").write_text(json.dumps(marker))


def digest(path: Path) -> str:
    """XXH3-128 of a file, hex."""
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


def _row(shard: str, record: Record, offset: int) -> dict[str, Any]:
    return {
        "shard": shard,
        "key": record.key,
        "suffix": record.suffix,
        "offset": offset,
        "size": len(record.data),
        "checksum": xxhash.xxh3_128_hexdigest(record.data),
        "width_px": record.width_px,
        "height_px": record.height_px,
        "group": record.key,
        "slide_id": None,
        "mpp": 0.5,
        "cluster": None,
        "stain": None,
    }
