"""The verb `launch`: a chain of verbs as dependent jobs on Slurm, through submitit.

A launch is a folder: ``code/`` (what runs), ``launch.yaml``, ``jobs.json`` (which job is which
verb), ``jobs/`` (submitit's scripts, its one pickle a job, and the logs), ``parts/`` (which slides
a task of an array does), and what supervisors write. Only its owner can enter it.
"""

import importlib
import math
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

from eosin.configs.errors import ConfigError, EosinError
from eosin.configs.load import to_yaml
from eosin.launch import slurm
from eosin.launch.artefacts import write_text
from eosin.launch.chain import LaunchConfig, Stage, read_stages
from eosin.launch.jobs import JOBS, Job, read_jobs, write_jobs
from eosin.launch.local import describe_local, run_local
from eosin.launch.parts import pack
from eosin.launch.restarts import Limits
from eosin.launch.snapshot import copy_code
from eosin.launch.supervisor import Task

LAUNCHES = Path("launches")


def launch(config: LaunchConfig) -> None:
    """Submits the chain, or runs it here.

    Raises:
        ConfigError: the chain or the config of one of its verbs is wrong.
        EosinError: Slurm refuses a job (those before it are cancelled), or a verb run here failed.
    """
    stages = read_stages(config)
    if not _on_slurm(config):
        run_local(config, stages)
        return
    folder = _new_folder(config, stages)
    commit = copy_code(folder / "code")
    write_text(folder / "launch.yaml", to_yaml(config))
    jobs: list[Job] = []
    try:
        submissions = list(_submissions(config, stages, folder, slurm.max_array_size()))
    except EosinError:  # of a verb whose slides cannot be listed
        shutil.rmtree(folder)
        raise
    try:
        for submission in submissions:
            jobs.append(submission.submit(folder, jobs))
            write_jobs(folder, jobs)
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        slurm.cancel([job.slurm_id for job in jobs])
        last = str(error).strip().splitlines()[-1]
        raise EosinError(f"Slurm refuses a job: {last}; nothing is left in the queue") from error
    rows = "\n".join(f"  {job.slurm_id}  {job.stage} ({job.title})" for job in jobs)
    print(f"{len(jobs)} jobs submitted from commit {commit}:\n{rows}\nfolder: {folder}")
    print(f"eosin launch status {folder} · logs {folder} · cancel {folder}")


