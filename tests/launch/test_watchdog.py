"""The watchdog and the signals, in one process and in two."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from ranks import ranks_of

from eosin.launch.process import World, join_world
from eosin.launch.signals import StopRequests
from eosin.launch.watchdog import Sign, Watchdog, who_is_behind


def test_what_goes_on_is_left_alone_and_what_stands_still_is_ended(tmp_path: Path) -> None:
    codes: list[int] = []
    with Watchdog(tmp_path / "stacks", World(), 0.5, end=codes.append) as watchdog:
        for step in range(8):
            watchdog.beat(step)
            time.sleep(0.1)
        assert not codes and not (tmp_path / "stacks").exists()
        deadline = time.monotonic() + 30
        while not codes and time.monotonic() < deadline:
            time.sleep(0.05)  # this very line is in the stack
    assert codes == [75]
    stack = (tmp_path / "stacks" / "rank_0.txt").read_text()
    assert stack.startswith("step 7, on ")
    assert "test_what_goes_on_is_left_alone" in stack


def test_the_first_step_has_three_times_as_long(tmp_path: Path) -> None:
    codes: list[int] = []
    with Watchdog(tmp_path, World(), 0.4, end=codes.append) as watchdog:
        watchdog.beat(0)
        time.sleep(0.8)
        assert not codes


def test_without_a_limit_nothing_is_watched(tmp_path: Path) -> None:
    with Watchdog(tmp_path, World(), 0.0, end=lambda code: pytest.fail("it ended")):
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ([], [], "rank 0, which keeps the account, cannot be reached"),
        (
            [Sign(4, 7, "a"), Sign(4, 7, "b")],
            [Sign(4, 9, "a"), Sign(4, 8, "b")],
            "all ranks began step 4: one of them is stuck in it",
        ),
        (
            [Sign(4, 7, "a"), Sign(2, 7, "b"), Sign(4, 6, "c")],
            [Sign(4, 9, "a"), Sign(2, 9, "b"), Sign(4, 8, "c")],
            "rank 1 (b) is at step 2, the others at 4",
        ),
        (
            [Sign(4, 7, "a"), Sign(4, 5, "b")],
            [Sign(4, 9, "a"), Sign(4, 5, "b")],
            "rank 1 (b) gives no sign of life since step 4: stopped, or gone",
        ),
        (
            [Sign(4, 7, "a")],
            [Sign(4, 9, "a")],
            "rank 1 never gave a sign of life: stopped, or gone",
        ),
    ],
)
def test_who_is_behind(before: list[Sign], now: list[Sign], words: str) -> None:
    found = who_is_behind(dict(enumerate(before)), dict(enumerate(now)), max(len(now), 2))
    assert found == words


def test_one_process_asks_nobody() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequests() as stops:
        assert stops.agreed(World()) is None
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stops.agreed(World()) == stops.received == "SIGUSR2"
    assert signal.getsignal(signal.SIGTERM) == before


def worker() -> None:
    """Rank 1 is sent a signal between two calls of its own; both ranks say when they learn it."""
    with join_world(torch.device("cpu"), 60) as world, StopRequests() as stops:
        answers = []
        for call in range(6):
            if call == 2 and world.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            answers.append(stops.agreed(world))
        stops.end()
        assert world.gather("x" * world.rank) == ["", "x"]
        assert world.total(world.rank + 1) == 3
        print(answers.index("SIGTERM"), flush=True)


def test_all_ranks_learn_of_a_signal_at_the_same_call(tmp_path: Path) -> None:
    with ranks_of(2, [__file__], tmp_path) as ranks:
        assert [rank.ends(120) for rank in ranks] == [0, 0], ranks[0].said()
        assert [rank.said().split() for rank in ranks] == [["3"], ["3"]]


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    code = (
        "import torch\nfrom eosin.launch.process import join_world\n"
        "with join_world(torch.device('cpu'), 3): pass"
    )
    script = tmp_path / "join.py"
    script.write_text(code)
    with ranks_of(2, [str(script)], tmp_path) as ranks:
        ranks[1].process.kill()
        assert ranks[0].ends(120) == 1  # there is no command around it
        assert "InterruptedRunError: of 2 ranks 1 did not come within 3 s" in ranks[0].said()


if __name__ == "__main__":
    worker()
