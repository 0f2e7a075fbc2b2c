"""On a GPU: planned memory is what a step allocates there, and what compiled blocks save of it."""

import gc
from pathlib import Path

import pytest
import torch

from eosin.configs.load import load_config
from eosin.launch.bench_sides import FastStep
from eosin.launch.plan import PlanConfig
from eosin.launch.process import World
from eosin.launch.stopwatch import NoWatch
from eosin.pretrain.step_plan import blank_batch, largest_step, plan_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
    # of torch's compiler, which hides it only where warnings are shown
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def allocated(config: PlanConfig, folder: Path) -> int:
    """Most bytes that torch had allocated in a step that was not the first, less those before."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    side = FastStep(config, torch.device("cuda", 0), torch.bfloat16, folder)
    plan = config.plan_of(World())
    batch = blank_batch(plan, largest_step(config, plan))
    for crops in batch.images:
        crops.random_(256)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        side.take(batch, NoWatch())
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("size", ["small", "base"])
@pytest.mark.parametrize("recipe", ["eosin", "dinov2"])
@pytest.mark.parametrize("batch_size", [16, 48])
def test_memory_is_what_an_eager_step_allocates(
    recipe: str, size: str, batch_size: int, mode: str, tmp_path: Path
) -> None:
    overrides = [f"batch_size={batch_size}", "group_size=16", f"recompute={mode}", "compile=none"]
    config = load_config(PlanConfig, [f"pretrain/{recipe}", f"size/{size}"], overrides)
    found = plan_step(config, "cuda", torch.bfloat16).peak.total
    assert found == pytest.approx(allocated(config, tmp_path), rel=0.1)


def test_compiled_blocks_keep_no_more_than_planned(tmp_path: Path) -> None:
    overrides = ["batch_size=32", "group_size=16", "compile=blocks"]
    config = load_config(PlanConfig, ["pretrain/eosin", "size/base"], overrides)
    found = plan_step(config, "cuda", torch.bfloat16).peak.total
    assert allocated(config, tmp_path) < 1.05 * found