def plan(config: LaunchConfig) -> str:
    """The scripts that would be submitted, or the processes that would be started here."""
    stages = read_stages(config)
    if not _on_slurm(config):
        return describe_local(config, stages)
    folder = _folder(config, stages)
    most = slurm.max_array_size() if slurm.has_slurm() else 1001
    texts = []
    for submission in _submissions(config, stages, folder, most, write=False):
        script = submission.script(folder)
        texts.append(f"# {submission.stage} ({submission.title})\n{script}")
    return "\n".join(texts)


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One call of sbatch: a job, or an array of tasks."""

    number: int
    """In the launch, from 0."""
    stage: str
    title: str
    tasks: list[Task]
    parameters: dict[str, Any]
    after: dict[str, list[int]]
    """Numbers of the submissions that it waits for, by condition: ``afterok``, ``afterany``."""

    def submit(self, folder: Path, before: Sequence[Job]) -> Job:
        """Hands it to Slurm."""
        executor = SlurmExecutor(folder / "jobs")
        executor.update_parameters(**self._parameters([job.slurm_id for job in before]))
        ids = [job.job_id for job in executor.submit_array(self.tasks)]
        return Job(
            stage=self.stage,
            title=self.title,
            slurm_id=ids[0].partition("_")[0],
            tasks=ids,
            arguments=self.tasks[0].arguments if len(self.tasks) == 1 else [],
            ranks=self.parameters["nodes"] * self.parameters["ntasks_per_node"],
        )

    def script(self, folder: Path) -> str:
        """What sbatch would get; jobs that it waits for by their numbers in this launch."""
        where = shlex.quote(str((folder / "jobs").absolute()))
        return _make_sbatch_string(
            command=f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {where}",
            folder=folder / "jobs",
            map_count=len(self.tasks) if len(self.tasks) > 1 else None,
            **self._parameters([f"JOB_{i + 1}" for i in range(self.number)]),
        )

    def _parameters(self, before: Sequence[str]) -> dict[str, Any]:
        waits = [":".join([how, *(before[i] for i in which)]) for how, which in self.after.items()]
        if not waits:
            return self.parameters
        dependency = ",".join(waits)
        extra = self.parameters["additional_parameters"] | {"kill-on-invalid-dep": "yes"}
        return self.parameters | {"dependency": dependency, "additional_parameters": extra}


def _submissions(
    config: LaunchConfig, stages: Sequence[Stage], folder: Path, most: int, write: bool = True
) -> Iterator[Submission]:
    """The calls of sbatch that a chain comes to.

    Args:
        config: the launch.
        stages: its verbs.
        folder: of the launch.
        most: tasks of one array.
        write: whether to write which pieces a task of an array does.
    """
    number = 0
    after: dict[str, list[int]] = {}
    for stage in stages:
        parts = _write_parts(stage, folder / "parts" / stage.name, write)
        arrays = [parts[i : i + most] for i in range(0, len(parts), most)]
        limits = Limits(restarts=config.max_restarts, stuck=config.retries, retry_failures=True)
        for array in arrays:
            yield Submission(
                number=number,
                stage=stage.name,
                title=f"{len(array)} tasks",
                tasks=[_task(config, stage, folder, limits, f"only={part}") for part in array],
                parameters=_parameters(config, stage, folder),
                after=after,
            )
            number += 1
        # the last job judges, so it waits for tasks that failed, too
        waits = {"afterany": list(range(number - len(arrays), number))} if arrays else {}
        limits = Limits(restarts=config.max_restarts, stuck=config.max_stuck)
        yield Submission(
            number=number,
            stage=stage.name,
            title="what is left, and the tables" if arrays else "1 job",
            tasks=[_task(config, stage, folder, limits)],
            parameters=_parameters(config, stage, folder),
            after=after | waits,
        )
        after = {"afterok": [number]}
        number += 1


def _write_parts(stage: Stage, folder: Path, write: bool) -> list[Path]:
    """Files that each name the pieces of one task; none where the verb is one job."""
    if not stage.resources.array:
        return []
    module = importlib.import_module(stage.verb.module)
    list_pieces: Callable[[Any], dict[str, int]] = getattr(module, stage.verb.pieces)
    parts = pack(list_pieces(stage.config), stage.resources.array)
    paths = [folder.absolute() / f"{index:05d}.txt" for index in range(len(parts))]
    if write:
        for path, part in zip(paths, parts, strict=True):
            write_text(path, "".join(f"{name}\n" for name in part))
    return paths


def _task(config: LaunchConfig, stage: Stage, folder: Path, limits: Limits, *more: str) -> Task:
    gpu = ["--nv"] if stage.resources.gpus else []
    prefix = ["apptainer", "exec", *gpu, config.container, "python3"] if config.container else []
    return Task(
        arguments=[*stage.arguments, *more],
        folder=str(folder.absolute()),
        limits=limits,
        container=prefix,
    )


def _parameters(config: LaunchConfig, stage: Stage, folder: Path) -> dict[str, Any]:
    """Parameters of submitit for one verb; nulls are left out of the script."""
    r = stage.resources
    assert r.hours is not None  # `Stage.resources` has its defaults
    code = shlex.quote(str((folder / "code").absolute()))
    return {
        "job_name": f"{config.name}.{stage.name}" if config.name else stage.name,
        "time": math.ceil(r.hours * 60),
        "nodes": r.nodes,
        "ntasks_per_node": stage.processes,
        "gpus_per_node": r.gpus or None,
        "cpus_per_task": r.cpus,
        "mem": r.mem,
        "partition": r.partition,
        "account": r.account,
        "qos": r.qos,
        "constraint": r.constraint,
        "exclude": r.exclude,
        "signal_delay_s": config.signal_s,
        "stderr_to_stdout": True,
        "wckey": None,
        "array_parallelism": config.array_at_once,
        "setup": [
            *config.setup,
            f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
        ],
        # one rank that fails ends the others; srun does not take the cores from sbatch (22.05)
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={r.cpus}"],
        "additional_parameters": {"requeue": True, **config.sbatch},
    }


def _on_slurm(config: LaunchConfig) -> bool:
    return config.where == "slurm" or (config.where == "auto" and slurm.has_slurm())


def _folder(config: LaunchConfig, stages: Sequence[Stage]) -> Path:
    """The folder that the launch gets: the next of its name."""
    if config.folder is not None:
        return config.folder
    name = config.name or "-".join(stage.name for stage in stages)[:80]
    taken = [path.name.rpartition("-")[2] for path in LAUNCHES.glob(f"{name}-*")]
    return LAUNCHES / f"{name}-{max((int(n) for n in taken if n.isdigit()), default=0) + 1}"


def _new_folder(config: LaunchConfig, stages: Sequence[Stage]) -> Path:
    """Makes the folder.

    Raises:
        ConfigError: it is there already, or jobs with the same verbs and configs are queued.
    """
    if not slurm.has_slurm():
        raise ConfigError("where=slurm, but there is no sbatch here; use where=local")
    folder = _folder(config, stages)
    queued = slurm.queue()
    for other in folder.parent.glob(f"*/{JOBS}"):
        live = [job for job in read_jobs(other.parent) if any(t in queued for t in job.tasks)]
        same = [job for job in live if job.arguments in [stage.arguments for stage in stages]]
        if same:
            raise ConfigError(
                f"{other.parent} has the same '{same[0].stage}' in the queue (job "
                f"{same[0].slurm_id}); eosin launch cancel {other.parent}, or another out="
            )
    try:
        folder.mkdir(parents=True, mode=0o700)
    except FileExistsError as error:
        raise ConfigError(f"{folder} is there already; give another folder=") from error
    return folder
