"""On a GPU: the bench times both sides in bf16, compiled against eager, and they agree."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from eosin.configs.load import load_config
from eosin.launch.bench_sides import PARTS, FastStep, PlainStep
from eosin.launch.bench_step import BenchStepConfig, held_batches, peak_flops, take_from
from eosin.launch.cli import main
from eosin.launch.stopwatch import NoWatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
    # of torch's compiler, which hides it only where warnings are shown
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SMALL = [
    "model.width=192", "model.depth=3", "model.heads=3", "objective.head.prototypes=4096",
    "batch_size=16", "group_size=8", "device=cuda", "repeats=2", "steps_per_repeat=3",
]  # fmt: skip


def test_every_part_is_timed_and_its_memory_known(tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    arguments = [*SMALL, "model.drop_path=0.25", "loss_prototypes=16384", "--json", str(file)]
    assert main(["bench", "step", *arguments]) == 0
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    assert len(rows) == 3 + 2 * len(PARTS) + 1
    assert all(np.isfinite(list(row.values())[2:]).all() for row in rows.values())
    assert all(min(row["ours"], row["baseline"], row["ratio"]) > 0 for row in rows.values())
    name = "T/16 2x224+8x96 K=4096 drop 0.25"
    assert rows[f"step MFU {name}"]["ours"] < 100
    forward, inputs = (rows[f"step memory {name} {part}"] for part in ("student", "inputs"))
    assert forward["ours"] > inputs["ours"] and forward["baseline"] > inputs["baseline"]
    whole = 16_000 / rows[f"step {name}"]["ours"]
    parts = sum(rows[f"step time {name} {part}"]["ours"] for part in PARTS)
    assert 0.5 * whole < parts < 1.05 * whole


def test_both_sides_take_the_same_steps_in_bf16(tmp_path: Path) -> None:
    config = load_config(BenchStepConfig, [], [*SMALL, "compile=none"])
    fast = FastStep(config.training, torch.device("cuda", 0), torch.bfloat16, tmp_path)
    plain = PlainStep(fast)
    for batch in take_from(config, held_batches(config), 60_000, 3):
        ours, theirs = fast.take(batch, NoWatch()), plain.take(batch, NoWatch())
        torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.01)


def test_the_peak_is_no_less_than_what_products_reach() -> None:
    peak = peak_flops(torch.device("cuda", 0), torch.bfloat16)
    side = 8192
    a = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    a @ a
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(10):
        a @ a
    end.record()
    torch.cuda.synchronize()
    assert 10 * 2 * side**3 / (begin.elapsed_time(end) / 1000) < 1.1 * peak
