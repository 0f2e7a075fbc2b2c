"""Hostile folders of shards: what each is, and what must become of it.

Whoever makes them can write every file of the folder, so that sizes and hashes agree wherever a
check of those would end the matter too early.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from hostile import images
from hostile.archives import ARCHIVES
from hostile.folder import (
    HEIGHT_PX,
    WIDTH_PX,
    digest,
    edit_index,
    edit_marker,
    edit_victim,
    seal,
    write_index,
    write_sound,
    write_with,
)
from hostile.slides import POINTERS, pointing, valued

Expected = Literal["refused", "skipped", "harmless", "lost", "ended"]
"""refused: an InputError at the opening; skipped: the record `VICTIM` is named as damaged and all
others are read; harmless: all are read; lost: refused, or all records that are not read are
named; ended: what reads it stops with a line that names a slide which cannot be opened now."""

SECRET = "outside/secret.txt"
"""A file beside the folder of shards, below the working folder, that nobody may open."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One hostile folder."""

    name: str
    what: str
    expect: Expected
    build: Callable[[Path], None]
    found: bool = True
    """Whether `eosin shard verify` must find something."""


def _case(
    name: str, what: str, expect: Expected, build: Callable[[Path], None], found: bool = True
) -> Case:
    return Case(name=name, what=what, expect=expect, build=build, found=found)


def _marker(name: str, what: str, change: Callable[[dict[str, Any]], object]) -> Case:
    return _case(f"marker_{name}", what, "refused", partial(edit_marker, change=change))


def _text(name: str, what: str, text: bytes, expect: Expected = "refused") -> Case:
    """A marker of this content."""

    def build(folder: Path) -> None:
        write_sound(folder)
        (folder / "shards.json").write_bytes(text)

    return _case(f"marker_{name}", what, expect, build)


def _named(name: str, shard: str) -> Case:
    """The second shard goes by another name in marker and index, and is there where it can be."""

    def build(folder: Path) -> None:
        write_sound(folder)
        rows = pq.read_table(folder / "index.parquet").to_pylist()
        for row in rows[4:]:
            row["shard"] = shard
        write_index(folder, pa.Table.from_pylist(rows, pq.read_schema(folder / "index.parquet")))
        marker = json.loads((folder / "shards.json").read_text())
        marker["shards"][shard] = marker["shards"].pop("000001.tar")
        marker["index_xxh3_128"] = digest(folder / "index.parquet")
        (folder / "shards.json").write_text(json.dumps(marker))
        if "\0" not in shard and "/" not in shard:
            (folder / "000001.tar").rename(folder / shard)

    return _case(f"name_{name}", f"a shard by the name of {shard!r}", "refused", build)


NAMES = [
    _named("parent", "../outside/secret.txt"),
    _named("absolute", "/etc/passwd"),
    _named("backslash", "..\\000001.tar"),
    _named("nul", "000001.tar\0"),
    _named("newline", "000001.tar\n"),
    _named("space", "000001.tar "),
    _named("digits", "٠٠٠٠٠١.tar"),
    _named("fullwidth", "０００００１.tar"),
    _named("pipe", f"pipe:touch {images.EXECUTED}|"),
    _named("bar", f"| touch {images.EXECUTED}"),
    _named("dollar", f"$(touch {images.EXECUTED}).tar"),
    _named("variable", "${HOME}/000001.tar"),
    _named("web", "http://127.0.0.1:9/000001.tar"),
    _named("file", "file:///etc/passwd"),
    _named("chain", "zip://000001.tar::http://127.0.0.1:9/a.zip"),
    _named("python", "000001.py"),
]


def _set(key: str, value: object, shard: bool = False) -> Callable[[dict[str, Any]], None]:
    def change(marker: dict[str, Any]) -> None:
        (marker["shards"]["000000.tar"] if shard else marker)[key] = value

    return change


