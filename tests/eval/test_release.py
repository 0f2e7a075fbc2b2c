"""A release says where the weights come from and what they are worth, by records alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eosin.configs.errors import ConfigError, EosinError, InputError
from eosin.configs.load import load_config
from eosin.data_curation.shards import ShardConfig, shard
from eosin.eval.config import EvalConfig
from eosin.eval.push import PushConfig, push
from eosin.eval.release import ReleaseConfig, release
from eosin.eval.run import evaluate
from eosin.eval.tasks import TaskConfig
from eosin.launch.artefacts import read_json, write_json
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.train import pretrain

TINY = [
    "steps=4", "batch_size=4", "group_size=2", "threads=1", "log_every=1", "checkpoints.every=2",
    "model={width: 32, depth: 1, heads: 2, patch_px: 8, image_px: 32}",
    "objective.head={prototypes: 32, hidden: 16, bottleneck: 8}",
    "augment={global_px: 32, local_px: 16, n_local: 2}",
]  # fmt: skip


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 48 tiles of 24 patients, half of them with names as TCGA's."""
    folder = tmp_path_factory.mktemp("tiles")
    generator, lines = np.random.default_rng(0), ["path,label,group,split"]
    for patient in range(24):
        group = f"TCGA-AA-{patient:04d}" if patient % 2 else f"site{patient}"
        split = ["train", "train", "val", "test"][patient // 2 % 4]
        for i in range(4):
            pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8) // (1 + i % 2)
            Image.fromarray(pixels).save(folder / f"{patient}_{i}.png")
            lines.append(f"{patient}_{i}.png,{'ab'[i % 2]},{group},{split}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    shard(ShardConfig(images=tiles / "labels.csv", out=out / "shards", workers=1))
    config = [f"shards={out / 'shards'}", f"out={out / 'run'}", *TINY]
    pretrain(load_config(PretrainConfig, (), config))
    return out / "run"


def score(encoder: Path, tiles: Path, out: Path) -> None:
    task = TaskConfig(tiles=tiles / "labels.csv")
    protocols = ["knn/uni20@1"]
    evaluate(EvalConfig(encoder=str(encoder), task=task, out=out, protocols=protocols))


def test_the_card_holds_the_runs_own_record(run: Path, tiles: Path, tmp_path: Path) -> None:
    score(run, tiles, tmp_path / "eval")
    release(
        ReleaseConfig(
            run=run, out=tmp_path / "out", licence="cc-by-4.0", data="Made-up tiles.",
            scores=[tmp_path / "eval"], forms=["transformers"],
        )
    )  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\nlicense: cc-by-4.0\n---\n")
    assert "Made-up tiles.\n\n96 tiles of 24 groups" in card
    assert "- **TCGA**: 12 names of its form; made of it are tcga-ut, msi" in card
    assert "DINO 1 + iBOT 1 + koleo 0.1" in card and "4 steps of 4 tiles" in card
    assert "device-hours of training on 1 × cpu; about" in card
    results = read_json(tmp_path / "eval" / "results.json")
    names = {e["name"]: e["kind"] for e in results["encoders"]}
    for found in results["scores"]:
        if found["metric"] == "balanced_accuracy" and names[found["encoder"]] != "floor":
            cell = f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
            assert cell in card
    assert (tmp_path / "out" / "transformers" / "model.safetensors").is_file()


def test_scores_of_other_weights_are_refused(run: Path, tiles: Path, tmp_path: Path) -> None:
    release(ReleaseConfig(run=run, out=tmp_path / "earlier", step="2"))
    score(tmp_path / "earlier", tiles, tmp_path / "eval")
    with pytest.raises(InputError, match="holds no scores of these weights"):
        release(ReleaseConfig(run=run, out=tmp_path / "out", scores=[tmp_path / "eval"]))


def test_what_is_not_known_is_said_not_to_be(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    text = (run / "config.yaml").read_text()
    shards = str(run.parent / "shards")
    (copy / "config.yaml").write_text(text.replace(shards, str(tmp_path / "gone")))
    (copy / "checkpoints").symlink_to(run / "checkpoints")
    write_json(copy / "environment.json", {"device": "Some New GPU", "ranks": 8})
    (copy / "metrics.jsonl").write_text('{"step": 4, "tiles_per_s": 0.5}\n')
    release(ReleaseConfig(run=copy, out=tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not known: the index of its shards was not at hand" in card
    assert "0.0711 device-hours of training on 8 × Some New GPU; its energy cannot be" in card
    assert "| licence | not stated |" in card


class Hub:
    """What would reach the hub."""

    calls: list[tuple[str, Any]]

    def __init__(self) -> None:
        Hub.calls = []

    def create_repo(self, repo: str, **options: Any) -> None:
        self.calls.append(("create", (repo, options["private"])))

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload", (options["repo_id"], Path(options["folder_path"]).name)))

    def update_repo_settings(self, repo: str, gated: str) -> None:
        self.calls.append(("gate", (repo, gated)))


def test_nothing_is_sent_until_it_is_really_meant(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    Hub.calls = []
    release(ReleaseConfig(run=run, out=tmp_path / "out", licence="mit"))
    push(PushConfig(encoder=tmp_path / "out", repo="org/name"))
    said = capsys.readouterr().out
    assert "nothing was sent" in said and "model.safetensors" in said and not Hub.calls
    push(PushConfig(encoder=tmp_path / "out", repo="org/name", really=True, gated="manual"))
    assert Hub.calls == [
        ("create", ("org/name", True)),
        ("upload", ("org/name", "out")),
        ("gate", ("org/name", "manual")),
    ]


def test_what_differs_or_states_no_licence_is_not_sent(run: Path, tmp_path: Path) -> None:
    release(ReleaseConfig(run=run, out=tmp_path / "out"))
    with pytest.raises(InputError, match="states no licence"):
        push(PushConfig(encoder=tmp_path / "out", repo="org/name", really=True))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["eosin"]["licence"] = "mit"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(EosinError, match="1 checks differ: files"):
        push(PushConfig(encoder=tmp_path / "out", repo="org/name", really=True))
    with pytest.raises((ConfigError, ValueError), match="should be ORG/NAME"):
        PushConfig(encoder=tmp_path, repo="name")
