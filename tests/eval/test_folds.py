"""Nested folds: every group is test once, and nothing of it was seen before."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch

from eosin.configs.errors import InputError
from eosin.eval.bags import BagsConfig, evaluate_bags
from eosin.eval.cross_validation import classify, classify_means
from eosin.eval.folds import Folds, draw_folds, refuse_crossing
from eosin.eval.heads.recipe import Recipe
from eosin.eval.heads.registry import HEADS, HeadProtocol
from eosin.eval.results import load_results
from eosin.launch.cli import main
from tests.eval.test_bags import haystack, hurry, write_store

CPU = torch.device("cpu")
SHORT = Recipe(epochs=3, rate=1e-3)


def cohort(n: int, seed: int = 0) -> tuple[Any, npt.NDArray[np.int64], list[str]]:
    """Bags, labels, and patients of two slides each."""
    bags, labels, _ = haystack(n, seed, tiles=16)
    return bags, labels, [f"p{i // 2}" for i in range(n)]


def test_every_group_is_test_once_and_on_one_side() -> None:
    _, labels, groups = cohort(60)
    folds = draw_folds(labels, groups, 5, 4, 3, "x")
    names = np.asarray(groups)
    assert sorted(np.concatenate([folds.test(f) for f in range(5)]).tolist()) == list(range(60))
    for fold in range(5):
        test = set(names[folds.test(fold)])
        stopped = []
        for train, val in folds.parts(fold):
            assert not (set(names[train]) & set(names[val]) or test & set(names[train]))
            assert len(train) + len(val) + len(folds.test(fold)) == 60
            stopped += val.tolist()
        assert sorted([*stopped, *folds.test(fold).tolist()]) == list(range(60))
        assert 0.2 < labels[folds.test(fold)].mean() < 0.8  # classes in proportion
    again = draw_folds(labels, groups, 5, 4, 3, "x")
    np.testing.assert_array_equal(folds.inner, again.inner)
    assert not np.array_equal(folds.outer, draw_folds(labels, groups, 5, 4, 4, "x").outer)
    members = folds.members(2)
    assert len(members) == 20 and len({m.seed for m in members}) == 4


def test_a_group_on_two_sides_is_refused() -> None:
    _, labels, groups = cohort(40)
    folds = draw_folds(labels, groups, 4, 3, 0, "x")
    moved = folds.inner.copy()
    first = int(np.flatnonzero(moved[0] == 0)[0])
    moved[0, first] = 1  # away from the other slide of its patient
    with pytest.raises(InputError, match=f"group '{groups[first]}' is on two sides of fold 0"):
        refuse_crossing(Folds(folds.outer, moved), groups)
    with pytest.raises(InputError, match="3 groups are too few for 5 folds"):
        draw_folds(labels[:6], groups[:6], 5, 2, 0, "x")
    rare = np.zeros(40, np.int64)
    rare[:2] = 1  # one patient alone
    with pytest.raises(InputError, match="too few groups of class 1"):
        draw_folds(rare, groups, 4, 3, 0, "x")


def test_a_folds_own_labels_change_nothing_that_is_said_of_it() -> None:
    """Neither weights of classes, nor standardisation, nor epochs, nor probes."""
    bags, labels, groups = cohort(24)
    folds = draw_folds(labels, groups, 3, 2, 0, "x")
    means = np.stack([bag.features.astype(np.float32).mean(axis=0) for bag in bags])
    head = HeadProtocol(make=HEADS["abmil/gated@2"].make, what="", recipe=SHORT)
    poisoned = labels.copy()
    test = folds.test(1)
    poisoned[test] = 1 - poisoned[test]
    said = []
    for own in (labels, poisoned):
        outcome, weights = classify(head, bags, own, 2, folds, 0, CPU, "test")
        pooled = classify_means(["prototypes/simpleshot@1"], means, own, 2, folds, 0, CPU)
        assert outcome.scores is not None
        said.append((outcome, weights, pooled["prototypes/simpleshot@1"]))
    np.testing.assert_array_equal(said[0][0].scores[test], said[1][0].scores[test])
    np.testing.assert_array_equal(said[0][2].votes[test], said[1][2].votes[test])
    for row in test.tolist():
        np.testing.assert_array_equal(said[0][1][row], said[1][1][row])
    others = np.setdiff1d(np.arange(24), test)
    assert not np.array_equal(said[0][0].scores[others], said[1][0].scores[others])
    assert said[0][0].runs is not None and said[0][0].runs.shape == (2, 24)


@pytest.fixture
def store(tmp_path: Path) -> tuple[Path, Path]:
    bags, labels, groups = cohort(48)
    write_store(tmp_path / "store", bags)
    lines = ["slide,label,group"]
    for bag, label, group in zip(bags, labels.tolist(), groups, strict=True):
        lines.append(f"{bag.slide_id},{'ab'[label]},{group}")
    (tmp_path / "slides.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "store", tmp_path / "slides.csv"


def test_every_slide_is_scored_once_by_the_verb(
    store: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch, epochs=8, rate=2e-3, bags_a_step=2)
    config = BagsConfig(
        features=[store[0]], labels=store[1], out=tmp_path / "out", device="cpu", folds=3,
        inner_folds=2, heads=["abmil/gated@2", "mean@1"], n_bootstrap=200,
    )  # fmt: skip
    evaluate_bags(config)
    results = load_results(config.out / "results.json")
    assert results.task.tiles["test"] == 48 and results.task.groups["test"] == 24
    table = pq.read_table(config.out / "predictions.parquet")
    for protocol in results.protocols:
        rows = [row for row in table.to_pylist() if row["protocol"] == protocol]
        assert sorted(r["tile_id"] for r in rows) == sorted({r["tile_id"] for r in rows})
        assert len(rows) == 48
    assert results.score("store", "abmil/gated@2", "auroc").value > 0.8
    first = (config.out / "results.json").read_bytes()
    evaluate_bags(config)
    assert (config.out / "results.json").read_bytes() == first


def test_what_folds_cannot_be_had_of_is_one_line(
    store: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "bags", f"features=[{store[0]}]", f"labels={store[1]}", "out=x"]
    assert main([*command, "folds=40"]) == 2
    assert "24 groups are too few for 40 folds" in capsys.readouterr().err
    assert main([*command, "folds=1"]) == 2
    text = store[1].read_text().splitlines()
    splits = ["train", "test", "val", "train"]
    lines = [f"{line},{splits[i // 2 % 4]}" for i, line in enumerate(text[1:])]
    store[1].write_text("\n".join([text[0] + ",split", *lines]) + "\n")
    assert main([*command, "folds=3"]) == 2
    assert "gives splits, and folds=3 draws its own" in capsys.readouterr().err


@pytest.mark.slow
def test_poisoned_labels_give_a_half(
    store: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch, epochs=8, rate=1e-3, bags_a_step=2)
    lines = store[1].read_text().splitlines()
    labels = np.random.default_rng(0).permutation([line.split(",")[1] for line in lines[1:]])
    changed = [
        ",".join([line.split(",")[0], label, line.split(",")[2]])
        for line, label in zip(lines[1:], labels, strict=True)
    ]
    store[1].write_text("\n".join([lines[0], *changed]) + "\n")
    config = BagsConfig(
        features=[store[0]], labels=store[1], out=tmp_path / "out", device="cpu", folds=4,
        inner_folds=3, heads=["abmil/gated@2"],
    )  # fmt: skip
    evaluate_bags(config)
    results = load_results(config.out / "results.json")
    for protocol in results.protocols:
        score = results.score("store", protocol, "auroc")
        assert score.low <= 0.5 <= score.high, (protocol, score)
