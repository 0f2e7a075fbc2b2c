"""Time and peak memory of the parts of a piece of work, on the CPU or a GPU.

A watch is told when another part begins; what lies between belongs to the part before. On a GPU
times are those of events in its queue, on a CPU see `seconds_now`; memory is what torch allocated.
"""

import functools
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeAlias, TypeVar

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

P = ParamSpec("P")
T = TypeVar("T")

PART_PREFIX = "part "
"""Of the names of our ranges in a trace."""

Moment: TypeAlias = "float | torch.cuda.Event"


class Watch(Protocol):
    """What a piece of work reports its parts to."""

    def switch(self, part: str) -> str:
        """Begins `part`; returns the one that ends, empty where none was running."""

    def stop(self) -> None:
        """Ends the running part."""


class NoWatch:
    """Takes no notice."""

    def switch(self, part: str) -> str:
        """Nothing."""
        return ""

    def stop(self) -> None:
        """Nothing."""


def seconds_now(is_cuda: bool) -> float:
    """A clock: of the wall; with one CPU thread, of the processor time that this process has had.

    The two differ where others take the processor or its memory away, which is nothing that the
    work costs; with several threads the processor times would add up.
    """
    one_thread = not is_cuda and torch.get_num_threads() == 1
    return time.process_time() if one_thread else time.perf_counter()


class TimeByPart:
    """Seconds of each part, summed over all times that it ran."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[tuple[str, Moment]] = []

    def switch(self, part: str) -> str:
        """See `Watch`; does not wait for the device."""
        before = self._marks[-1][0] if self._marks else ""
        self._marks.append((part, self._now()))
        return before

    def stop(self) -> None:
        """See `Watch`."""
        self._marks.append(("", self._now()))

    def seconds(self) -> dict[str, float]:
        """Of each part, in the order in which they first ran; waits for the device."""
        if self._is_cuda:
            torch.cuda.synchronize()
        total: dict[str, float] = {}
        for (part, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if part:
                total[part] = total.get(part, 0.0) + _seconds_between(begin, end)
        return total

    def _now(self) -> Moment:
        if not self._is_cuda:
            return seconds_now(self._is_cuda)
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class CudaMemoryByPart:
    """Peak of the bytes that torch has allocated during each part, less those at the beginning."""

    def __init__(self) -> None:
        self._part, self._held = "", torch.cuda.memory_allocated()
        self.peaks: dict[str, int] = {}
        """Bytes of each part, in the order in which they first ran."""

    def switch(self, part: str) -> str:
        """See `Watch`; torch counts as the host allocates, so there is nothing to wait for."""
        before, self._part = self._part, part
        if before:
            peak = torch.cuda.max_memory_allocated() - self._held
            self.peaks[before] = max(self.peaks.get(before, peak), peak)
        torch.cuda.reset_peak_memory_stats()
        return before

    def stop(self) -> None:
        """See `Watch`."""
        self.switch("")


class CpuMemoryByPart:
    """The same on a CPU, by torch's profiler, from the making of this watch on.

    Resident memory says little there: what is freed stays with the process. Nor is the freeing seen
    of what was there before.
    """

    def __init__(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would announce itself on stderr
        self._part = ""
        self._range = record_function("")
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()
        self.peaks: dict[str, int] = {}
        """Bytes of each part, in the order in which they first ran; empty until `stop`."""

    def switch(self, part: str) -> str:
        """See `Watch`."""
        before, self._part = self._part, part
        if before:
            self._range.__exit__(None, None, None)
        self._range = record_function(PART_PREFIX + part)
        self._range.__enter__()
        return before

    def stop(self) -> None:
        """See `Watch`; there is no part behind it."""
        self._range.__exit__(None, None, None)
        self._profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(trace))
            self.peaks = peaks_of_trace(json.loads(trace.read_text())["traceEvents"])


def peaks_of_trace(events: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Peak bytes of each part over those at the beginning, from a profiler's Chrome trace."""
    parts = sorted(
        (event["ts"], event["name"].removeprefix(PART_PREFIX))
        for event in events
        if event["name"].startswith(PART_PREFIX) and "dur" in event
    )
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    peaks: dict[str, int] = {}
    held, next_change = 0, 0
    # what comes before the first part counts as held, and is no part's peak
    for (_, part), (end, _) in itertools.pairwise([(-math.inf, ""), *parts, (math.inf, "")]):
        peak = held
        while next_change < len(changes) and changes[next_change][0] < end:
            held += changes[next_change][1]
            peak = max(peak, held)
            next_change += 1
        peaks[part] = max(peaks.get(part, peak), peak)
    del peaks[""]
    return peaks


def memory_by_part(device: torch.device) -> CudaMemoryByPart | CpuMemoryByPart:
    """The watch for `device`."""
    return CudaMemoryByPart() if device.type == "cuda" else CpuMemoryByPart()


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes that are there in any case: parameters, buffers and moments; gradients are not."""
    moments = (value for state in optimizer.state.values() for value in state.values())
    tensors = itertools.chain(model.parameters(), model.buffers(), moments)
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


@contextmanager
def inside(watch: Watch, part: str) -> Iterator[None]:
    """A part in the middle of another one, which goes on behind it."""
    around = watch.switch(part)
    yield
    watch.switch(around)


def watched(
    watch: Callable[[], Watch], part: str, function: Callable[P, T], *, goes_on: bool = False
) -> Callable[P, T]:
    """`function`, of which each call is a part of what is going on around it.

    Args:
        watch: gives the watch at the time of the call.
        part: name.
        function: any.
        goes_on: whether the part goes on behind the call, until another one begins.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if goes_on:
            watch().switch(part)
            return function(*args, **kwargs)
        with inside(watch(), part):
            return function(*args, **kwargs)

    return call


def wait_for(device: torch.device) -> None:
    """Returns when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds_between(begin: Moment, end: Moment) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float)
        return end - begin
    return float(begin.elapsed_time(end)) / 1000
