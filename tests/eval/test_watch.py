"""Live probes: the split, the scores, the cost, and what a resume leaves.

Run as a script, this file is one rank of two.
"""

import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eosin.configs.errors import ConfigError
from eosin.eval.config import EvalConfig
from eosin.eval.probe_tiles import LEAST_TILES, order_tiles
from eosin.eval.results import load_results
from eosin.eval.run import evaluate
from eosin.eval.tasks import Task, TaskConfig, load_task
from eosin.eval.watch import Budget, ProbeConfig, TrainerProbe
from eosin.eval.watch_exports import ExportProbe, WatchConfig, watch
from eosin.launch.metrics import read_lines
from eosin.launch.process import World, join_world
from eosin.launch.status import Status
from eosin.pretrain.attention import sdpa_attention
from eosin.pretrain.augment import AugmentConfig
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.export import write_encoder
from eosin.pretrain.initialise import materialise
from eosin.pretrain.model_card import EncoderCard
from eosin.pretrain.retention import Retention
from eosin.pretrain.vit import Vit, VitConfig

CPU = torch.device("cpu")
MODEL = VitConfig(width=32, depth=2, heads=2, patch_px=8, image_px=32, layer_scale=1.0)
TILES_A_GROUP = 4


def teacher(seed: int = 0) -> Vit:
    return materialise(lambda: Vit(MODEL, sdpa_attention), seed).eval().requires_grad_(False)


