"""The bench: rows, JSON and table, the watches, and a whole tiny run of the verb."""

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eosin.configs.load import load_config
from eosin.launch import bench, bench_step
from eosin.launch.bench_sides import PARTS, FastStep, PlainStep
from eosin.launch.bench_step import BenchStepConfig, held_batches, peak_flops, take_from
from eosin.launch.cli import main
from eosin.launch.stopwatch import NoWatch, TimeByPart, inside, memory_by_part, watched

TINY = [
    "model.width=32", "model.depth=2", "model.heads=2", "model.patch_px=8", "model.image_px=32",
    "objective.head.prototypes=64", "objective.head.hidden=32", "objective.head.bottleneck=16",
    "augment.global_px=32", "augment.local_px=16", "augment.n_local=2", "batch_size=4",
    "group_size=2", "device=cpu", "threads=1", "warmup=1", "repeats=1",
]  # fmt: skip
NAME = "D32/8 2x32+2x16 K=64"


def test_ratios_are_above_one_in_our_favour_and_json_is_what_was_shown(tmp_path: Path) -> None:
    rows = [
        bench.more_is_better("rate", "tiles/s", 1234.0, 617.0),
        bench.less_is_better("time", "ms", 2.0, 3.0),
    ]
    shown = io.StringIO()
    bench.report("title", rows, tmp_path / "rows.json", shown)
    assert [row.ratio for row in rows] == [2.0, 1.5]
    saved = json.loads((tmp_path / "rows.json").read_text())
    assert [list(row) for row in saved] == [["name", "unit", "ours", "baseline", "ratio"]] * 2
    assert saved[0] == {
        "name": "rate", "unit": "tiles/s", "ours": 1234.0, "baseline": 617.0, "ratio": 2.0,
    }  # fmt: skip
    lines = shown.getvalue().splitlines()
    assert lines[0] == "title" and lines[2].split() == ["rate", "tiles/s", "1,234", "617", "2.00"]
    assert len({len(line) for line in lines[1:]}) == 1  # columns are aligned


def test_runs_alternate_and_medians_are_by_part() -> None:
    order: list[str] = []
    a, b = bench.in_turn(lambda: order.append("a"), lambda: order.append("b"), 3)
    assert order == ["a", "b"] * 3 and len(a) == len(b) == 3
    runs = [{"x": 1.0, "y": 9.0}, {"x": 5.0, "y": 7.0}, {"x": 3.0, "y": 8.0}]
    assert bench.median_by_part(runs) == {"x": 3.0, "y": 8.0}


