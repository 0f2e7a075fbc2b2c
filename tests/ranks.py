"""Processes that are the ranks of one world, on this machine."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TESTS = str(Path(__file__).parent)


@dataclass(frozen=True)
class Rank:
    """One of them."""

    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        """Its output and errors so far."""
        return self.log.read_text(errors="replace")

    def ends(self, timeout_s: float = 300) -> int:
        """Waits for its exit code."""
        return self.process.wait(timeout_s)


@contextmanager
def ranks_of(
    count: int, arguments: Sequence[str], folder: Path, **environment: str
) -> Iterator[list[Rank]]:
    """One Python process a rank, told what torchrun would tell it; killed at the end.

    Args:
        count: of ranks.
        arguments: of each Python.
        folder: for what they say; made.
        environment: more variables.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        **environment,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")])),
    }
    folder.mkdir(parents=True, exist_ok=True)
    ranks: list[Rank] = []
    try:
        for number in range(count):
            log = folder / f"rank_{number}.log"
            with log.open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, *arguments],
                    env={**common, "RANK": str(number), "LOCAL_RANK": str(number)},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            ranks.append(Rank(process, log))
        yield ranks
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.wait()
