"""Embedding tile images: tiles in, a feature store out."""

import io
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image
from torch import Tensor

from eosin.configs.errors import InputError
from eosin.data_curation.codec import MAX_PIXELS, ImageError, decode_image, image_suffix
from eosin.data_curation.encoder_interface import Encoder
from eosin.data_curation.features import (
    FeatureStore,
    as_half,
    features_stamp,
    has_features,
    join_features,
    open_features,
    rows_done,
    write_features,
)
from eosin.launch.artefacts import file_digest, replacing
from eosin.launch.process import World
from eosin.launch.progress import Meter

CHUNK_BATCHES = 8
"""Batches that are decoded ahead and made safe together."""

_TIFF_OR_BMP_STARTS = (b"II*\0", b"MM\0*", b"BM")


def read_image(path: Path) -> npt.NDArray[np.uint8]:
    """The image in `path` as RGB uint8 [H, W, 3]: JPEG or PNG as everywhere, TIFF and BMP too.

    Raises:
        InputError: it is not such an image, or it is damaged or deeper than 8 bits.
    """
    return decode_bytes(path.read_bytes(), str(path))


def decode_bytes(data: bytes, where: str) -> npt.NDArray[np.uint8]:
    """The image in `data` as RGB uint8 [H, W, 3]; see `read_image`.

    Args:
        data: of a whole image file.
        where: it is from, for the message.

    Raises:
        InputError: see `read_image`.
    """
    try:
        if data.startswith(_TIFF_OR_BMP_STARTS):
            return _decode_tiff_or_bmp(data)
        return decode_image(data, image_suffix(data))
    except ImageError as error:
        raise InputError(f"{where} cannot be used as a tile: {error}") from error


def _decode_tiff_or_bmp(data: bytes) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=["TIFF", "BMP"]) as image:
            if image.mode not in ("L", "P", "RGB"):
                raise ImageError(f"image of mode {image.mode}; a tile is 8-bit RGB or grey")
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{image.width}×{image.height} pixels; at most {MAX_PIXELS}")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"damaged image: {error}") from error


class TileImage(Protocol):
    """Where one tile's pixels are to be had."""

    def read(self) -> npt.NDArray[np.uint8]:
        """RGB uint8 [H, W, 3]; safe to call from many threads.

        Raises:
            InputError: it cannot be read.
        """

    def checksum(self) -> str:
        """XXH3-128 of what is read: equal checksums mean equal tiles."""


@dataclass(frozen=True)
class FileTile:
    """A tile in a file of its own."""

    path: Path

    def read(self) -> npt.NDArray[np.uint8]:
        """See `read_image`."""
        return read_image(self.path)

    def checksum(self) -> str:
        """Of the file's bytes."""
        return file_digest(self.path)


def embed_in_memory(
    encoder: Encoder, images: Sequence[TileImage], *, batch_size: int, threads: int = 4
) -> npt.NDArray[np.float32]:
    """Features [N, D] of tile images, kept nowhere.

    Args:
        encoder: from `load_encoder`.
        images: N tiles.
        batch_size: tiles a forward pass.
        threads: that decode and resize.

    Raises:
        InputError: an image cannot be read.
    """
    features = []
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(images), batch_size):
            batch = images[first : first + batch_size]
            prepared = list(pool.map(lambda image: encoder.prepare(image.read()), batch))
            features.append(encoder.forward(prepared))
    return np.concatenate(features)


def embed_images(
    encoder: Encoder,
    images: Sequence[TileImage],
    rows: pa.Table,
    data_digest: str,
    folder: Path,
    *,
    batch_size: int,
    threads: int = 4,
    world: World | None = None,
) -> FeatureStore:
    """Features of tile images, kept in `folder` and taken from there when they are up to date.

    The key is the encoder's digest and `data_digest`. Batch size and device move features in the
    last bits of float16 and are not part of it.

    Args:
        encoder: from `load_encoder`.
        images: N tiles.
        rows: what they are, under `FEATURE_ROWS`, N rows.
        data_digest: of the files' bytes and their order.
        folder: of the feature store.
        batch_size: tiles a forward pass.
        threads: that decode and resize.
        world: ranks that share the chunks, all of which call this; the bytes are those of one.

    Raises:
        InputError: an image cannot be read, or features are not finite; earlier chunks are kept.
    """
    world = world or World()
    stamp = features_stamp(encoder.digest, data_digest)
    if has_features(folder, stamp):
        return open_features(folder)
    meta = {
        "encoder": encoder.name,
        "encoder_digest": encoder.digest,
        "transform_digest": encoder.transform_digest,
        "pooling": encoder.pooling,
    }
    done = rows_done(folder, stamp)
    label = f"embed {encoder.name}" + (" on rank 0" if world.size > 1 else "")
    total = -(-len(images) // world.size)
    with (
        ThreadPoolExecutor(threads) as pool,
        Meter(label, total, "tiles", done=min(done, total), shown=world.leads) as meter,
    ):

        def prepare(image: TileImage) -> Tensor:
            return encoder.prepare(image.read())

        def compute(start: int, stop: int) -> npt.NDArray[np.float32]:
            prepared = pool.map(prepare, images[start:stop])
            features = []
            for first in range(start, stop, batch_size):
                batch = [next(prepared) for _ in range(min(batch_size, stop - first))]
                features.append(encoder.forward(batch))
                meter.advance(len(batch))
            return np.concatenate(features)

        chunk_rows = CHUNK_BATCHES * batch_size
        if world.size == 1:
            return write_features(
                folder,
                rows=rows,
                dim=encoder.dim,
                stamp=stamp,
                compute=compute,
                chunk_rows=chunk_rows,
                meta=meta,
            )
        parts = folder / f".parts-{stamp}-{chunk_rows}"
        starts = range(0, len(images), chunk_rows)
        for start in starts[world.rank :: world.size]:
            _make_part(parts / f"{start}.npy", start, min(start + chunk_rows, len(images)), compute)
    world.barrier()
    if world.leads:
        join_features(
            folder,
            rows=rows,
            dim=encoder.dim,
            stamp=stamp,
            parts=(np.load(parts / f"{start}.npy") for start in starts),
            meta=meta,
        )
        for left_over in folder.glob(".parts-*"):
            shutil.rmtree(left_over)
    world.barrier()
    return open_features(folder)


def _make_part(
    path: Path, start: int, stop: int, compute: Callable[[int, int], npt.NDArray[np.float32]]
) -> None:
    """The features of some rows, unless an earlier call has made them."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    half = as_half(compute(start, stop), start)
    with replacing(path) as partial, partial.open("wb") as file:
        np.save(file, half, allow_pickle=False)
