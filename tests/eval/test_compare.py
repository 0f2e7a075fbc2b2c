"""Comparing encoders: permutation tests against scipy, Holm by hand, and the verb on real runs."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from scipy.stats import kstest, permutation_test

from eosin.eval.compare import CompareConfig, compare_encoders, mean_lines
from eosin.eval.config import EvalConfig
from eosin.eval.metrics import SummedMetric, accuracy, balanced_accuracy, grouped_confusion
from eosin.eval.permutation import holm, permutation_p
from eosin.eval.probe import one_hot
from eosin.eval.run import evaluate
from eosin.eval.tasks import TaskConfig
from eosin.launch.cli import main

Writer = Callable[..., Path]


def metric_of(
    labels: npt.NDArray[np.int64],
    predictions: npt.NDArray[np.int64],
    groups: npt.NDArray[np.int64],
    function: Callable[..., npt.NDArray[np.float64]] = accuracy,
) -> SummedMetric:
    n_groups = int(groups.max()) + 1
    votes = one_hot(predictions, int(labels.max()) + 1)
    return SummedMetric(grouped_confusion(labels, votes, groups, n_groups), function)


def test_with_few_groups_the_p_value_is_scipys_exact_one() -> None:
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(9), 20)
    labels = generator.integers(0, 2, 180)
    a = np.where(generator.random(180) < 0.8, labels, 1 - labels)
    b = np.where(generator.random(180) < 0.7, labels, 1 - labels)
    found = permutation_p(metric_of(labels, a, groups), metric_of(labels, b, groups), 100, 0)
    rates = [(p == labels).reshape(9, 20).mean(axis=1) for p in (a, b)]
    expected = permutation_test(
        rates, lambda x, y, axis: (x - y).mean(axis=axis), permutation_type="samples",
        n_resamples=np.inf, vectorized=True,
    )  # fmt: skip
    assert found == pytest.approx(expected.pvalue, abs=1e-9)


def test_drawn_swaps_come_near_the_exact_p_value(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(5)
    groups = np.repeat(np.arange(12), 15)
    labels = generator.integers(0, 3, 180)
    guesses = [
        np.where(generator.random(180) < share, labels, generator.integers(0, 3, 180))
        for share in (0.7, 0.66)
    ]
    metrics = [metric_of(labels, g, groups, balanced_accuracy) for g in guesses]
    exact = permutation_p(metrics[0], metrics[1], 100, 0)
    monkeypatch.setattr("eosin.eval.permutation.EXACT_GROUPS", 0)
    drawn = permutation_p(metrics[0], metrics[1], 20_000, 0)
    assert 0.02 < exact < 0.9
    assert drawn == pytest.approx(exact, abs=0.015)


def test_two_copies_of_one_model_give_uniform_p_values() -> None:
    """Same skill, same hard patients, their own mistakes."""
    generator = np.random.default_rng(2)
    p_values = []
    for trial in range(300):
        ease = generator.beta(6, 2, 40)
        groups = np.repeat(np.arange(40), generator.integers(5, 30, 40))
        labels = generator.integers(0, 2, len(groups))
        copies = [
            np.where(generator.random(len(groups)) < ease[groups], labels, 1 - labels)
            for _ in range(2)
        ]
        metrics = [metric_of(labels, c, groups, balanced_accuracy) for c in copies]
        p_values.append(permutation_p(metrics[0], metrics[1], 400, trial))
    assert kstest(p_values, "uniform").pvalue > 0.01
    assert 0.02 < np.mean(np.array(p_values) < 0.05) < 0.09


def test_an_encoder_and_itself_are_never_different() -> None:
    labels, groups = np.arange(40) % 2, np.arange(40) // 4
    metric = metric_of(labels, labels[::-1].copy(), groups)
    assert permutation_p(metric, metric, 100, 0) == 1.0


def test_holms_rule() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.fixture
def evaluated(tmp_path: Path, write_encoder_folder: Writer) -> Callable[[str, str, float], Path]:
    """Evaluates an encoder on a task of stripes; a task of more noise tells less."""

    def run(encoder: str, task: str, noise: float) -> Path:
        generator = np.random.default_rng(len(task))
        folder = tmp_path / task
        lines = ["path,label,group,split"]
        for patient in range(24):
            base = generator.integers(120, 200, 3)
            for i in range(4):
                stripes = 60 * (np.arange(32) // 4 % 2)[:, None, None]
                stripes = stripes.transpose(1, 0, 2) if i % 2 else stripes
                pixels = base + stripes + generator.normal(0, noise, (32, 32, 3))
                folder.mkdir(exist_ok=True)
                name = f"{patient}_{i}.png"
                Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / name)
                split = ["train", "test", "val"][patient % 3]
                lines.append(f"{name},{['across', 'along'][i % 2]},p{patient},{split}")
        (folder / "labels.csv").write_text("\n".join(lines) + "\n")
        path = tmp_path / encoder
        dim = {"one": 32, "two": 64}[encoder]
        if not path.exists():
            write_encoder_folder(path, embed_dim=dim)
        out = tmp_path / f"{encoder}-{task}"
        evaluate(
            EvalConfig(
                encoder=str(path), task=TaskConfig(tiles=folder / "labels.csv", name=task),
                out=out, device="cpu", protocols=["knn/uni20@1", "prototypes/*"],
            ),
            with_report=False,
        )  # fmt: skip
        return out

    return run


def test_the_verb_compares_every_pair_on_every_shared_task(
    evaluated: Callable[[str, str, float], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = [evaluated(e, t, n) for e in ("one", "two") for t, n in (("clear", 5), ("grim", 90))]
    capsys.readouterr()
    out = tmp_path / "compared"
    assert main(["eval", "compare", *map(str, folders), f"out={out}", "swaps=500"]) == 0
    shown = capsys.readouterr().out
    found = json.loads((out / "compare.json").read_text())["comparisons"]
    assert {(c["task"], c["protocol"]) for c in found} == {
        (t, p) for t in ("clear", "grim") for p in ("knn/uni20@1", "prototypes/simpleshot@1")
    }
    for c in found:
        assert (c["encoder"], c["baseline"]) == ("one (cls)", "two (cls)")
        assert c["low"] <= c["value"] <= c["high"] and 0 < c["p"] <= c["p_holm"] <= 1
        results = [
            json.loads((tmp_path / f"{e}-{c['task']}" / "results.json").read_text())
            for e in ("one", "two")
        ]
        values = [
            next(
                s["value"]
                for s in r["scores"]
                if s["encoder"] == f"{e}-cls"
                and (s["protocol"], s["metric"]) == (c["protocol"], "balanced_accuracy")
            )
            for e, r in zip(("one", "two"), results, strict=True)
        ]
        assert c["value"] == pytest.approx(values[0] - values[1])
    header = (out / "compare.csv").read_text().splitlines()[0]
    assert header.startswith("task,protocol,metric,encoder,baseline,value,low,high,p,p_holm")
    assert "one (cls)" in shown
    # A ranking has an interval and no permutation test.
    rankings = compare_encoders(CompareConfig(results=folders, metric="auroc"))
    assert {c.protocol for c in rankings} == {"knn/uni20@1", "prototypes/simpleshot@1"}
    assert all(c.p is None and c.low <= c.value <= c.high for c in rankings)


def test_means_leave_out_tasks_on_which_a_floor_is_as_good(
    evaluated: Callable[[str, str, float], Path],
) -> None:
    folders = [evaluated(e, t, n) for e in ("one", "two") for t, n in (("clear", 5), ("grim", 90))]
    found = compare_encoders(CompareConfig(results=folders, swaps=200))
    marks = {(c.task, c.protocol): c.discriminative for c in found}
    lines = mean_lines(found)
    for protocol in ("knn/uni20@1", "prototypes/simpleshot@1"):
        told = [c.value for c in found if c.protocol == protocol and c.discriminative]
        line = next((text for text in lines if text.startswith(protocol)), None)
        if told:
            assert line is not None and f"{np.mean(told):+.3f} over {len(told)} tasks" in line
            assert ("left out" in line) == (len(told) < 2)
        else:
            assert line is None
    assert not marks["grim", "knn/uni20@1"]  # nothing to be seen under so much noise


def test_what_cannot_be_compared_is_one_line(
    evaluated: Callable[[str, str, float], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = evaluated("one", "clear", 5)
    assert main(["eval", "compare", str(folder)]) == 2
    assert "no two encoders" in capsys.readouterr().err
    assert main(["eval", "compare", str(tmp_path)]) == 2
    assert "results.json does not exist" in capsys.readouterr().err
    assert main(["eval", "compare"]) == 2
    assert "results" in capsys.readouterr().err
