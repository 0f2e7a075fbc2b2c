"""One task of a Slurm job: runs a verb as its child, passes signals on, and queues the job again.

submitit starts a `Task` on every rank. The verb runs in a process of its own, in its own process
group, so that a signal that Slurm sends to the whole group reaches it once, from here, and its
data workers not at all. When the verb ends early through no fault of its own (exit code 75, or
killed), the first supervisor to say so puts the job back into the queue; where one rank failed for
good, it forbids that first, and the job fails everywhere.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

from eosin.launch import slurm
from eosin.launch.artefacts import write_json
from eosin.launch.restarts import AGAIN, Ending, Limits, limit, progress_of, read_ending

OUTCOMES, RESTARTS, EXCLUDED = "outcomes", "restarts", "excluded"
"""Folders of a launch that supervisors write: how each task ended, each restart, bad nodes."""
EXCLUDE_VARIABLE = "EOSIN_EXCLUDE_FILE"
"""Names the file into which a verb writes nodes that the job must not get again, one a line."""

_SETTLE_S = 5.0
"""A rank that failed for good takes this long at most to say so, before others queue again."""
_GONE_S = 90.0
"""A job that was queued again is ended by Slurm within this time."""
_PORTS = (10_000, 20_000)
"""First port of the meeting point, and how many: below those that systems hand out."""
_FORWARDED = (signal.SIGTERM, signal.SIGUSR2)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What submitit stores of a job and calls on each rank: arguments and limits, nothing else."""

    arguments: list[str]
    """Of the `eosin` command: verb, flags, overrides."""
    folder: str
    """Of the launch."""
    limits: Limits
    container: list[str] = field(default_factory=list)
    """Command in which the verb runs, such as ``apptainer exec IMAGE python3``."""

    def __call__(self) -> None:
        """Runs the verb.

        Raises:
            SystemExit: the job failed, or was put back into the queue.
        """
        code = _Supervisor(self).run()
        if code:
            raise SystemExit(code)


def rank_variables() -> dict[str, str]:
    """What torchrun would tell this process, from what Slurm tells it; nothing for one alone."""
    here = os.environ
    size, nodes = int(here["SLURM_NTASKS"]), int(here["SLURM_JOB_NUM_NODES"])
    if size == 1:
        return {}
    first, count = _PORTS
    return {
        "RANK": here["SLURM_PROCID"],
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": here["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(size // nodes),
        "MASTER_ADDR": slurm.node_address(here["SLURM_JOB_NODELIST"]),
        "MASTER_PORT": str(first + int(here["SLURM_JOB_ID"]) % count),
    }


def node_name() -> str:
    """What Slurm calls this node; its host name outside Slurm."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


class _Supervisor:
    """One run of a task, from its start to its exit code."""

    def __init__(self, task: Task) -> None:
        self.task, self.folder = task, Path(task.folder)
        self.job = os.environ["SLURM_JOB_ID"]
        self.rank = int(os.environ.get("SLURM_PROCID", "0"))
        self.size = int(os.environ.get("SLURM_NTASKS", "1"))
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.signals: list[int] = []
        self.ended = 0.0
        self.child: subprocess.Popen[bytes] | None = None
        self.excluded = self.folder / EXCLUDED / f"{self.job}.txt"

    def run(self) -> int:
        for number in _FORWARDED:  # in place of submitit's handlers
            signal.signal(number, self._forward)
        self._note("running", f"on {node_name()}")
        before = self._bad_nodes()
        python = self.task.container or [sys.executable]
        self.child = subprocess.Popen(
            [*python, "-u", "-m", "eosin.launch.cli", *self.task.arguments],
            env=os.environ | rank_variables() | {EXCLUDE_VARIABLE: str(self.excluded)},
            process_group=0,
        )
        for early in self.signals:  # those that came while it started
            self.child.send_signal(early)
        code = self.child.wait()
        self.ended = time.monotonic()
        if code == AGAIN and not self.signals:
            self._settle()  # ranks end together: the signal that ended another may be on its way
        ending = read_ending(code, bool(self.signals), self.task.limits)
        bad = [name for name in self._bad_nodes() if name not in before]
        if bad and ending.what == "again":
            ending = Ending("again", f"found bad nodes ({', '.join(bad)})")
        progress = progress_of(self.task.arguments)
        ending = limit(ending, self.restart, self._stuck(progress), self.task.limits)
        if ending.what == "again":
            return self._again(ending, progress, bad)
        self._note(ending.what, ending.reason)
        if ending.what == "done":
            return 0
        slurm.forbid_requeue(self.job)
        return code if code in (1, 2) else 1

    def _forward(self, number: int, _: FrameType | None) -> None:
        self.signals.append(number)
        if self.child is not None:
            self.child.send_signal(number)

    def _again(self, ending: Ending, progress: str, bad: list[str]) -> int:
        """Puts the job back into the queue, unless it is failing, cancelled or there already."""
        self._settle()
        state = slurm.job_state(self.job)
        if state != "RUNNING":
            self._note("ended", f"{ending.reason}; Slurm is ending the job ({state or 'gone'})")
            return AGAIN
        if not slurm.requeue(self.job):
            self._note("ended", f"{ending.reason}; the job failed elsewhere, or is queued again")
            return AGAIN
        self._record(ending, progress)
        self._note("again", f"{ending.reason}; the job is queued again")
        if bad and not slurm.exclude_nodes(self.job, bad):
            print(f"eosin: Slurm does not exclude {', '.join(bad)}", flush=True)
        deadline = time.monotonic() + _GONE_S  # Slurm ends this process; to end first is an error
        while slurm.job_state(self.job) == "RUNNING" and time.monotonic() < deadline:
            time.sleep(1.0)
        return AGAIN

    def _settle(self) -> None:
        """Waits until other ranks that ended with this one have said so, and Slurm why."""
        if self.size > 1:
            time.sleep(max(0.0, self.ended + _SETTLE_S - time.monotonic()))

    def _record(self, ending: Ending, progress: str) -> None:
        """Writes down this restart; the first rank to do so speaks for all."""
        path = self.folder / RESTARTS / f"{self.job}_{self.restart:04d}.json"
        path.parent.mkdir(exist_ok=True)
        record = asdict(ending) | {"rank": self.rank, "node": node_name(), "progress": progress}
        try:
            with path.open("x") as file:
                json.dump(record, file)
        except FileExistsError:
            pass

    def _stuck(self, progress: str) -> int:
        """Earlier crashes of this job with the checkpoint that is the newest now."""
        records = []
        for path in sorted((self.folder / RESTARTS).glob(f"{self.job}_*.json")):
            if path.stem.endswith(f"_{self.restart:04d}"):  # another rank is quicker
                continue
            try:
                records.append(json.loads(path.read_text()))
            except json.JSONDecodeError:  # its writer was killed
                continue
        return sum(r["crash"] and r["progress"] == progress for r in records)

    def _bad_nodes(self) -> list[str]:
        return self.excluded.read_text().split() if self.excluded.is_file() else []

    def _note(self, what: str, reason: str) -> None:
        """Tells the log and the launch's folder how this task stands."""
        verb = self.task.arguments[0]
        print(f"eosin: {verb} {reason} (rank {self.rank}, start {self.restart})", flush=True)
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}" if task is not None else self.job
        note = {"what": what, "reason": reason, "node": node_name(), "restart": self.restart}
        write_json(self.folder / OUTCOMES / job / f"{self.rank}.json", note)
