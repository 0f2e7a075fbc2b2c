"""Jobs in processes that may crash, hang or be killed: such an end costs one job, not the run.

`worker_pool` is for jobs that do not crash. This is for readers of files from anywhere: each
process holds one job at a time, so the job that a dying process takes with it is known, and one
that runs too long can be ended.
"""

import contextlib
import multiprocessing
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from eosin.data_curation.manifest import Status
from eosin.data_curation.worker_pool import follow_parent

J = TypeVar("J")
R = TypeVar("R")

_DYING_S = 10.0
"""Seconds that a process whose pipe broke has to end, so that its exit code is known."""

_RETIRING_S = 2.0
"""Seconds that a process without a job has to end."""


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A job that has no result: its process died (`crashed`) or was ended (`timeout`)."""

    status: Status
    reason: str


def run_isolated(
    function: Callable[[J], R],
    jobs: Sequence[J],
    *,
    workers: int,
    timeout_s: float,
    max_bytes: int | None = None,
) -> Iterator[tuple[J, R | Lost]]:
    """Yields each job with its result, as it is done, or with how it was lost.

    An exception of `function` is raised here, after which no further job is started and the
    running ones are ended.

    Args:
        function: importable by name; called in a spawned process.
        jobs: its arguments.
        workers: processes at once.
        timeout_s: seconds after which a job's process is ended.
        max_bytes: memory that a process may hold, on Linux; what asks for more fails, or dies.
    """
    waiting = list(reversed(jobs))
    idle: list[_Worker[J, R]] = []
    busy: list[_Worker[J, R]] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                worker = idle.pop() if idle else _Worker(function, max_bytes)
                busy.append(worker)
                worker.start(waiting.pop(), timeout_s)
            remaining = min(worker.deadline for worker in busy) - time.monotonic()
            ready = wait([worker.pipe for worker in busy], timeout=max(0.0, remaining))
            now = time.monotonic()
            for worker in [w for w in busy if w.pipe in ready or w.deadline <= now]:
                busy.remove(worker)
                result = worker.finish(timed_out=worker.pipe not in ready)
                if isinstance(result, BaseException):
                    worker.end()
                    raise result
                if not isinstance(result, Lost):
                    idle.append(worker)
                yield worker.job, result
    finally:
        for worker in idle:
            worker.pipe.close()  # at which it ends by itself, and gives back what it holds
        for worker in idle:
            worker.process.join(_RETIRING_S)
        for worker in idle + busy:
            worker.end()


class _Worker(Generic[J, R]):
    """One spawned process and the pipe to it."""

    job: J
    deadline: float

    def __init__(self, function: Callable[[J], R], max_bytes: int | None) -> None:
        self.function, self.max_bytes = function, max_bytes
        self._spawn()

    def start(self, job: J, timeout_s: float) -> None:
        """Hands over `job`, to a new process where this one died since its last job."""
        self.job, self.deadline = job, time.monotonic() + timeout_s
        self.timeout_s = timeout_s
        try:
            self.pipe.send(job)
        except OSError:
            self.end()
            self._spawn()
            with contextlib.suppress(OSError):  # dead again: `finish` says so of this job
                self.pipe.send(job)

    def finish(self, timed_out: bool) -> R | Lost | BaseException:
        if timed_out:
            self.end()
            return Lost(status=Status.TIMEOUT, reason=f"took over {self.timeout_s:g} s")
        try:
            result: R | BaseException = self.pipe.recv()
        except (EOFError, OSError):
            self.pipe.close()  # a process that still lives ends at this
            self.process.join(_DYING_S)
            reason = f"its process died ({_describe_exit(self.process.exitcode)})"
            self.end()
            return Lost(status=Status.CRASHED, reason=reason)
        return result

    def _spawn(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, self.function, self.max_bytes), daemon=True
        )
        self.process.start()
        theirs.close()

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def _serve(
    pipe: "Connection[Any, Any]", function: Callable[[Any], Any], max_bytes: int | None
) -> None:
    if max_bytes is not None:
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        limit = max_bytes if most == resource.RLIM_INFINITY else min(max_bytes, most)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    follow_parent()
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            result = function(job)
        except Exception as error:
            result = error
        pipe.send(result)


def _describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"
