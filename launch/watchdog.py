"""A run that stands still is ended, with the stack of every rank and the name of who is behind.

A thread of each process notes in the shared store how far it came. When no step was finished for
too long, it writes down where all threads stand, says which ranks are behind, and ends the process:
the main thread may hang in a collective, which no exception reaches.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Self

from eosin.configs.errors import InterruptedRunError
from eosin.launch.process import World

FIRST_STEP = 3
"""The first step may take so many times as long: kernels are compiled in it."""
LAST_WORDS_S = 5.0
"""For the other ranks to say how far they came, before the first process ends."""


class Watchdog:
    """Watches that `beat` is called often enough, from entering the context to leaving it.

    Args:
        folder: where ``rank_N.txt`` is written when it is not.
        world: the processes.
        limit_s: seconds between two calls, at most; 0: nothing is watched.
        end: what is done last; it must not return.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        limit_s: float,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self.folder, self.world, self.limit_s, self._end = folder, world, limit_s, end
        self._done, self._last, self._steps = threading.Event(), time.monotonic(), 0
        self._step = -1
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self.limit_s > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self, step: int) -> None:
        """The run goes on: step `step` begins."""
        self._last, self._step = time.monotonic(), step
        self._steps += 1

    def _watch(self) -> None:
        interval = min(self.limit_s / 10, 10.0)
        while not self._done.wait(interval):
            self._note()
            limit = self.limit_s * (FIRST_STEP if self._steps < 2 else 1)
            if time.monotonic() - self._last > limit:
                self._give_up(limit)
                return

    def _note(self) -> None:
        if self.world.store is not None:
            try:
                self.world.store.set(
                    f"step/{self.world.rank}", f"{self._step} {socket.gethostname()}"
                )
            except RuntimeError:  # rank 0 and its store are gone; the main thread will find out
                return

    def _give_up(self, limit: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank_{self.world.rank}.txt"
        with path.open("w") as file:
            file.write(f"step {self._step}, on {socket.gethostname()}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        print(f"eosin: {self._diagnosis(limit)}", file=sys.stderr, flush=True)
        if self.world.leads:
            time.sleep(LAST_WORDS_S)  # its process keeps the store
        self._end(InterruptedRunError.exit_code)

    def _diagnosis(self, limit: float) -> str:
        where = f"the stack of each rank is in {self.folder}"
        if self.world.store is None:
            return f"no step was finished for {limit:.0f} s, at step {self._step}; {where}"
        return (
            f"rank {self.world.rank}: no step was finished for {limit:.0f} s; "
            f"{who_is_behind(self._read_steps())}; {where}"
        )

    def _read_steps(self) -> dict[int, tuple[int, str]]:
        """Step and host of each rank that said so."""
        store, found = self.world.store, {}
        assert store is not None
        for rank in range(self.world.size):
            try:
                if store.check([f"step/{rank}"]):
                    store.set_timeout(timedelta(seconds=LAST_WORDS_S))
                    step, host = store.get(f"step/{rank}").decode().split(" ", 1)
                    found[rank] = int(step), host
            except RuntimeError:
                break
        return found


def who_is_behind(steps: Mapping[int, tuple[int, str]]) -> str:
    """In words, which ranks came less far than the others.

    Args:
        steps: of each rank, the step that it began last, and its host.
    """
    if not steps:
        return "rank 0, which keeps the account, cannot be reached"
    ahead = max(step for step, _ in steps.values())
    behind = [
        f"rank {rank} ({host}) is at step {step}"
        for rank, (step, host) in sorted(steps.items())
        if step < ahead
    ]
    if not behind:
        return f"all ranks began step {ahead}: one of them is stuck in it"
    return f"{', '.join(behind)}, the others at {ahead}"
