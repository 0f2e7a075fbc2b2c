"""Starts: weights of an encoder or of a run, a backbone that waits, and parts that stand still."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eosin.configs.errors import ConfigError, InputError
from eosin.configs.load import load_config
from eosin.data_curation.shards import ShardConfig, shard
from eosin.data_curation.torchvision_import import import_timm
from eosin.pretrain.checkpoint import list_checkpoints, read_tensors
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.low_rank import LowRankLinear, merge_additions
from eosin.pretrain.positions import learned_positions
from eosin.pretrain.rates import Rates
from eosin.pretrain.start import StartConfig
from eosin.pretrain.train import pretrain
from eosin.pretrain.vit import Vit, VitConfig

TINY = [
    "steps=6", "batch_size=4", "group_size=2", "threads=1", "log_every=1", "checkpoints.every=2",
    "model={width: 32, depth: 3, heads: 2, patch_px: 8, image_px: 32, registers: 1}",
    "objective.head={prototypes: 32, hidden: 16, bottleneck: 8}",
    "augment={global_px: 32, local_px: 16, n_local: 2}",
    "optim.lr={peak: 0.01, end: 0.001, start: 0.01}",
]  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (folder / "tiles").mkdir()
    for i in range(12):
        image = cv2.resize(rng.integers(0, 255, (6, 6, 3), np.uint8), (48, 48))
        cv2.imwrite(str(folder / "tiles" / f"{i}.png"), image)
    shard(ShardConfig(images=folder / "tiles", out=folder / "shards", workers=1))
    return folder / "shards"


@pytest.fixture(scope="module")
def first(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("first") / "run"
    pretrain(config_for(shards, out))
    return out


def config_for(shards: Path, out: Path, *overrides: str) -> PretrainConfig:
    return load_config(PretrainConfig, (), [f"shards={shards}", f"out={out}", *TINY, *overrides])


def at(run: Path, step: int) -> dict[str, torch.Tensor]:
    return read_tensors(run / "checkpoints" / f"step_{step:08d}", "model.")


def newest(run: Path) -> dict[str, torch.Tensor]:
    return read_tensors(list_checkpoints(run / "checkpoints")[0], "model.")


def test_the_backbone_waits_for_the_heads_and_sets_off_in_a_line() -> None:
    start = StartConfig(frozen_steps=3, ramp_steps=3)
    rates = [start.backbone_rate(step) for step in range(8)]
    assert rates == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert StartConfig().backbone_rate(0) == 1


def test_a_frozen_backbone_is_that_of_the_source_and_heads_move(
    shards: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = f"start={{weights: {first}, frozen_steps: 4}}"
    pretrain(config_for(shards, tmp_path / "run", start, "seed=5"))
    assert "tensors accounted for (timm)" in capsys.readouterr().out
    source, run = newest(first), at(tmp_path / "run", 4)
    heads = []
    for name, tensor in run.items():
        if name.startswith(("student.backbone.", "teacher.backbone.")):
            teacher = source["teacher.backbone." + name.split("backbone.")[1]]
            if not name.endswith("mask_token"):
                assert torch.equal(tensor, teacher), name
        elif name.startswith("student.head."):
            heads.append(torch.equal(tensor, source[name]))
    assert not any(heads)
    later = at(tmp_path / "run", 6)
    moved = [n for n in run if n.startswith("student.backbone.blocks") and n.endswith("weight")]
    assert all(not torch.equal(run[name], later[name]) for name in moved)


@pytest.mark.pitfall(20)
def test_a_run_that_was_started_from_weights_resumes_without_them(
    shards: Path, first: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "source"
    shutil.copytree(first / "encoder", copy)
    changes = [f"start={{weights: {copy}, frozen_steps: 1, ramp_steps: 2, train_blocks: 2}}"]
    pretrain(config_for(shards, tmp_path / "whole", *changes))
    pretrain(config_for(shards, tmp_path / "stopped", *changes))
    shutil.rmtree(list_checkpoints(tmp_path / "stopped" / "checkpoints")[0])
    (tmp_path / "stopped" / "done.json").unlink()
    shutil.rmtree(copy)
    pretrain(config_for(shards, tmp_path / "stopped", *changes))
    expected, got = newest(tmp_path / "whole"), newest(tmp_path / "stopped")
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_run_goes_on_as_a_stage_at_another_size(
    shards: Path, first: Path, tmp_path: Path
) -> None:
    larger = [
        "model.image_px=48", "augment.global_px=48", "steps=2", "optim.lr.peak=0",
        "optim.lr.start=0", "optim.lr.end=0", "momentum={peak: 1.0, end: 1.0, start: 1.0}",
    ]  # fmt: skip
    pretrain(config_for(shards, tmp_path / "run", f"start.run={first}", *larger))
    source, run = newest(first), newest(tmp_path / "run")
    for name, tensor in run.items():
        if name.startswith(("student.", "teacher.")):
            expected = source[name]
            if name.endswith("pos_embed"):
                expected = learned_positions(expected, 4, (6, 6), "antialias")
            assert torch.equal(tensor, expected), name
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1


def test_only_the_last_blocks_or_additions_are_trained(
    shards: Path, first: Path, tmp_path: Path
) -> None:
    pretrain(config_for(shards, tmp_path / "last", f"start={{weights: {first}, train_blocks: 1}}"))
    source, run = newest(first), newest(tmp_path / "last")
    moved = {
        name.removeprefix("student.backbone.")
        for name in run
        if name.startswith("student.backbone.")
        and not torch.equal(run[name], source[name.replace("student", "teacher", 1)])
    }
    assert moved and all(name.startswith(("blocks.2.", "norm.", "mask_token")) for name in moved)
    rank = ["model.low_rank=2", f"start.weights={first}"]
    pretrain(config_for(shards, tmp_path / "lora", *rank))
    run = newest(tmp_path / "lora")
    for name, tensor in run.items():
        kept = name.replace("student.backbone.", "teacher.backbone.")
        if name.startswith("student.backbone.") and name.endswith(("qkv.weight", "fc1.weight")):
            assert torch.equal(tensor, source[kept])
        if name.startswith("student.backbone.") and name.endswith("lora_b"):
            assert tensor.abs().max() > 0
    # the export has them added up, in a network that knows nothing of them
    exported = load_file(tmp_path / "lora" / "encoder" / "model.safetensors")
    layer = "blocks.0.attn.qkv"
    t = {k: run[f"teacher.backbone.{layer}.{k}"] for k in ("weight", "lora_a", "lora_b")}
    torch.testing.assert_close(exported[f"{layer}.weight"], t["weight"] + t["lora_b"] @ t["lora_a"])
    timm = import_timm()
    model = timm.create_model(f"local-dir:{tmp_path / 'lora' / 'encoder'}", pretrained=True).eval()
    vit = Vit(
        VitConfig(width=32, depth=3, heads=2, patch_px=8, image_px=32, registers=1, low_rank=2)
    )
    vit.load_state_dict({n[17:]: p for n, p in run.items() if n.startswith("teacher.backbone.")})
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), vit([images])[0].cls, atol=1e-5, rtol=1e-5)


def test_an_addition_is_the_formula_and_nothing_at_the_start() -> None:
    layer = LowRankLinear(6, 4, 2)
    layer.initialise_addition(torch.Generator().manual_seed(0))
    x = torch.randn(5, 6)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    torch.nn.init.normal_(layer.lora_b)
    whole = layer.weight + layer.lora_b @ layer.lora_a
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, whole, layer.bias))
    merged = merge_additions({f"a.{n}": p.detach() for n, p in layer.named_parameters()})
    assert merged.keys() == {"a.weight", "a.bias"}
    torch.testing.assert_close(merged["a.weight"], whole.detach())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.width=64", "width=32 there and 64 here"),
        ("objective.patch_head={prototypes: 8, hidden: 8, bottleneck: 4}", "too many|missing"),
        ("objective.head.prototypes=16", r"head\.last_gain is \[32, 1\] there and \[16, 1\]"),
    ],
)
def test_another_network_than_the_runs_is_refused(
    override: str, words: str, shards: Path, first: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        pretrain(config_for(shards, tmp_path / "run", f"start.run={first}", override))


def test_starts_that_cannot_be_are_one_line(shards: Path, first: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match="give one of them"):
        config_for(shards, out, f"start={{weights: {first}, run: {first}}}")
    with pytest.raises(InputError, match="and the network has 3 blocks"):
        pretrain(config_for(shards, out, f"start={{weights: {first}, train_blocks: 4}}"))
    with pytest.raises(InputError, match="holds no run"):
        pretrain(config_for(shards, out, f"start.run={tmp_path}"))
    with pytest.raises(InputError, match="does not exist"):
        pretrain(config_for(shards, out, f"start.weights={tmp_path / 'none'}"))


def test_rates_say_how_fast_the_backbone_goes(shards: Path, tmp_path: Path) -> None:
    config = config_for(shards, tmp_path, "start={frozen_steps: 2, ramp_steps: 1}")
    assert [Rates.at(config, step).backbone for step in range(4)] == [0, 0, 0.5, 1]
    assert replace(config, start=StartConfig()).start.backbone_rate(0) == 1
