"""Vectors that belong to slides or patients: a report, a profile of expression, another stain.

One table holds them all: a key, a modality, a vector. The trainer never sees the model that made
them. A vector that is missing is a row that is not there. Legend: n samples, m vectors of a
modality, Dm its width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eosin.configs.errors import InputError
from eosin.launch.artefacts import file_digest

COLUMNS = ("key", "modality", "vector")


@dataclass(frozen=True)
class Modality:
    """Vectors of one kind."""

    name: str
    vectors: npt.NDArray[np.float32]
    """[m, Dm]"""
    row: npt.NDArray[np.int64]
    """Of each sample's vector; -1 where there is none, [n]."""


@dataclass(frozen=True)
class Paired:
    """All that a table says of the samples."""

    modalities: tuple[Modality, ...]
    digest: str

    @property
    def dims(self) -> dict[str, int]:
        """Dm by name."""
        return {of.name: of.vectors.shape[1] for of in self.modalities}

    def missing(self) -> npt.NDArray[np.bool_]:
        """Which samples have no vector at all, [n]."""
        found: npt.NDArray[np.bool_] = np.all([of.row < 0 for of in self.modalities], axis=0)
        return found


def read_paired(path: Path, keys: Sequence[str]) -> Paired:
    """The vectors of samples.

    Args:
        path: Parquet with the columns key, modality (text) and vector (a list of numbers).
        keys: of the samples, slides or groups.

    Raises:
        InputError: it cannot be read, lacks a column, names a key twice for a modality, a vector is
            of another width or not finite, or no sample is in it.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{path} is no Parquet table of paired vectors: {error}") from error
    for name in COLUMNS:
        if name not in table.column_names:
            raise InputError(
                f"{path} has no column '{name}'; paired vectors have {', '.join(COLUMNS)}"
            )
    place = {key: at for at, key in enumerate(keys)}
    names = sorted(set(table["modality"].to_pylist()))
    modalities = tuple(
        _modality(path, name, table.filter(pc.equal(table["modality"], name)), place)
        for name in names
    )
    if not any((of.row >= 0).any() for of in modalities):
        raise InputError(
            f"{path}: none of its keys ('{table['key'][0]}', …) is that of a sample ('{keys[0]}', "
            "…); a key is what bags.unit says, a slide or a group"
        )
    return Paired(modalities, file_digest(path))


def _modality(path: Path, name: str, table: pa.Table, place: dict[str, int]) -> Modality:
    keys = [str(key) for key in table["key"].to_pylist()]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InputError(f"{path}: '{twice}' has two vectors of modality '{name}'")
    column = table["vector"].combine_chunks()
    widths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    if len(set(widths.tolist())) != 1 or column.null_count:
        raise InputError(
            f"{path}: vectors of modality '{name}' are {sorted(set(widths.tolist()))} numbers "
            "wide; give them one width"
        )
    vectors = np.asarray(column.flatten(), np.float32).reshape(len(keys), -1)
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise InputError(f"{path}: the vector '{name}' of '{keys[bad[0]]}' is not finite")
    row = np.full(len(place), -1, np.int64)
    for at, key in enumerate(keys):
        if key in place:
            row[place[key]] = at
    return Modality(name, vectors, row)