def card(step: int) -> EncoderCard:
    return EncoderCard(
        steps=step, tiles_seen=4 * step, index_digest="digest", mpp=None, mean=(0.7, 0.6, 0.7),
        std=(0.2, 0.2, 0.2),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def few_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they cost is not what is tested here."""
    monkeypatch.setattr("eosin.eval.fewshot.EPISODES", 50)


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of stripes, 72 patients of 4 tiles, 40 px: 36 train, 18 val, 18 test."""
    folder = tmp_path_factory.mktemp("task")
    (folder / "tiles").mkdir()
    generator, lines = np.random.default_rng(0), ["path,label,group,split"]
    for patient in range(72):
        split = ["train", "train", "val", "test"][patient % 4]
        base = generator.integers(100, 200, 3)
        for i in range(TILES_A_GROUP):
            stripes = 25 * (np.arange(40) // 4 % 2)[:, None, None]
            if i % 2:
                stripes = stripes.transpose(1, 0, 2)
            pixels = np.clip(base + stripes + generator.normal(0, 25, (40, 40, 3)), 0, 255)
            path = f"tiles/{patient}_{i}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / path)
            lines.append(f"{path},{['across', 'along'][i % 2]},p{patient},{split}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder / "labels.csv"


class Clock:
    """Time passes only when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def training(out: Path) -> PretrainConfig:
    out.mkdir(parents=True, exist_ok=True)
    return PretrainConfig(
        shards="", out=out, steps=100, checkpoints=Retention(every=10), model=MODEL,
        augment=AugmentConfig(global_px=32, local_px=16),
    )  # fmt: skip


def probe_of(
    out: Path, labels: Path, first_step: int = 1, clock: Callable[[], float] | None = None,
    **options: object,
) -> TrainerProbe:  # fmt: skip
    config = ProbeConfig(tiles=labels, **{"max_share": 1.0, "batch_size": 16, **options})
    clock = clock or Passing(1.0)
    return TrainerProbe(config, training(out), World(), CPU, torch.float32, first_step, clock)


class Passing:
    """A clock that goes on by itself at each look."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = 0.0, seconds

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


def settled(probe: TrainerProbe, seconds: float = 1e6) -> TrainerProbe:
    """As if so much training lay behind it."""
    probe._budget._began -= seconds
    return probe


def lines(out: Path) -> list[dict[str, float]]:
    return read_lines(out / "probes.jsonl")


def task_of(labels: Path) -> Task:
    return load_task(TaskConfig(tiles=labels), seed=0)


def test_every_beginning_of_the_order_is_whole_groups_of_all_classes_and_half_of_it_val(
    labels: Path,
) -> None:
    task = task_of(labels)
    tiles = order_tiles(task, seed=0)
    assert len(tiles) == 216 and tiles.ends[-1] == 216 and tiles.ends[0] == LEAST_TILES
    group_of = dict(zip(task.images, task.groups, strict=True))
    split_of = dict(zip(task.images, task.splits.tolist(), strict=True))
    sizes = Counter(group_of[path] for path in tiles.images)
    for end in tiles.ends:
        inside = Counter(group_of[path] for path in tiles.images[:end])
        assert all(sizes[group] == count for group, count in inside.items())
        assert abs(tiles.labels[:end].mean() - 0.5) < 0.03
    for end in range(8, 216):
        n_val = tiles.is_val[:end].sum()
        assert abs(n_val - min(end / 2, 72)) <= TILES_A_GROUP
    assert {split_of[path] for path in tiles.images} == {"train", "val"}
    assert [split_of[path] == "val" for path in tiles.images] == tiles.is_val.tolist()
    assert (tiles.first(199), tiles.first(203), tiles.first(10**6)) == (0, 200, 216)
    other = order_tiles(task, seed=1)
    assert other.images != tiles.images and set(other.images) == set(tiles.images)
    assert other.digest != tiles.digest == order_tiles(task, seed=0).digest
    few = order_tiles(task, seed=0, most=205)
    assert few.images == tiles.images[:204] and few.digest != tiles.digest


def test_scores_are_those_of_eval_on_the_same_split_and_tiles(tmp_path: Path, labels: Path) -> None:
    vit = teacher()
    settled(probe_of(tmp_path / "run", labels))(vit, card(10))
    (line,) = lines(tmp_path / "run")
    # for eval: the same tiles, val as its test split; its own val is of train, and a reference too
    rows = [r.split(",") for r in labels.read_text().splitlines()[1:]]
    moved = {"train": "train", "val": "test"}
    table = ["path,label,group,split"]
    table += [",".join([*row[:3], moved[row[3]]]) for row in rows if row[3] != "test"]
    (labels.parent / "moved.csv").write_text("\n".join(table) + "\n")
    write_encoder(tmp_path / "encoder", MODEL, vit.state_dict(), card(10))
    evaluate(
        EvalConfig(
            encoder=str(tmp_path / "encoder"), task=TaskConfig(tiles=labels.parent / "moved.csv"),
            out=tmp_path / "eval", n_bootstrap=100, device="cpu", batch_size=16,
            protocols=["knn/uni20@1"],
        )
    )  # fmt: skip
    results = load_results(tmp_path / "eval" / "results.json")
    name = results.encoders[0].name
    assert line["tiles"] == 216
    assert line["knn"] == pytest.approx(results.score(name, "knn/uni20@1").value, abs=1e-9)
    assert line["score"] == line["knn"] and line["split"] == "val"
    assert 0.5 < line["knn"] < 1.0  # so that the comparison says something


def test_the_test_split_is_never_opened(tmp_path: Path, labels: Path) -> None:
    settled(probe_of(tmp_path / "honest", labels))(teacher(), card(10))
    poisoned = labels.parent / "poisoned.csv"
    swap = {"across": "along", "along": "across"}
    rows = [line.split(",") for line in labels.read_text().splitlines()]
    rows = [[r[0], swap[r[1]], *r[2:]] if r[3] == "test" else r for r in rows]
    poisoned.write_text("\n".join(map(",".join, rows)) + "\n")
    settled(probe_of(tmp_path / "poisoned", poisoned))(teacher(), card(10))
    one, two = (lines(tmp_path / name)[0] for name in ("honest", "poisoned"))
    assert {**one, "set": two["set"]} == two


@pytest.mark.parametrize("pooling", ["cls", "mean", "clsmean"])
def test_a_job_of_its_own_finds_the_same_scores(pooling: str, tmp_path: Path, labels: Path) -> None:
    beside, own = tmp_path / "beside", tmp_path / "own"
    job = ProbeConfig(where="job", pooling=pooling, max_share=1.0)
    probe = settled(probe_of(beside, labels, pooling=pooling))
    export = ExportProbe(job, training(own), World())
    export._budget._began -= 1e6
    for step in (10, 20, 25, 30):
        probe(teacher(step), card(step))
        export(teacher(step), card(step))
    (own / "done.json").write_text("{}")
    watch(WatchConfig(run=own, probe=ProbeConfig(tiles=labels, pooling=pooling), device="cpu"))
    assert [line["step"] for line in lines(own)] == [10, 20, 30]
    for ours, theirs in zip(lines(beside), lines(own), strict=True):
        for name in ("step", "score", "knn", "fewshot", "tiles", "set"):
            assert ours[name] == theirs[name]
        assert ours["rankme"] == pytest.approx(theirs["rankme"], rel=1e-4)
        assert ours["feature_std"] == pytest.approx(theirs["feature_std"], rel=1e-4)
    best = max(lines(own), key=lambda line: line["score"])["step"]
    assert [path.name for path in (own / "exports").iterdir()] == [f"step_{best:08d}"]


def test_a_watcher_waits_scores_each_export_once_and_again_when_it_was_made_anew(
    tmp_path: Path, labels: Path
) -> None:
    run = tmp_path / "run"
    config = WatchConfig(run=run, probe=ProbeConfig(tiles=labels), device="cpu")
    looks = []

    def sleep(seconds: float) -> None:
        looks.append([line["knn"] for line in lines(run)])
        if len(looks) == 1:
            write_encoder(
                run / "exports" / "step_00000010", MODEL, teacher(1).state_dict(), card(10)
            )
        elif len(looks) == 2:  # a resumed training, on another GPU, comes by again
            write_encoder(
                run / "exports" / "step_00000010", MODEL, teacher(2).state_dict(), card(10)
            )
        else:
            (run / "done.json").write_text("{}")

    watch(config, sleep)
    assert len(looks) == 3 and looks[0] == [] and len(looks[1]) == len(looks[2]) == 1
    before = (run / "probes.jsonl").read_bytes()
    watch(config, sleep)
    assert (run / "probes.jsonl").read_bytes() == before and len(looks) == 3
    other = replace(config, probe=ProbeConfig(tiles=labels, pooling="mean"))
    with pytest.raises(ConfigError, match="other tiles, pooling or seed"):
        watch(other, sleep)


def test_a_watcher_of_a_failed_run_ends_and_says_so(tmp_path: Path, labels: Path) -> None:
    Status(tmp_path, World()).update(state="failed", reason="out of memory")
    with pytest.raises(Exception, match="failed \\(out of memory\\)"):
        watch(WatchConfig(run=tmp_path, probe=ProbeConfig(tiles=labels), device="cpu"))


def test_a_resume_leaves_neither_gap_nor_repeat_and_the_same_scores(
    tmp_path: Path, labels: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    probe = settled(probe_of(whole, labels))
    for step in (10, 20, 30, 40):
        probe(teacher(step), card(step))
    probe = settled(probe_of(killed, labels))
    for step in (10, 20, 30):  # killed before the checkpoint of step 30 was whole
        probe(teacher(step), card(step))
    with (killed / "probes.jsonl").open("a") as file:
        file.write('{"step": 40, "sc')
    probe = settled(probe_of(killed, labels, first_step=21))
    for step in (30, 40):
        probe(teacher(step), card(step))
    assert [line["step"] for line in lines(killed)] == [10, 20, 30, 40]
    timeless = [
        [{k: v for k, v in line.items() if k not in ("seconds", "share")} for line in lines(run)]
        for run in (whole, killed)
    ]
    assert timeless[0] == timeless[1]


def test_scores_on_other_tiles_are_not_mixed_with_those_of_the_run(
    tmp_path: Path, labels: Path
) -> None:
    settled(probe_of(tmp_path, labels))(teacher(), card(10))
    with pytest.raises(ConfigError, match=r"probes\.jsonl holds scores on other tiles"):
        probe_of(tmp_path, labels, first_step=11, seed=1)
    probe_of(tmp_path, labels, first_step=10, seed=1)  # that line is forgotten


@pytest.mark.slow
def test_two_ranks_share_the_tiles_and_find_the_same_scores(tmp_path: Path, labels: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(2):
        env = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, __file__, str(tmp_path / "two"), str(labels)]
        processes.append(subprocess.Popen(command, env=env))
    probe = settled(probe_of(tmp_path / "one", labels, batch_size=7))
    probe(teacher(10), card(10))
    assert [process.wait(timeout=400) for process in processes] == [0, 0]
    (one,), (two,) = lines(tmp_path / "one"), lines(tmp_path / "two")
    timed = ("seconds", "share", "fewshot")  # the other ranks' episodes are not cut short here
    assert {k: v for k, v in one.items() if k not in timed} == pytest.approx(
        {k: v for k, v in two.items() if k not in timed}
    )


def be_a_rank(out: Path, labels: Path) -> None:
    with join_world(CPU, 60) as world:
        config = ProbeConfig(tiles=labels, max_share=1.0, batch_size=7)
        probe = TrainerProbe(config, training(out), world, CPU, torch.float32, 1)
        settled(probe)(teacher(10), card(10))
        world.barrier()


def test_only_due_steps_are_probed_and_the_last(tmp_path: Path, labels: Path) -> None:
    probe = settled(probe_of(tmp_path, labels, every=40))
    for step in range(10, 101, 10):
        probe(teacher(), card(step))
    assert [line["step"] for line in lines(tmp_path)] == [40, 80, 100]


class SlowTeacher(Vit):
    """Takes a known time a forward, by a clock of its own."""

    clock: Clock
    seconds = 0.0

    def forward(self, *arguments: object, **keywords: object) -> object:
        self.clock.now += self.seconds
        return super().forward(*arguments, **keywords)


def slow_teacher(clock: Clock, seconds: float) -> SlowTeacher:
    vit = SlowTeacher(MODEL, sdpa_attention)
    vit.load_state_dict(teacher().state_dict())
    vit.clock, vit.seconds = clock, seconds
    return vit.eval().requires_grad_(False)


@pytest.mark.parametrize("seconds", [0.01, 0.12, 0.3, 1.0, 30.0])
def test_probes_never_take_more_than_their_share(
    seconds: float, tmp_path: Path, labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    vit, share = slow_teacher(clock, seconds), 0.02
    probe = probe_of(tmp_path, labels, clock=clock, max_share=share, batch_size=20)
    for step in range(10, 101, 10):
        clock.now += 150.0  # of training: 3 s for the first probe, 1.8 of them to embed in
        probe(vit, card(step))
        spent = probe._budget.spent
        # the first one looks at the clock between two forwards
        slack = 1e-9 if lines(tmp_path) else seconds
        assert spent <= share * (clock.now - spent) + slack
    recorded = lines(tmp_path)
    assert len({line["tiles"] for line in recorded}) <= 1  # so that scores can be compared
    shown = capsys.readouterr().out
    if seconds == 0.01:  # all 216 tiles
        assert [line["tiles"] for line in recorded] == [216] * 10 and "no time" not in shown
    elif seconds == 0.12:  # 11 forwards, 1.3 s
        assert len(recorded) == 10 and "no time" not in shown
    elif seconds == 0.3:  # six forwards are too few tiles, but 3.3 s come together in a while
        assert 2 <= len(recorded) < 10 and shown.count("no time") == 1
    elif seconds == 1.0:
        assert 1 <= len(recorded) < 4 and shown.count("no time") == 1
    else:
        assert not recorded and shown.count("no time") == 1 and probe._budget.spent == seconds


def test_a_set_too_large_for_its_share_is_scored_on_its_first_tiles(
    tmp_path: Path, labels: Path
) -> None:
    clock = Clock()
    vit = slow_teacher(clock, 0.1)
    probe = probe_of(tmp_path, labels, clock=clock, max_share=0.02, batch_size=1)
    for step in range(10, 101, 10):
        clock.now += 1750.0  # 35 s, 21 of them to embed in: 210 tiles, 208 in whole groups
        probe(vit, card(step))
    recorded = lines(tmp_path)
    assert [line["tiles"] for line in recorded] == [208] * 10
    assert len({line["score"] for line in recorded}) == 1
    again = probe_of(tmp_path, labels, first_step=91, clock=clock, max_share=0.02, batch_size=7)
    clock.now += 1750.0
    again(vit, card(100))
    assert lines(tmp_path)[-1]["tiles"] == 208
    assert lines(tmp_path)[-1]["score"] == recorded[-1]["score"]


def test_features_that_are_not_finite_score_nothing_and_do_not_end_the_run(
    tmp_path: Path, labels: Path
) -> None:
    vit = teacher()
    with torch.no_grad():
        vit.norm.weight.fill_(float("nan"))
    settled(probe_of(tmp_path, labels))(vit, card(10))
    (line,) = lines(tmp_path)
    assert line["score"] == 0.0 and "NaN" not in (tmp_path / "probes.jsonl").read_text()


def test_a_budget_counts_the_training_alone() -> None:
    clock = Clock()
    budget = Budget(0.1, clock)
    clock.now = 100.0
    assert budget.left() == pytest.approx(10)
    began = budget.now()
    clock.now = 110.0
    assert budget.spend(began) == 10
    assert budget.share() == pytest.approx(0.1) and budget.left() == pytest.approx(0)


def test_options_out_of_range_are_refused() -> None:
    for wrong in ({"max_share": 0.0}, {"max_share": 1.5}, {"every": -1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ProbeConfig(**wrong)


if __name__ == "__main__":
    be_a_rank(Path(sys.argv[1]), Path(sys.argv[2]))
