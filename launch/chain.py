"""What `eosin launch` is asked for: verbs in a row, and the resources of each."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from eosin.configs.errors import ConfigError
from eosin.configs.load import load_config
from eosin.launch.cli import parse_arguments, split_verb
from eosin.launch.verbs import VERBS, Verb

Where: TypeAlias = Literal["auto", "slurm", "local"]


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one verb gets. Under `stages`, null is what the launch as a whole gives."""

    nodes: int | None = None
    """Nodes of a verb that runs as several processes (pretrain); the others run on one."""
    gpus: int | None = None
    """GPUs a node, each with a process of its own; a verb that is one process gets one. 0: none."""
    tasks: int | None = None
    """Processes a node where there are no GPUs."""
    cpus: int | None = None
    """Cores a process."""
    mem: str | None = None
    """Memory a node, as Slurm writes it (``64G``; ``0``: all of it); null: the partition's own."""
    hours: float | None = None
    """Time limit. Training goes on in a further job of the same id when it is over."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    """Nodes that are not wanted, as Slurm writes them."""
    array: int | None = None
    """Tasks among which a per-slide verb shares its slides; 0: one job does them all."""

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("tasks", 1), ("cpus", 1), ("gpus", 0), ("array", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        if self.hours is not None and not self.hours > 0:
            raise ValueError(f"hours must be positive, not {self.hours}")


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(Resources):
    """Verbs on Slurm, or here: what follows ``--`` is run, and queued again until it is done.

    Several verbs, each after a ``--``, are a chain: each starts when the one before it has ended
    with exit code 0, and never after a failure. A verb that is killed, preempted, or out of time
    goes back into the queue. Without Slurm the chain runs here, one verb after another, `gpus` or
    `tasks` processes each, started again in the same way; over several machines, run the same
    command on each with its own `node_rank`.

    `container` is an image for apptainer, in which the verb runs (the jobs' own Python only
    watches it); what it must see besides the working folder goes into APPTAINER_BIND, in `setup`.
    """

    where: Where = "auto"
    """auto: Slurm where `sbatch` is found."""
    name: str = ""
    """Of the jobs and of the folder; empty: the verbs'."""
    folder: Path | None = None
    """For the code, scripts and logs, on a disk all nodes share; null: ``launches/NAME-1`` on."""
    nodes: int | None = 1
    gpus: int | None = 0
    tasks: int | None = 1
    cpus: int | None = 4
    hours: float | None = 24.0
    array: int | None = 0
    stages: dict[str, Resources] = field(default_factory=dict)
    """Of single verbs, by name (``pretrain``, ``shard-verify``; the second of one: ``eval-2``)."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell for each job before it starts, such as ``module load cuda``."""
    container: str = ""
    """Image for ``apptainer exec``; empty: none."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Further options of sbatch, such as ``reservation: winter``."""
    signal_s: int = 300
    """Seconds before the time limit at which training writes a checkpoint and makes room."""
    max_restarts: int = 100
    """How often a job is queued again; one that ends itself before its limit counts too."""
    max_stuck: int = 2
    """How often of these in a row after a crash without a newer checkpoint."""
    retries: int = 2
    """How often a task of an array that failed is tried again."""
    array_at_once: int = 256
    """Tasks of an array that run at the same time."""
    node_rank: int = 0
    """Without Slurm: number of this machine of `nodes`."""
    master_addr: str = "localhost:29400"
    """Without Slurm, with several nodes: machine 0, and a free port there."""
    command: list[str] = field(default_factory=list)
    """What follows the first ``--``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("signal_s", "max_restarts", "max_stuck", "retries", "node_rank"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.array_at_once < 1:
            raise ValueError(f"array_at_once must be at least 1, not {self.array_at_once}")
        if any(not c.isalnum() and c not in "-_." for c in self.name) or self.name.startswith("."):
            raise ValueError(f"name may hold letters, digits, - _ and ., not '{self.name}'")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One verb of a chain."""

    name: str
    arguments: list[str]
    """Of the `eosin` command."""
    verb: Verb
    config: Any
    """The verb's own, already read: what is wrong with it is known before anything waits."""
    resources: Resources
    """Without nulls where there is a default."""

    @property
    def processes(self) -> int:
        """Of each node: one a GPU, or `tasks`; one in all of a verb that knows no ranks."""
        r = self.resources
        return (r.gpus or r.tasks or 1) if self.verb.ranks else 1


def read_stages(config: LaunchConfig) -> list[Stage]:
    """The verbs of a launch, with their configs read.

    Raises:
        ConfigError: no verb, an unknown one, what is no work of its own, or a bad config.
    """
    stages: list[Stage] = []
    for arguments in _split(config.command):
        name, rest = split_verb(arguments)
        if name is None or name.startswith("launch"):
            raise ConfigError("after '--' comes a verb, as in: eosin launch nodes=2 -- pretrain …")
        verb = VERBS[name]
        files, overrides, flags = parse_arguments(rest, verb)
        if flags:
            raise ConfigError(f"{', '.join(sorted(flags))} goes before the '--', not behind it")
        title = name.replace(" ", "-")
        same = sum(stage.verb is verb for stage in stages)
        title = f"{title}-{same + 1}" if same else title
        own = config.stages.get(title, Resources())
        stages.append(
            Stage(
                name=title,
                arguments=arguments,
                verb=verb,
                config=load_config(verb.load_schema(), files, overrides),
                resources=_resources(config, own, verb, title),
            )
        )
    unknown = sorted(set(config.stages) - {stage.name for stage in stages})
    if unknown:
        names = ", ".join(stage.name for stage in stages)
        raise ConfigError(f"stages.{unknown[0]}: no such stage in this chain of {names}")
    return stages


def _split(command: Sequence[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in command:
        if word == "--":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def _resources(config: LaunchConfig, own: Resources, verb: Verb, title: str) -> Resources:
    given = {f.name: getattr(own, f.name) for f in fields(Resources)}
    merged = {
        name: getattr(config, name) if value is None else value for name, value in given.items()
    }
    resources = Resources(**merged)
    if own.array and not verb.pieces:
        raise ConfigError(f"stages.{title}.array: 'eosin {title}' does not work slide by slide")
    if not verb.pieces:
        resources = replace(resources, array=0)
    if verb.ranks:
        return resources
    if (own.nodes or 1) > 1:
        raise ConfigError(f"stages.{title}.nodes: 'eosin {title}' is one process on one node")
    return replace(resources, nodes=1, tasks=1, gpus=min(resources.gpus or 0, 1))
