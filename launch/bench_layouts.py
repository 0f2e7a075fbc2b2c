"""`eosin bench layouts`: what a layout costs on one rank, and what a checkpoint costs a step.

One rank has nobody to talk to, so what shows is the layout's own work: buckets, gathers and
reductions to itself, copies. Each layout has a process of its own, so that its memory is its own.
A step's time with a checkpoint is that of the steps from one that saves to the end of its writing.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from eosin.configs.errors import EosinError
from eosin.configs.load import load_config, to_yaml
from eosin.launch.bench import Row, less_is_better, more_is_better, report
from eosin.launch.bench_sides import FastStep
from eosin.launch.bench_step import BenchStepConfig, held_batches, take_from
from eosin.launch.process import World, choose_device, choose_precision, usable_cores
from eosin.launch.stopwatch import NoWatch, wait_for
from eosin.pretrain.checkpoint import TrainState
from eosin.pretrain.retention import Retention
from eosin.pretrain.run_checkpoints import Checkpoints

LAYOUTS = ("none", "ddp", "fsdp")
MIB = 2**20
FIRST_STEP = 50_000


@dataclass(frozen=True)
class Cost:
    """Of one layout on one rank."""

    tiles_per_s: float
    memory_mib: float
    """Peak: of the GPU, else of the process."""
    step_s: float
    save_s: float
    """That `Checkpoints.save` keeps the training waiting, once its buffers are there."""
    slowed_s: float
    """By which the steps take longer, all together, while a checkpoint is written beside them."""
    written_s: float
    """From `save` to the end of the writing, with no step beside it."""


def bench_layouts(config: BenchStepConfig) -> None:
    """Times each layout in a process of its own, and reports them against one process alone.

    Raises:
        EosinError: a process failed.
    """
    costs = {name: _measured(config, name) for name in LAYOUTS}
    alone, rows = costs["none"], []
    for name in LAYOUTS[1:]:
        cost = costs[name]
        what = f"layout {name} on one rank, {config.name}"
        rows.append(more_is_better(what, "tiles/s", cost.tiles_per_s, alone.tiles_per_s))
        rows.append(less_is_better(f"{what}, memory", "MiB", cost.memory_mib, alone.memory_mib))
    rows += [_stall(name, costs[name], config) for name in LAYOUTS]
    report(f"layouts of {config.name}, batch {config.batch_size}", rows, config.json)


def _stall(name: str, cost: Cost, config: BenchStepConfig) -> Row:
    """What an asynchronous checkpoint adds, against waiting for its writing; in step times."""
    added, waiting = (cost.save_s + cost.slowed_s) / cost.step_s, cost.written_s / cost.step_s
    what = f"checkpoint {name}, asynchronous against waiting, {config.name}"
    return less_is_better(what, "steps", max(added, 1e-3), waiting)


def _measured(config: BenchStepConfig, name: str) -> Cost:
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "config.yaml", Path(folder) / "cost.json"
        file.write_text(to_yaml(replace(config, parallel=name)))  # type: ignore[arg-type]
        command = [sys.executable, "-m", "eosin.launch.bench_layouts", str(file), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = done.stderr.strip().splitlines()
            raise EosinError(f"layout {name}: {said[-1] if said else done.returncode}")
        return Cost(**json.loads(out.read_text()))


@contextmanager
def _one_rank(device: torch.device, alone: bool) -> Iterator[World]:
    """A world of one rank that has process groups all the same."""
    if alone:
        yield World()
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    group, host = dist.group.WORLD, dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup) and isinstance(host, dist.ProcessGroup)
    yield World(group=group, host=host)
    dist.destroy_process_group()


def measure(config: BenchStepConfig, folder: Path) -> Cost:
    """Times steps without and with a checkpoint beside them, in this process."""
    torch.set_num_threads(config.threads or usable_cores())
    device = choose_device(config.device)
    dtype = choose_precision(config.precision, device)
    with _one_rank(device, alone=config.parallel == "none") as world:
        side = FastStep(config.training, device, dtype, folder, world)
        crops, t = held_batches(config), side.training
        steps = config.steps_per_repeat or (10 if device.type == "cuda" else 2)
        numbers = iter(range(FIRST_STEP, FIRST_STEP + 10**6))

        def seconds(count: int) -> float:
            wait_for(device)
            began = time.perf_counter()
            for _ in range(count):
                [batch] = take_from(config, crops, next(numbers), 1)
                side.take(batch, NoWatch())
            wait_for(device)
            return time.perf_counter() - began

        seconds(config.warmup)
        step_s = statistics.median(seconds(steps) / steps for _ in range(config.repeats))
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident()
        checkpoints = Checkpoints(folder / "checkpoints", Retention(every=1, keep=1), world)
        state = TrainState(1, 0, "", None)
        began = time.perf_counter()
        checkpoints.save(t.tensors(), state, wait=False)
        checkpoints.finish()
        written_s = time.perf_counter() - began
        stalls, slowed = [], []
        for number in range(config.repeats):
            wait_for(device)
            began = time.perf_counter()
            checkpoints.save(t.tensors(), replace(state, step=number + 2))
            stalls.append(time.perf_counter() - began)
            taken, began = 0, time.perf_counter()
            while checkpoints.is_writing or taken == 0:
                seconds(1)
                taken += 1
            slowed.append(max(time.perf_counter() - began - taken * step_s, 0.0))
            checkpoints.finish()
        return Cost(
            tiles_per_s=config.batch_size / step_s,
            memory_mib=peak / MIB,
            step_s=step_s,
            save_s=statistics.median(stalls),
            slowed_s=statistics.median(slowed),
            written_s=written_s,
        )


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def main(config_file: str, out: str) -> None:
    """One layout, for `bench_layouts`."""
    config = load_config(BenchStepConfig, [config_file])
    with tempfile.TemporaryDirectory() as folder:
        cost = measure(config, Path(folder))
    Path(out).write_text(json.dumps(cost.__dict__))


if __name__ == "__main__":
    main(*sys.argv[1:])
