"""Rows of the index of shards in memory: plain arrays, from which one row is soon looked up."""

import binascii
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from eosin.data_curation.codec import MAX_PIXELS
from eosin.data_curation.manifest import REFERENCE

DIGEST_BYTES = 16
"""Of an XXH3-128."""

_DIGEST = re.compile(r"[0-9A-Fa-f]{32}")
_Cell = TypeVar("_Cell", bound=np.generic)


@dataclass(frozen=True)
class RowBlock:
    """The rows of one shard, as compact as may be."""

    suffixes: tuple[str, ...]
    """The kinds of images there are."""
    suffix: NDArray[np.int32]
    """[n], numbers in `suffixes`."""
    offset: NDArray[np.int64]
    """[n], of the first byte in the tar."""
    size: NDArray[np.int64]
    """[n], bytes."""
    checksum: bytes
    """16 bytes a record."""
    hw: NDArray[np.int32]
    """[n, 2], height and width, px; 1 × 1 where the index says what cannot be."""
    mpp: NDArray[np.float64]
    """[n], µm per pixel, NaN where unknown."""
    reference: pa.Table | None
    """`manifest.REFERENCE`, where the records point into slides."""

    def n_bytes(self) -> int:
        """Memory that it takes."""
        held = (self.suffix, self.offset, self.size, self.hw, self.mpp)
        more = self.reference.nbytes if self.reference is not None else 0
        return sum(a.nbytes for a in held if a.strides[0]) + len(self.checksum) + more


def compact_rows(table: pa.Table, points: bool) -> RowBlock:
    """The rows of one shard.

    Args:
        table: columns of `manifest.INDEX`, as far as `RowBlock` has them.
        points: whether the records point into slides: `manifest.REFERENCE` are there too.
    """
    suffixes, codes = encode_values(table["suffix"])
    hw = possible_hw(table["height_px"].to_numpy(), table["width_px"].to_numpy())
    return RowBlock(
        suffixes=tuple(suffixes),
        suffix=_lean(codes),
        offset=table["offset"].to_numpy(),
        size=table["size"].to_numpy(),
        checksum=_pack_digests(table["checksum"].combine_chunks()),
        hw=_lean(hw),
        mpp=_lean(table["mpp"].to_numpy()),
        reference=table.select(REFERENCE.names) if points else None,
    )


def possible_hw(height_px: ArrayLike, width_px: ArrayLike) -> NDArray[np.int32]:
    """Sizes of tiles, int32 [n, 2]; 1 × 1 for what cannot be: that is told when it is decoded."""
    hw = np.stack([np.asarray(height_px, np.int32), np.asarray(width_px, np.int32)], axis=1)
    area = hw[:, 0].astype(np.int64) * hw[:, 1]
    hw[(hw < 1).any(axis=1) | (area > MAX_PIXELS)] = 1
    return hw


def encode_values(cells: pa.ChunkedArray) -> tuple[list[str], NDArray[np.int32]]:
    """The values of a column as text, and each cell's number of its value; null is ``""``."""
    if not pa.types.is_dictionary(cells.type):
        cells = cells.dictionary_encode()
    # Of one chunk, lest chunks number their values each in their own way.
    array = cells.unify_dictionaries().combine_chunks()
    values = array.dictionary.cast(pa.string()).fill_null("").to_pylist()
    codes: NDArray[np.int32] = array.indices.fill_null(len(values)).to_numpy().astype(np.int32)
    return [*values, ""], codes


def _pack_digests(cells: pa.Array) -> bytes:
    """XXH3-128 in hex to 16 bytes each; what is no such thing becomes zeros, which nothing has."""
    n, digits = len(cells), 2 * DIGEST_BYTES
    if n and pc.all(pc.equal(pc.binary_length(cells), digits)).as_py():
        first = int(np.frombuffer(cells.buffers()[1], np.int32)[cells.offset])
        with suppress(ValueError):
            return binascii.unhexlify(cells.buffers()[2][first : first + digits * n])
    found = (_DIGEST.fullmatch(text) for text in cells.to_pylist())
    return b"".join(bytes.fromhex(f[0]) if f else bytes(DIGEST_BYTES) for f in found)


def _lean(cells: NDArray[_Cell]) -> NDArray[_Cell]:
    """`cells` [n, …]; where all are the same, a view of one."""
    if (len(cells) and (cells == cells[0]).all()) or np.isnan(cells).all():
        return np.broadcast_to(cells[:1].copy(), cells.shape)
    return cells