def work(seconds: float) -> None:
    """Takes that much of the processor."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_time_goes_to_the_part_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    watch = TimeByPart(torch.device("cpu"))
    inner = watched(lambda: watch, "inner", work)
    for _ in range(2):
        watch.switch("outer")
        work(0.01)
        inner(0.03)
        watch.stop()
        work(0.05)  # between two stretches of work: nobody's
    time.sleep(0.01)  # takes no processor
    seconds = watch.seconds()
    assert list(seconds) == ["outer", "inner"]
    assert 0.02 <= seconds["outer"] < 0.05 and 0.06 <= seconds["inner"] < 0.09
    again = TimeByPart(torch.device("cpu"))
    again.switch("outer")
    watched(lambda: again, "inner", work, goes_on=True)(0.01)
    work(0.02)
    again.stop()
    assert again.seconds()["inner"] >= 0.03 > again.seconds()["outer"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    wall = TimeByPart(torch.device("cpu"))
    wall.switch("outer")
    time.sleep(0.02)
    wall.stop()
    assert wall.seconds()["outer"] >= 0.02


def test_memory_is_the_peak_of_each_part_over_the_beginning() -> None:
    watch = memory_by_part(torch.device("cpu"))
    kept: list[Tensor] = []
    torch.zeros(9_000_000).sum()  # before the first part: nobody's
    watch.switch("first")
    kept.append(torch.zeros(1_000_000))
    with inside(watch, "inner"):
        torch.zeros(3_000_000).sum()  # gone at once
    watch.switch("last")
    kept.clear()
    watch.stop()
    assert list(watch.peaks) == ["first", "inner", "last"]
    first, inner, last = (peak / 1e6 for peak in watch.peaks.values())
    assert first == pytest.approx(4, abs=0.01) and last == pytest.approx(4, abs=0.01)
    assert inner == pytest.approx(16, abs=0.01)


def test_the_verb_reports_every_part_of_both_sides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "step.json"
    arguments = ["loss_prototypes=2048", "loss_rows=64", "model.drop_path=0.3", "--json", str(file)]
    assert main(["bench", "step", *TINY, *arguments]) == 0
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    name = f"{NAME} drop 0.3"
    expected = [f"step {name}", f"step executed {name}", f"step MFU {name}"]
    expected += [f"step time {name} {part}" for part in PARTS]
    expected += [f"step memory {name} {part}" for part in PARTS]
    assert list(rows) == [*expected, "loss memory K=2048 M=64"]
    assert all(np.isfinite(list(row.values())[2:]).all() for row in rows.values())
    assert all(min(row["ours"], row["baseline"], row["ratio"]) > 0 for row in rows.values())
    shown = capsys.readouterr().out
    assert all(name in shown for name in rows) and "sdpa_attention" in shown
    held = rows[f"step memory {name} inputs"], rows[f"step memory {name} student"]
    assert all(held[0][side] < held[1][side] for side in ("ours", "baseline"))
    whole = 4000 / rows[f"step {name}"]["ours"]
    parts = sum(rows[f"step time {name} {part}"]["ours"] for part in PARTS)
    assert 0.8 * whole < parts <= whole * 1.001


def test_both_sides_take_the_same_steps(tmp_path: Path) -> None:
    config = load_config(BenchStepConfig, [], TINY)
    fast = FastStep(config.training, torch.device("cpu"), torch.float32, tmp_path)
    plain = PlainStep(fast)
    for batch in take_from(config, held_batches(config), 70_000, 3):
        ours, theirs = fast.take(batch, NoWatch()), plain.take(batch, NoWatch())
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    before = dict(fast.model.teacher.named_parameters())["backbone.blocks.0.mlp.fc1.weight"]
    after = dict(plain.model.teacher.named_parameters())["backbone.blocks.0.mlp.fc1.weight"]
    torch.testing.assert_close(before, after, atol=1e-6, rtol=1e-5)


def test_shards_give_the_crops_and_a_row_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "tiles").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        image = rng.integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / "tiles" / f"{i}.png")
    shards = tmp_path / "shards"
    assert main(["shard", f"images={tmp_path / 'tiles'}", f"out={shards}", "workers=1"]) == 0
    file = tmp_path / "step.json"
    arguments = [f"shards={shards}", "loss_prototypes=0", f"--json={file}"]
    assert main(["bench", "step", *TINY, *arguments]) == 0
    last = json.loads(file.read_text())[-1]
    assert last["name"].startswith(f"step data {NAME} waiting ") and last["unit"] == "tiles/s"


def test_shards_are_drawn_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_step, "LEAST_TILES", 8)
    monkeypatch.setattr(bench_step, "TILE_PX", 64)
    file = tmp_path / "step.json"
    arguments = ["shards=made-up", "loss_prototypes=0", f"--json={file}"]
    assert main(["bench", "step", *TINY, *arguments]) == 0
    last = json.loads(file.read_text())[-1]
    assert last["name"].startswith(f"step data {NAME} waiting ") and last["ours"] > 0


@pytest.mark.slow
def test_layouts_on_one_rank_are_held_against_one_process(tmp_path: Path) -> None:
    file = tmp_path / "layouts.json"
    assert main(["bench", "layouts", *TINY, f"--json={file}"]) == 0
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    assert len(rows) == 7 and all(min(row["ours"], row["baseline"]) > 0 for row in rows.values())
    for layout in ("ddp", "fsdp"):
        assert rows[f"layout {layout} on one rank, {NAME}"]["unit"] == "tiles/s"
    assert sum("checkpoint" in name for name in rows) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["repeats=0"], "repeats=0 must be at least 1"),
        (["objective.targets=centre"], "no objective.targets=centre"),
        (["augment.local_px=17"], "local_px=17 is not a multiple"),
        (["--json"], "--json needs a value"),
    ],
)
def test_what_cannot_be_benched_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "step", *TINY, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_dry_run_and_the_gpu_preset_say_what_would_be_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["bench", "step", *TINY, "--dry-run"]) == 0
    assert "2 timed ones of 4 tiles" in capsys.readouterr().out
    files = ["bench/step_gpu", "size/large"]
    config = load_config(BenchStepConfig, files, ["model.drop_path=0.3"])
    assert config.name == "L/14 2x224+8x98 K=65536 drop 0.3"


def test_the_peak_is_a_rate_that_products_reach() -> None:
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e14
