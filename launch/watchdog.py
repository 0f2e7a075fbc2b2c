"""A run that stands still is ended, with the stack of every rank and the name of who is behind.

A thread of each process notes in the shared store how far it came, and that it lives. When no step
was finished for too long, it writes down where all threads stand, says which ranks are silent or
behind, and ends the process: the main thread may hang in a collective, which no exception reaches.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, Self

from eosin.configs.errors import InterruptedRunError
from eosin.launch.process import World

FIRST_STEP = 3
"""The first step may take so many times as long: kernels are compiled in it."""
LAST_WORDS_S = 5.0
"""For the other ranks to read the account, before the first process, which keeps it, ends."""
SIGNS = 6
"""Signs of life that a rank gives before it says which others gave none; each is half of what lies
between two in good times, so that ranks that give up at different moments see each other."""


class Sign(NamedTuple):
    """What a rank says of itself."""

    step: int
    """That it began last."""
    number: int
    """Of the signs that it gave."""
    host: str


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
        self._step, self._signs, self._interval = -1, 0, min(limit_s / 10, 10.0)
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
        self._note()
        while not self._done.wait(self._interval):
            self._note()
            limit = self.limit_s * (FIRST_STEP if self._steps < 2 else 1)
            if time.monotonic() - self._last > limit:
                self._give_up(limit)
                return

    def _note(self) -> None:
        self._signs += 1
        if self.world.store is not None:
            sign = f"{self._step} {self._signs} {socket.gethostname()}"
            with suppress(RuntimeError):  # rank 0 and its store are gone; the main thread finds out
                self.world.store.set(f"sign/{self.world.rank}", sign)

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
        before = self._read_signs()
        for _ in range(SIGNS):
            time.sleep(self._interval / 2)
            self._note()
        return (
            f"rank {self.world.rank}: no step was finished for {limit:.0f} s; "
            f"{who_is_behind(before, self._read_signs(), self.world.size)}; {where}"
        )

    def _read_signs(self) -> dict[int, Sign]:
        """The newest of each rank that gave one."""
        store, found = self.world.store, {}
        assert store is not None
        for rank in range(self.world.size):
            try:
                if store.check([f"sign/{rank}"]):
                    store.set_timeout(timedelta(seconds=LAST_WORDS_S))
                    step, signs, host = store.get(f"sign/{rank}").decode().split(" ", 2)
                    found[rank] = Sign(int(step), int(signs), host)
            except RuntimeError:
                break
        return found


def who_is_behind(before: Mapping[int, Sign], now: Mapping[int, Sign], ranks: int) -> str:
    """In words, which ranks are silent, or came less far than the others.

    Args:
        before: what was read first, by rank.
        now: likewise later, when every rank that lives has given another sign.
        ranks: in all.
    """
    if not now:
        return "rank 0, which keeps the account, cannot be reached"
    silent = [
        f"rank {rank} ({sign.host}) gives no sign of life since step {sign.step}"
        for rank, sign in sorted(now.items())
        if before.get(rank) == sign
    ]
    silent += [f"rank {rank} never gave a sign of life" for rank in range(ranks) if rank not in now]
    if silent:
        return f"{', '.join(silent)}: stopped, or gone"
    ahead = max(sign.step for sign in now.values())
    behind = [
        f"rank {rank} ({sign.host}) is at step {sign.step}"
        for rank, sign in sorted(now.items())
        if sign.step < ahead
    ]
    if not behind:
        return f"all ranks began step {ahead}: one of them is stuck in it"
    return f"{', '.join(behind)}, the others at {ahead}"
