"""Cohorts to cohorts: what carries over is found, what does not is seen to be lost."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from eosin.eval.heads.packed import pack
from eosin.eval.heads.routed import Routed
from eosin.eval.transfer import ROUTED, TransferConfig, evaluate_transfer
from eosin.launch.artefacts import read_json
from eosin.launch.cli import main
from tests.eval.test_bags import DIM, Bag, hurry, write_store


def write_cohorts(folder: Path, n: int = 36) -> tuple[Path, Path]:
    """Two cohorts whose classes differ along one direction, and one where it says the opposite."""
    generator = np.random.default_rng(0)
    needle = np.random.default_rng(99).normal(size=DIM)
    bags, lines = [], ["slide,label,group,cohort"]
    for cohort, sign in (("a", 1), ("b", 1), ("c", -1)):
        for i in range(n):
            label = i // 2 % 2
            features = generator.normal(size=(12, DIM))
            features[:4] += sign * (1 if label else -1) * needle
            cells = np.stack(np.unravel_index(np.arange(12), (4, 3)), axis=1)
            name = f"{cohort}{i}"
            bags.append(
                Bag(slide_id=name, tile_ids=[f"{name}_{t}" for t in range(12)],
                    features=features.astype(np.float16), cells=cells)
            )  # fmt: skip
            lines.append(f"{name},{'xy'[label]},{cohort}p{i // 2},{cohort}")
    write_store(folder / "store", bags)
    (folder / "slides.csv").write_text("\n".join(lines) + "\n")
    return folder / "store", folder / "slides.csv"


def test_a_matrix_shows_what_carries_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch, epochs=6, rate=2e-3, bags_a_step=4)
    store, labels = write_cohorts(tmp_path)
    config = TransferConfig(
        features=store, labels=labels, out=tmp_path / "out", heads=["abmil/gated@2"], folds=2,
        inner_folds=2, device="cpu", n_bootstrap=200,
    )  # fmt: skip
    evaluate_transfer(config)
    found = read_json(config.out / "transfer.json")
    cells = {(c["head"], c["source"], c["target"]): c for c in found["cells"]}
    assert len(cells) == 2 * 9 and found["cohorts"]["a"] == {"slides": 36, "groups": 18}
    for head in ("mean@1", "abmil/gated@2"):
        assert cells[head, "a", "b"]["value"] > 0.9 and cells[head, "a", "a"]["value"] > 0.9
        opposite = cells[head, "a", "c"]
        assert opposite["value"] < 0.1 and opposite["lost_high"] < 0
        assert cells[head, "c", "c"]["lost"] == 0
    table = pq.read_table(config.out / "predictions.parquet").to_pylist()
    rows = [r for r in table if r["encoder"] == "from a" and r["protocol"] == "mean@1"]
    assert len(rows) == 108  # every slide is asked about once by each source
    own = [r for r in rows if r["tile_id"].startswith("b")]
    area = roc_auc_score([r["label"] for r in own], [r["scores"][1] for r in own])
    assert cells["mean@1", "a", "b"]["value"] == pytest.approx(area, abs=1e-6)
    with Image.open(config.out / "transfer_abmil_gated_2.png") as picture:
        assert picture.size[0] > 500


def test_a_routed_mixture_uses_what_others_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the two others one says the opposite: whom to believe is learnt within the target."""
    hurry(monkeypatch, epochs=6, rate=2e-3, bags_a_step=4)
    store, labels = write_cohorts(tmp_path, 24)
    config = TransferConfig(
        features=store, labels=labels, out=tmp_path / "out", heads=["mean@1"], folds=2,
        inner_folds=2, device="cpu", n_bootstrap=50, routed=True,
    )  # fmt: skip
    evaluate_transfer(config)
    found = read_json(config.out / "transfer.json")
    cells = {(c["source"], c["target"]): c["value"] for c in found["cells"]}
    assert len(cells) == 12
    assert cells["b", "c"] < 0.1 and all(cells[ROUTED, target] > 0.85 for target in "abc")


def test_a_mixture_is_its_sum_written_out() -> None:
    torch.manual_seed(0)
    head = Routed(7, 2, heads=8, embedding=4).eval()
    bags = [torch.randn(8, 4) for _ in range(3)]
    means = [torch.randn(3) for _ in range(3)]
    rows = [
        torch.cat([bag, mean.expand(8, -1)], dim=1) for bag, mean in zip(bags, means, strict=True)
    ]
    cells = torch.zeros(8, 2, dtype=torch.int64)
    verdict = head(pack([(row, cells) for row in rows]))
    for at, (bag, mean) in enumerate(zip(bags, means, strict=True)):
        shares = head.router(mean).softmax(dim=0)
        best = sorted(range(8), key=lambda k: -shares[k].item())[:5]
        mixed = sum(shares[k] * torch.relu(head.experts[k](bag[k])) for k in best)
        torch.testing.assert_close(verdict.outputs[at], head.classify(mixed))
        own = verdict.weights[8 * at : 8 * at + 8]
        assert own.sum().item() == pytest.approx(1, abs=1e-5) and (own > 0).sum() == 5


def test_cohorts_that_are_none_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, labels = write_cohorts(tmp_path, 12)
    text = labels.read_text()
    for changed, words in (
        (text.replace(",b\n", ",a\n").replace(",c\n", ",a\n"), "one cohort alone, 'a'"),
        (text.replace("bp1,", "ap1,"), "group 'ap1' is in a and in b"),
        (text.replace(",y,b", ",x,b").replace("y,bp", "x,bp"), "cohort 'b' has no slide of 'y'"),
        (text.replace("cohort\n", "hospital\n"), "no column 'cohort'"),
    ):
        labels.write_text(changed)
        command = ["eval", "transfer", f"features={store}", f"labels={labels}", "out=x", "folds=2"]
        assert main([*command, "inner_folds=2"]) == 2
        assert words in capsys.readouterr().err
