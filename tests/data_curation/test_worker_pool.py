"""Workers of a killed command end with it, whatever they are doing."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = """
import os, sys
from pathlib import Path
from eosin.data_curation.worker_pool import run_jobs

def work(path):
    Path(path).write_text(str(os.getpid()))
    sum(range(10**9))  # one call that no other Python thread can interrupt, of many seconds
    Path(path).write_text("worked on")

if __name__ == "__main__":
    for _ in run_jobs(work, [sys.argv[1] + "/0", sys.argv[1] + "/1"], 2):
        pass
"""


def lives(pid: int) -> bool:
    """Whether the process runs (one that was ended but not yet collected does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel's /proc")
def test_busy_workers_end_at_once_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path)])
    notes = [tmp_path / "0", tmp_path / "1"]
    while not all(note.is_file() and note.read_text() for note in notes):
        assert process.poll() is None
        time.sleep(0.01)
    workers = [int(note.read_text()) for note in notes]
    assert all(map(lives, workers))
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 2
    while any(map(lives, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(lives, workers))
    assert [int(note.read_text()) for note in notes] == workers


LATE_COMMAND = """
import multiprocessing, os, sys, time
from pathlib import Path
from eosin.data_curation.worker_pool import follow_parent

def work(folder):
    Path(folder, f"pid{os.getpid()}").touch()
    while not Path(folder, "go").exists():
        time.sleep(0.005)
    follow_parent()
    os.mkdir(folder + f"/worked on {os.getpid()}")

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    for _ in range(2):
        context.Process(target=work, args=(sys.argv[1],)).start()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel's /proc")
def test_a_worker_that_starts_after_its_parent_was_killed_does_nothing(tmp_path: Path) -> None:
    script = tmp_path / "command.py"
    script.write_text(LATE_COMMAND)
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path)])
    while len(pids := [int(path.name[3:]) for path in tmp_path.glob("pid*")]) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "go").touch()
    deadline = time.monotonic() + 60
    while any(map(lives, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(lives, pids))
    assert not list(tmp_path.glob("worked*"))
