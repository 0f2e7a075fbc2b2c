"""The file of an index: found to be that of its shards, and read a row group at a time.

What stands in it may be damaged, or written to do harm: row groups that would unfold to far more
than records need are refused, and a copy of a remote file is fetched anew where it was damaged.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eosin.configs.errors import InputError, printable
from eosin.data_curation.index_rows import encode_values
from eosin.data_curation.manifest import INDEX, REFERENCE, version_of
from eosin.data_curation.shard_marker import INDEX_NAME, POINTING
from eosin.data_curation.shard_store import LocalFolder, ShardStore
from eosin.launch.artefacts import SCHEMA_VERSION, file_digest

T = TypeVar("T")

MAX_CELL_BYTES = 16384
"""Of a column's average cell; more is taken for a decompression bomb."""
HASHED_BYTES = 64_000_000
"""A fetched index of at most this size is compared with its hash each time it is opened."""


class Bounds(NamedTuple):
    """What the footer says of a column in one row group."""

    low: Any
    """None where it says nothing of values, as where all are null."""
    high: Any
    n_null: int


class IndexFile:
    """``index.parquet`` of a folder of shards, one row group a shard.

    All methods may be called from several threads at once.

    Args:
        store: of the shards.
        names: of the shards; the row groups are in this order.
        counts: int64 [S], records of each.

    Raises:
        InputError: the file is missing, damaged, of an older layout or of other shards.
        EosinError: it cannot be fetched.
    """

    def __init__(self, store: ShardStore, names: Sequence[str], counts: NDArray[np.int64]) -> None:
        self._store, self._names, self._counts = store, names, counts
        self._is_copy = not isinstance(store, LocalFolder)
        self._remedy = "remove it and run the same 'eosin shard' again"
        if self._is_copy:
            self._remedy = "the file there is not what was written, or of an older layout"
        self._lock = threading.RLock()  # of the files
        self._files: dict[str, pq.ParquetFile] = {}  # by the column that is read as a dictionary
        path = store.index()
        hashed = self._is_copy and path.stat().st_size <= HASHED_BYTES
        if hashed and file_digest(path) != store.marker["index_xxh3_128"]:
            store.discard(INDEX_NAME)
        self._trying(self._open)

    @property
    def column_names(self) -> list[str]:
        """Of the index: `manifest.INDEX`, and others behind."""
        return list(self._schema.names)

    def read(self, shard: int, columns: list[str]) -> pa.Table:
        """Some columns of the rows of a shard.

        Raises:
            InputError: the file is damaged there.
        """
        return self._read(shard, columns)

    def codes(self, shard: int, column: str) -> tuple[list[str], NDArray[np.int32]]:
        """The values of a column as text, and each record's number of its value.

        Raises:
            InputError: the file is damaged there, or there is no such column.
        """
        if column not in self._schema.names:
            raise InputError(
                f"{self._store.where(INDEX_NAME)} has no column '{column}'; "
                f"there are: {', '.join(self._schema.names)}"
            )
        cells = self._read(shard, [column], column)[column]
        try:
            return encode_values(cells)
        except pa.ArrowException as error:  # no text can be made of it
            raise self.damaged(error) from error

    def table(self) -> pa.Table:
        """All rows and columns.

        Raises:
            InputError: the file is damaged.
        """
        self._refuse_bomb(range(len(self._names)), self._schema.names)
        return self._trying(lambda: self._file().read())

    def bounds(self, shard: int, column: str) -> Bounds | None:
        """What the footer says of a column in the rows of a shard, where it says anything."""
        group = self._metadata.row_group(shard)
        found = group.column(self._paths.index(column)).statistics
        if found is None or not found.has_null_count:
            return None
        has = found.has_min_max
        return Bounds(found.min if has else None, found.max if has else None, found.null_count)

    def damaged(self, error: Exception) -> InputError:
        """The error to raise where the file is damaged, as `error` has it."""
        first_line = printable(str(error).strip().partition("\n")[0])
        where = self._store.where(INDEX_NAME)
        return InputError(f"{where} is damaged ({first_line}); {self._remedy}")

    def _open(self) -> None:
        """Opens the file anew; an `InputError` where it is not that of the shards."""
        self._files = {"": pq.ParquetFile(self._store.index(), page_checksum_verification=True)}
        file = self._files[""]
        self._metadata, self._schema = file.metadata, file.schema_arrow
        self._paths = [file.schema.column(n).path for n in range(len(file.schema.names))]
        self._check_footer()

    def _file(self, coded: str = "") -> pq.ParquetFile:
        if coded not in self._files:
            self._files[coded] = pq.ParquetFile(
                self._store.index(),
                page_checksum_verification=True,
                read_dictionary=[coded],
                metadata=self._metadata,
            )
        return self._files[coded]

    def _read(self, shard: int, columns: list[str], coded: str = "") -> pa.Table:
        """Args: `coded`: a column that comes as a dictionary, as it mostly lies in the file."""
        self._refuse_bomb([shard], columns)
        return self._trying(
            lambda: self._file(coded).read_row_group(shard, columns, use_threads=False)
        )

    def _trying(self, action: Callable[[], T]) -> T:
        """What `action` gives; a damaged copy is fetched anew for a second attempt."""
        with self._lock:
            try:
                return action()
            except (pa.ArrowException, OSError) as error:
                if not self._store.discard(INDEX_NAME):
                    raise self.damaged(error) from error
            try:
                self._open()
                return action()
            except (pa.ArrowException, OSError) as error:
                raise self.damaged(error) from error

    def _refuse_bomb(self, shards: Iterable[int], columns: Iterable[str]) -> None:
        """Raises where cells have more bytes than those of an index ever have."""
        names = tuple(columns)
        leaves = [
            number
            for number, path in enumerate(self._paths)
            if any(path == name or path.startswith(f"{name}.") for name in names)
        ]
        for shard in shards:
            group = self._metadata.row_group(shard)
            claimed = sum(group.column(leaf).total_uncompressed_size for leaf in leaves)
            if claimed > MAX_CELL_BYTES * len(leaves) * (group.num_rows + 1):
                raise self.damaged(ValueError(f"{claimed} bytes for {group.num_rows} rows"))

    def _check_footer(self) -> None:
        """Refuses a file whose row groups are not the shards of the marker, from its footer."""
        where = self._store.where(INDEX_NAME)
        version = version_of(self._schema)
        if version > SCHEMA_VERSION:
            raise InputError(f"{where} was written by a newer eosin (schema_version {version})")
        needed = [*INDEX, *(REFERENCE if any(n.endswith(POINTING) for n in self._names) else ())]
        for field in needed:
            once = self._schema.names.count(field.name) == 1
            given = self._schema.field(field.name) if once else None
            if given is None or given.type != field.type or given.nullable > field.nullable:
                raise InputError(f"{where} lacks the column {field.name} ({field.type})")
        if self._metadata.num_row_groups != len(self._names):
            raise InputError(
                f"{where} has {self._metadata.num_row_groups} row groups for {len(self._names)} "
                "shards: an older layout, or damaged; "
                + (
                    self._remedy
                    if self._is_copy
                    else "run the same 'eosin shard' again, it rewrites the index alone"
                )
            )
        for group, name in enumerate(self._names):
            n_rows, found = self._metadata.row_group(group).num_rows, self.bounds(group, "shard")
            said = (found.low, found.high) if found is not None else (None, None)
            if n_rows != self._counts[group] or (n_rows and said != (name, name)):
                raise InputError(
                    f"{where} is not what was written with these shards: row group {group} has "
                    f"{n_rows} rows of {said[0]}, not {self._counts[group]} of {name}; "
                    f"{self._remedy}"
                )
