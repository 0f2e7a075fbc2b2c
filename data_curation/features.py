"""The feature store: one layout for embedded tiles, the evaluation's cache and bags.

A folder with ``features.npy`` (float16 [N, D], to be memory-mapped), ``rows.parquet`` (what each
row is), ``offsets.npy`` (where each slide's rows begin) and ``meta.json`` (which encoder, what
data), written last. Features are computed in
chunks; after a kill the same call goes on at the first chunk that was not on disk.
"""

import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from eosin.configs.errors import InputError
from eosin.data_curation.manifest import FEATURE_ROWS, read_table, write_table
from eosin.launch.artefacts import (
    is_done,
    mark_done,
    read_json,
    replacing,
    stamp_of,
    write_json,
)

FORMAT = 1
"""Version of what a store holds; stores of another one are made again."""

META = "meta.json"
"""The marker, written last."""
_FEATURES, _ROWS, _PROGRESS = "features.npy", "rows.parquet", ".progress.json"
_OFFSETS = "offsets.npy"


@dataclass(frozen=True, kw_only=True)
class FeatureStore:
    """Features on disk and what they are of."""

    features: npt.NDArray[np.float16]
    """Memory-mapped, [N, D]."""
    rows: pa.Table
    """Under `FEATURE_ROWS`, N rows."""
    meta: dict[str, Any]
    offsets: npt.NDArray[np.int64] | None = None
    """[S + 1]: the rows of slide s are ``offsets[s]`` to ``offsets[s + 1]``, slides in the order of
    the rows; None where the rows do not lie slide by slide, or name no slides."""

    def bags(self) -> Iterator[tuple[str, npt.NDArray[np.float16]]]:
        """Each slide's id with its features [n, D], which are views of the mapped file.

        Raises:
            InputError: the rows do not lie slide by slide.
        """
        if self.offsets is None:
            raise InputError("these features do not lie slide by slide: they are no bags")
        for start, stop in itertools.pairwise(self.offsets.tolist()):
            yield self.rows["slide_id"][start].as_py(), self.features[start:stop]


def features_stamp(encoder_digest: str, data_digest: str) -> str:
    """The key of a store: weights, preprocessing and pooling; tiles and their order."""
    return stamp_of(
        stage="features", format=FORMAT, encoder=encoder_digest, data=data_digest, dtype="float16"
    )


def has_features(folder: Path, stamp: str) -> bool:
    """Whether `folder` holds the finished store with this stamp."""
    return is_done(folder / META, stamp)


def rows_done(folder: Path, stamp: str) -> int:
    """Rows that an earlier call with this stamp made safe."""
    try:
        progress = read_json(folder / _PROGRESS)
    except (FileNotFoundError, ValueError):
        return 0
    return int(progress["rows"]) if progress["stamp"] == stamp else 0


def open_features(folder: Path) -> FeatureStore:
    """Opens a finished store.

    Raises:
        InputError: there is none, or its parts do not belong together.
    """
    if not (folder / META).is_file():
        raise InputError(f"{folder} holds no finished features; run the step that makes them")
    rows = read_table(folder / _ROWS, FEATURE_ROWS)
    try:
        features = np.load(folder / _FEATURES, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder / _FEATURES} cannot be read: {error}; delete {folder}"
        ) from error
    if features.dtype != np.float16 or len(features) != rows.num_rows:
        raise InputError(f"{folder}: features and rows do not belong together; delete the folder")
    return FeatureStore(
        features=features, rows=rows, meta=read_json(folder / META), offsets=slide_offsets(rows)
    )


def slide_offsets(rows: pa.Table) -> npt.NDArray[np.int64] | None:
    """Where each slide's rows begin, and the end: int64 [S + 1]; None as in `FeatureStore`."""
    column = rows["slide_id"]
    if not rows.num_rows or column.null_count:
        return None
    codes = column.combine_chunks().dictionary_encode().indices.to_numpy()
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    if len(starts) != len(np.unique(codes)):
        return None
    return np.append(starts, rows.num_rows).astype(np.int64)


