"""The tables of eosin: their Arrow schemas, ids and statuses, defined here and nowhere else."""

import re
from enum import StrEnum
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from eosin.configs.errors import InputError, printable
from eosin.launch.artefacts import SCHEMA_VERSION, replacing


class Status(StrEnum):
    """What became of a slide or a tile; everything but `OK` comes with a reason."""

    OK = "ok"
    EMPTY = "empty"
    """No tissue: on a tile, not read; on a slide, no tile has tissue."""
    UNREADABLE = "unreadable"
    NO_MPP = "no_mpp"
    IMPLAUSIBLE_MPP = "implausible_mpp"
    UPSAMPLING = "upsampling"
    TIMEOUT = "timeout"
    CRASHED = "crashed"


def _field(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def _numbers(name: str, count: int) -> pa.Field:
    """A column of so many numbers a row, or null."""
    return pa.field(name, pa.list_(pa.float32(), count))


SLIDES = pa.schema(
    [
        _field("slide_id", pa.string()),
        _field("path", pa.string()),
        _field("group", pa.string()),  # patient, else the slide itself: never crosses a split
        pa.field("width_px", pa.int64()),  # level 0
        pa.field("height_px", pa.int64()),
        pa.field("mpp_x", pa.float64()),
        pa.field("mpp_y", pa.float64()),
        pa.field("mpp_source", pa.string()),  # "metadata" or "table"
        pa.field("scanner", pa.string()),
        pa.field("quickhash", pa.string()),  # OpenSlide's hash of the file's content
        pa.field("decoding", pa.string()),  # of the pixels that were measured: "exact" or "scaled"
        pa.field("stain", pa.string()),
        pa.field("tissue_area_mm2", pa.float64()),
        pa.field("pen_area_mm2", pa.float64()),
        pa.field("n_sections", pa.int32()),
        _numbers("glass", 3),  # grey values in R, G, B; this and what follows: see `SlideStains`
        _numbers("macenko_vectors", 6),
        _numbers("macenko_strength", 2),
        _numbers("lab_mean", 3),
        _numbers("lab_std", 3),
        _numbers("vahadane_vectors", 6),
        _field("n_cells", pa.int64()),  # rows in tiles.parquet
        _field("n_ok", pa.int64()),  # of them with status ok
        _field("n_unreadable", pa.int64()),
        _field("status", pa.string()),
        _field("reason", pa.string()),
    ]
)
"""One row a slide, sorted by slide_id."""

TILES = pa.schema(
    [
        _field("tile_id", pa.string()),
        _field("slide_id", pa.string()),
        _field("group", pa.string()),
        _field("column", pa.int32()),  # of the slide's grid
        _field("row", pa.int32()),
        _field("level0_x", pa.float64()),  # exact origin in level-0 pixels
        _field("level0_y", pa.float64()),
        _field("size_px", pa.int32()),
        _field("requested_mpp", pa.float64()),
        _field("effective_mpp_x", pa.float64()),
        _field("effective_mpp_y", pa.float64()),
        _field("tissue_fraction", pa.float32()),
        pa.field("section", pa.int32()),  # piece of tissue on the slide, from 1; null: none
        pa.field("pen_fraction", pa.float32()),  # of the tile under pen, by the slide's mask
        pa.field("fold_fraction", pa.float32()),  # likewise where tissue seems folded
        pa.field("white_fraction", pa.float32()),  # this and what follows: null if not read
        pa.field("dark_fraction", pa.float32()),
        pa.field("sharpness", pa.float32()),  # see `measure_sharpness`
        pa.field("entropy", pa.float32()),  # of grey levels, bits
        pa.field("haematoxylin", pa.float32()),  # mean optical density
        pa.field("nuclei_fraction", pa.float32()),
        _numbers("stain_vectors", 6),  # of this tile alone
        pa.field("stain", pa.string()),
        _field("status", pa.string()),
        _field("reason", pa.string()),
    ]
)
"""One row a grid cell, empty cells included, sorted by (slide_id, row, column)."""

SELECTION = pa.schema(
    [
        _field("tile_id", pa.string()),
        _field("stratum", pa.string()),
        pa.field("cluster", pa.string()),
        _field("copies", pa.int32()),
        _field("reason", pa.string()),
    ]
)
"""One row a tile that goes into the shards, in the order of tiles.parquet."""

INDEX = pa.schema(
    [
        _field("shard", pa.string()),  # file name of the tar, or 000000.slides
        _field("key", pa.string()),  # tile_id, or the image's path made a key
        _field("suffix", pa.string()),  # "jpg", "png", or "slide" (see `REFERENCE`)
        _field("offset", pa.int64()),  # of the image's first byte in the tar
        _field("size", pa.int64()),  # bytes
        _field("checksum", pa.string()),  # XXH3-128 of the bytes, hex
        _field("width_px", pa.int32()),
        _field("height_px", pa.int32()),
        _field("group", pa.string()),
        pa.field("slide_id", pa.string()),
        pa.field("mpp", pa.float64()),  # null where the scale is unknown
        pa.field("cluster", pa.string()),
        pa.field("stain", pa.string()),
    ]
)
"""One row a record, in shard order; a table of images may add columns of its own behind these."""

REFERENCE = pa.schema(
    [
        _field("source_path", pa.string()),  # of the slide, absolute
        _field("source_identity", pa.string()),  # its size and time of change, `records`
        _field("source_mpp_x", pa.float64()),  # µm per level-0 pixel that the tile was placed by
        _field("source_mpp_y", pa.float64()),
        _field("level0_x", pa.float64()),  # exact origin in level-0 pixels
        _field("level0_y", pa.float64()),
        _field("size_px", pa.int32()),
        _field("requested_mpp", pa.float64()),
    ]
)
"""Further columns of an index whose records have the suffix ``slide``: a tile and not its bytes,
where their ``offset`` and ``size`` are 0 and their ``checksum`` is empty."""

FEATURE_ROWS = pa.schema(
    [
        _field("tile_id", pa.string()),  # or the image's path, as its table gives it
        _field("group", pa.string()),
        pa.field("slide_id", pa.string()),
        pa.field("level0_x", pa.float64()),
        pa.field("level0_y", pa.float64()),
        pa.field("mpp", pa.float64()),
        pa.field("stain", pa.string()),
    ]
)
"""What the rows of a feature store's ``features.npy`` are, in their order."""

BAG_TOKENS = pa.schema(
    [
        _field("column", pa.int32()),  # on the lattice of its origin
        _field("row", pa.int32()),
        _field("origin", pa.int32()),  # from 1: pieces of tissue may have a lattice of their own
        _field("section", pa.int32()),  # piece of tissue, from 1; 0: none
        _field("size_px", pa.int32()),  # side of the tile as the encoder's transform got it
        _field("footprint_px", pa.float64()),  # side of the tile in level-0 pixels
        _field("level0_mpp", pa.float64()),
    ]
)
"""What a bag knows of its rows beyond `FEATURE_ROWS`, in their order."""

FEATURES_FAILED = pa.schema(
    [
        _field("tile_id", pa.string()),
        _field("source", pa.string()),  # the file that it is in
        _field("status", pa.string()),
        _field("reason", pa.string()),
    ]
)
"""One row a tile that has no row of features, in the order in which it would have one."""

CLUSTERS = pa.schema(
    [
        _field("tile_id", pa.string()),
        _field("slide_id", pa.string()),
        _field("level_1", pa.int32()),  # the finest; level_2, level_3, … follow, where there are
        _field("distance", pa.float32()),  # L2, to the centre of its cluster of level 1
    ]
)
"""One row a tile, in the order of the feature store it was clustered from. Further columns:
``level_2`` and on (int32, each the parent of the one below), and ``slide_cluster`` (int32) with
``slide_distance`` (float32) where tiles were clustered within slides too."""

DUPLICATES = pa.schema(
    [
        _field("tile_id", pa.string()),  # the one to leave out
        _field("kept_tile_id", pa.string()),  # the one that stands for it
        _field("kind", pa.string()),  # exact, near, slide
        pa.field("similarity", pa.float32()),  # correlation of prints or slides; null where equal
        _field("group", pa.string()),
        _field("kept_group", pa.string()),  # where it is another, both groups are one family
    ]
)
"""One row a tile that repeats another, sorted by tile_id; no ``kept_tile_id`` is a ``tile_id``."""

LEAKS = pa.schema(
    [
        _field("tile_id", pa.string()),
        _field("group", pa.string()),
        _field("reason", pa.string()),  # patient, slide, slide hash, image
        _field("denied", pa.string()),  # what the deny list names: a group, a slide, an image
        pa.field("similarity", pa.float32()),  # of an image's print; null elsewhere
    ]
)
"""One row a tile that a deny list forbids, in the order of the tiles."""

PREDICTIONS = pa.schema(
    [
        _field("encoder", pa.string()),  # EncoderRecord.name of the results
        _field("protocol", pa.string()),
        _field("tile_id", pa.string()),
        _field("group", pa.string()),
        _field("label", pa.int32()),  # index into the task's classes
        _field("prediction", pa.int32()),  # likewise
        pa.field("votes", pa.list_(pa.float32())),  # a class each; null: all for the prediction
        pa.field("scores", pa.list_(pa.float32())),  # a class each; null: none beyond the votes
        _field("probabilities", pa.bool_()),  # whether the scores are meant as such
        _field("values", pa.map_(pa.string(), pa.float32())),  # metric → what this tile adds to it
    ]
)
"""One row a test tile, protocol and encoder: what was predicted for it."""

FAILED = pa.schema(
    [
        _field("shard", pa.string()),  # the tar that it would be in
        _field("key", pa.string()),
        _field("source", pa.string()),  # an image's path as it was given, or a tile's slide
        _field("status", pa.string()),
        _field("reason", pa.string()),
    ]
)
"""One row a tile that should be a record and is not, beside the index."""


def make_id(name: str) -> str:
    """`name` with every character outside ``[A-Za-z0-9_-]`` made ``_``."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


def make_tile_id(slide_id: str, level0_x: float, level0_y: float, mpp: float) -> str:
    """``{slide_id}_{x}_{y}_{mpp in nm}``: the tile's name and its key in a shard."""
    return f"{slide_id}_{round(level0_x)}_{round(level0_y)}_{round(mpp * 1000)}"


def full_schema(given: pa.Schema, schema: pa.Schema) -> pa.Schema:
    """`schema`, the further fields of `given` behind it, and the version of the layout."""
    extra = [given.field(name) for name in given.names if name not in schema.names]
    return pa.schema([*schema, *extra]).with_metadata({"schema_version": str(SCHEMA_VERSION)})


def check_table(table: pa.Table, schema: pa.Schema, name: str) -> pa.Table:
    """`table` in exactly the form of `schema`; `name` is the file that it is for.

    Raises:
        ValueError: a column is missing, of another type, or null where it must not be.
    """
    missing = [column for column in schema.names if column not in table.column_names]
    if missing:
        raise ValueError(f"{name}: the columns {', '.join(missing)} are missing")
    for field in schema:
        if not field.nullable and table[field.name].null_count:
            raise ValueError(f"{name}: column '{field.name}' must not be null")
    return table.select(schema.names).cast(schema)


def write_table(table: pa.Table, path: Path, schema: pa.Schema) -> None:
    """Writes `table` to `path` atomically as Parquet, after checking it against `schema`.

    Columns beyond the schema's are kept behind it. Equal tables give equal bytes.

    Raises:
        ValueError: a column is missing, of another type, or null where it must not be.
    """
    checked = check_table(table, full_schema(table.schema, schema), path.name)
    with replacing(path) as partial:
        pq.write_table(checked, partial, compression="zstd", store_schema=True)


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Reads a table written by `write_table`.

    Raises:
        InputError: see `open_table`; or its pages are damaged.
    """
    file = open_table(path, schema)
    try:
        return file.read()
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from error


def open_table(path: Path, schema: pa.Schema) -> pq.ParquetFile:
    """A table written by `write_table`, of which nothing but the footer has been read.

    Raises:
        InputError: the file is missing, not Parquet, of a newer version, or lacks a column.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; run the step that writes it first")
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from error
    given = file.schema_arrow
    version = version_of(given)
    if version > SCHEMA_VERSION:
        raise InputError(f"{path} was written by a newer eosin (schema_version {version})")
    missing = [name for name in schema.names if name not in given.names]
    if missing:
        raise InputError(f"{path} lacks the columns {', '.join(missing)}")
    return file


def version_of(schema: pa.Schema) -> int:
    """The version of a table's layout; a very new one where it is no number."""
    text = (schema.metadata or {}).get(b"schema_version", b"1")
    return int(text) if re.fullmatch(rb"[0-9]{1,9}", text) else 10**9


def unreadable(path: Path, error: Exception) -> InputError:
    """The error of a Parquet file that cannot be read, in one line."""
    first_line = printable(str(error).strip().partition("\n")[0])
    return InputError(f"{path} is not a readable Parquet file: {first_line}")
