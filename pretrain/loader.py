"""Batches of crops from shards: each step's batch is a pure function of (seed, step).

There is no loader state but the step: a resumed run asks for another first step, and any number of
workers gives the same batches. Crops stay bytes until they are on the device (`normalise`).
"""

import math
import multiprocessing
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eosin.configs.errors import ConfigError, EosinError
from eosin.data_curation.shard_reader import RecordError, ShardReader
from eosin.pretrain.augment import AugmentConfig, draw_view, render_view
from eosin.pretrain.order import locate, sample_at
from eosin.pretrain.upload import upload

SHARED_MEMORY = Path("/dev/shm")
"""Where batches cross from a worker to the trainer on Linux."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How batches are made; none of it changes what is in them."""

    workers: int = 0
    """Processes that make batches; 0 makes them in the trainer's own process."""
    prefetch: int = 2
    """Batches that each worker holds ready."""
    max_damaged: float = 0.01
    """Share of the records that may turn out to be damaged before the run stops. Until then the
    next record in the epoch's order stands in for a damaged one."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers must not be negative, not {self.workers}")
        if self.prefetch < 1:
            raise ValueError(f"prefetch must be at least 1, not {self.prefetch}")
        if not 0 <= self.max_damaged < 1:
            raise ValueError(f"max_damaged must lie in [0, 1), not {self.max_damaged}")


@dataclass(frozen=True)
class Batch:
    """The crops of B tiles for one step; view-major: all first global crops, then all second."""

    step: int
    global_crops: Tensor
    """uint8 [2, B, 3, G, G], RGB."""
    local_crops: Tensor
    """uint8 [L, B, 3, S, S]; L may be 0."""
    rows: Tensor
    """int64 [B], rows of the index that the crops are of."""
    damaged: Mapping[int, str]
    """Row and reason of each damaged record that was met here for the first time in this call."""


def batches(
    shards: Path,
    augment: AugmentConfig,
    loader: LoaderConfig,
    *,
    batch_size: int,
    seed: int,
    first_step: int,
    last_step: int,
) -> Iterator[Batch]:
    """The batches of steps `first_step` … `last_step` - 1.

    Args:
        shards: folder that `eosin shard` wrote.
        augment: the crops of a tile.
        loader: processes and tolerance; without influence on the batches.
        batch_size: tiles in a batch; epochs follow one another within a batch without a gap.
        seed: of the order and of the crops.
        first_step: where to start, e.g. the step of a checkpoint.
        last_step: where to end.

    Raises:
        ConfigError: at once, when there are fewer tiles than a batch takes, or too little shared
            memory for the batches that the workers hold ready.
        InputError: at once, when the shards are not finished or not whole.
        EosinError: while iterating, when more records are damaged than `loader.max_damaged`
            allows, or a worker died.
    """
    reader = ShardReader(shards)
    if len(reader) < batch_size:
        raise ConfigError(
            f"{shards} holds {len(reader)} tiles, fewer than one batch of {batch_size}: "
            "make shards of more tiles, or lower batch_size"
        )
    steps = _Steps(reader, augment, batch_size, seed, _allowed(reader, loader))
    if loader.workers == 0:
        made: Iterable[Batch | Exception] = (steps[step] for step in range(first_step, last_step))
    else:
        _check_shared_memory(augment, loader, batch_size)
        made = _from_workers(steps, loader, range(first_step, last_step))
    return _within_budget(made, reader, _allowed(reader, loader))


def normalise(
    crops: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """(crops / 255 - mean) / std, on the device where the crops are.

    Args:
        crops: uint8 […, 3, H, W].
        mean: of R, G, B, where white is 1.
        std: of R, G, B.
        dtype: of the result; the arithmetic is in float32.
    """
    scale = 1 / (255 * torch.tensor(std, dtype=torch.float32))
    shift = -torch.tensor(mean, dtype=torch.float32) / torch.tensor(std, dtype=torch.float32)
    scale, shift = (upload(part.view(3, 1, 1), crops.device) for part in (scale, shift))
    return torch.addcmul(shift, crops.float(), scale).to(dtype)


class _Steps(Dataset[Batch | Exception]):
    """The batch of each step; sent to the workers."""

    def __init__(
        self, reader: ShardReader, augment: AugmentConfig, batch_size: int, seed: int, allowed: int
    ) -> None:
        self.reader, self.augment, self.batch_size = reader, augment, batch_size
        self.seed, self.allowed = seed, allowed

    def __getitem__(self, step: int) -> Batch | Exception:
        # What is expected to go wrong is returned: torch would wrap it in a worker's traceback.
        try:
            return self._make(step)
        except (EosinError, OSError) as error:
            return error

    def _make(self, step: int) -> Batch:
        augment, size = self.augment, self.batch_size
        big, small, count = augment.global_px, augment.local_px, augment.n_local
        crops = [torch.empty((augment.n_global, size, 3, big, big), dtype=torch.uint8)]
        crops.append(torch.empty((count, size, 3, small, small), dtype=torch.uint8))
        views = [view for group in crops for view in group.numpy()]  # each [B, 3, px, px]
        n = len(self.reader)
        epochs, positions = locate(step, size, n)
        rows = np.empty(size, np.int64)
        for epoch in np.unique(epochs).tolist():  # at most two
            inside = epochs == epoch
            rows[inside] = sample_at(self.seed, epoch, positions[inside], n)
        damaged: dict[int, str] = {}
        places = zip(epochs.tolist(), positions.tolist(), strict=True)
        for sample, (epoch, position) in enumerate(places):
            rows[sample], tile = self._read(int(rows[sample]), epoch, position, damaged)
            for index, view in enumerate(views):
                drawn = draw_view(augment, self.seed, epoch, position, index, tile.shape[:2])
                view[sample] = cv2.split(render_view(tile, drawn))  # [px, px, 3] to [3, px, px]
        return Batch(step, crops[0], crops[1], torch.from_numpy(rows), damaged)

    def _read(
        self, row: int, epoch: int, position: int, damaged: dict[int, str]
    ) -> tuple[int, NDArray[np.uint8]]:
        """The tile at a place, or the next in the order that is whole; notes the damaged ones."""
        n = len(self.reader)
        while True:
            try:
                return row, self.reader.image(row)
            except RecordError as error:
                damaged[row] = str(error)
            if len(damaged) > self.allowed:  # at the latest when all are damaged
                raise _too_many(damaged, self.allowed, self.reader)
            position = (position + 1) % n
            row = int(sample_at(self.seed, epoch, position, n))


def _within_budget(
    made: Iterable[Batch | Exception], reader: ShardReader, allowed: int
) -> Iterator[Batch]:
    """Passes batches on, each with its newly found damage, until there is more than allowed."""
    found: dict[int, str] = {}
    for batch in made:
        if isinstance(batch, Exception):
            raise batch
        new = {row: reason for row, reason in batch.damaged.items() if row not in found}
        found |= new
        if len(found) > allowed:
            raise _too_many(found, allowed, reader)
        yield replace(batch, damaged=new)


def _allowed(reader: ShardReader, loader: LoaderConfig) -> int:
    return math.floor(loader.max_damaged * len(reader))


def _too_many(damaged: Mapping[int, str], allowed: int, reader: ShardReader) -> EosinError:
    first = next(iter(damaged.values()))
    return EosinError(
        f"{first}; that makes {len(damaged)} damaged of {len(reader)} records, where "
        f"loader.max_damaged allows {allowed}: see 'eosin shard verify {reader.shards}'"
    )


def _from_workers(
    steps: _Steps, loader: LoaderConfig, wanted: range
) -> Iterator[Batch | Exception]:
    iterator = iter(
        DataLoader(
            steps,
            sampler=wanted,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=loader.workers,
            prefetch_factor=loader.prefetch,
            multiprocessing_context=_clean_processes(),
            worker_init_fn=_one_thread,
            generator=torch.Generator(),  # or it would draw from the trainer's global one
        )
    )
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except (RuntimeError, ConnectionError, EOFError) as error:
            # torch notices a death at its next poll, or the pipe to the process breaks before that
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            reason = str(error).split("\n")[0]
            raise EosinError(
                f"a process that makes batches died ({reason}); when memory was short, "
                "fewer loader.workers or a smaller loader.prefetch help"
            ) from error
        yield batch


def _clean_processes() -> BaseContext:
    """Workers come from a server that never ran a thread: forking the trainer may hang OpenMP."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _one_thread(_: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _unchanged(batch: Any) -> Any:
    return batch


def _check_shared_memory(augment: AugmentConfig, loader: LoaderConfig, batch_size: int) -> None:
    """Without this a worker dies of a bus error, as in containers with 64 MB of shared memory."""
    if not SHARED_MEMORY.is_dir():
        return
    pixels = augment.n_global * augment.global_px**2 + augment.n_local * augment.local_px**2
    needed = 3 * pixels * batch_size * (loader.workers * loader.prefetch + 1)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise ConfigError(
            f"{loader.workers} workers that hold {loader.prefetch} batches each need "
            f"{needed / 1e6:.0f} MB of {SHARED_MEMORY}, where {free / 1e6:.0f} MB are free: lower "
            "loader.workers or loader.prefetch, or give the container more (--shm-size)"
        )
