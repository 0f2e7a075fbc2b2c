"""Every recipe of the README's cookbook, run in its order at toy size."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from eosin.data_curation.cluster_config import MARKER_NAME as CLUSTERS_MARKER
from eosin.data_curation.review_file import Review, Verdict, write_review
from eosin.data_curation.synthetic import SyntheticConfig, write_slides
from eosin.data_curation.torchvision_import import import_timm
from eosin.launch.artefacts import read_json
from eosin.launch.cli import main
from eosin.launch.verbs import VERBS

README = Path(__file__).parents[1] / "README.md"
NETWORK = [
    "model.width=96", "model.depth=2", "model.heads=2", "model.patch_px=14", "model.image_px=56",
    "model.registers=4", "augment.global_px=56", "augment.local_px=28", "augment.n_local=2",
]  # fmt: skip
HEADS = ["objective.head={prototypes: 32, hidden: 16, bottleneck: 8}"]
PATCH_HEAD = ["objective.patch_head={prototypes: 32, hidden: 16, bottleneck: 8}"]
TRAINING = [
    "steps=4", "batch_size=8", "group_size=4", "threads=1", "loader.workers=0", "log_every=1",
    "checkpoints.every=2", "device=cpu", "optim.lr_reference_batch=8",
]  # fmt: skip
TOY: dict[str, list[str]] = {
    "doctor": [],
    "curate": ["tile.mpp=1.0", "tile.size_px=128", "tile.workers=1"],
    "pretrain": [*TRAINING, *HEADS],
    "eval": ["device=cpu", "n_bootstrap=100"],
    "extract": ["tile.mpp=1.0", "tile.size_px=128", "tile.workers=1", "embed.device=cpu"],
    "explain": ["device=cpu", "fit_tiles=8"],
    "sample": ["total=100"],
}


def recipes() -> dict[str, list[list[str]]]:
    """Title → commands, each as words behind ``eosin``, in the README's order."""
    cookbook = README.read_text().split("\n## Cookbook\n")[1].split("\n## ")[0]
    found = {}
    for part in cookbook.split("\n### ")[1:]:
        title, _, body = part.partition("\n")
        lines = re.findall(r"^eosin (.+)$", "\n".join(re.findall(r"```bash\n(.*?)```", body, re.S)),
                           re.M)  # fmt: skip
        found[title.strip()] = [shlex.split(line) for line in lines]
    return found


def toy(words: list[str], data: Path) -> list[str]:
    """A command with the README's paths, and its sizes at toy size."""
    words = [word.replace("/data/", f"{data}/") for word in words]
    if "--" in words:
        return words  # of a launch: its plan alone
    added = list(TOY.get(words[0], []))
    if words[:2] in (["eval", "compare"], ["eval", "leaderboard"]):
        added = []
    if words[0] == "curate" and any(word.startswith("cluster.levels") for word in words):
        added += ["cluster.levels=[6,2]", "sample.total=100", "embed.device=cpu"]
    if words[0] == "pretrain":
        high = "stage/high_resolution" in words
        network = [w for w in NETWORK if not (high and ("_px=56" in w or "local_px" in w))]
        added += network
        if high:
            added += ["model.image_px=84", "augment.global_px=84", "augment.local_px=42"]
        if "size/small" in words and any(w.startswith("teacher.run") for w in words):
            added = [w.replace("model.width=96", "model.width=48") for w in added]
        if "pretrain/eosin" in words:
            added += PATCH_HEAD
        if "stage/continue" in words:
            added += ["start.frozen_steps=1", "start.ramp_steps=1"]
    return [*words, *added]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides, labelled tiles, and weights as timm saves them."""
    folder = tmp_path_factory.mktemp("data")
    write_slides(folder / "slides", SyntheticConfig(n_slides=3, size_px=2048), workers=1)
    generator, lines = np.random.default_rng(0), ["path,label,group,split"]
    for patient in range(24):
        for i in range(4):
            pixels = generator.integers(60, 250, (80, 80, 3), dtype=np.uint8) // (1 + i % 2)
            Image.fromarray(pixels).save(folder / f"{patient}_{i}.png")
            split = ["train", "train", "val", "test"][patient % 4]
            lines.append(f"{patient}_{i}.png,{'ab'[i % 2]},p{patient},{split}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    torch.manual_seed(0)
    model = import_timm().create_model(
        "vit_small_patch14_reg4_dinov2", embed_dim=96, depth=2, num_heads=2, img_size=70
    )
    save_file(dict(model.state_dict()), folder / "weights.safetensors")
    return folder


@pytest.mark.slow
def test_every_recipe_runs(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one folder, each standing on those before it, as a reader goes through them."""
    monkeypatch.chdir(tmp_path)
    found = recipes()
    assert len(found) == 7
    verbs = set()
    for commands in found.values():
        for words in commands:
            if words[0] == "sample":  # what a pathologist saves between two commands
                save_review(tmp_path / "balanced")
            command = toy(words, data)
            code = main(command)
            said = capsys.readouterr()
            assert code == 0, f"eosin {' '.join(command)}\n{said.out[-3000:]}{said.err[-3000:]}"
            verbs.add(words[0])
    assert verbs >= {"doctor", "curate", "pretrain", "weights", "export", "extract", "explain"}
    for made in ("my_encoder/onnx/model.onnx", "pictures/nearest.png", "scores/board"):
        assert (tmp_path / made).exists(), made


def save_review(balanced: Path) -> None:
    """What the page saves when a cluster is named and nothing else is done."""
    stamp = read_json(balanced / "clusters" / CLUSTERS_MARKER)["stamp"]
    verdicts = {0: Verdict(name="stroma")}
    write_review(
        balanced.parent / "review.json", Review(clusters_stamp=stamp, level=2, verdicts=verdicts)
    )


def test_the_readme_shows_no_command_that_is_none() -> None:
    """Every verb in the README's code blocks is one."""
    text = README.read_text()
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for verb in re.findall(r"^eosin +(\S+)", block, re.M):
            assert verb in {name.split()[0] for name in VERBS} | {"launch"}, verb
