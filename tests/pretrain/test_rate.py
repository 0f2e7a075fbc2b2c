"""The rate of a training, and the verdict on ranks that hold up the others.

Run as a script, this file is one rank of two.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from eosin.launch.peak import peak_of
from eosin.launch.process import World, join_world
from eosin.pretrain.augment import AugmentConfig
from eosin.pretrain.batch import Batch, Crops, Tiles
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.flops import StepShape, executed_flops
from eosin.pretrain.gram import GramConfig
from eosin.pretrain.network import ObjectiveConfig
from eosin.pretrain.rate import (
    LAPS,
    RankTime,
    Rate,
    batch_flops,
    flops_counter,
    slow_ranks,
)
from eosin.pretrain.vit import VitConfig

CPU = torch.device("cpu")
CONFIG = PretrainConfig(
    shards="",
    out=Path(),
    batch_size=4,
    model=VitConfig(width=32, depth=2, heads=2, patch_px=8, image_px=32, drop_path=0.5),
    augment=AugmentConfig(global_px=32, local_px=16, n_local=2),
    objective=ObjectiveConfig(gram=GramConfig(weight=1.0, start=10)),
)


def batch(step: int = 0, tiles: int = 4) -> Batch:
    masks = np.zeros((2 * tiles, 16), dtype=bool)
    masks[:, :3] = True
    crops = [torch.zeros(2, tiles, px, px, 3, dtype=torch.uint8) for px in (32, 16)]
    return Batch(step, Crops(*crops), masks, torch.arange(tiles), damaged={})


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_lap_counts_tiles_waiting_and_memory(ranks: int) -> None:
    clock = Clock()
    rate = Rate(flops_counter(CONFIG), CPU, torch.float32, World(size=ranks), clock)

    def slowly() -> Iterator[Batch]:
        for step in range(6):
            clock.now += 0.5  # what a batch takes to come
            yield batch(step)

    laps = []
    for step, _ in enumerate(rate.waiting(slowly())):
        rate.start()
        clock.now += 1.5
        rate.stop()
        rate.stop()
        if step % 3 == 2:
            laps.append(rate.lap())
    for lap in laps:
        assert lap.samples_per_s == pytest.approx(ranks * 3 * 4 / 6)
        assert lap.data_wait == pytest.approx(0.25)
        assert 0.05 < lap.memory_gib < 20
        assert lap.mfu is None and "mfu" not in lap.values()
        assert lap.slow == lap.news == ()


def test_mfu_is_the_models_operations_over_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eosin.pretrain.rate.known_peak", lambda *_: 1e9)
    clock = Clock()
    rate = Rate(flops_counter(CONFIG), CPU, torch.bfloat16, World(), clock)
    for _ in rate.waiting([batch(9), batch(10)]):  # without and with the Gram term
        clock.now += 0.25
    shape = {"batch": 4, "global_px": 32, "local_px": 16, "n_local": 2, "masked": 24}
    without, with_gram = (
        executed_flops(CONFIG.model, CONFIG.objective, StepShape(**shape, gram=gram)).model
        for gram in (False, True)
    )
    assert without < with_gram
    assert rate.lap().values()["mfu"] == pytest.approx((without + with_gram) / 0.5 / 1e9)


def test_a_batch_of_tiles_for_the_device_costs_what_its_crops_do() -> None:
    crops = batch()
    tiles = Tiles(torch.zeros(4, 1, 1, 3), torch.zeros(4, 4, 1), ((2, 32), (2, 16)))
    other = Batch(0, tiles, crops.masks, crops.rows, damaged={})
    assert batch_flops(CONFIG, crops) == batch_flops(CONFIG, other) > 0


def test_a_gpu_is_known_by_the_longest_name() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_of("NVIDIA H100 NVL") == 835e12
    assert peak_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_of("NVIDIA GeForce GTX 1080") is None


def lap_of(works: list[float], waits: list[float] | None = None) -> list[RankTime]:
    waits = waits or [0.0] * len(works)
    return [RankTime(work, wait, 1.0) for work, wait in zip(works, waits, strict=True)]


HOSTS = ["node-1", "node-1", "node-2", "node-2"]


def test_a_rank_that_is_slow_in_every_one_of_the_last_laps_is_named_with_its_host() -> None:
    slow = lap_of([0.2, 0.2, 0.38, 0.21])
    fine = lap_of([0.2, 0.2, 0.29, 0.21])
    named = {2: "rank 2 (node-2) takes 1.9 times the median of a step"}
    assert slow_ranks([slow] * LAPS, HOSTS) == named
    assert slow_ranks([fine, *[slow] * LAPS], HOSTS) == named
    assert slow_ranks([slow] * (LAPS - 1), HOSTS) == {}
    assert slow_ranks([slow, fine, *[slow] * (LAPS - 1)], HOSTS) == {}
    assert slow_ranks([fine] * LAPS, HOSTS) == {}


def test_one_of_two_can_be_the_slow_one_and_one_alone_cannot() -> None:
    assert list(slow_ranks([lap_of([0.2, 0.5])] * LAPS, HOSTS[:2])) == [1]
    assert slow_ranks([lap_of([0.5])] * LAPS, HOSTS[:1]) == {}


def test_what_nobody_would_notice_is_not_named() -> None:
    assert slow_ranks([lap_of([0.001, 0.003, 0.001, 0.001])] * LAPS, HOSTS) == {}


def test_a_rank_that_waits_for_its_data_is_told_from_one_that_computes_slowly() -> None:
    lap = lap_of([0.2] * 4, [0.01, 0.01, 0.01, 0.31])
    assert slow_ranks([lap] * LAPS, HOSTS) == {
        3: "rank 3 (node-2) waits 0.31 s a step for data, the median rank 0.01 s"
    }
    everyone = lap_of([0.2] * 4, [0.5] * 4)
    assert slow_ranks([everyone] * LAPS, HOSTS) == {}


def test_two_ranks_find_the_same_slow_one_and_name_it_once(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(2):
        env = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, __file__, str(tmp_path / f"{rank}.json")]
        processes.append(subprocess.Popen(command, env=env))
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    ours, theirs = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert [len(lap["slow"]) for lap in ours] == [0] * (LAPS - 1) + [1, 1]
    assert [lap["slow"] for lap in ours] == [lap["slow"] for lap in theirs]
    assert ours[-1]["slow"][0].startswith(f"rank 1 ({socket.gethostname()}) takes ")
    assert [len(lap["news"]) for lap in ours] == [0] * (LAPS - 1) + [1, 0]


def be_a_rank(out: Path) -> None:
    with join_world(CPU, 60) as world:
        rate, laps = Rate(flops_counter(CONFIG), CPU, torch.float32, world), []
        for step, _ in enumerate(rate.waiting(batch(step) for step in range(2 * (LAPS + 1)))):
            rate.start()
            time.sleep(0.02 + 0.06 * world.rank)
            rate.stop()
            world.barrier()  # as the gradients' collective: all take as long as the slowest
            if step % 2:
                lap = rate.lap()
                laps.append({"slow": lap.slow, "news": lap.news})
    out.write_text(json.dumps(laps))


if __name__ == "__main__":
    be_a_rank(Path(sys.argv[1]))
