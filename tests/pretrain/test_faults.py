"""What goes wrong in a long run: signals, lost and stopped ranks, kills, spikes, damage, disks."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from ranks import Rank, ranks_of
from torch import Tensor

from eosin.configs.errors import ConfigError, EosinError, InterruptedRunError
from eosin.configs.load import load_config, to_yaml
from eosin.data_curation.shards import ShardConfig, shard
from eosin.launch.process import World
from eosin.launch.status import read_status
from eosin.pretrain import gradients
from eosin.pretrain.checkpoint import list_checkpoints, read_state, read_tensors
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.endings import telling_why
from eosin.pretrain.loader import LoaderConfig, open_shards
from eosin.pretrain.steps import Steps
from eosin.pretrain.train import pretrain

TINY = [
    "batch_size=4", "group_size=2", "threads=1", "log_every=1", "device=cpu", "steps=40",
    "model={width: 32, depth: 2, heads: 2, patch_px: 8, image_px: 32, drop_path: 0.5}",
    "objective.head={prototypes: 32, hidden: 16, bottleneck: 8}", "checkpoints={every: 3, keep: 2}",
    "augment={global_px: 32, local_px: 16, n_local: 2}",
]  # fmt: skip
FOREVER = ["steps=100000", "timeout_s=0"]
INTERRUPTED = InterruptedRunError.exit_code


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (folder / "tiles").mkdir()
    for i in range(24):
        image = cv2.resize(rng.integers(0, 255, (6, 6, 3), np.uint8), (48, 48))
        cv2.imwrite(str(folder / "tiles" / f"{i}.png"), image)
    shard(ShardConfig(images=folder / "tiles", out=folder / "shards", workers=1))
    return folder / "shards"


def config_for(shards: Path, out: Path, *overrides: str) -> PretrainConfig:
    return load_config(PretrainConfig, (), [f"shards={shards}", f"out={out}", *TINY, *overrides])


def state(run: Path) -> dict[str, Tensor]:
    return read_tensors(list_checkpoints(run / "checkpoints")[0])


def rows(run: Path) -> list[dict[str, float]]:
    """Of the metrics, without what a clock or the memory says."""
    path, clocks = run / "metrics.jsonl", ("tiles_per_s", "data_wait", "memory_gib", "mfu")
    lines = path.read_text().splitlines() if path.is_file() else []
    return [{k: v for k, v in json.loads(line).items() if k not in clocks} for line in lines]


def logged(run: Path) -> int:
    """Whole lines of the metrics; the last may be half written at this moment."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def assert_same_run(one: Path, other: Path) -> None:
    expected, got = state(one), state(other)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert rows(one) == rows(other)


