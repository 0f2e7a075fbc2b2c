"""Drawn slides through the whole slide level: what heads and a slide encoder find on them.

`laid_out_slides` says what the labels are: an arrangement that amounts do not tell, and a needle.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from laid_out_slides import SIDE, write_laid_out

from eosin.data_curation.bag_store import BagStore
from eosin.launch.cli import main

N = 80
ENCODER = [
    "steps=200", "batch_size=32", "log_every=50", "checkpoints.every=200", "device=cpu",
    "model={width: 64, depth: 3, heads: 4, registers: 2, drop_path: 0.1, pool: mean}",
    "views={n_global: 2, n_local: 2, global_tiles: 10, local_tiles: 6}",
    "hiding={ratio: [0.2, 0.6]}",
    "objective.distil={targets: centre, head: {prototypes: 256, hidden: 512, bottleneck: 128}}",
    "objective.regress={weight: 2.0}", "optim.lr={peak: 3e-3, end: 1e-5, warmup: 0.1}",
    "optim.layer_decay=1.0", "momentum={peak: 0.98, end: 1.0, start: 0.98}",
    "temperature={peak: 0.05, end: 0.05, start: 0.03, warmup: 0.3, shape: constant}",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("laid_out")
    slides = write_laid_out(folder / "slides", N)
    assert main([
        "extract", f"slides={folder}/slides", "encoder=builtin:stain-texture", "layouts=[bags]",
        f"out={folder}/made", "tile.mpp=0.5", "tile.size_px=64", "tile.min_tissue=0",
    ]) == 0  # fmt: skip
    for task in ("kind", "needle"):
        lines = [f"{s.slide_id},{getattr(s, task)}" for s in slides]
        (folder / f"{task}.csv").write_text("slide,label\n" + "\n".join(lines) + "\n")
    return folder


def scores(path: Path, metric: str) -> dict[tuple[str, str], tuple[float, float, float]]:
    found = json.loads((path / "results.json").read_text())["scores"]
    return {
        (s["encoder"], s["protocol"]): (s["value"], s["low"], s["high"])
        for s in found
        if s["metric"] == metric
    }


@pytest.mark.slow
def test_an_arrangement_is_seen_by_a_self_distilled_encoder_alone(folder: Path) -> None:
    bags = folder / "made/bags"
    assert all(len(BagStore(bags).read(s)) == SIDE**2 for s in BagStore(bags).slide_ids)
    assert main(["pretrain", "slides", f"bags.stores=[{bags}]", f"out={folder}/run", *ENCODER]) == 0
    assert main([
        "extract", "slides", f"encoder={folder}/run/encoder", f"bags=[{bags}]",
        f"out={folder}/vectors",
    ]) == 0  # fmt: skip
    assert main([
        "eval", "bags", f"features=[{folder}/vectors, {bags}]", f"labels={folder}/kind.csv",
        f"out={folder}/kind", "folds=4", "heads=[]", "pooled=[linear/sklearn-l2@2]",
        "attention_slides=0",
    ]) == 0  # fmt: skip
    results = json.loads((folder / "kind/results.json").read_text())
    vectors, mean = (e["name"] for e in results["encoders"])
    found = scores(folder / "kind", "balanced_accuracy")
    protocol = "mean+linear/sklearn-l2@2"
    assert found[mean, protocol][1] < 0.5 < found[mean, protocol][2]  # the interval holds chance
    assert found[vectors, protocol][0] > 0.8
    [difference] = [d for d in results["differences"] if d["metric"] == "balanced_accuracy"]
    assert difference["low"] > 0


@pytest.mark.slow
def test_a_needle_is_found_by_attention_and_not_by_the_mean(folder: Path) -> None:
    assert main([
        "eval", "bags", f"features=[{folder}/made/bags]", f"labels={folder}/needle.csv",
        f"out={folder}/needle", "folds=2", "inner_folds=2", "pooled=[]", "attention_slides=0",
        "heads=['mean@1', 'abmil/gated@2', 'packmil@1']",
    ]) == 0  # fmt: skip
    found = {p: value for (_, p), (value, _, _) in scores(folder / "needle", "auroc").items()}
    assert found["abmil/gated@2"] >= 0.95 and found["packmil@1"] >= 0.95
    assert found["mean@1"] < 0.9
    assert np.isfinite(list(found.values())).all()