def _special(file: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    """The sound folder with one file replaced by what `make` puts at its path."""

    def build(folder: Path) -> None:
        write_sound(folder)
        (folder / file).unlink()
        make(folder / file)

    return build


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _moved(file: str) -> Callable[[Path], None]:
    """The sound folder with one file moved out of it, and a link in its place."""

    def build(folder: Path) -> None:
        write_sound(folder)
        outside = folder.with_name(f"{folder.name}-{file}")
        (folder / file).rename(outside)
        (folder / file).symlink_to(outside)

    return build


MARKERS = [
    _marker("list", "the shards are a list", _set("shards", [])),
    _marker("count_text", "a count in quotes", _set("count", "4", shard=True)),
    _marker("count_true", "a count that is a truth value", _set("count", True, shard=True)),
    _marker("count_negative", "a negative count", _set("count", -4, shard=True)),
    _marker("count_huge", "a count beyond 64 bits", _set("count", 1 << 70, shard=True)),
    _marker("count_more", "more records than the index has", _set("count", 5, shard=True)),
    _marker("count_fewer", "fewer records than the index has", _set("count", 3, shard=True)),
    _marker("bytes_negative", "negative bytes", _set("bytes", -1, shard=True)),
    _marker("bytes_nan", "bytes that are no number", _set("bytes", float("nan"), shard=True)),
    _marker("bytes_infinite", "infinite bytes", _set("bytes", float("inf"), shard=True)),
    _marker("hash_list", "a hash that is a list", _set("xxh3_128", ["a"], shard=True)),
    _marker("newer", "a layout of the future", _set("schema_version", 1 << 40)),
    _marker("version_true", "a version that is a truth value", _set("schema_version", True)),
    _marker("no_shards", "no shards, though the index has records", _set("shards", {})),
    _text("empty", "an empty file", b""),
    _text("array", "JSON, but no object", b"[1, 2]"),
    _text("deep", "100,000 brackets, one within the other", b"[" * 100_000),
    _text("deep_object", "objects 100,000 deep", b'{"a":' * 100_000),
    _text("digits", "a number of a million digits", b'{"schema_version": ' + b"9" * 10**6 + b"}"),
    _text("latin", "not UTF-8", b'{"schema_version": 1, "stamp": "\xe9\xff"}'),
    _text("utf16", "UTF-16 with a byte order mark", '{"schema_version": 1}'.encode("utf-16")),
    _text("blank", "30 MB of blanks", b" " * 30_000_000),
    _text("pickle", "a pickle", images.pickled()),
    _case(
        "marker_twice",
        "the key `shards` twice, first with a name that escapes",
        "harmless",
        lambda folder: _twice(folder),
        found=False,
    ),
    _case("marker_folder", "a folder", "refused", _special("shards.json", Path.mkdir)),
    _case("marker_pipe", "a named pipe", "refused", _special("shards.json", os.mkfifo)),
    _case("marker_loop", "a link to itself", "refused", _special("shards.json", _loop)),
    _case("index_pipe", "the index is a pipe", "refused", _special("index.parquet", os.mkfifo)),
    _case("index_loop", "it links to itself", "refused", _special("index.parquet", _loop)),
    _case(
        "index_gone",
        "the index is not there",
        "refused",
        _special("index.parquet", lambda path: None),
    ),
    _case("shard_pipe", "a shard is a pipe", "refused", _special("000000.tar", os.mkfifo)),
    _case("shard_folder", "a shard is a folder", "refused", _special("000000.tar", Path.mkdir)),
    _case("shard_loop", "a shard links to itself", "refused", _special("000000.tar", _loop)),
    _case(
        "shard_device",
        "a shard links to a file without an end",
        "refused",
        _special("000000.tar", lambda path: path.symlink_to("/dev/zero")),
    ),
    _case("shard_link", "a shard lies elsewhere", "harmless", _moved("000000.tar"), found=False),
    _case("sidecar_pipe", "a pipe", "harmless", _special("000000.json", os.mkfifo)),
    _case("part_pipe", "a pipe", "harmless", _special("parts/000000.parquet", os.mkfifo)),
    _case("failed_pipe", "a pipe", "harmless", _special("failed.parquet", os.mkfifo)),
    _case(
        "sidecar_deep",
        "100,000 brackets",
        "harmless",
        _special("000000.json", lambda path: _put(path, b"[" * 100_000)),
    ),
    _case("stranger", "a module beside the shards", "harmless", lambda f: _stranger(f)),
]


def _put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _twice(folder: Path) -> None:
    write_sound(folder)
    marker = folder / "shards.json"
    text = marker.read_text()
    marker.write_text('{"shards": {"../x.tar": {}},' + text[1:])


def _stranger(folder: Path) -> None:
    write_sound(folder)
    (folder / "sitecustomize.py").write_bytes(images.script())
    (folder / "__init__.py").write_bytes(images.script())


def _victim(
    name: str, what: str, expect: Expected = "skipped", found: bool = True, **values: Any
) -> Case:
    return _case(f"row_{name}", what, expect, partial(edit_victim, **values), found)


def _index(
    name: str,
    what: str,
    change: Callable[[pa.Table], pa.Table],
    expect: Expected = "refused",
    found: bool = True,
) -> Case:
    return _case(f"index_{name}", what, expect, partial(edit_index, change=change), found)


def _cast(column: str, kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    def change(rows: pa.Table) -> pa.Table:
        at = rows.column_names.index(column)
        return rows.set_column(at, column, rows[column].cast(kind))

    return change


def _null(column: str) -> Callable[[pa.Table], pa.Table]:
    def change(rows: pa.Table) -> pa.Table:
        at = rows.column_names.index(column)
        values = [None, *rows[column].to_pylist()[1:]]
        return rows.set_column(at, column, pa.array(values, rows.schema.field(column).type))

    return change


def _twin(rows: pa.Table) -> pa.Table:
    return rows.append_column("offset", rows["offset"])


def _with_metadata(**metadata: bytes) -> Callable[[pa.Table], pa.Table]:
    def change(rows: pa.Table) -> pa.Table:
        more = {key.encode(): value for key, value in metadata.items()}
        return rows.replace_schema_metadata({**rows.schema.metadata, **more})

    return change


def _extension(rows: pa.Table) -> pa.Table:
    """A column whose type would be made by unpickling, as Arrow once did (CVE-2023-47248)."""
    metadata = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": images.pickled(),
    }
    field = pa.field("note", pa.binary(), metadata=metadata)
    return rows.append_column(field, pa.array([b"x"] * rows.num_rows, pa.binary()))


def _bomb(column: str) -> Callable[[pa.Table], pa.Table]:
    """100 MB of text in one cell, which the file holds compressed."""

    def change(rows: pa.Table) -> pa.Table:
        values = ["x" * 100_000_000, *[""] * (rows.num_rows - 1)]
        if column not in rows.column_names:
            return rows.append_column(column, pa.array(values, pa.string()))
        values = [values[0], *rows[column].to_pylist()[1:]]
        at = rows.column_names.index(column)
        return rows.set_column(at, rows.schema.field(column), pa.array(values, pa.string()))

    return change


def _cut_index(share: float) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        write_sound(folder)
        index = folder / "index.parquet"
        data = index.read_bytes()
        index.write_bytes(data[: int(len(data) * share)])
        seal(folder)

    return build


def _overwritten(start: float, length: int) -> Callable[[Path], None]:
    """The index with `length` bytes of nonsense from a share `start` of it on."""

    def build(folder: Path) -> None:
        write_sound(folder)
        index = folder / "index.parquet"
        data = bytearray(index.read_bytes())
        at = int(len(data) * start)
        data[at : at + length] = bytes((at * 37 + n * 101) % 256 for n in range(length))
        index.write_bytes(data)
        seal(folder)

    return build


HUGE = 1 << 62

ROWS = [
    _victim("offset_negative", "an offset before the shard", offset=-512),
    _victim("offset_beyond", "an offset beyond the shard", offset=1 << 40),
    _victim("offset_huge", "an offset at the end of 63 bits", offset=2**63 - 1),
    _victim(
        "size_zero",
        "no bytes, with the checksum of none",
        size=0,
        checksum="99aa06d3014798d86001c324468d497f",
    ),
    _victim("size_negative", "negative bytes", size=-1),
    _victim("size_huge", "more bytes than there is memory", size=HUGE),
    _victim("size_beyond", "more bytes than the shard has", size=1 << 33),
    _victim("checksum_empty", "no checksum", checksum=""),
    _victim("checksum_text", "a checksum that is none", checksum="zz" * 16),
    _victim("checksum_long", "a checksum of a megabyte", "lost", checksum="0" * 1_000_000),
    _victim("suffix_pickle", "a record that says it is a pickle", suffix="pkl"),
    _victim("suffix_module", "a record that says it is a module", suffix="pyd"),
    _victim("suffix_torch", "a record that says it holds weights", suffix="pth"),
    _victim("suffix_array", "a record that says it is an array", suffix="npy"),
    _victim("suffix_json", "a record that says it is JSON", suffix="json"),
    _victim("suffix_path", "a suffix that leads elsewhere", suffix="/../../x.jpg"),
    _victim("suffix_slide", "a record that says it lies in a slide", suffix="slide"),
    _victim("suffix_other", "a JPEG that says it is a PNG", suffix="png"),
    _victim("width_zero", "no width", found=False, width_px=0),
    _victim("width_negative", "a negative width", found=False, width_px=-WIDTH_PX),
    _victim("width_huge", "a width of a billion", found=False, width_px=10**9, height_px=10**9),
    _victim("width_double", "twice the width that it has", found=False, width_px=2 * WIDTH_PX),
    _victim(
        "turned", "width and height exchanged", found=False, width_px=HEIGHT_PX, height_px=WIDTH_PX
    ),
    _victim("key_parent", "a key that climbs", "harmless", key="../../etc/x"),
    _victim("key_empty", "an empty key", "harmless", key=""),
    _victim(
        "key_control", "a key with lines and colours of its own", "harmless", key="a\n\x1b[31m\0b"
    ),
    _victim("shard_unknown", "a shard that nobody described", "refused", shard="../outside.tar"),
    _victim("shard_other", "a row among those of another shard", "lost", shard="000001.tar"),
]

INDICES = [
    _index("few", "a row fewer than was counted", lambda rows: rows.slice(0, 7)),
    _index("many", "a row more", lambda rows: pa.concat_tables([rows, rows.slice(7)])),
    _index("none", "no rows", lambda rows: rows.slice(0, 0)),
    _index("long", "50,000 rows in a few kB", lambda rows: rows.take([0] * 50_000)),
    _index(
        "mixed",
        "rows out of the order of shards",
        lambda rows: rows.take([0, 4, 1, 5, 2, 6, 3, 7]),
        "lost",
    ),
    _index(
        "double",
        "two rows for the same bytes",
        lambda rows: rows.take([0, 1, 2, 2, 4, 5, 6, 7]),
        "harmless",
    ),
    _index("offset_text", "offsets as text", _cast("offset", pa.string())),
    _index("offset_float", "offsets as floating point", _cast("offset", pa.float64())),
    _index("width_text", "widths as text", _cast("width_px", pa.string())),
    _index("key_bytes", "keys as bytes", _cast("key", pa.binary()), "lost"),
    _index(
        "shard_dictionary",
        "shards coded as a dictionary",
        _cast("shard", pa.dictionary(pa.int32(), pa.string())),
        "lost",
        found=True,
    ),
    _index("offset_null", "an offset that is not there", _null("offset"), "lost"),
    _index("size_null", "a size that is not there", _null("size"), "lost"),
    _index("shard_null", "a shard that is not there", _null("shard"), "lost"),
    _index("suffix_null", "a suffix that is not there", _null("suffix"), "lost"),
    _index("checksum_null", "a checksum that is not there", _null("checksum"), "lost"),
    _index("width_null", "a width that is not there", _null("width_px"), "lost"),
    _index(
        "mpp_infinite",
        "an endless scale",
        lambda r: r.set_column(
            r.column_names.index("mpp"),
            "mpp",
            pa.array([float("inf"), -1.0, 0.0, float("nan"), 1e-300, 1e300, None, 0.5]),
        ),
        "harmless",
        found=False,
    ),
    _index("no_column", "the offsets are not there", lambda rows: rows.drop_columns("offset")),
    _index("twin_column", "two columns of offsets", _twin),
    _index("extension", "a type that is made by unpickling", _extension, "harmless", found=False),
    _index(
        "pandas",
        "metadata for another library, broken",
        _with_metadata(pandas=b'{"columns": '),
        "harmless",
        found=False,
    ),
    _index("version_text", "a version that is no number", _with_metadata(schema_version=b"one")),
    _index("version_newer", "a layout of the future", _with_metadata(schema_version=b"999")),
    _index(
        "bomb_stranger",
        "100 MB in a column that nobody asks for",
        _bomb("note"),
        "harmless",
        found=False,
    ),
    _index("bomb_key", "100 MB in the key of a record", _bomb("key"), "lost"),
    *[
        _case(f"index_cut_{n}", f"cut at {n} tenths", "refused", _cut_index(n / 10))
        for n in (0, 3, 6, 9)
    ],
    _case("index_cut_end", "cut one byte before its end", "refused", _cut_index(0.99995)),
    *[
        _case(
            f"index_spoilt_{n}",
            f"64 bytes overwritten at {n} tenths",
            "lost",
            _overwritten(n / 10, 64),
        )
        for n in range(1, 10)
    ],
    _case(
        "index_pickle",
        "a pickle",
        "refused",
        _special("index.parquet", lambda path: _put(path, images.pickled())),
    ),
]


def _record(
    name: str,
    what: str,
    make: Callable[[], bytes],
    suffix: str = "jpg",
    expect: Expected = "skipped",
    px: tuple[int, int] = (WIDTH_PX, HEIGHT_PX),
) -> Case:
    def build(folder: Path) -> None:
        write_with(folder, make(), suffix, *px)

    return _case(f"record_{name}", what, expect, build, found=False)


RECORDS = [
    _record("pickle", "a pickle", images.pickled),
    _record("pickle_png", "a pickle by the name of a PNG", images.pickled, "png"),
    _record("script", "a program", images.script),
    _record("array", "an array of objects", images.array_file, "png"),
    _record("html", "a page: the answer of a server", lambda: b"<!DOCTYPE html><html>404</html>"),
    _record("empty", "nothing", lambda: b""),
    _record("zip_bomb", "50 MB of zeros in a zip", images.zip_bomb),
    _record("png_bomb", "60000 × 60000 pixels", images.png_bomb, "png"),
    _record(
        "png_bomb_told",
        "the same, and the index says so",
        images.png_bomb,
        "png",
        px=(60000, 60000),
    ),
    _record("png_text_bomb", "60 MB of compressed text", images.png_text_bomb, "png"),
    _record(
        "png_profile_bomb",
        "60 MB of a colour profile",
        lambda: images.png_text_bomb(b"iCCP"),
        "png",
    ),
    _record("png_long_data", "pixels far beyond the header's", images.png_long_data, "png", "lost"),
    _record("png_broken_sum", "a wrong checksum in a chunk", images.png_broken_sum, "png"),
    _record("png_cut", "a PNG that ends early", lambda: images.png()[:-25], "png"),
    _record("png_no_data", "a header alone", lambda: images.PNG_START + images.header(8, 8), "png"),
    _record("png_short_header", "half a header", lambda: images.png()[:20], "png"),
    _record(
        "png_palette", "colours that the palette has not", images.png_palette_beyond, "png", "lost"
    ),
    _record("png_many_chunks", "20,000 chunks of text", images.png_many_chunks, "png", "lost"),
    _record("png_huge_chunk", "a chunk of 2 GB that is not there", images.png_huge_chunk, "png"),
    _record("png_deep", "16 bits a channel", images.png_deep, "png"),
    _record("png_clear", "half transparent", images.png_transparent, "png"),
    _record("png_zero", "a header of 0 × 0", lambda: images.png(head=images.header(0, 0)), "png"),
    _record("apng", "an animation", images.apng, "png", "harmless"),
    _record("jpeg_giant", "a JPEG of 65500 × 65500", lambda: images.resized_header(65500, 65500)),
    _record(
        "jpeg_giant_told",
        "the same, and the index says so",
        lambda: images.resized_header(65500, 65500),
        px=(65500, 65500),
    ),
    _record(
        "jpeg_larger",
        "a header of more rows than there are",
        lambda: images.resized_header(640, 480),
        px=(640, 480),
    ),
    _record("jpeg_flat", "a header of no rows", lambda: images.resized_header(24, 0)),
    _record("jpeg_cut", "a JPEG that ends early", lambda: images.jpeg()[:-120]),
    _record("jpeg_header", "a JPEG of its first 100 bytes", lambda: images.jpeg()[:100]),
    _record("jpeg_deep", "12 bits a channel", images.deep_jpeg),
    _record("jpeg_cmyk", "a printer's colours", lambda: images.pillow("CMYK", "JPEG")),
    _record(
        "jpeg_scans",
        "2048 × 2048 pixels in 883 passes: a second for 22 kB",
        lambda: images.many_scans(2048),
        px=(2048, 2048),
    ),
    _record("jpeg_exif", "6 MB of metadata", images.huge_metadata, expect="harmless"),
    _record(
        "jpeg_zip",
        "an archive behind the picture",
        lambda: images.jpeg() + images.zip_bomb(),
        expect="harmless",
    ),
    _record("gif", "an animated GIF", lambda: images.pillow("P", "GIF")),
    _record("webp", "a WebP", lambda: images.pillow("RGB", "WEBP")),
    _record("tiff", "a TIFF", lambda: images.pillow("RGB", "TIFF"), "png"),
    _record("svg", "XML that asks for a file of the machine", images.svg),
    _record(
        "eps", "a PostScript program", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    ),
    _record(
        "large",
        "a tile of 4096 × 4096 in 50 kB",
        lambda: images.large_png(4096),
        "png",
        "harmless",
        (4096, 4096),
    ),
]

TARS = [
    _case(f"tar_{name}", what, "harmless", build, found) for name, what, build, found in ARCHIVES
]

_OF_POINTERS: dict[str, Expected] = {
    "jpeg": "lost",
    **dict.fromkeys(("command", "web"), "ended"),  # no file is there
}

POINTED = [
    _case(
        f"slide_{name}",
        f"a record of {what}",
        _OF_POINTERS.get(name, "skipped"),
        partial(pointing, change=change),
    )
    for name, what, change in POINTERS
]
POINTED.append(
    _case(
        "slide_sound",
        "a shard that points into a slide",
        "harmless",
        partial(pointing, change=valued()),
    )
)

GROUPS: dict[str, list[Case]] = {
    "folder": [*NAMES, *MARKERS],
    "index": [*ROWS, *INDICES],
    "records": [*RECORDS, *TARS],
    "slides": POINTED,
}
