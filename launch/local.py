"""A chain of verbs without Slurm: here, one after another, several processes by torch's agent."""

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

from eosin.configs.errors import ConfigError, EosinError, InterruptedRunError
from eosin.launch.chain import LaunchConfig, Stage
from eosin.launch.restarts import AGAIN, USAGE, Limits, limit, progress_of, read_ending

_MODULE = ("-u", "-m", "eosin.launch.cli")
_PAUSE_S = 1.0


def run_local(config: LaunchConfig, stages: Sequence[Stage]) -> None:
    """Runs each verb until it is done, starting it again after what `restarts` calls for.

    Raises:
        EosinError: a verb failed; those after it are not started.
        InterruptedRunError: this process was asked to end.
    """
    limits = Limits(restarts=config.max_restarts, stuck=config.max_stuck)
    for stage in stages:
        crashes: list[str] = []
        restarts = 0
        while True:
            code = _run(config, stage)
            if code == 0:
                break
            ending = read_ending(code, False, limits)
            progress = progress_of(stage.arguments)
            ending = limit(ending, restarts, crashes.count(progress), limits)
            if ending.what == "failed":
                kind = ConfigError if code == USAGE else EosinError
                raise kind(f"{stage.name} {ending.reason}")
            crashes.append(progress)
            restarts += 1
            print(f"eosin: {stage.name} {ending.reason}; start {restarts + 1}", flush=True)
            time.sleep(_PAUSE_S)


def describe_local(config: LaunchConfig, stages: Sequence[Stage]) -> str:
    """What `run_local` would start."""
    lines = []
    for stage in stages:
        nodes = stage.resources.nodes or 1
        where = f"{stage.processes} processes" if stage.processes > 1 else "1 process"
        where += f" on each of {nodes} nodes, this one {config.node_rank}" if nodes > 1 else " here"
        lines.append(f"{where}: eosin {shlex.join(stage.arguments)}")
    return "\n".join(lines)


def _run(config: LaunchConfig, stage: Stage) -> int:
    """Exit code of one verb, as `subprocess` gives it; of the rank that ended first."""
    if stage.processes == 1 and stage.resources.nodes == 1:
        return subprocess.run([sys.executable, *_MODULE, *stage.arguments], check=False).returncode
    # here: torch takes seconds to import
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig as AgentConfig
    from torch.distributed.launcher.api import elastic_launch

    nodes = stage.resources.nodes or 1
    agent = AgentConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=stage.processes,
        run_id=f"eosin-{stage.name}",
        rdzv_backend="c10d",
        rdzv_endpoint=config.master_addr if nodes > 1 else "localhost:0",
        rdzv_configs={"is_host": config.node_rank == 0} if nodes > 1 else {},
        max_restarts=0,  # the exit code says whether to start again, and the agent does not ask
        monitor_interval=0.1,
        local_addr=None if nodes > 1 else "localhost",
    )
    try:
        elastic_launch(agent, sys.executable)(*_MODULE, *stage.arguments)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        real = [code for code in codes if code > 0 and code != AGAIN]
        return (real or codes)[0]
    except SignalException as error:
        raise InterruptedRunError(
            f"{stage.name} was asked to end; the same command goes on"
        ) from error
    return 0
