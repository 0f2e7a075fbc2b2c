"""Jobs on a pool of processes that do not outlive their parent."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from eosin.configs.errors import EosinError

J = TypeVar("J")
R = TypeVar("R")

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def count_workers(workers: int) -> int:
    """`workers`, or one per core that this process may use where it is 0."""
    return workers or len(os.sched_getaffinity(0))


def run_jobs(function: Callable[[J], R], jobs: Iterable[J], workers: int) -> Iterator[tuple[J, R]]:
    """Yields each job with its result as it is done; in this process where `workers` is 1.

    Jobs are drawn as they are needed, so that few are in memory. An exception of `function` ends
    the run after the jobs that were started.

    Raises:
        EosinError: a worker died (killed, or a crash in a library).
    """
    if workers == 1:
        yield from ((job, function(job)) for job in jobs)
        return
    # Spawned, not forked: a fork copies the locks of threads that it does not copy.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        waiting = iter(jobs)
        running: dict[Future[R], J] = {}
        try:
            while True:
                while len(running) < 2 * workers and (job := next(waiting, None)) is not None:
                    running[pool.submit(function, job)] = job
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    yield job, future.result()
        except BrokenProcessPool as error:
            raise EosinError(
                "a worker process died (out of memory, or a crash in a reader); what was finished "
                "is kept: run again, with workers=1 if it happens twice"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    follow_parent()


def follow_parent() -> None:
    """Ends this worker as soon as its parent is gone.

    Otherwise a worker of a killed command would write on, into the files of the next one. On Linux
    the kernel ends it before anyone learns of the parent's death; elsewhere a thread watches, which
    a busy worker may run too late. A parent that died before this call, while the worker was still
    starting, ends it here: its queue may hold jobs yet.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if not parent.is_alive():
        os._exit(1)
    threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
