"""Tables for others, the leaderboard, and running an evaluation again."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eosin.eval.config import EvalConfig
from eosin.eval.datasets import DATASETS
from eosin.eval.export_tables import escaped, scores_csv, scores_latex
from eosin.eval.leaderboard import LeaderboardConfig, make_leaderboard
from eosin.eval.published_scores import PUBLISHED_SCORES
from eosin.eval.reproduce import differing_numbers
from eosin.eval.results import load_results
from eosin.eval.run import evaluate
from eosin.eval.tasks import TaskConfig
from eosin.launch.cli import main

Writer = Callable[..., Path]


@pytest.fixture
def evaluated(tmp_path: Path, write_encoder_folder: Writer) -> Callable[[str, str], Path]:
    """Evaluates an encoder on a task of stripes."""

    def run(encoder: str, task: str) -> Path:
        generator = np.random.default_rng(len(task))
        folder = tmp_path / task
        folder.mkdir(exist_ok=True)
        lines = ["path,label,group,split"]
        for patient in range(24):
            for i in range(4):
                stripes = 60 * (np.arange(32) // 4 % 2)[:, None, None]
                stripes = stripes.transpose(1, 0, 2) if i % 2 else stripes
                pixels = 100 + stripes + generator.normal(0, 9, (32, 32, 3))
                name = f"{patient}_{i}.png"
                Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / name)
                split = ["train", "test", "val"][patient % 3]
                lines.append(f"{name},{['across', 'along'][i % 2]},p{patient},{split}")
        (folder / "labels.csv").write_text("\n".join(lines) + "\n")
        path = tmp_path / encoder
        if not path.exists():
            write_encoder_folder(path, embed_dim={"one": 32, "two": 64}[encoder])
        out = tmp_path / f"{encoder}-{task}"
        evaluate(
            EvalConfig(
                encoder=str(path), task=TaskConfig(tiles=folder / "labels.csv", name=task),
                out=out, device="cpu", protocols=["knn/uni20@1", "linear/uni-l2@1"],
            ),
            with_report=False,
        )  # fmt: skip
        return out

    return run


def test_scores_stand_in_csv_and_latex(evaluated: Callable[[str, str], Path]) -> None:
    out = evaluated("one", "clear")
    results = load_results(out / "results.json")
    rows = list(csv.DictReader(io.StringIO((out / "scores.csv").read_text())))
    assert len(rows) == len(results.scores) and (out / "scores.csv").read_text() == scores_csv(
        results
    )
    first = results.scores[0]
    assert float(rows[0]["value"]) == first.value and rows[0]["metric"] == first.metric
    latex = (out / "scores.tex").read_text()
    assert latex.count(r"\\") == 1 + len(results.encoders) and r"\begin{tabular}{lrr}" in latex
    value = 100 * results.score("one-cls", "knn/uni20@1").value
    assert "one (cls) & " in latex and f"{value:.1f} [" in latex
    assert escaped("a_b & 5 %") == r"a\_b \& 5 \%"
    scores = [replace(s, protocol=f"{s.protocol}{i}") for i in range(4) for s in results.scores]
    tall = scores_latex(replace(results, scores=scores))  # eight protocols: in the rows
    assert r"\begin{tabular}{lrrrr}" in tall and tall.count(r"\\") == 9
    assert r"protocol & one (cls) &" in tall


def test_a_leaderboard_merges_encoders_and_tasks(
    evaluated: Callable[[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [evaluated(e, t) for e, t in (("one", "clear"), ("one", "further"), ("two", "clear"))]
    out = tmp_path / "board"
    board = make_leaderboard(LeaderboardConfig(results=folders, out=out))
    assert sorted(name.split(" ")[0] for name in board.tasks.values()) == ["clear", "further"]
    trained = {line.encoder.label: line for line in board.lines if line.encoder.kind == "encoder"}
    assert set(trained) == {"one (cls)", "two (cls)"}
    assert len(trained["one (cls)"].scores) == 2 and len(trained["two (cls)"].scores) == 1
    if len(board.counted) == 2:
        values = [s.value for s in trained["one (cls)"].scores.values()]
        assert trained["one (cls)"].mean == pytest.approx(np.mean(values))
        assert trained["two (cls)"].mean is None  # it lacks a task
    rows = list(csv.DictReader(io.StringIO((out / "leaderboard.csv").read_text())))
    assert {row["encoder"] for row in rows} >= {"one (cls)", "two (cls)", "mean colour"}
    page = (out / "leaderboard.html").read_text()
    assert "<script" not in page and "http" not in page and "two (cls)" in page
    assert r"\begin{tabular}" in (out / "leaderboard.tex").read_text()
    assert main(["eval", "leaderboard", str(folders[0]), f"out={out}", "protocol=knn/x"]) == 2
    assert "no evaluation has protocol=knn/x; there are knn/uni20@1" in capsys.readouterr().err


def test_published_figures_are_of_datasets_that_there_are_and_are_shares() -> None:
    assert PUBLISHED_SCORES.keys() <= DATASETS.keys()
    for sources in PUBLISHED_SCORES.values():
        for found in sources:
            assert found.source and all(0 < value < 1 for value in found.scores.values())


def test_an_evaluation_is_reproduced_or_what_differs_is_named(
    evaluated: Callable[[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = evaluated("one", "clear")
    assert main(["eval", "reproduce", str(out)]) == 0
    assert "reproduced: " in capsys.readouterr().out
    # another number
    results = json.loads((out / "results.json").read_text())
    results["scores"][0]["value"] -= 0.01
    (out / "results.json").write_text(json.dumps(results))
    assert main(["eval", "reproduce", str(out)]) == 1
    assert "1 numbers differ" in (error := capsys.readouterr().err) and "scores[0].value" in error
    assert main(["eval", "reproduce", str(out), "tolerance=0.02"]) == 0
    # other tiles
    Image.new("RGB", (32, 32)).save(tmp_path / "clear" / "0_0.png")
    assert main(["eval", "reproduce", str(out)]) == 2
    assert "task clear is not what it was" in capsys.readouterr().err
    (out / "config.yaml").unlink()
    assert main(["eval", "reproduce", str(out / "results.json")]) == 2
    assert "has no config.yaml" in capsys.readouterr().err


def test_what_differs_is_found_wherever_it_is() -> None:
    a = {"x": [1.0, {"y": 2.0}], "z": "same", "n": None}
    b = {"x": [1.0, {"y": 2.5}], "z": "other", "n": 0.5}
    assert differing_numbers(a, a, 0) == []
    found = [name for name, _, _ in differing_numbers(a, b, 0.1)]
    assert found == ["x[1].y", "z", "n"]
    assert [name for name, _, _ in differing_numbers(a, b, 1)] == ["z", "n"]
    assert differing_numbers([1.0], [1.0, 2.0], 0) == [("", [1.0], [1.0, 2.0])]
