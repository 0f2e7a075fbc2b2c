"""On a GPU: the layouts on one rank over NCCL, compiled, in bf16; checkpoints beside steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from eosin.configs.load import load_config
from eosin.launch.bench_layouts import _one_rank, measure
from eosin.launch.bench_sides import FastStep
from eosin.launch.bench_step import BenchStepConfig, held_batches, take_from
from eosin.launch.process import World
from eosin.launch.stopwatch import NoWatch
from eosin.pretrain.checkpoint import TrainState, read_tensors, step_folder
from eosin.pretrain.retention import Retention
from eosin.pretrain.run_checkpoints import Checkpoints

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]

SMALL = [
    "model.width=192", "model.depth=3", "model.heads=3", "objective.head.prototypes=4096",
    "batch_size=16", "group_size=8", "device=cuda", "repeats=2", "steps_per_repeat=3",
    "model.drop_path=0.25",
]  # fmt: skip
GPU = torch.device("cuda", 0)


@contextmanager
def side_of(tmp_path: Path, *overrides: str) -> Iterator[tuple[FastStep, BenchStepConfig, World]]:
    config = load_config(BenchStepConfig, [], [*SMALL, *overrides])
    with _one_rank(GPU, alone=config.parallel == "none") as world:
        yield FastStep(config.training, GPU, torch.bfloat16, tmp_path, world), config, world


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("compiled", ["none", "blocks"])
def test_a_layout_takes_the_steps_of_one_process(
    tmp_path: Path, layout: str, compiled: str
) -> None:
    found = {}
    for name in ("none", layout):
        choices = [f"parallel={name}", f"compile={compiled}"]
        with side_of(tmp_path, *choices) as (side, config, _):
            batches = take_from(config, held_batches(config), 60_000, 4)
            found[name] = torch.stack([side.take(batch, NoWatch()) for batch in batches])
    torch.testing.assert_close(found[layout], found["none"], atol=0.05, rtol=0.01)


def test_a_checkpoint_taken_beside_the_steps_is_that_of_its_step(tmp_path: Path) -> None:
    with side_of(tmp_path, "parallel=fsdp", "compile=none") as (side, config, world):
        batches = take_from(config, held_batches(config), 60_000, 6)
        for batch in batches[:2]:
            side.take(batch, NoWatch())
        checkpoints = Checkpoints(tmp_path / "checkpoints", Retention(every=1), world)
        tensors = side.training.tensors()
        wanted = {
            name: (t.full_tensor() if hasattr(t, "full_tensor") else t).cpu().clone()
            for name, t in tensors.items()
        }
        checkpoints.save(tensors, TrainState(2, 0, "", None))
        for batch in batches[2:]:
            side.take(batch, NoWatch())
        checkpoints.finish()
    read = read_tensors(step_folder(tmp_path / "checkpoints", 2))
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[name], wanted[name]) for name in read)


def test_what_a_checkpoint_costs_is_measured(tmp_path: Path) -> None:
    config = load_config(BenchStepConfig, [], [*SMALL, "parallel=fsdp"])
    cost = measure(config, tmp_path)
    assert cost.tiles_per_s > 0 and cost.save_s < cost.written_s
    assert not dist.is_initialized()
