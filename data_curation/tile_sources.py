"""Where tiles to be embedded come from: slides, image files or finished shards, behind one form.

A source knows its rows without reading a pixel, and reads any of them from any thread.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from eosin.configs.errors import InputError
from eosin.data_curation.embed import read_image
from eosin.data_curation.images import image_records
from eosin.data_curation.manifest import FEATURE_ROWS, SLIDES, Status, read_table
from eosin.data_curation.pseudonyms import Pseudonyms
from eosin.data_curation.records import Failure, Records, file_identity
from eosin.data_curation.shard_reader import RecordError, ShardReader
from eosin.data_curation.slide import RegionError
from eosin.data_curation.slide_metadata import SlideError
from eosin.data_curation.slide_pool import SlidePool
from eosin.data_curation.slide_tiles import tile_records
from eosin.data_curation.stain_library import StainCondition, slide_conditions
from eosin.launch.artefacts import file_digest, stamp_of

OPEN_SLIDES = 4
"""Of one thread; rows come slide after slide."""


class TileSource(ABC):
    """Tiles that can be embedded, N of them."""

    rows: pa.Table
    """Under `FEATURE_ROWS`, with further columns behind, N rows."""
    digest: str
    """Of what the tiles are and of their order; a file that moved keeps it."""

    @abstractmethod
    def read(self, row: int) -> npt.NDArray[np.uint8] | Failure:
        """The tile of a row, RGB uint8 [H, W, 3], or why there is none; from any thread."""

    def stains(self, row: int) -> StainCondition | None:
        """How the slide of a row's tile is stained, where that is known."""
        return None

    @abstractmethod
    def where(self, row: int) -> str:
        """The file that a row's tile is in."""


class SlideTileSource(TileSource):
    """Tiles of a curated set, read from the slides at their exact scale.

    Args:
        tiles: a folder with ``slides.parquet`` and ``tiles.parquet``.
        selection: a selection.parquet of them; without one, all tiles of status ``ok``.
        keep: see `records.keep_rows`.

    Raises:
        InputError, ConfigError: see `slide_tiles.tile_records`.
    """

    def __init__(self, tiles: Path, selection: Path | None, keep: Sequence[str]) -> None:
        records = tile_records(tiles, selection, keep)
        self.rows = _feature_rows(records)
        slides = read_table(tiles / "slides.parquet", SLIDES).drop_columns(["path"])
        identities = sorted(set(records.source["identity"].to_pylist()))
        self.digest = stamp_of(
            tiles=file_digest(tiles / "tiles.parquet"),
            slides=slides.to_pylist(),
            identities=identities,
            selection=file_digest(selection) if selection else None,
            keep=list(keep),
        )
        renamed = [_REFERENCE.get(name, name) for name in records.source.column_names]
        self._source = records.source.rename_columns(renamed)
        self._pools = threading.local()
        self._tiles = tiles
        self._stains: dict[str, StainCondition] | None = None

    def read(self, row: int) -> npt.NDArray[np.uint8] | Failure:
        """As `Slide.read_tile` gives it."""
        pool: SlidePool | None = getattr(self._pools, "pool", None)
        if pool is None:
            pool = self._pools.pool = SlidePool(max_open=OPEN_SLIDES)
        try:
            return pool.read(self._place(row))
        except SlideError as error:
            return Failure(status=error.status, reason=error.reason)
        except RegionError as error:
            return Failure(status=Status.UNREADABLE, reason=str(error))

    def stains(self, row: int) -> StainCondition | None:
        """As slides.parquet says it."""
        if self._stains is None:
            self._stains = slide_conditions(self._tiles)
        return self._stains.get(self.rows["slide_id"][row].as_py())

    def where(self, row: int) -> str:
        """The slide's path."""
        return str(self._source["source_path"][row].as_py())

    def _place(self, row: int) -> dict[str, Any]:
        place: dict[str, Any] = self._source.slice(row, 1).to_pylist()[0]
        return place


class ImageSource(TileSource):
    """Tile images that exist already, see `images.image_records`."""

    def __init__(
        self, images: Path, keep: Sequence[str], pseudonyms: Pseudonyms | None = None
    ) -> None:
        records = image_records(images, keep, pseudonyms)
        self.rows = _feature_rows(records)
        self._paths: list[str] = records.source["path"].to_pylist()
        identities = [file_identity(Path(path)) for path in self._paths]
        labels = records.labels.to_pylist()
        self.digest = stamp_of(images=labels, identities=identities)

    def read(self, row: int) -> npt.NDArray[np.uint8] | Failure:
        """As `embed.read_image` gives it."""
        try:
            return read_image(Path(self._paths[row]))
        except InputError as error:
            return Failure(status=Status.UNREADABLE, reason=str(error))
        except OSError as error:
            return Failure(status=Status.UNREADABLE, reason=(error.strerror or "no file").lower())

    def where(self, row: int) -> str:
        """The image's path."""
        return self._paths[row]


class ShardSource(TileSource):
    """The records of finished shards, in their order.

    Raises:
        InputError: see `ShardReader`.
    """

    def __init__(self, shards: str) -> None:
        self._reader, self._lock = ShardReader(shards), threading.Lock()
        index = self._reader.index.table()
        self.rows = _feature_rows(Records(labels=index, source=index.select([])))
        self._names: pa.ChunkedArray = index["shard"]
        self.digest = stamp_of(shards=self._reader.digest)

    def read(self, row: int) -> npt.NDArray[np.uint8] | Failure:
        """As `ShardReader.image` gives it."""
        with self._lock:  # the index is for one thread, see `ShardReader`
            place = self._reader.index.locate(row)
        try:
            return self._reader.decode(self._reader.fetch(place))
        except RecordError as error:
            return Failure(status=Status.UNREADABLE, reason=str(error))

    def where(self, row: int) -> str:
        """The shard's name."""
        return str(self._names[row].as_py())


_REFERENCE = {name: f"source_{name}" for name in ("path", "identity", "mpp_x", "mpp_y")}
"""What `manifest.REFERENCE`, and so `SlidePool`, calls the columns of a source."""
_NOT_CARRIED = frozenset({"key", "cluster", "shard", "suffix", "offset", "size", "checksum"})


def _feature_rows(records: Records) -> pa.Table:
    """What the rows are, and what their table said of them beside."""
    labels, source = records.labels, records.source
    columns = {"tile_id": labels["key"]}
    for name in FEATURE_ROWS.names[1:]:
        table = next((t for t in (labels, source) if name in t.column_names), None)
        kind = FEATURE_ROWS.field(name).type
        columns[name] = table[name] if table is not None else pa.nulls(labels.num_rows, kind)
    for name in labels.column_names:
        if name not in _NOT_CARRIED:
            columns.setdefault(name, labels[name])
    return pa.table(columns)
