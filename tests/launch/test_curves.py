"""Curves of a run from its metrics file."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eosin.configs.errors import InputError
from eosin.launch.curves import PANEL_HEIGHT_PX, loss_curves, read_metrics, running_mean
from eosin.launch.pictures import PAGE_PX


def write_metrics(path: Path, steps: int, *names: str, tail: str = "") -> Path:
    lines = [json.dumps({"step": s, **{name: s * 0.5 for name in names}}) for s in range(steps)]
    path.write_text("\n".join(lines) + "\n" + tail)
    return path


def test_half_a_line_of_a_killed_writer_is_passed_over(tmp_path: Path) -> None:
    metrics = write_metrics(tmp_path / "m.jsonl", 5, "loss", tail='{"step": 5, "lo')
    assert read_metrics(metrics)["loss"].steps.tolist() == [0, 1, 2, 3, 4]
    loss_curves(metrics, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5_000


def test_steps_written_again_after_a_resume_count_once_and_as_written_last(tmp_path: Path) -> None:
    metrics = write_metrics(tmp_path / "m.jsonl", 3, "loss", tail='{"step": 1, "loss": 9.0}\n')
    series = read_metrics(metrics)["loss"]
    assert series.steps.tolist() == [0, 1, 2]
    assert series.values.tolist() == [0.0, 9.0, 1.0]


def test_words_flags_and_foreign_lines_are_no_curves(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('[1]\n{"loss": 2}\n{"step": 1, "loss": NaN, "phase": "warm-up", "ok": true}\n')
    series = read_metrics(path)
    assert list(series) == ["loss"]
    loss_curves(path, tmp_path / "curves.png")


def test_a_panel_is_drawn_for_each_quantity_and_none_for_missing_ones(tmp_path: Path) -> None:
    shapes = {}
    for count in (1, 4, 5):
        names = ("lr", "loss", "spread", "something_new", "ibot")[:count]
        metrics = write_metrics(tmp_path / "m.jsonl", 50, *names)
        loss_curves(metrics, tmp_path / "curves.png")
        with Image.open(tmp_path / "curves.png") as image:
            shapes[count] = image.size
    assert shapes == {
        1: (PAGE_PX // 4, PANEL_HEIGHT_PX),
        4: (PAGE_PX, PANEL_HEIGHT_PX),
        5: (PAGE_PX, 2 * PANEL_HEIGHT_PX),
    }


def test_probes_beside_the_metrics_get_panels_of_their_own(tmp_path: Path) -> None:
    metrics = write_metrics(tmp_path / "m.jsonl", 50, "loss", "lr", "spread", "ibot")
    rows = [
        {"step": step, "split": "val", "score": score, "knn": score, "fewshot": 0.5, "tiles": 300}
        for step, score in ((10, 0.4), (20, 0.7), (30, 0.6))
    ]
    (tmp_path / "probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss_curves(metrics, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (PAGE_PX, 2 * PANEL_HEIGHT_PX)  # kNN and few-shot, of six panels
    (tmp_path / "probes.jsonl").write_text("half a li")
    loss_curves(metrics, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (PAGE_PX, PANEL_HEIGHT_PX)


def test_the_same_metrics_give_the_same_bytes(tmp_path: Path) -> None:
    metrics = write_metrics(tmp_path / "m.jsonl", 20, "loss", "lr")
    loss_curves(metrics, tmp_path / "one.png")
    loss_curves(metrics, tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_missing_or_empty_metrics_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        loss_curves(tmp_path / "none.jsonl", tmp_path / "curves.png")
    (tmp_path / "m.jsonl").write_text("")
    with pytest.raises(InputError, match=r"m\.jsonl holds no line"):
        loss_curves(tmp_path / "m.jsonl", tmp_path / "curves.png")


@pytest.mark.parametrize("width", [1, 3, 7, 101])
def test_running_mean_agrees_with_a_loop_over_finite_points(width: int) -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(size=40)
    values[[3, 4, 5, 20]] = np.nan, np.inf, np.nan, np.nan
    expected = []
    for i in range(len(values)):
        window = values[max(i - width // 2, 0) : i + width // 2 + 1]
        finite = window[np.isfinite(window)]
        expected.append(finite.mean() if len(finite) else np.nan)
    np.testing.assert_allclose(running_mean(values, width), expected, rtol=1e-9, atol=1e-12)
