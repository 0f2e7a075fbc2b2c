"""What eosin asks of Slurm's own commands: a job's state, to queue it again, nodes, limits.

Accounting (``sacct``) is not needed anywhere.
"""

import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from eosin.configs.errors import EosinError

_PATIENCE_S = 60.0
"""Seconds after which a command of Slurm's is given up: a busy controller answers late."""
_MAX_ARRAY_SIZE = 1001
"""Slurm's default."""


@dataclass(frozen=True)
class Queued:
    """A job, or a task of an array, that squeue lists."""

    job: str
    """``12``, or ``12_3`` for a task of an array."""
    state: str
    """In Slurm's words: RUNNING, PENDING, …"""
    reason: str
    """Why it waits."""
    nodes: str


def has_slurm() -> bool:
    """Whether jobs can be submitted from here."""
    return shutil.which("sbatch") is not None


def job_state(job: str) -> str:
    """The state of one job in Slurm's words; empty where Slurm does not know it, or not now."""
    shown = _ask(["scontrol", "--oneliner", "show", "job", job])
    words = dict(word.partition("=")[::2] for word in (shown or "").split())
    return words.get("JobState", "")


def requeue(job: str) -> bool:
    """Puts a running job back into the queue; False where Slurm refuses."""
    return _ask(["scontrol", "requeue", job]) is not None


def forbid_requeue(job: str) -> None:
    """From now on every `requeue` of this job is refused: it has failed for good."""
    _ask(["scontrol", "update", f"JobId={job}", "Requeue=0"])


def exclude_nodes(job: str, nodes: Sequence[str]) -> bool:
    """Adds nodes to those a waiting job must not get; False where Slurm refuses."""
    shown = _ask(["scontrol", "--oneliner", "show", "job", job]) or ""
    words = dict(word.partition("=")[::2] for word in shown.split())
    before = words.get("ExcNodeList", "(null)")
    names = [*([] if before == "(null)" else [before]), *nodes]
    return (
        _ask(["scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(names)}"]) is not None
    )


def node_address(nodes: str) -> str:
    """Where the first node of a list such as ``n[1-4]`` is reached.

    Raises:
        EosinError: Slurm does not expand the list.
    """
    names = (_ask(["scontrol", "show", "hostnames", nodes]) or "").split()
    if not names:
        raise EosinError(f"Slurm does not say which nodes '{nodes}' are (scontrol show hostnames)")
    try:
        socket.getaddrinfo(names[0], None)
        return names[0]
    except OSError:  # a name that only Slurm knows
        shown = _ask(["scontrol", "--oneliner", "show", "node", names[0]]) or ""
        words = dict(word.partition("=")[::2] for word in shown.split())
        return words.get("NodeAddr", names[0])


def max_array_size() -> int:
    """How many tasks one array may have here."""
    for line in (_ask(["scontrol", "show", "config"]) or "").splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "MaxArraySize" and value.strip().isdigit():
            return max(1, int(value))
    return _MAX_ARRAY_SIZE


def queue() -> dict[str, Queued]:
    """All of the user's jobs that wait or run, by id.

    Raises:
        EosinError: squeue does not answer.
    """
    shown = _ask(["squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r|%N"])
    if shown is None:
        raise EosinError("squeue does not answer; is this a machine of the cluster?")
    rows = [line.strip().split("|", 3) for line in shown.splitlines() if line.strip()]
    return {row[0]: Queued(*row) for row in rows}


def cancel(jobs: Sequence[str]) -> None:
    """Ends jobs; those that have ended already are passed over."""
    if jobs:
        _ask(["scancel", "--quiet", *jobs])


def _ask(command: list[str]) -> str | None:
    """What a command prints; None where it fails or does not answer."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_PATIENCE_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
