"""The print of a tile: a small picture that copies of it share, and a hash that only equals share.

Brightness goes first (log of grey), then everything that changes slowly and how strong the rest is
(local mean and deviation), so that another stain, scanner or compression leaves the print much as
it was. `duplicate_match` compares prints.
"""

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import xxhash

from eosin.configs.errors import InputError
from eosin.data_curation.features import FeatureStore, open_features

SIDE = 32
"""Of the picture, in px: an eighth of the tile is 4."""
HASH_BYTES = 16
DIM = SIDE * SIDE + HASH_BYTES
"""Features of a print: the picture row by row, then the bytes of the hash, 0 to 255 each."""
VERSION = 1
"""Raise it when the same tile gets another print."""

_SIGMA_PX = 3.0
_FAINT = 0.01
"""Deviation of log grey that counts as empty: JPEG's noise on glass makes no picture."""

Array = npt.NDArray[np.float32]


def tile_print(tile: npt.NDArray[np.uint8]) -> Array:
    """The print of an RGB tile, uint8 [H, W, 3]: float32 [DIM]."""
    return np.concatenate([picture_of(tile), _hash(tile)])


def picture_of(tile: npt.NDArray[np.uint8]) -> Array:
    """The picture alone, float32 [SIDE * SIDE]: mean 0 and about 1 strong, or faint."""
    grey = np.asarray(cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY))
    small = cv2.resize(grey.astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    log = np.log(small + np.float32(8.0))
    detail = log - _blurred(log)
    strength = np.sqrt(_blurred(detail * detail) + np.float32(_FAINT**2))
    picture = np.asarray(detail / strength, np.float32).ravel()
    return np.asarray(picture - picture.mean(), np.float32)


def pictures(prints: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """The pictures of prints [N, DIM], as a view: [N, SIDE * SIDE]."""
    return prints[:, : SIDE * SIDE]


def hashes(prints: npt.NDArray[np.floating]) -> npt.NDArray[np.void]:
    """The hashes of prints [N, DIM]: [N], of 16 bytes each."""
    numbers = np.asarray(prints[:, SIDE * SIDE :]).astype(np.uint8)
    return np.ascontiguousarray(numbers).view(np.dtype((np.void, HASH_BYTES))).ravel()


def open_prints(folder: Path) -> FeatureStore:
    """A store of prints.

    Raises:
        InputError: there is none, or its features are no prints of this version.
    """
    store = open_features(folder)
    if store.meta.get("encoder") != "tile-print" or store.features.shape[1] != DIM:
        raise InputError(
            f"{folder} holds features by {store.meta.get('encoder')}, not prints; make them by "
            "eosin embed encoder=builtin:tile-print"
        )
    return store


def _blurred(plane: npt.NDArray[np.floating]) -> Array:
    return np.asarray(
        cv2.GaussianBlur(plane, (0, 0), _SIGMA_PX, borderType=cv2.BORDER_REFLECT), np.float32
    )


def _hash(tile: npt.NDArray[np.uint8]) -> Array:
    """XXH3-128 of size and pixels, byte by byte: float16 holds 0 to 255 exactly."""
    state = xxhash.xxh3_128(f"{tile.shape[0]} {tile.shape[1]} ".encode())
    state.update(np.ascontiguousarray(tile).data)
    return np.frombuffer(state.digest(), np.uint8).astype(np.float32)
