"""The verb `pretrain` with probes beside the training, as a whole."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from eosin.configs.errors import ConfigError
from eosin.configs.load import load_config
from eosin.data_curation.shards import ShardConfig, shard
from eosin.eval.watch_exports import WatchConfig, watch
from eosin.launch.metrics import read_lines
from eosin.launch.status import read_status
from eosin.launch.training import TrainingConfig, plan, pretrain
from eosin.pretrain.checkpoint import list_checkpoints
from eosin.pretrain.export import ExportConfig, export

TINY = [
    "steps=8", "batch_size=4", "threads=1", "log_every=1", "checkpoints.every=2", "device=cpu",
    "model={width: 32, depth: 2, heads: 2, patch_px: 8, image_px: 32, layer_scale: 1.0}",
    "objective.head={prototypes: 32, hidden: 16, bottleneck: 8}",
    "augment={global_px: 32, local_px: 16, n_local: 2}", "optim.lr.warmup=0", "optim.lr.peak=0.01",
    "momentum={start: 0.5, peak: 0.5, end: 0.9}",
]  # fmt: skip


@pytest.fixture(autouse=True)
def probes_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes milliseconds here: by their share, there would be no time for probes."""
    monkeypatch.setattr("eosin.eval.fewshot.EPISODES", 20)
    monkeypatch.setattr("eosin.eval.watch.Budget.left", lambda self: 1e9)
    monkeypatch.setattr("eosin.launch.curves.loss_curves", lambda *_: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and labels of the same tiles: two textures, ten patients."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    (folder / "tiles").mkdir()
    rows = ["path,label,group"]
    for i in range(60):
        coarse = rng.integers(0, 255, ((4, 16)[i % 2],) * 2 + (3,), np.uint8)
        cv2.imwrite(str(folder / "tiles" / f"{i}.png"), cv2.resize(coarse, (40, 40)))
        rows.append(f"tiles/{i}.png,{('coarse', 'fine')[i % 2]},p{i // 6}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    shard(ShardConfig(images=folder / "tiles", out=folder / "shards", workers=1))
    return folder


def config_for(data: Path, out: Path, *overrides: str) -> TrainingConfig:
    given = [f"shards={data / 'shards'}", f"out={out}", *TINY, *overrides]
    return load_config(TrainingConfig, (), given)


def timeless(run: Path) -> list[dict[str, object]]:
    lines = read_lines(run / "probes.jsonl")
    return [{k: v for k, v in line.items() if k not in ("seconds", "share")} for line in lines]


def test_a_probed_run_is_scored_at_its_checkpoints_and_resumes_without_gap_or_repeat(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe = f"probe.tiles={data / 'labels.csv'}"
    config = config_for(data, tmp_path / "whole", probe)
    assert "a probe every 2 steps" in plan(config) and "2% of the time" in plan(config)
    pretrain(config)
    whole = timeless(tmp_path / "whole")
    assert [line["step"] for line in whole] == [2, 4, 6, 8]
    assert len({line["rankme"] for line in whole}) == 4  # the teacher moves
    assert "probe at step 8: kNN" in capsys.readouterr().out

    again = config_for(data, tmp_path / "again", probe)
    pretrain(again)
    shutil.rmtree(list_checkpoints(tmp_path / "again" / "checkpoints")[0])
    (tmp_path / "again" / "done.json").unlink()
    pretrain(again)  # from step 6 on
    assert timeless(tmp_path / "again") == whole

    plain = config_for(data, tmp_path / "plain")
    pretrain(plain)  # probes change nothing of what is learned
    sums = [
        (tmp_path / run / "encoder" / "SHA256SUMS").read_bytes()
        for run in ("whole", "again", "plain")
    ]
    assert sums[0] == sums[1] == sums[2]
    assert not (tmp_path / "plain" / "probes.jsonl").exists()


def test_a_probed_run_can_be_exported_and_says_that_it_is_finished(
    data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    pretrain(config_for(data, run, "probe.where=job", "probe.every=4", "tensorboard=true"))
    assert sorted(path.name for path in (run / "exports").iterdir()) == [
        "step_00000004", "step_00000008",
    ]  # fmt: skip
    labels = data / "labels.csv"
    watch(load_config(WatchConfig, (), [f"run={run}", f"probe.tiles={labels}", "device=cpu"]))
    assert [line["step"] for line in timeless(run)] == [4, 8]
    export(ExportConfig(run=run, out=tmp_path / "encoder"))
    status = read_status(run)
    assert status is not None
    assert (status.state, status.step, status.steps) == ("finished", 8, 8)
    assert status.checkpoint_step == 8 and status.loss is not None and status.tiles_per_s
    assert status.memory_gib and status.mfu is None
    assert status.alarms and "all but uniform" in status.alarms[0]  # as ever after eight steps
    assert list((run / "tensorboard").glob("events.*"))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, 9))
    assert {"tiles_per_s", "data_wait", "memory_gib"} <= metrics[0].keys()


def test_probes_come_where_there_are_checkpoints(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"probe\.every=3 must be a multiple of"):
        config_for(data, tmp_path, "probe.every=3")
