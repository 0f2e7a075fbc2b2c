"""One training in several layouts: gloo processes that torchrun starts, against one process.

Key biases are left out of comparisons: their true gradient is zero, so AdamW makes noise of them.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from ranks import ranks_of
from safetensors.torch import load_file
from torch import Tensor

from eosin.configs.errors import ConfigError
from eosin.configs.load import load_config, to_yaml
from eosin.data_curation.shards import ShardConfig, shard
from eosin.launch.process import join_world
from eosin.launch.signals import StopRequests
from eosin.pretrain.checkpoint import list_checkpoints, read_tensors
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.loader import open_shards
from eosin.pretrain.train import pretrain, run

TINY = [
    "batch_size=8", "group_size=2", "threads=1", "log_every=1", "checkpoints.every=5", "steps=10",
    "model={width: 32, depth: 2, heads: 2, patch_px: 8, image_px: 32, drop_path: 0.5, registers: 1,"
    " layer_scale: 0.1}", "objective.head={prototypes: 40, hidden: 16, bottleneck: 8}",
    "augment={global_px: 32, local_px: 16, n_local: 2}", "optim.lr={peak: 1e-3, end: 1e-6, "
    "warmup: 0.2}", "device=cpu", "optim.clip_norm=0.5",
]  # fmt: skip

OBJECTIVES = {
    "koleo": ["objective.spread={kind: koleo, over: batch}"],
    "kde_centre": [
        "objective.spread={kind: kde, over: batch}", "objective.targets=centre",
        "objective.patch_head={prototypes: 24, hidden: 16, bottleneck: 8}", "masks.exact=true",
    ],
    "jepa_gram": [
        "objective.ibot=0", "objective.jepa={weight: 1.0, depth: 1, width: 16, heads: 2}",
        "objective.gram={weight: 1.0, start: 2, refresh_every: 3}", "model.positions=rope",
        "objective.spread={kind: koleo, over: group}",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (folder / "tiles").mkdir()
    for i in range(40):
        image = cv2.resize(rng.integers(0, 255, (6, 6, 3), np.uint8), (48, 48))
        cv2.imwrite(str(folder / "tiles" / f"{i}.png"), image)
    shard(ShardConfig(images=folder / "tiles", out=folder / "shards", workers=1))
    return folder / "shards"


def config_for(shards: Path, out: Path, *overrides: str) -> PretrainConfig:
    return load_config(PretrainConfig, (), [f"shards={shards}", f"out={out}", *TINY, *overrides])


def in_one_process(configs: list[PretrainConfig]) -> None:
    for config in configs:
        pretrain(config)


def on_ranks(ranks: int, configs: list[PretrainConfig], folder: Path) -> None:
    """All trainings one after another, in the same processes: starting them takes longest."""
    folder.mkdir()
    files = [folder / f"{number}.yaml" for number in range(len(configs))]
    for file, config in zip(files, configs, strict=True):
        file.write_text(to_yaml(config))
    with ranks_of(ranks, [__file__, *map(str, files)], folder) as started:
        for rank in started:
            assert rank.ends() == 0, rank.said()  # a deadlock ends here


def worker(files: list[str]) -> None:
    torch.set_num_threads(1)
    with join_world(torch.device("cpu"), 120) as world, StopRequests() as stops:
        for file in files:
            config = load_config(PretrainConfig, [file])
            reader = open_shards(config.shards, config.loader)
            run(config, reader, torch.device("cpu"), world, stops)


def state(run_folder: Path, step: int | None = None) -> dict[str, Tensor]:
    folders = list_checkpoints(run_folder / "checkpoints")
    [folder] = [f for f in folders if step is None or f.name == f"step_{step:08d}"][:1]
    return read_tensors(folder)


def losses(run_folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "dino_global", "dino_local", "ibot", "jepa", "spread", "gram")
    return [{k: row[k] for k in (*names, "grad_norm_backbone") if k in row} for row in rows]


def without_key_biases(name: str, tensor: Tensor) -> Tensor:
    if name.endswith(("attn.qkv.bias", "attn.qkv.bias.exp_avg", "attn.qkv.bias.exp_avg_sq")):
        third = len(tensor) // 3
        return torch.cat([tensor[:third], tensor[2 * third :]])
    return tensor


def assert_equal_to_rounding(one: Path, other: Path) -> None:
    for a, b in zip(losses(one), losses(other), strict=True):
        assert a.keys() == b.keys() and a == pytest.approx(b, rel=1e-5, abs=1e-5), (a, b)
    expected, got = state(one), state(other)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        mine, theirs = (without_key_biases(name, t) for t in (tensor, got[name]))
        if "exp_avg_sq" in name:
            torch.testing.assert_close(theirs, mine, rtol=1e-3, atol=1e-8, msg=name)
        else:
            torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.slow
def test_two_ranks_learn_from_two_teachers_what_one_learns(shards: Path, tmp_path: Path) -> None:
    for name, count in (("first", 40), ("second", 24)):
        head = f"objective.head={{prototypes: {count}, hidden: 16, bottleneck: 8}}"
        pretrain(config_for(shards, tmp_path / name, "steps=5", head))
    taught = [f"teacher.run={tmp_path / 'first'}", f"teacher.also=[{tmp_path / 'second'}]"]
    in_one_process([config_for(shards, tmp_path / "none", *taught)])
    two = [config_for(shards, tmp_path / n, *taught, f"parallel={n}") for n in LAYOUTS]
    on_ranks(2, two, tmp_path / "two")
    for name in LAYOUTS:
        assert_equal_to_rounding(tmp_path / "none", tmp_path / name)


LAYOUTS = ("ddp", "fsdp")
PARTS = ["objective.spread={kind: kde, over: group}", "masks.exact=true"]


FIRST = "koleo"
FURTHER = [name for name in OBJECTIVES if name != FIRST]


def train_both_ways(shards: Path, folder: Path, objectives: list[str], parts: bool) -> Path:
    """One folder a run: what one process and two ranks train."""

    def configured(name: str, *overrides: str) -> PretrainConfig:
        return config_for(shards, folder / name, *overrides)

    one = [configured(f"{name}-none", *OBJECTIVES[name]) for name in objectives]
    if parts:
        one += [configured("parts-none", *PARTS), configured("parts-2", *PARTS, "accumulate=2")]
    in_one_process(one)
    two = [
        configured(f"{name}-{layout}", *OBJECTIVES[name], f"parallel={layout}")
        for name in objectives
        for layout in LAYOUTS
    ]
    if parts:
        two += [
            configured(f"parts-{layout}", *PARTS, "accumulate=2", f"parallel={layout}")
            for layout in LAYOUTS
        ]
    on_ranks(2, two, folder / "two")
    return folder


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_both_ways(shards, tmp_path_factory.mktemp("runs"), [FIRST], parts=True)


@pytest.fixture(scope="module")
def further_runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_both_ways(shards, tmp_path_factory.mktemp("further"), FURTHER, parts=False)


@pytest.mark.pitfall(19)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_train_what_one_trains(runs: Path, layout: str) -> None:
    assert_equal_to_rounding(runs / f"{FIRST}-none", runs / f"{FIRST}-{layout}")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("objective", FURTHER)
def test_other_objectives_train_alike_on_two_ranks(
    further_runs: Path, objective: str, layout: str
) -> None:
    assert_equal_to_rounding(
        further_runs / f"{objective}-none", further_runs / f"{objective}-{layout}"
    )


@pytest.mark.pitfall(19)
@pytest.mark.parametrize("run_name", ["parts-2", "parts-ddp", "parts-fsdp"])
def test_a_batch_taken_in_parts_gives_the_gradient_of_the_whole(runs: Path, run_name: str) -> None:
    assert_equal_to_rounding(runs / "parts-none", runs / run_name)


def test_the_encoder_of_shards_is_exported_whole(runs: Path) -> None:
    one, two = (
        load_file(runs / f"koleo-{layout}" / "encoder" / "model.safetensors")
        for layout in ("none", "fsdp")
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        mine, theirs = (without_key_biases(name, t) for t in (tensor, two[name]))
        torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.pitfall(20)
def test_ranks_and_layouts_change_between_stops(shards: Path, runs: Path, tmp_path: Path) -> None:
    """2 → 1 → 2 ranks, sharded and replicated: the same order, and weights to rounding."""
    out = tmp_path / "elastic"
    overrides = [*OBJECTIVES["koleo"], "checkpoints={every: 1, keep: 20}"]
    stops = ((2, 3, "fsdp"), (1, 6, "none"), (2, 10, "ddp"))
    for ranks, last, layout in stops:
        config = config_for(shards, out, *overrides, f"parallel={layout}")
        if ranks == 1:
            pretrain(config)
        else:
            on_ranks(2, [config], tmp_path / f"ranks-{last}")
        if last < 10:  # as if it had been killed: later checkpoints are gone
            for path in list_checkpoints(out / "checkpoints"):
                if int(path.name.removeprefix("step_")) > last:
                    shutil.rmtree(path)
            (out / "done.json").unlink()
    assert_equal_to_rounding(runs / "koleo-none", out)


@pytest.mark.slow
def test_full_and_hybrid_sharding_on_four_ranks(shards: Path, runs: Path, tmp_path: Path) -> None:
    overrides = [*OBJECTIVES["koleo"], "group_size=2"]
    layouts = {
        "fsdp": ["parallel=fsdp"],
        "hybrid": ["parallel=hybrid", "shard_ranks=2"],
        "ddp": ["parallel=ddp"],
    }
    on_ranks(
        4,
        [config_for(shards, tmp_path / name, *overrides, *o) for name, o in layouts.items()],
        tmp_path / "four",
    )
    for name in layouts:
        assert_equal_to_rounding(runs / "koleo-none", tmp_path / name)


@pytest.mark.pitfall(24)
@pytest.mark.slow
def test_compiled_shards_train_what_eager_ones_do(shards: Path, runs: Path, tmp_path: Path) -> None:
    """A hook of the layout inside a compiled graph would end in an error: it must be whole."""
    overrides = [*OBJECTIVES["koleo"], "compile=blocks"]
    names = ("ddp", "fsdp")
    on_ranks(
        2,
        [config_for(shards, tmp_path / n, *overrides, f"parallel={n}") for n in names],
        tmp_path / "two",
    )
    for name in names:
        assert_equal_to_rounding(runs / "koleo-none", tmp_path / name)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["accumulate=2"], "spread.over=batch"),
        (["accumulate=3", *PARTS], "whole groups"),
        (["accumulate=2", *PARTS, "objective.gram={weight: 1.0, level: batch}"], "level=image"),
        (["parallel=fsdp"], "several processes"),
    ],
)
def test_what_cannot_be_exact_is_refused(
    shards: Path, tmp_path: Path, overrides: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        pretrain(config_for(shards, tmp_path, *overrides))


def test_training_leaves_the_global_random_states_alone(shards: Path, tmp_path: Path) -> None:
    """So there is no state of theirs to save."""
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    pretrain(config_for(shards, tmp_path, "steps=2"))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1]) and random.getstate() == before[2]


if __name__ == "__main__":
    worker(sys.argv[1:])