def wait_until(what: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it did not come to it"
        time.sleep(0.01)


@pytest.fixture
def two_ranks(shards: Path, tmp_path: Path) -> Callable[..., AbstractContextManager[list[Rank]]]:
    """Starts the command on two ranks; a context."""

    def start(*overrides: str, out: str = "run"):  # type: ignore[no-untyped-def]
        file = tmp_path / f"{out}.yaml"
        file.write_text(to_yaml(config_for(shards, tmp_path / out, *overrides)))
        verb = ["-m", "eosin.launch.cli", "pretrain", "--config", str(file)]
        return ranks_of(2, verb, tmp_path / "logs")

    return start


def test_a_signal_to_one_rank_stops_all_at_one_step_after_a_checkpoint(
    tmp_path: Path, two_ranks: Callable[..., AbstractContextManager[list[Rank]]]
) -> None:
    run = tmp_path / "run"
    for number in (signal.SIGUSR2, signal.SIGTERM):
        with two_ranks() as ranks:
            begun = logged(run)
            wait_until(lambda begun=begun: logged(run) > begun + 2)
            ranks[1].process.send_signal(number)
            assert [rank.ends() for rank in ranks] == [INTERRUPTED] * 2, ranks[0].said()
            for rank in ranks:
                assert f"{number.name} after step" in rank.said()
            assert "Traceback" not in ranks[0].said() + ranks[1].said()
        status, newest = read_status(run), list_checkpoints(run / "checkpoints")[0]
        assert status is not None and status.state == "interrupted"
        assert number.name in (status.reason or "")
        assert read_state(newest).step == rows(run)[-1]["step"] < 40  # nothing is done twice
    for out in ("run", "whole"):
        with two_ranks(out=out) as ranks:
            assert [rank.ends() for rank in ranks] == [0, 0], ranks[0].said()
    assert_same_run(tmp_path / "whole", run)


def test_a_killed_rank_ends_the_others_quickly(
    tmp_path: Path, two_ranks: Callable[..., AbstractContextManager[list[Rank]]]
) -> None:
    for killed, left in ((1, 0), (0, 1)):
        with two_ranks(*FOREVER) as ranks:
            begun = logged(tmp_path / "run")
            wait_until(lambda begun=begun: logged(tmp_path / "run") > begun + 2)
            ranks[killed].process.kill()
            assert ranks[left].ends(60) == INTERRUPTED, ranks[left].said()
            assert f"rank {left} lost another rank" in ranks[left].said()
            assert "Traceback" not in ranks[left].said()


@pytest.mark.slow
def test_a_stopped_rank_is_named_with_the_stacks_of_the_others(
    tmp_path: Path, two_ranks: Callable[..., AbstractContextManager[list[Rank]]]
) -> None:
    with two_ranks("steps=100000", "timeout_s=8") as ranks:
        wait_until(lambda: logged(tmp_path / "run") > 3)
        ranks[1].process.send_signal(signal.SIGSTOP)
        assert ranks[0].ends(120) == INTERRUPTED, ranks[0].said()
        assert "no step was finished for 8 s; rank 1 (" in ranks[0].said()
        assert ") gives no sign of life since step" in ranks[0].said()
        stack = (tmp_path / "run" / "stacks" / "rank_0.txt").read_text()
        assert "train.py" in stack and "Thread" in stack
        ranks[1].process.send_signal(signal.SIGCONT)


@pytest.mark.pitfall(20)
@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(shards: Path, tmp_path: Path) -> None:
    """A checkpoint at every third step, so that some of the kills hit its writing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["eosin.pretrain.train"])
    pretrain(config_for(shards, tmp_path / "whole", "steps=400"))
    killed = config_for(shards, tmp_path / "killed", "steps=400")
    draw, kills, unfinished = random.Random(3), 0, 0
    while kills < 20:
        process = context.Process(target=pretrain, args=(killed,))
        process.start()
        wanted = logged(killed.out) + draw.randint(1, 12)
        wait_until(lambda n=wanted, p=process: logged(killed.out) >= n or not p.is_alive())
        time.sleep(draw.uniform(0, 0.05))
        assert process.is_alive(), "it came to its end before it was killed often enough"
        process.kill()
        process.join()
        kills += 1
        unfinished += len(list((killed.out / "checkpoints").glob(".step_*")))
    pretrain(killed)
    assert unfinished > 0, "no kill fell into the writing of a checkpoint"
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert [row["step"] for row in rows(killed.out)] == list(range(1, 401))


def poisoned(monkeypatch: pytest.MonkeyPatch, spoils: Callable[[int, Tensor], Tensor]) -> list[int]:
    """Lets `spoils` change the loss of a step, given the first row of its data; the rows seen."""
    real, seen = gradients.forward, []

    def forward(config, step, batch, *rest):  # type: ignore[no-untyped-def]
        losses, outputs = real(config, step, batch, *rest)
        seen.append(int(batch.rows[0]))
        return losses._replace(total=spoils(seen[-1], losses.total)), outputs

    monkeypatch.setattr(gradients, "forward", forward)
    return seen


SPIKES = "spike={threshold: 8, least: 0.2, window: 10, patience: 2, rollbacks: 2}"


def test_a_loss_spike_goes_back_and_passes_over_its_data(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:

    plan = replace(config_for(shards, tmp_path).batch_plan)

    order = Steps(open_shards(str(shards), LoaderConfig()), plan)
    data = [int(order.rows_of(step)[0]) for step in range(60)]
    bad = {(step, data[step]) for step in (20, 21)}
    counter = iter(range(10**6))

    def spoils(row: int, total: Tensor) -> Tensor:
        step = next(counter)
        return total + 100 if (step, row) in bad else total  # in the first pass alone

    poisoned(monkeypatch, spoils)
    pretrain(config_for(shards, tmp_path / "run", "steps=30", SPIKES))
    said = capsys.readouterr().out
    assert "back to step 18, and the 2 batches from step 20 on are passed over" in said
    assert json.loads((tmp_path / "run" / "skips.json").read_text()) == [[20, 2]]
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 31))
    assert max(row["loss"] for row in rows(tmp_path / "run")) < 50
    assert read_state(list_checkpoints(tmp_path / "run" / "checkpoints")[0]).skips == ((20, 2),)
    monkeypatch.undo()
    seen = poisoned(monkeypatch, lambda row, total: total)
    (tmp_path / "run" / "done.json").unlink()
    pretrain(config_for(shards, tmp_path / "run", "steps=36", "accept_changes=true", SPIKES))
    assert seen == data[32:38]  # the skip is still in force


def test_a_run_killed_between_a_spike_and_its_checkpoint_keeps_to_the_skip(
    shards: Path, tmp_path: Path
) -> None:
    """skips.json was written; the checkpoints of what is left behind are still there."""
    pretrain(config_for(shards, tmp_path / "run", "steps=12", "checkpoints={every: 3, keep: 9}"))
    (tmp_path / "run" / "skips.json").write_text("[[7, 2]]")
    (tmp_path / "run" / "done.json").unlink()
    pretrain(config_for(shards, tmp_path / "run", "steps=12", "checkpoints={every: 3, keep: 9}"))
    found = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert {read_state(path).step: read_state(path).skips for path in found} == {
        12: ((7, 2),), 9: ((7, 2),), 6: (), 3: (),
    }  # fmt: skip


def test_too_many_spikes_stop_the_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(10**6))
    poisoned(monkeypatch, lambda _, total: total + (100 if next(steps) % 16 >= 13 else 0))
    with pytest.raises(EosinError, match=r"after 2 spikes before it .*lower optim\.lr"):
        pretrain(config_for(shards, tmp_path / "run", "steps=90", SPIKES))
    status = read_status(tmp_path / "run")
    assert status is not None and status.state == "failed" and "spikes" in (status.reason or "")


def test_a_nan_storm_stops_and_says_where_it_began(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(10**6))
    poisoned(monkeypatch, lambda _, total: total * (float("nan") if next(steps) >= 9 else 1))
    with pytest.raises(EosinError, match="3 steps in a row gave a NaN or Inf, up to step 11"):
        pretrain(config_for(shards, tmp_path / "run", "max_bad_steps=3"))
    bad = (tmp_path / "run" / "bad_steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in bad] == [9, 10, 11]
    assert read_state(list_checkpoints(tmp_path / "run" / "checkpoints")[0]).step == 9


def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(config_for(shards, tmp_path / "whole", "steps=9"))
    pretrain(config_for(shards, tmp_path / "run", "steps=9"))
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[0]
    [file] = newest.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    (tmp_path / "run" / "done.json").unlink()
    capsys.readouterr()
    pretrain(config_for(shards, tmp_path / "run", "steps=9"))
    said = capsys.readouterr().out
    assert f"passed over a damaged checkpoint: {newest.name}: {file.name} is damaged" in said
    assert "step 6 of 9" in said
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_checkpoint_of_another_config_is_refused_with_the_difference_unless_told_otherwise(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, lr in (("one", "1e-3"), ("other", "2e-3")):
        pretrain(config_for(shards, tmp_path / name, "steps=3", f"optim.lr.peak={lr}"))
    newest = list_checkpoints(tmp_path / "one" / "checkpoints")[0]
    target = tmp_path / "other" / "checkpoints" / newest.name
    for path in target.iterdir():
        path.unlink()
    for path in newest.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    (tmp_path / "other" / "done.json").unlink()
    again = config_for(shards, tmp_path / "other", "steps=3", "optim.lr.peak=2e-3")
    with pytest.raises(ConfigError, match=r"optim\.lr\.peak: 0\.001 → 0\.002.*accept_changes"):
        pretrain(again)
    pretrain(replace(again, accept_changes=True))
    assert "warning" in capsys.readouterr().out


def test_out_of_memory_says_what_to_change(shards: Path, tmp_path: Path) -> None:
    config = config_for(shards, tmp_path)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 GB"),
    ):
        with pytest.raises(EosinError) as raised, telling_why(config, World()):
            raise error
        assert "out of memory with 4 tiles a rank; give it recompute=selective, or" in str(
            raised.value
        )
    with pytest.raises(RuntimeError, match="else"), telling_why(config, World()):
        raise RuntimeError("something else")


def test_a_full_disk_leaves_the_last_good_checkpoint(
    shards: Path, small_disk: Callable[[float], Path], tmp_path: Path
) -> None:
    """Room for one checkpoint and half of the next."""
    pretrain(config_for(shards, tmp_path / "whole", "steps=6", "checkpoints={every: 3, keep: 9}"))
    [_, first] = list_checkpoints(tmp_path / "whole" / "checkpoints")
    size = sum(path.stat().st_size for path in first.iterdir())
    disk = small_disk(6)
    run = disk / "run"
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler.write_bytes(bytes(free - int(1.8 * size) - 60_000))
    config = config_for(shards, run, "steps=6", "checkpoints={every: 3, keep: 9}")
    with pytest.raises(EosinError, match=r"step 6 was not written \(step_00000003 stands\)"):
        pretrain(config)
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step_00000003"]
    filler.unlink()
    pretrain(config)
    assert_same_run(tmp_path / "whole", run)
