"""The selected tiles of tiled slides as records: read at their exact scale and encoded once."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from eosin.configs.errors import InputError
from eosin.data_curation.codec import EncodedTile, encode_tile
from eosin.data_curation.manifest import (
    REFERENCE,
    SELECTION,
    SLIDES,
    TILES,
    Status,
    read_table,
)
from eosin.data_curation.records import (
    LABELS,
    Failure,
    Records,
    file_identity,
    keep_rows,
    make_keys,
)
from eosin.data_curation.slide import MAX_UPSAMPLE, Decoding, RegionError, Slide
from eosin.data_curation.slide_metadata import SlideError
from eosin.data_curation.slide_pool import check_identity

_SOURCE = ("path", "identity", "mpp_x", "mpp_y", "level0_x", "level0_y", "size_px", "requested_mpp")


def tile_records(tiles: Path, selection: Path | None, keep: Sequence[str] = ()) -> Records:
    """The records of tiled slides, in the order of ``tiles.parquet``: slide after slide.

    Args:
        tiles: a folder with ``slides.parquet`` and ``tiles.parquet``.
        selection: a ``selection.parquet``; without one, all tiles of status ``ok``.
        keep: see `records.keep_rows`; columns are those of the tiles, the selection's ``stratum``
            and ``cluster``, and the ones that a table of slides brought.

    Raises:
        InputError: a table is missing, no tile is left, or the selection is of other tiles.
        ConfigError: see `records.keep_rows`.
    """
    table = read_table(tiles / "tiles.parquet", TILES).drop_columns(["stain_vectors"])
    slides = read_table(tiles / "slides.parquet", SLIDES)
    if selection is None:
        table = table.filter(pc.equal(table["status"], Status.OK))
        table = table.append_column("cluster", pa.nulls(table.num_rows, pa.string()))
    else:
        table = _select(table, selection)
    if not table.num_rows:
        raise InputError(f"{selection or tiles} holds no tiles to shard")
    table = keep_rows(_with_slides(table, slides), keep)
    keys = make_keys(table["tile_id"].to_pylist())
    table = table.append_column("key", pa.array(keys))
    table = table.append_column("mpp", table["requested_mpp"])
    known = {*TILES.names, *SLIDES.names, *LABELS.names, *SELECTION.names, "identity"}
    extra = [name for name in table.column_names if name not in known]
    return Records(labels=table.select([*LABELS.names, *extra]), source=table.select(list(_SOURCE)))


def _select(table: pa.Table, selection: Path) -> pa.Table:
    """The selected rows of `table`, in its order, with ``stratum`` and ``cluster``."""
    chosen = read_table(selection, SELECTION)
    if pc.any(pc.not_equal(chosen["copies"], 1)).as_py():
        raise InputError(f"{selection} asks for copies; a shard holds each tile once")
    position = pc.index_in(chosen["tile_id"], table["tile_id"])
    if position.null_count:
        lost = chosen.filter(pc.is_null(position))["tile_id"][0].as_py()
        raise InputError(f"{selection} names '{lost}', which is not in tiles.parquet; select again")
    chosen = chosen.append_column("position", position).sort_by("position")
    table = table.take(chosen["position"])
    for name in ("stratum", "cluster"):
        table = table.append_column(name, chosen[name])
    return table


def _with_slides(table: pa.Table, slides: pa.Table) -> pa.Table:
    """`table` with each slide's path, scale and identity, and what its table of slides brought."""
    position = pc.index_in(table["slide_id"], slides["slide_id"])
    if position.null_count:
        lost = table.filter(pc.is_null(position))["slide_id"][0].as_py()
        raise InputError(f"tiles.parquet names the slide '{lost}', which slides.parquet lacks")
    identities = [file_identity(Path(path)) for path in slides["path"].to_pylist()]
    slides = slides.append_column("identity", pa.array(identities, pa.string()))
    extra = [name for name in slides.column_names if name not in SLIDES.names]
    for name in ("path", "mpp_x", "mpp_y", *extra):
        if name not in table.column_names:
            table = table.append_column(name, slides[name].take(position))
    return table


class SlideUse(NamedTuple):
    """A slide as tiles need it: what opens it, and the scale that it must serve."""

    path: str
    identity: str
    mpp_x: float
    mpp_y: float
    requested_mpp: float


def slide_uses(source: pa.Table) -> list[SlideUse]:
    """The use that each row of `Records.source` makes of its slide, in the rows' order."""
    columns = (source[name].to_pylist() for name in SlideUse._fields)
    return [SlideUse(*values) for values in zip(*columns, strict=True)]


def check_slide(use: SlideUse) -> Failure | None:
    """Why the slide cannot serve its tiles, or None. It is opened, but none of its pixels read."""
    try:
        check_identity(use.path, use.identity)
        mpp = (use.mpp_x, use.mpp_y)
        with Slide(Path(use.path), mpp=mpp, max_upsample=MAX_UPSAMPLE) as slide:
            slide.level_for(use.requested_mpp)
    except SlideError as error:
        return Failure(status=error.status, reason=str(error))
    return None


def refuse_reference_columns(records: Records) -> None:
    """Raises InputError where a column of the user's has a name of `manifest.REFERENCE`."""
    taken = sorted(set(REFERENCE.names) & set(records.labels.column_names))
    if taken:
        raise InputError(
            f"the table of slides has a column '{taken[0]}', a name that pixels=slides needs; "
            "rename it and tile again"
        )


def read_slide_tiles(
    source: pa.Table, jpeg_quality: int, *, pass_through: bool, decoding: Decoding = "exact"
) -> Iterator[EncodedTile | Failure]:
    """Each tile of `source`, encoded; a slide is opened once for a run of its tiles.

    Args:
        source: as in `Records`, of tiles.
        jpeg_quality: of tiles that are encoded here.
        pass_through: whether a tile that the slide holds as a JPEG keeps its bytes; `eosin tile`
            has decoded it before.
        decoding: of the slide's JPEGs.
    """
    rows = source.to_pylist()
    for (path, *mpp), tiles in groupby(rows, key=lambda r: (r["path"], r["mpp_x"], r["mpp_y"])):
        yield from _read_slide(
            Path(path), (mpp[0], mpp[1]), list(tiles), jpeg_quality, pass_through, decoding
        )


def _read_slide(
    path: Path,
    mpp: tuple[float, float],
    tiles: list[dict[str, Any]],
    jpeg_quality: int,
    pass_through: bool,
    decoding: Decoding,
) -> Iterator[EncodedTile | Failure]:
    try:
        slide = Slide(path, mpp=mpp, decoding=decoding, max_upsample=MAX_UPSAMPLE)
    except SlideError as error:
        yield from [Failure(status=Status.UNREADABLE, reason=str(error))] * len(tiles)
        return
    with slide:
        for tile in tiles:
            place = (tile["level0_x"], tile["level0_y"], tile["size_px"], tile["requested_mpp"])
            try:
                coded = slide.coded_tile(*place) if pass_through else None
                if coded is None:
                    encoded = encode_tile(slide.read_tile(*place), jpeg_quality)
                else:
                    encoded = EncodedTile(
                        data=coded,
                        suffix="jpg",
                        width_px=tile["size_px"],
                        height_px=tile["size_px"],
                        has_metadata=False,
                    )
            except (RegionError, SlideError) as error:
                yield Failure(status=Status.UNREADABLE, reason=str(error))
            else:
                yield encoded
