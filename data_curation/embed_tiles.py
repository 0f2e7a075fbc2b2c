"""The verb `embed`: tiles of slides, image files or shards to a feature store, by any encoder.

Rows are computed in blocks, each a file of its own until all are there. So any number of processes
share the work (each takes a run of blocks), a killed command goes on at the first block that is
missing, and the store has the same bytes either way: what is in a batch never depends on who
computes it. A tile that cannot be read has no row; ``failed.parquet`` says why.
"""

import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from safetensors.numpy import load_file, save
from torch import Tensor

from eosin.configs.errors import InputError, TooManyFailedError
from eosin.data_curation.embed_config import EmbedConfig
from eosin.data_curation.encoder_interface import Encoder
from eosin.data_curation.features import as_half, features_stamp, has_features, join_features
from eosin.data_curation.manifest import FEATURES_FAILED, read_table, write_table
from eosin.data_curation.normalised_encoder import NormalisedEncoder, load_normalised
from eosin.data_curation.pseudonyms import Pseudonyms
from eosin.data_curation.records import Failure
from eosin.data_curation.tile_sources import ImageSource, ShardSource, SlideTileSource, TileSource
from eosin.data_curation.worker_pool import count_workers
from eosin.launch.artefacts import is_done, mark_done, stamp_of, write_bytes
from eosin.launch.process import World, choose_device, choose_precision, join_world
from eosin.launch.progress import Meter, format_seconds

R = TypeVar("R")

SMALLEST_BLOCK, LARGEST_BLOCK = 256, 16384
"""Tiles that are computed and made safe together; between the two, so that there are about
`MANY_BLOCKS` files, whatever the number of processes."""
MANY_BLOCKS = 4096
FAILED_NAME = "failed.parquet"
_PARTS = ".parts"
_TRIED = 32  # tiles that a plan embeds
WAIT_S = 24 * 3600.0  # for the other ranks: one may have slower slides


def embed(config: EmbedConfig) -> None:
    """Embeds what is not embedded yet; as one process, or as several that share the work.

    Raises:
        InputError: no such encoder or tiles; or a feature is not finite.
        TooManyFailedError: more tiles are unreadable than `max_failed` allows; the others are in
            the store.
    """
    device = choose_device(config.device)
    with join_world(device, timeout_s=WAIT_S) as world:
        embed_among(config, device, world)


def embed_among(config: EmbedConfig, device: torch.device, world: World) -> None:
    """`embed`, on one of the processes that share the work."""
    source = open_source(config)
    encoder = load_normalised(config.encoder, device, config.normalise)
    dtype = choose_precision(config.precision, device)
    stamp = stamp_for(config, encoder, source, dtype)
    started, done_before = time.monotonic(), has_features(config.out, stamp)
    if not done_before:
        _prepare_parts(config.out, stamp, world)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            _compute(config, source, encoder, world)
        world.barrier()
        if world.leads:
            _join(config, source, encoder, stamp)
    if world.leads:
        shutil.rmtree(config.out / _PARTS, ignore_errors=True)
    world.barrier()
    if world.leads:
        _conclude(config, source, encoder, None if done_before else started)


def plan(config: EmbedConfig) -> str:
    """What `embed` would do: tiles, size of the store, and time from a few of them."""
    source = open_source(config)
    device = choose_device(config.device)
    encoder = load_normalised(config.encoder, device, config.normalise)
    n_rows = source.rows.num_rows
    rows = np.linspace(0, n_rows - 1, min(_TRIED, n_rows)).astype(int).tolist()
    tiles = [tile for tile in map(source.read, rows) if not isinstance(tile, Failure)]
    lines = [
        f"{n_rows} tiles by {encoder.name}: {encoder.dim} features each, "
        f"{n_rows * encoder.dim * 2 / 1e9:.3f} GB in {config.out}"
    ]
    if tiles:
        encoder.embed(tiles[:1])
        started = time.monotonic()
        encoder.embed([tile for tile in map(source.read, rows) if not isinstance(tile, Failure)])
        rate = len(tiles) / (time.monotonic() - started)
        lines.append(
            f"about {format_seconds(n_rows / rate)} at {rate:.0f} tiles/s with one reading thread "
            f"on {device.type}"
        )
    if len(tiles) < len(rows):
        lines.append(f"{len(rows) - len(tiles)} of {len(rows)} tiles tried cannot be read")
    return "\n".join(lines)


def open_source(config: EmbedConfig) -> TileSource:
    """The tiles that the config names.

    Raises:
        InputError: there are none, or they cannot be used.
    """
    if config.tiles is not None:
        return SlideTileSource(config.tiles, config.selection, config.keep)
    if config.images is not None:
        pseudonyms = Pseudonyms(config.pseudonyms) if config.pseudonyms else None
        return ImageSource(config.images, config.keep, pseudonyms)
    assert config.shards is not None
    return ShardSource(config.shards)


def stamp_for(config: EmbedConfig, encoder: Encoder, source: TileSource, dtype: torch.dtype) -> str:
    """The stamp of the finished store."""
    digest = stamp_of(encoder=encoder.digest, dtype=str(dtype), batch=config.batch_size)
    return features_stamp(digest, source.digest)


def _prepare_parts(out: Path, stamp: str, world: World) -> None:
    """An empty folder of parts, or the one that an earlier call with this stamp began."""
    parts = out / _PARTS
    if world.leads and not is_done(parts / "stamp.json", stamp):
        shutil.rmtree(parts, ignore_errors=True)
        mark_done(parts / "stamp.json", stamp)
    world.barrier()


