"""Signals that ask a run to end in good order: SIGTERM (preemption) and SIGUSR2 (end of its time).

A handler only takes note. The loop asks at the end of each step whether any rank was told to stop,
and all of them learn it at the same step.
"""

import signal
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist

from eosin.launch.process import World

STOPS = (signal.SIGTERM, signal.SIGUSR2)


class StopRequests:
    """Takes note of `STOPS` while the context lasts; in the main thread alone."""

    def __init__(self) -> None:
        self._received = 0
        self._before: dict[signal.Signals, Any] = {}
        self._vote: tuple[dist.Work, torch.Tensor] | None = None

    def __enter__(self) -> Self:
        for number in STOPS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received = self._received or number

    @property
    def received(self) -> str | None:
        """The signal that this process was sent, by name."""
        return signal.Signals(self._received).name if self._received else None

    def agreed(self, world: World) -> str | None:
        """The signal that some rank was sent, known to all at the same call; None for none.

        What a rank brings is known to the others at their next call, so that nobody waits.
        """
        if world.host is None:
            return self.received
        answer = 0
        if self._vote is not None:
            work, vote = self._vote
            work.wait()
            answer = int(vote)
        vote = torch.tensor([self._received], dtype=torch.int32)
        work = dist.all_reduce(vote, dist.ReduceOp.MAX, group=world.host, async_op=True)
        assert work is not None
        self._vote = work, vote
        return signal.Signals(answer).name if answer else None

    def end(self) -> None:
        """Waits for the last vote, which nobody asked for."""
        if self._vote is not None:
            self._vote[0].wait()
            self._vote = None
