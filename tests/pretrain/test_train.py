"""The loop: killed and resumed, bit for bit; NaN steps; refusals."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from eosin.configs.errors import ConfigError, InputError
from eosin.configs.load import load_config, to_yaml
from eosin.data_curation.shards import ShardConfig, shard
from eosin.pretrain.batch import Inputs
from eosin.pretrain.checkpoint import list_checkpoints, read_tensors
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.export import ExportConfig, export
from eosin.pretrain.gradients import forward
from eosin.pretrain.loader import batches, open_shards
from eosin.pretrain.optim import group_key
from eosin.pretrain.rates import Rates
from eosin.pretrain.setup import set_up
from eosin.pretrain.train import plan, pretrain

TINY = [
    "steps=8", "batch_size=4", "group_size=2", "threads=1", "log_every=1", "checkpoints.every=2",
    "model={width: 32, depth: 2, heads: 2, patch_px: 8, image_px: 32, drop_path: 0.5}",
    "objective.head={prototypes: 32, hidden: 16, bottleneck: 8}",
    "augment={global_px: 32, local_px: 16, n_local: 2}",
]  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i in range(12):
        image = cv2.resize(rng.integers(0, 255, (6, 6, 3), np.uint8), (48, 48))
        (folder / "tiles").mkdir(exist_ok=True)
        cv2.imwrite(str(folder / "tiles" / f"{i}.png"), image)
    shard(ShardConfig(images=folder / "tiles", out=folder / "shards", workers=1))
    return folder / "shards"


def config_for(shards: Path, out: Path, *overrides: str) -> PretrainConfig:
    return load_config(PretrainConfig, (), [f"shards={shards}", f"out={out}", *TINY, *overrides])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_tensors(list_checkpoints(run / "checkpoints")[0], "model.")


def steps_logged(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_trains_exports_and_is_not_done_twice(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(shards, tmp_path / "run")
    assert "8 steps of 4 tiles from 12 records: 32 tiles, 2.7 epochs" in plan(config)
    pretrain(config)
    assert steps_logged(tmp_path / "run") == list(range(1, 9))
    for name in ("config.yaml", "environment.json", "curves.png", "encoder/model.safetensors"):
        assert (tmp_path / "run" / name).is_file()
    earlier = read_tensors(tmp_path / "run" / "checkpoints" / "step_00000006", "model.")
    name = "teacher.backbone.cls_token"
    assert not torch.equal(earlier[name], weights(tmp_path / "run")[name])
    before = (tmp_path / "run" / "encoder" / "SHA256SUMS").read_bytes()
    export(ExportConfig(run=tmp_path / "run", out=tmp_path / "again"))
    assert (tmp_path / "again" / "SHA256SUMS").read_bytes() == before
    pretrain(config)
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.pitfall(20)
def test_killed_runs_end_with_the_same_weights_bit_for_bit(shards: Path, tmp_path: Path) -> None:
    whole = config_for(shards, tmp_path / "whole", "steps=40")
    pretrain(whole)
    killed = tmp_path / "killed"
    killed.mkdir()
    (tmp_path / "killed.yaml").write_text(to_yaml(replace(whole, out=killed)))
    command = [
        sys.executable, "-m", "eosin.launch.cli", "pretrain",
        "--config", str(tmp_path / "killed.yaml"),
    ]  # fmt: skip
    kills = 0
    for wanted in (3, 11, 27):  # checkpoints are at even steps, so each kill loses some work
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        metrics = killed / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.is_file() and metrics.read_bytes().count(b"\n") >= wanted:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        process.wait()
    assert kills == 3
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected, got = weights(tmp_path / "whole"), weights(killed)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[k], got[k]) for k in expected)
    assert steps_logged(killed) == list(range(1, 41))
    for name in ("model.safetensors", "golden/features.safetensors", "config.json"):
        one = (tmp_path / "whole" / "encoder" / name).read_bytes()
        assert one == (killed / "encoder" / name).read_bytes()


def test_another_config_or_other_shards_are_refused_on_resume(shards: Path, tmp_path: Path) -> None:
    pretrain(config_for(shards, tmp_path / "run"))
    changed = config_for(shards, tmp_path / "run", "optim.lr.peak=0.5", "log_every=3")
    with pytest.raises(ConfigError, match=r"optim\.lr\.peak: 0\.001 → 0\.5") as error:
        pretrain(changed)
    assert "log_every" not in str(error.value)
    other = tmp_path / "other"
    copies = tmp_path / "copies"
    copies.mkdir()
    for path in sorted((shards.parent / "tiles").iterdir())[:8]:
        (copies / path.name).write_bytes(path.read_bytes())
    shard(ShardConfig(images=copies, out=other, workers=1))
    with pytest.raises(ConfigError, match="differs: the index of the shards"):
        pretrain(config_for(other, tmp_path / "run"))


def test_fewer_tiles_than_a_batch_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"12.*64|64.*12"):
        pretrain(config_for(shards, tmp_path / "run", "batch_size=64"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("batch_size=3", "batch_size=3 must be a multiple of group_size=2"),
        ("augment.global_px=64", "model.image_px=32 must equal augment.global_px=64"),
        ("augment.local_px=20", "not a multiple of model.patch_px=8"),
        ("steps=0", "steps=0 must be at least 1"),
    ],
)
def test_values_that_contradict_each_other_are_refused(
    shards: Path, tmp_path: Path, override: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        config_for(shards, tmp_path, override)


@pytest.mark.pitfall(21)
def test_a_nan_step_changes_nothing(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eosin.pretrain import gradients as module

    real = module.forward

    def poisoned(config, model, batch, *rest):  # type: ignore[no-untyped-def]
        losses, outputs = real(config, model, batch, *rest)
        if batch.step == 1:
            losses = losses._replace(total=losses.total * float("nan"))
        return losses, outputs

    monkeypatch.setattr(module, "forward", poisoned)
    pretrain(config_for(shards, tmp_path / "run", "steps=3", "checkpoints={every: 1, keep: 3}"))
    folders = list_checkpoints(tmp_path / "run" / "checkpoints")[::-1]
    for prefix in ("model.", "optimizer."):
        one, two, three = (read_tensors(folder, prefix) for folder in folders)
        assert all(torch.equal(one[k], two[k]) for k in one)
        assert not all(torch.equal(two[k], three[k]) for k in two)


def by_hand(config: PretrainConfig) -> dict[str, torch.Tensor]:
    """The run step by step with torch's own clipping and optimiser; all of the model."""
    cpu = torch.device("cpu")
    model = set_up(config, cpu, torch.float32).model
    student, teacher = (dict(m.named_parameters()) for m in (model.student, model.teacher))
    keys = {name: group_key(name, config.model.depth, config.optim) for name in student}
    groups = [{"params": [p], "name": name} for name, p in student.items()]
    betas, eps = config.optim.betas, config.optim.eps
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, foreach=False)
    clipped = 0
    inputs, reader = Inputs(cpu, config.mean, config.std), open_shards(config.shards, config.loader)
    for batch in batches(
        reader, config.batch_plan, config.loader, first_step=0, last_step=config.steps
    ):
        rates = Rates.at(config, batch.step)
        losses, _ = forward(config, model, batch, rates, inputs, torch.float32)
        optimizer.zero_grad()
        losses.total.backward()
        for part in model.student.children():
            norm = torch.nn.utils.clip_grad_norm_(part.parameters(), config.optim.clip_norm)
            clipped += int(norm > config.optim.clip_norm)
        for group in optimizer.param_groups:
            key = keys[group["name"]]
            frozen = key.last_layer and rates.freeze_last
            group["lr"] = 0.0 if frozen else rates.lr * key.lr_factor
            group["weight_decay"] = rates.weight_decay if key.decays else 0.0
        optimizer.step()
        with torch.no_grad():
            for name, p in teacher.items():
                p.copy_(rates.momentum * p + (1 - rates.momentum) * student[name])
    assert clipped > 0
    return model.state_dict()


