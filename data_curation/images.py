"""Tile images that exist already: a folder of JPEG and PNG files, or a table that names them."""

import csv
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from eosin.configs.errors import InputError
from eosin.data_curation.codec import MAX_BYTES, EncodedTile, ImageError, inspect_image
from eosin.data_curation.image_metadata import without_metadata
from eosin.data_curation.manifest import INDEX, Status
from eosin.data_curation.pseudonyms import Pseudonyms
from eosin.data_curation.records import (
    LABELS,
    Failure,
    Records,
    file_identity,
    keep_rows,
    make_keys,
)

SUFFIXES = {".jpg", ".jpeg", ".png"}
"""Files that are taken from a folder, in any case; what is in them decides their format."""


def image_records(
    images: Path, keep: Sequence[str] = (), pseudonyms: Pseudonyms | None = None
) -> Records:
    """The records of existing tile images, sorted by key.

    Args:
        images: a folder, searched below too, or a CSV table with a column ``path`` (relative to
            the table) and, if known, ``group``, ``slide_id``, ``mpp``, ``cluster``, ``stain``;
            further columns are carried into the index. Without ``group`` each image is its own.
        keep: see `records.keep_rows`.
        pseudonyms: what takes the place of keys, groups and slide_ids; paths are left out then.

    Raises:
        InputError: there is no image, or the table cannot be used.
        ConfigError: see `records.keep_rows`.
    """
    table = _list_folder(images) if images.is_dir() else read_text_table(images, ("path",))
    paths = table["path"].to_pylist()
    if not paths:
        raise InputError(f"{images} holds no tiles: neither *.jpg, *.jpeg nor *.png")
    _check_table(table, images)
    # Named before the filter, so that another filter gives the same tile the same key.
    table = table.append_column("key", [make_keys([_without_suffix(path) for path in paths])])
    table = keep_rows(table, keep)
    if pseudonyms is not None:
        for name in {"key", "group", "slide_id"} & set(table.column_names):
            hidden = [pseudonyms.of(text) if text else text for text in table[name].to_pylist()]
            table = table.set_column(table.column_names.index(name), name, [hidden])
    table = table.sort_by("key")
    root = images if images.is_dir() else images.parent
    files = [root / path for path in table["path"].to_pylist()]
    source = {"path": [str(file) for file in files], "identity": [file_identity(f) for f in files]}
    labels = _labels(table, images)
    if pseudonyms is not None:
        labels = labels.drop_columns(["path"])
    return Records(labels=labels, source=pa.table(source))


def read_images(
    source: pa.Table, *, keep_metadata: bool = False
) -> Iterator[EncodedTile | Failure]:
    """Each image of `source` as it is encoded, after a full strict decode.

    Args:
        source: with a column ``path``.
        keep_metadata: whether EXIF, comments and texts stay in; see `image_metadata`.
    """
    for path in source["path"].to_pylist():
        try:
            tile = _read_image(Path(path))
            plain = tile.data if keep_metadata else without_metadata(tile.data, tile.suffix)
            yield tile if plain == tile.data else inspect_image(plain)
        except ImageError as error:
            yield Failure(status=Status.UNREADABLE, reason=str(error))
        except OSError as error:
            yield Failure(status=Status.UNREADABLE, reason=(error.strerror or "no file").lower())


def read_text_table(path: Path, required: Sequence[str]) -> pa.Table:
    """A CSV table with all columns as text, so that patient ``007`` stays ``007``.

    Raises:
        InputError: the file is missing or no CSV, or lacks a required column or value.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a folder of images or a CSV table")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file), [])
        refuse_repeated(header, path)
        missing = [name for name in required if name not in header]
        if missing:
            raise InputError(
                f"{path} has no column '{missing[0]}'; it has: {', '.join(header)[:200]}"
            )
        types = pa_csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string()))
        table = pa_csv.read_csv(path, convert_options=types)
    except (UnicodeDecodeError, csv.Error, pa.ArrowInvalid) as error:
        raise InputError(f"{path} is not a CSV table in UTF-8: {error}") from error
    for name in required:
        empty = pc.equal(pc.utf8_trim_whitespace(table[name]), "")
        if pc.any(empty).as_py():
            raise InputError(f"{path}: line {pc.index(empty, True).as_py() + 2} has no '{name}'")
    return table


def refuse_repeated(columns: Sequence[str], path: Path) -> None:
    """Raises InputError where two columns of the table in `path` have the same name."""
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise InputError(f"{path} has the column '{twice[0]}' more than once; rename or drop one")


def _list_folder(folder: Path) -> pa.Table:
    """All images below `folder`; hidden names (a Mac's ``._x.jpg``, a trash) are none."""
    found = [
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    for path in found:
        if not str(path).isprintable():  # nor can a table hold what is not UTF-8
            name = ascii(str(path))
            raise InputError(f"{folder}: the file name {name} has control characters; rename it")
    seen = sorted(str(p) for p in found if not any(part.startswith(".") for part in p.parts))
    return pa.table({"path": pa.array(seen, pa.string())})


def _check_table(table: pa.Table, images: Path) -> None:
    names = table.column_names
    reserved = sorted((set(INDEX.names) - set(LABELS.names) | {"key"}) & set(names))
    if reserved:
        raise InputError(f"{images}: the column name '{reserved[0]}' is reserved; rename it")
    paths = table["path"].to_pylist()
    if len(set(paths)) < len(paths):
        twice, _ = Counter(paths).most_common(1)[0]
        raise InputError(f"{images} names '{twice}' more than once; keep one row a tile")


def _labels(table: pa.Table, images: Path) -> pa.Table:
    """`LABELS`, the path as it was given, and the table's other columns, typed."""
    nothing = pa.nulls(table.num_rows, pa.string())
    columns = {n: _text(table[n]) if n in table.column_names else nothing for n in LABELS.names}
    columns["group"] = pc.coalesce(columns["group"], table["key"])
    try:
        columns["mpp"] = columns["mpp"].cast(pa.float64())
    except pa.ArrowInvalid as error:
        raise InputError(f"{images}: column 'mpp' is not all numbers: {error}") from error
    for name in table.column_names:
        columns.setdefault(name, _typed(table[name]))
    return pa.table(columns)


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """`column` with empty cells as null."""
    return pc.if_else(pc.equal(column, ""), None, column)


def _typed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers where every cell is one and none is a code such as ``007``; else text."""
    text = _text(column)
    if text.null_count == len(text) or pc.any(pc.match_substring_regex(text, r"^-?0\d")).as_py():
        return text
    for kind in (pa.int64(), pa.float64()):
        try:
            return text.cast(kind)
        except pa.ArrowInvalid:
            continue
    return text


def _read_image(path: Path) -> EncodedTile:
    if not stat.S_ISREG(path.stat().st_mode):
        raise ImageError("not a file")  # a pipe or a device might never end
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ImageError(f"larger than {MAX_BYTES} bytes")
    return inspect_image(data)


def _without_suffix(path: str) -> str:
    return re.sub(r"\.(jpe?g|png)$", "", path, flags=re.IGNORECASE)