def _blocks(n_rows: int) -> list[range]:
    size = min(max(SMALLEST_BLOCK, n_rows // MANY_BLOCKS), LARGEST_BLOCK)
    return [range(first, min(first + size, n_rows)) for first in range(0, n_rows, size)]


def _part(out: Path, block: range) -> Path:
    return out / _PARTS / f"{block.start:012d}.safetensors"


def _compute(config: EmbedConfig, source: TileSource, encoder: Encoder, world: World) -> None:
    """The blocks of this rank: a run of them, so that it opens few slides of another's."""
    blocks = _blocks(source.rows.num_rows)
    bounds = [len(blocks) * rank // world.size for rank in (world.rank, world.rank + 1)]
    mine = blocks[bounds[0] : bounds[1]]
    todo = [block for block in mine if not _part(config.out, block).is_file()]
    total, left = sum(map(len, mine)), sum(map(len, todo))
    label = f"embed {encoder.name}" + (" on rank 0" if world.size > 1 else "")
    with (
        ThreadPoolExecutor(count_workers(config.threads)) as pool,
        Meter(label, total, "tiles", done=total - left, shown=world.leads) as meter,
    ):
        for block in todo:
            content = _block_content(block, config, source, encoder, pool, meter)
            write_bytes(_part(config.out, block), content)


def _block_content(
    block: range,
    config: EmbedConfig,
    source: TileSource,
    encoder: Encoder,
    pool: ThreadPoolExecutor,
    meter: Meter,
) -> bytes:
    """The part of one block: its features, which rows they are, and what failed."""

    def prepare(row: int) -> Tensor | Failure:
        tile = source.read(row)
        return tile if isinstance(tile, Failure) else encoder.prepare(tile)

    prepared = _ahead(pool, prepare, block, 2 * config.batch_size)
    failed, rows = list[tuple[int, str, str]](), list[int]()
    features = [np.zeros((0, encoder.dim), np.float32)]
    batch: list[Tensor] = []
    for row, found in zip(block, prepared, strict=True):
        if isinstance(found, Failure):
            failed.append((row, str(found.status), found.reason))
        else:
            rows.append(row)
            batch.append(found)
        if len(batch) == config.batch_size:
            features.append(_forward(encoder, batch, source, rows))
            batch = []
        meter.advance(1)
    if batch:
        features.append(_forward(encoder, batch, source, rows))
    half = as_half(np.concatenate(features), block.start)
    return save(
        {"features": half, "rows": np.array(rows, np.int64)}, {"failed": json.dumps(failed)}
    )


def _forward(
    encoder: Encoder, batch: list[Tensor], source: TileSource, rows: list[int]
) -> npt.NDArray[np.float32]:
    """Features of a batch, whose rows are the last of `rows`."""
    if not isinstance(encoder, NormalisedEncoder):
        return encoder.forward(batch)
    return encoder.forward_from(batch, [source.stains(row) for row in rows[-len(batch) :]])


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[int], R], rows: range, ahead: int
) -> Iterator[R]:
    """`function` of each row in their order, with so many rows begun before they are wanted."""
    waiting: deque[Future[R]] = deque()
    for row in rows:
        waiting.append(pool.submit(function, row))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _join(config: EmbedConfig, source: TileSource, encoder: Encoder, stamp: str) -> None:
    """Puts the parts together: rows of what was read, and a table of what was not."""
    parts = [_part(config.out, block) for block in _blocks(source.rows.num_rows)]
    kept = np.concatenate([load_file(path)["rows"] for path in parts])
    if not len(kept):
        raise InputError(f"none of {source.rows.num_rows} tiles can be read: {_first(parts)}")
    ids = source.rows["tile_id"]
    failed = [
        {"tile_id": ids[row].as_py(), "source": source.where(row), "status": s, "reason": reason}
        for path in parts
        for row, s, reason in _failures(path)
    ]
    write_table(
        pa.Table.from_pylist(failed, FEATURES_FAILED), config.out / FAILED_NAME, FEATURES_FAILED
    )
    join_features(
        config.out,
        rows=source.rows.take(pa.array(kept)),
        dim=encoder.dim,
        stamp=stamp,
        parts=_features_of(parts),
        meta={
            "encoder": encoder.name,
            "encoder_digest": encoder.digest,
            "transform_digest": encoder.transform_digest,
            "pooling": encoder.pooling,
            "token_grid": encoder.token_grid,
            "failed": len(failed),
        },
    )


def _features_of(parts: list[Path]) -> Iterator[npt.NDArray[np.float16]]:
    for path in parts:
        yield load_file(path)["features"]


def _failures(part: Path) -> list[tuple[int, str, str]]:
    with part.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    failed: list[tuple[int, str, str]] = json.loads(header["__metadata__"]["failed"])
    return failed


def _first(parts: list[Path]) -> str:
    return next((reason for part in parts for _, _, reason in _failures(part)), "no reason known")


def _conclude(
    config: EmbedConfig, source: TileSource, encoder: Encoder, started: float | None
) -> None:
    """The closing line, and the error where too many tiles failed."""
    failed = read_table(config.out / FAILED_NAME, FEATURES_FAILED)
    n_rows = source.rows.num_rows
    when = (
        "there already" if started is None else f"in {format_seconds(time.monotonic() - started)}"
    )
    print(
        f"embed: {n_rows - failed.num_rows} tiles × {encoder.dim} features by {encoder.name}, "
        f"{when}, {failed.num_rows} failed → {config.out}"
    )
    if failed.num_rows > config.max_failed * n_rows:
        raise TooManyFailedError(
            f"{failed.num_rows} of {n_rows} tiles could not be read, the first: "
            f"{failed['source'][0].as_py()}: {failed['reason'][0].as_py()}; "
            f"{config.out / FAILED_NAME} names them, all others are in the store; mend their files "
            "and remove the store, or raise max_failed"
        )