@pytest.mark.pitfall(16)
def test_the_loop_clips_then_steps_then_averages(shards: Path, tmp_path: Path) -> None:
    config = config_for(
        shards, tmp_path / "run", "steps=4", "optim.clip_norm=0.05", "optim.lr.peak=0.01",
        "optim.lr.warmup=0.5", "optim.eps=1e-4", "momentum={start: 0.5, peak: 0.5, end: 0.9}",
        "model.layer_scale=1.0",
    )  # fmt: skip
    pretrain(config)
    expected, got = by_hand(config), weights(tmp_path / "run")
    for name, tensor in got.items():
        if name.startswith(("student.", "teacher.")):
            torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.pitfall(11)
def test_a_frozen_gram_teacher_is_an_earlier_encoder(shards: Path, tmp_path: Path) -> None:
    pretrain(config_for(shards, tmp_path / "first", "steps=2"))
    encoder = tmp_path / "first" / "encoder"
    frozen = f"objective.gram={{weight: 1.0, teacher: frozen, frozen_from: {encoder}}}"
    pretrain(config_for(shards, tmp_path / "second", "steps=2", frozen))
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    for name, tensor in second.items():
        if name.startswith("gram_teacher.") and not name.endswith("mask_token"):
            assert torch.equal(tensor, first[name.replace("gram_teacher.", "teacher.backbone.")])
    rows = (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(row)["gram"] > 0 for row in rows)
    with pytest.raises(InputError, match="is another network: depth=2 there and 3 here"):
        pretrain(config_for(shards, tmp_path / "third", frozen, "model.depth=3"))


