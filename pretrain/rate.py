"""How fast the training goes, what it waits for, and which rank holds up the others.

Between two log steps a rank sums up the tiles and operations of its batches, its waiting for data,
and the seconds of its own work: from a batch's arrival to the end of the teacher's forward. There
is no collective in that, so nobody else's slowness shows in it. Legend: R ranks, L laps.
"""

import resource
import socket
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from eosin.launch.peak import known_peak
from eosin.launch.process import World
from eosin.pretrain.batch import Batch, Tiles
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.flops import StepShape, executed_flops
from eosin.pretrain.frozen_teacher import TeacherShape, read_shape
from eosin.pretrain.gram import gram_active

SLOW = 1.5
"""Times the median of a step from which a rank is one that holds up the others."""

NOTICED = 0.05
"""Share of a step by which its work must be longer, too: of a millisecond nobody suffers."""

WAITING = 0.1
"""Share of a step that a rank waits for data longer than the median rank does, likewise."""

LAPS = 3
"""Log steps in a row after which it is named."""

GIB = 2**30

Moment = float | torch.cuda.Event


class Counted(Protocol):
    """A rank's share of a step."""

    @property
    def rows(self) -> Tensor:
        """Of its samples."""


B = TypeVar("B", bound=Counted)


@dataclass(frozen=True)
class Lap:
    """What is known at a log step; the same `slow` on every rank."""

    samples_per_s: float
    """Tiles, or slides, of all ranks together."""
    data_wait: float
    """Share of this rank's time that it waited for batches."""
    memory_gib: float
    """Peak of this rank so far: of its GPU, else of its process."""
    mfu: float | None
    """Share of the device's peak that the model's operations are; None where that is unknown."""
    slow: tuple[str, ...]
    """Ranks that have held up the others for some log steps, each in a sentence."""
    news: tuple[str, ...]
    """Those of `slow` that were not yet slow at the log step before."""
    unit: str = "tiles"
    """What a sample is."""

    def values(self) -> dict[str, float]:
        """The figures for metrics.jsonl."""
        figures = {
            f"{self.unit}_per_s": self.samples_per_s,
            "data_wait": self.data_wait,
            "memory_gib": self.memory_gib,
        }
        return figures if self.mfu is None else {**figures, "mfu": self.mfu}


class Rate:
    """Measures a training; every rank has one, and comes to `lap` at the same steps.

    Args:
        flops_of: operations of a batch; None: they are not counted.
        device: of this rank.
        dtype: of its products of matrices.
        world: the ranks; each batch of the stream is one rank's share.
        clock: seconds.
        unit: what a sample is, in the plural.
    """

    def __init__(
        self,
        flops_of: Callable[[Any], float] | None,
        device: torch.device,
        dtype: torch.dtype,
        world: World,
        clock: Callable[[], float] = time.perf_counter,
        unit: str = "tiles",
    ) -> None:
        self._flops_of, self._world, self._clock = flops_of, world, clock
        self._unit = unit
        self._is_cuda = device.type == "cuda"
        self._peak = known_peak(device, dtype)
        self._names = world.all_hosts() if world.host is not None else [socket.gethostname()]
        self._laps: deque[list[RankTime]] = deque(maxlen=LAPS)
        self._slow: frozenset[int] = frozenset()
        self._started: Moment | None = None
        self._work: list[tuple[Moment, Moment]] = []
        self._begin_lap()

    def waiting(self, stream: Iterable[B]) -> Iterator[B]:
        """The stream, with its batches counted and the time that each takes to come."""
        iterator = iter(stream)
        while True:
            asked = self._clock()
            batch = next(iterator, None)
            self._waited += self._clock() - asked
            if batch is None:
                return
            self._batches += 1
            self._samples += len(batch.rows) * self._world.size
            if self._peak is not None and self._flops_of is not None:
                self._flops += self._flops_of(batch)
            yield batch

    def start(self) -> None:
        """This rank's own work on a batch begins."""
        self._started = self._now()

    def stop(self) -> None:
        """It ends, before the step's first collective; a second call for one start is ignored."""
        if self._started is not None:
            self._work.append((self._started, self._now()))
            self._started = None

    def lap(self) -> Lap:
        """Figures since the last lap; starts a new one. Waits for all ranks, and for the device."""
        work = sum(_seconds_between(*pair) for pair in self._work)
        seconds = max(self._clock() - self._lap_began, 1e-9)
        batches = max(self._batches, 1)
        mine = RankTime(work / batches, self._waited / batches, seconds / batches)
        self._laps.append(gather_times(mine, self._world))
        sentences = slow_ranks(list(self._laps), self._names)
        news = tuple(text for rank, text in sentences.items() if rank not in self._slow)
        self._slow = frozenset(sentences)
        lap = Lap(
            samples_per_s=self._samples / seconds,
            data_wait=self._waited / seconds,
            memory_gib=peak_memory(self._is_cuda) / GIB,
            mfu=self._flops / seconds / self._peak if self._peak and self._flops_of else None,
            slow=tuple(sentences.values()),
            news=news,
            unit=self._unit,
        )
        self._begin_lap()
        return lap

    def _begin_lap(self) -> None:
        self._lap_began, self._waited, self._flops = self._clock(), 0.0, 0.0
        self._samples = self._batches = 0
        self._started, self._work = None, []

    def _now(self) -> Moment:
        if not self._is_cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class RankTime:
    """Seconds of one rank, a batch, as the mean over a lap."""

    work: float
    """Its own, from the batch's arrival to the end of the teacher's forward."""
    wait: float
    """For the batch."""
    whole: float
    """From one batch to the next: the same for all, since they wait for each other."""


