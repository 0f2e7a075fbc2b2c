"""Batches from shards, made in this process or in workers: the same from either.

What is in a batch is `eosin.pretrain.steps`' matter; here are the processes, the budget of damaged
records and the errors that a user sees.
"""

import multiprocessing
import shutil
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from eosin.configs.errors import ConfigError, EosinError
from eosin.data_curation.shard_cache import CacheConfig
from eosin.data_curation.shard_reader import ShardReader
from eosin.pretrain.batch import Batch
from eosin.pretrain.steps import BatchPlan, Steps

SHARED_MEMORY = Path("/dev/shm")
"""Where batches cross from a worker to the trainer on Linux."""

Made: TypeAlias = Generator[Any, None, None]
"""Batches as they are made, and what is expected to go wrong."""


class Served(Protocol):
    """Makes the batch of any step; a torch dataset."""

    def __getitem__(self, step: int) -> Any:
        """The batch, or what is expected to go wrong."""

    def close(self) -> None:
        """Ends what reads."""

    def check_budget(self, damaged: Mapping[int, str]) -> None:
        """Raises `EosinError` where more is damaged than is allowed."""

    def largest_batch_bytes(self) -> int:
        """Of a batch, at most."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How batches are made; none of it changes what is in them."""

    workers: int = 0
    """Processes that make batches; 0 makes them in the trainer's own process."""
    prefetch: int = 2
    """Batches that each worker holds ready."""
    max_damaged: float = 0.01
    """Share of the records that may turn out to be damaged before the run stops, counted by each
    rank from its start. Until then a record from elsewhere in the epoch stands in for each."""
    read_threads: int = 2
    """Threads of each process that read the records of the next batch; 0: none."""
    read_ahead_mb: int = 256
    """Bytes that they hold at most, for each process."""
    max_open: int = 128
    """Shards that each process holds open at most; and slides, for each of its threads."""
    index_cache_mb: int = 256
    """Rows of the index that each process holds, in MB. A mixture that shows rare values often
    reads all over the shards, and wants more."""
    cache: Path | None = None
    """Folder for copies of whole shards; needed where `shards` is a URL. On a local disk: all
    processes of a machine share it, by file locks."""
    cache_gb: float = 500.0
    """Size of that folder; the shards that were opened longest ago make room. Those that a process
    still holds open keep their space on the disk: give it more than `max_open` of them."""

    def __post_init__(self) -> None:
        for name, low in (
            *(("workers", 0), ("prefetch", 1), ("read_threads", 0)),
            *(("read_ahead_mb", 1), ("max_open", 1), ("index_cache_mb", 1)),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if not 0 <= self.max_damaged < 1:
            raise ValueError(f"max_damaged must lie in [0, 1), not {self.max_damaged}")
        if self.cache_gb <= 0:
            raise ValueError(f"cache_gb must be positive, not {self.cache_gb}")


def open_shards(shards: str | Path, loader: LoaderConfig) -> ShardReader:
    """The shards in a folder or at a URL, as this process reads them.

    Raises:
        InputError: they are not finished, or one is missing or of another size.
        ConfigError: the URL is none that is read, or has no cache.
    """
    cache = None
    if loader.cache is not None:
        cache = CacheConfig(folder=loader.cache.expanduser(), max_gb=loader.cache_gb)
    return ShardReader(
        shards, cache=cache, max_open=loader.max_open, index_cache_mb=loader.index_cache_mb
    )


def batches(
    reader: ShardReader,
    plan: BatchPlan,
    loader: LoaderConfig,
    *,
    first_step: int,
    last_step: int,
    pin: bool = False,
) -> Generator[Batch]:
    """The batches of steps `first_step` … `last_step` - 1.

    Args:
        reader: of the shards; each worker opens its own.
        plan: what the batches depend on.
        loader: processes and tolerance; without influence on the batches.
        first_step: where to start, e.g. the step of a checkpoint.
        last_step: where to end.
        pin: in page-locked memory, for a GPU.

    Raises:
        ConfigError: at once, when there are fewer tiles than a batch takes, the mixture does not
            fit, or there is too little shared memory for the batches that the workers hold ready.
        EosinError: while iterating, when more records are damaged than `loader.max_damaged`
            allows, or a worker died.
    """
    steps = Steps(
        reader,
        plan,
        max_damaged=loader.max_damaged,
        read_threads=loader.read_threads,
        read_ahead_mb=loader.read_ahead_mb,
        last_step=last_step,
    )
    wanted = range(first_step, last_step)
    return serve(steps, wanted, workers=loader.workers, prefetch=loader.prefetch, pin=pin)


def serve(
    steps: "Served", wanted: range, *, workers: int, prefetch: int, pin: bool = False
) -> Generator[Any]:
    """The batches of some steps, made here or in other processes.

    Args:
        steps: makes them; what is expected to go wrong is returned and not raised.
        wanted: numbers of the steps.
        workers: processes; 0: this one.
        prefetch: batches that each holds ready.
        pin: in page-locked memory.

    Raises:
        ConfigError: at once, when there is too little shared memory.
        EosinError: while iterating, as in `batches`.
    """
    if workers == 0:
        made: Made = _in_this_process(steps, wanted, pin)
    else:
        _check_shared_memory(steps, workers, prefetch)
        made = _from_workers(steps, workers, prefetch, wanted, pin)
    return _within_budget(made, steps)


def _within_budget(made: Made, steps: "Served") -> Generator[Any]:
    """Passes batches on, each with its newly found damage, until there is more than allowed."""
    found: dict[int, str] = {}
    with closing(made):  # or an error keeps the workers until garbage is collected
        for batch in made:
            if isinstance(batch, Exception):
                raise batch
            new = {row: reason for row, reason in batch.damaged.items() if row not in found}
            found |= new
            steps.check_budget(found)
            yield replace(batch, damaged=new)


def _in_this_process(steps: "Served", wanted: range, pin: bool) -> Made:
    try:
        for step in wanted:
            batch = steps[step]
            yield batch.pin_memory() if pin and not isinstance(batch, Exception) else batch
    finally:
        steps.close()


def _from_workers(steps: "Served", workers: int, prefetch: int, wanted: range, pin: bool) -> Made:
    iterator = iter(
        DataLoader(
            cast(Dataset[Any], steps),
            sampler=wanted,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=workers,
            prefetch_factor=prefetch,
            pin_memory=pin,
            multiprocessing_context=_clean_processes(),
            worker_init_fn=_start_worker,
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


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _unchanged(batch: Any) -> Any:
    return batch


def _check_shared_memory(steps: "Served", workers: int, prefetch: int) -> None:
    """Without this a worker dies of a bus error, as in containers with 64 MB of shared memory."""
    if not SHARED_MEMORY.is_dir():
        return
    needed = steps.largest_batch_bytes() * (workers * prefetch + 1)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise ConfigError(
            f"{workers} workers that hold {prefetch} batches each need "
            f"{needed / 1e6:.0f} MB of {SHARED_MEMORY}, where {free / 1e6:.0f} MB are free: lower "
            "loader.workers or loader.prefetch, or give the container more (--shm-size)"
        )