@pytest.mark.pitfall(20)
@pytest.mark.parametrize("changes", [
    ["objective.targets=centre", "objective.patch_head={prototypes: 16, hidden: 8, bottleneck: 4}"],
    pytest.param(
        ["objective.ibot=0", "objective.jepa={weight: 1.0, depth: 1, width: 16, heads: 2}",
         "masks={kind: jepa, share: 1.0}", "model.positions=rope", "model.rope.rescale=2.0"],
        marks=pytest.mark.slow,
    ),
    pytest.param(
        ["objective.gram={weight: 1.0, start: 2, refresh_every: 3}", "masks.exact=true",
         "objective.spread={kind: kde, over: group}", "spread_ramp=[0.2,0.6]"],
        marks=pytest.mark.slow,
    ),
])  # fmt: skip
def test_other_objectives_resume_bit_for_bit(
    changes: list[str], shards: Path, tmp_path: Path
) -> None:
    pretrain(config_for(shards, tmp_path / "whole", *changes))
    stopped = config_for(shards, tmp_path / "stopped", *changes)
    pretrain(stopped)
    for folder in list_checkpoints(tmp_path / "stopped" / "checkpoints")[:1]:
        shutil.rmtree(folder)  # of step 8; that of step 6 is left
    (tmp_path / "stopped" / "done.json").unlink()
    pretrain(stopped)
    expected, got = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.pitfall(15)
def test_learning_rate_scales_with_the_root_of_the_batch(shards: Path, tmp_path: Path) -> None:
    config = config_for(shards, tmp_path, "optim.lr_reference_batch=16", "optim.lr.warmup=0")
    assert Rates.at(config, 0).lr == pytest.approx(1e-3 * (4 / 16) ** 0.5)
    assert Rates.at(config, config.steps).lr == pytest.approx(config.optim.lr.end)
    assert Rates.at(config, 0).freeze_last and not Rates.at(config, 1).freeze_last


@pytest.mark.slow
def test_wandb_offline_writes_its_files_into_the_run(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    config = config_for(shards, tmp_path / "run", "steps=2", "wandb=offline")
    command = [
        sys.executable,
        "-m",
        "eosin.launch.cli",
        "pretrain",
        "--config",
        str(tmp_path / "c.yaml"),
    ]
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