def gather_times(mine: RankTime, world: World) -> list[RankTime]:
    """Those of all ranks, in their order, on every rank."""
    if world.host is None:
        return [mine]
    row = torch.tensor([mine.work, mine.wait, mine.whole], dtype=torch.float64)
    rows = [torch.empty_like(row) for _ in range(world.size)]
    dist.all_gather(rows, row, group=world.host)
    return [RankTime(*row.tolist()) for row in rows]


def slow_ranks(laps: Sequence[Sequence[RankTime]], hosts: Sequence[str]) -> dict[int, str]:
    """The ranks that held up the others in each of the last `LAPS` laps, each with a sentence.

    Medians are the lower ones, so that one of two ranks can be the slow one.

    Args:
        laps: times of all ranks, [L][R], the newest last; fewer than `LAPS` name nobody.
        hosts: host name of each rank.
    """
    if len(laps) < LAPS or len(hosts) < 2:
        return {}
    recent = laps[-LAPS:]
    works = [statistics.median_low(rank.work for rank in lap) for lap in recent]
    waits = [statistics.median_low(rank.wait for rank in lap) for lap in recent]
    sentences = {}
    for rank, host in enumerate(hosts):
        times = [lap[rank] for lap in recent]
        if all(_is_slow(t, work) for t, work in zip(times, works, strict=True)):
            ratio = statistics.mean(t.work for t in times) / max(statistics.mean(works), 1e-9)
            sentences[rank] = f"rank {rank} ({host}) takes {ratio:.1f} times the median of a step"
        elif all(t.wait - wait > WAITING * t.whole for t, wait in zip(times, waits, strict=True)):
            mean, usual = statistics.mean(t.wait for t in times), statistics.mean(waits)
            sentences[rank] = (
                f"rank {rank} ({host}) waits {mean:.2f} s a step for data, the median rank "
                f"{usual:.2f} s"
            )
    return sentences


def _is_slow(time: RankTime, median: float) -> bool:
    return time.work > SLOW * median and time.work - median > NOTICED * time.whole


def flops_counter(config: PretrainConfig) -> Callable[[Batch], float]:
    """Counts the model's operations on a batch of tiles."""
    teachers = [read_shape(run) for run in config.teacher.runs]
    return lambda batch: batch_flops(config, batch, teachers)


def batch_flops(
    config: PretrainConfig, batch: Batch, teachers: Sequence[TeacherShape] = ()
) -> float:
    """The model's operations on one batch, by what is in it."""
    if isinstance(batch.images, Tiles):
        (n_global, global_px), (n_local, local_px) = batch.images.sizes
    else:
        n_global, _, global_px = batch.images.global_crops.shape[:3]
        n_local, _, local_px = batch.images.local_crops.shape[:3]
    shape = StepShape(
        batch=len(batch.rows),
        global_px=global_px,
        local_px=local_px,
        n_global=n_global,
        n_local=n_local,
        masked=int(batch.masks.sum()),
        group_size=config.group_size,
        gram=gram_active(batch.step, config.objective.gram),
    )
    return executed_flops(config.model, config.objective, shape, teachers).model


def peak_memory(is_cuda: bool) -> int:
    """Bytes that torch had allocated at most on the GPU; else that this process had in memory."""
    if is_cuda:
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _seconds_between(begin: Moment, end: Moment) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000
    assert isinstance(begin, float) and isinstance(end, float)
    return end - begin
