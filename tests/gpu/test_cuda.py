"""What only a GPU can show: a bf16 run that learns, resumes and exports."""

import json
import math
import shutil
import statistics
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from eosin.configs.load import load_config
from eosin.data_curation.shards import ShardConfig, shard
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.train import pretrain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
    # of torch's compiler, which hides it only where warnings are shown
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def test_a_bf16_run_learns_resumes_and_exports(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "tiles").mkdir()
    for i in range(32):
        image = cv2.resize(rng.integers(0, 255, (6, 6, 3), np.uint8), (96, 96))
        cv2.imwrite(str(tmp_path / "tiles" / f"{i}.png"), image)
    shard(ShardConfig(images=tmp_path / "tiles", out=tmp_path / "shards", workers=1))
    overrides = [
        f"shards={tmp_path / 'shards'}", f"out={tmp_path / 'run'}", "device=cuda", "batch_size=16",
        "steps=20", "log_every=1", "checkpoints.every=10", "wandb=disabled",
    ]  # fmt: skip
    config, run = load_config(PretrainConfig, ["pretrain/smoke"], overrides), tmp_path / "run"
    pretrain(config)
    first = logged_losses(run)
    assert len(first) == 20 and (run / "encoder" / "model.safetensors").is_file()
    assert all(math.isfinite(loss) for loss in first)
    assert statistics.mean(first[-5:]) < statistics.mean(first[:5])

    shutil.rmtree(run / "checkpoints" / "step_00000020")  # as if killed after step 10
    (run / "done.json").unlink()
    pretrain(config)
    again = logged_losses(run)
    assert again[:10] == first[:10] and again[10:] == pytest.approx(first[10:], rel=0.02)


def logged_losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]
