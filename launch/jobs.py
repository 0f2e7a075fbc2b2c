"""The verbs `launch status`, `launch logs` and `launch cancel`: the jobs of a launch's folder.

What waits or runs, squeue knows; how the others ended, their supervisors wrote down. Accounting is
not needed.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from eosin.configs.errors import InputError
from eosin.launch import slurm
from eosin.launch.artefacts import read_json, write_json, write_text
from eosin.launch.supervisor import OUTCOMES

JOBS, CANCELLED = "jobs.json", "cancelled"
_NAMED = 5
"""Tasks of one job that are named."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job or array of a launch."""

    stage: str
    title: str
    slurm_id: str
    tasks: list[str]
    """Its id, or those of an array's tasks."""
    ranks: int
    """Processes of each task."""
    arguments: list[str]
    """Of the verb; empty for an array."""


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """How the jobs of a launch stand."""

    folder: Path
    """That `eosin launch` printed."""


@dataclass(frozen=True, kw_only=True)
class LogsConfig:
    """The end of the logs of a launch's jobs."""

    folder: Path
    """That `eosin launch` printed."""
    stage: str = ""
    """Of this verb alone."""
    rank: int = 0
    """Of this process of each job."""
    lines: int = 20
    """From the end of each log."""


@dataclass(frozen=True, kw_only=True)
class CancelConfig:
    """Ends all jobs of a launch; finished work stays."""

    folder: Path
    """That `eosin launch` printed."""


def read_jobs(folder: Path) -> list[Job]:
    """The jobs of a launch.

    Raises:
        InputError: the folder is not one of a launch.
    """
    try:
        return [Job(**row) for row in read_json(folder / JOBS)]
    except (OSError, json.JSONDecodeError, TypeError) as error:
        raise InputError(f"{folder} is no folder of a launch (no readable {JOBS})") from error


def write_jobs(folder: Path, jobs: Sequence[Job]) -> None:
    """Writes down the jobs of a launch."""
    write_json(folder / JOBS, [asdict(job) for job in jobs])


def status(config: StatusConfig) -> None:
    """Prints a line a job.

    Raises:
        InputError: the folder is not one of a launch.
        EosinError: squeue does not answer.
    """
    print(describe(config.folder, slurm.queue()))


def describe(folder: Path, queued: dict[str, slurm.Queued]) -> str:
    """The jobs of a launch, a line each, and a line for each task that is not as it should be."""
    lines = []
    for job in read_jobs(folder):
        states = {task: _state(folder, task, job.ranks, queued) for task in job.tasks}
        counts = Counter(what for what, _ in states.values())
        if len(job.tasks) == 1:
            what, reason = states[job.tasks[0]]
            lines.append(f"{job.slurm_id}  {job.stage}: {what}{reason and f' · {reason}'}")
            continue
        summary = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
        lines.append(f"{job.slurm_id}  {job.stage} ({job.title}): {summary}")
        bad = [(t, s) for t, s in states.items() if s[0] not in ("done", "running", "pending")]
        lines += [
            f"    {task}: {what}{reason and f' · {reason}'}"
            for task, (what, reason) in bad[:_NAMED]
        ]
    return "\n".join(lines)


def _state(folder: Path, task: str, ranks: int, queued: dict[str, slurm.Queued]) -> tuple[str, str]:
    """One word, and what there is to say."""
    notes = [read_json(path) for path in sorted((folder / OUTCOMES / task).glob("*.json"))]
    restarts = max((note["restart"] for note in notes), default=0)
    again = f"restart {restarts}" if restarts else ""
    if task in queued:
        row = queued[task]
        told = [row.nodes, again] if row.nodes else [row.reason, again]
        return row.state.lower(), ", ".join(filter(None, told))
    failed = [note for note in notes if note["what"] == "failed"]
    if failed:
        return "failed", f"{failed[0]['reason']} (on {failed[0]['node']})"
    if len(notes) == ranks and all(note["what"] == "done" for note in notes):
        return "done", again
    if (folder / CANCELLED).is_file():
        return "cancelled", again
    if not notes:
        return "gone", "never started: cancelled, or what it waited for failed"
    return "gone", f"ended without a word on {notes[0]['node']}; see its log"


def logs(config: LogsConfig) -> None:
    """Prints the end of each log.

    Raises:
        InputError: the folder is not one of a launch, or no log fits.
    """
    found = False
    for job in read_jobs(config.folder):
        if config.stage not in ("", job.stage):
            continue
        for task in job.tasks:
            path = config.folder / "jobs" / f"{task}_{config.rank}_log.out"
            if path.is_file():
                found = True
                end = path.read_text(errors="replace").splitlines()[-config.lines :]
                print("\n".join([f"== {job.stage}, {path}", *end]))
    if not found:
        raise InputError(f"{config.folder} has no such log yet (stage, rank); see its status")


def cancel(config: CancelConfig) -> None:
    """Ends the jobs.

    Raises:
        InputError: the folder is not one of a launch.
    """
    jobs = read_jobs(config.folder)
    write_text(config.folder / CANCELLED, "")
    slurm.cancel([job.slurm_id for job in jobs])
    print(f"{len(jobs)} jobs cancelled; what they finished is kept")