def write_features(
    folder: Path,
    *,
    rows: pa.Table,
    dim: int,
    stamp: str,
    compute: Callable[[int, int], npt.NDArray[np.float32]],
    chunk_rows: int,
    meta: dict[str, Any],
) -> FeatureStore:
    """Fills a store chunk by chunk, or goes on with one that was begun with the same stamp.

    Args:
        folder: where it lies; features with another stamp in it are replaced.
        rows: under `FEATURE_ROWS`, N rows.
        dim: D.
        stamp: from `features_stamp`.
        compute: (start, stop) to the features [stop - start, D] of those rows. It is called with
            the same bounds whether or not there was a kill.
        chunk_rows: rows that are computed and made safe at a time.
        meta: what else ``meta.json`` records.

    Raises:
        InputError: a feature is not finite in float16.
    """
    if has_features(folder, stamp):
        return open_features(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / META).unlink(missing_ok=True)
    partial, final = folder / f".{_FEATURES}.partial", folder / _FEATURES
    header = _npy_header(rows.num_rows, dim)
    done = rows_done(folder, stamp)
    if done == rows.num_rows and final.is_file() and not partial.is_file():
        final.replace(partial)  # killed between the renaming and the marker
    if not partial.is_file() or partial.stat().st_size < len(header) + done * 2 * dim:
        done = 0
    if not done:
        (folder / _PROGRESS).unlink(missing_ok=True)  # another stamp's would count these rows
    with partial.open("r+b" if done else "wb") as file:
        file.write(header)
        file.truncate(len(header) + done * 2 * dim)
        file.seek(0, os.SEEK_END)
        for start in range(done, rows.num_rows, chunk_rows):
            stop = min(start + chunk_rows, rows.num_rows)
            file.write(as_half(compute(start, stop), start).tobytes())
            file.flush()
            os.fsync(file.fileno())
            write_json(folder / _PROGRESS, {"stamp": stamp, "rows": stop})
    _write_rows(folder, rows)
    partial.replace(final)
    mark_done(folder / META, stamp, format=FORMAT, dtype="float16", dim=dim, **meta)
    (folder / _PROGRESS).unlink(missing_ok=True)
    return open_features(folder)


def join_features(
    folder: Path,
    *,
    rows: pa.Table,
    dim: int,
    stamp: str,
    parts: Iterable[npt.NDArray[np.float16]],
    meta: dict[str, Any],
) -> None:
    """Writes a store from features that were computed in parts.

    Args:
        folder: where it lies; what is in it is replaced, the marker last.
        rows: under `FEATURE_ROWS`, N rows.
        dim: D.
        stamp: from `features_stamp`.
        parts: float16 [n, D] each, N rows together; one is in memory at a time.
        meta: what else ``meta.json`` records.
    """
    (folder / META).unlink(missing_ok=True)
    with replacing(folder / _FEATURES) as partial, partial.open("wb") as file:
        file.write(_npy_header(rows.num_rows, dim))
        for part in parts:
            file.write(np.ascontiguousarray(part, "<f2").tobytes())
    _write_rows(folder, rows)
    mark_done(folder / META, stamp, format=FORMAT, dtype="float16", dim=dim, **meta)


def _write_rows(folder: Path, rows: pa.Table) -> None:
    """``rows.parquet``, and ``offsets.npy`` where the rows lie slide by slide."""
    write_table(rows, folder / _ROWS, FEATURE_ROWS)
    offsets = slide_offsets(rows)
    if offsets is None:
        (folder / _OFFSETS).unlink(missing_ok=True)
        return
    with replacing(folder / _OFFSETS) as partial, partial.open("wb") as file:
        np.save(file, offsets, allow_pickle=False)


def _npy_header(n_rows: int, dim: int) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f2", "fortran_order": False, "shape": (n_rows, dim)}
    )
    return buffer.getvalue()


def as_half(features: npt.NDArray[np.float32], start: int) -> npt.NDArray[np.float16]:
    """Features [n, D] as float16; `start` is the row of the first, for the message.

    Raises:
        InputError: one is not finite in float16.
    """
    with np.errstate(over="ignore"):
        half = features.astype("<f2")
    bad = np.flatnonzero(~np.isfinite(half).all(axis=1))
    if len(bad):
        raise InputError(
            f"the features of row {start + bad[0]} do not fit float16 (largest magnitude "
            f"{np.abs(features[bad[0]]).max():.3g}): the encoder is broken or not normalised"
        )
    return half
