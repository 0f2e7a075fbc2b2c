"""Labelled tiles in HDF5: an array of RGB tiles and one of labels.

``x`` is uint8 [N, H, W, 3], ``y`` the labels, N numbers or texts in any shape; ``group`` and
``split``, if there, N texts.
"""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import xxhash

from eosin.configs.errors import InputError
from eosin.eval.listing import Listing

_LOCK = threading.Lock()  # HDF5 is not made for threads


@dataclass(frozen=True)
class Hdf5Tile:
    """A row of a file's ``x``."""

    file: Path
    row: int
    name: str = "x"

    def read(self) -> npt.NDArray[np.uint8]:
        """See `TileImage`."""
        try:
            with _LOCK, h5py.File(self.file) as file:
                tile: npt.NDArray[np.uint8] = file[self.name][self.row]
        except (OSError, KeyError, ValueError) as error:
            raise InputError(f"{self.file}: row {self.row} cannot be read: {error}") from error
        return tile

    def checksum(self) -> str:
        """Of the pixels."""
        return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(self.read()).data)


def list_hdf5(path: Path) -> Listing:
    """The tiles of a file with x, y and maybe group and split.

    Raises:
        InputError: it is no such file.
    """
    count = count_tiles(path, "x")
    return Listing(
        tile_ids=[f"{i:08d}" for i in range(count)],
        images=[Hdf5Tile(path, i) for i in range(count)],
        labels=read_column(path, "y", count),
        groups=read_column(path, "group", count) if _has(path, "group") else None,
        splits=read_column(path, "split", count) if _has(path, "split") else None,
    )


def count_tiles(path: Path, name: str) -> int:
    """How many RGB tiles an array holds.

    Raises:
        InputError: the file cannot be read, or the array is missing or no uint8 [N, H, W, 3].
    """
    with _open(path) as file:
        if name not in file:
            raise InputError(f"{path} has no array '{name}'; it has {', '.join(file) or 'none'}")
        array = file[name]
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            raise InputError(
                f"{path}: '{name}' is {array.dtype} {list(array.shape)}, not uint8 [N, H, W, 3]"
            )
        return int(array.shape[0])


def read_column(path: Path, name: str, count: int) -> list[str]:
    """An array of `count` numbers or texts, as texts.

    Raises:
        InputError: it is missing, or of another length.
    """
    with _open(path) as file:
        if name not in file:
            raise InputError(f"{path} has no array '{name}'; it has {', '.join(file) or 'none'}")
        values = np.asarray(file[name]).reshape(-1)
    if len(values) != count:
        raise InputError(f"{path}: '{name}' holds {len(values)} values for {count} tiles")
    return [v.decode() if isinstance(v, bytes) else str(v) for v in values.tolist()]


def _has(path: Path, name: str) -> bool:
    with _open(path) as file:
        return name in file


def _open(path: Path) -> Any:
    try:
        return h5py.File(path)
    except OSError as error:
        raise InputError(f"{path} is no readable HDF5 file: {error}") from error
