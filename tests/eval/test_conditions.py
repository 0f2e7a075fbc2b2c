"""Test tiles under other conditions: the transforms, and the scores, ranges and cosines of them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from eosin.data_curation.encoder import load_encoder
from eosin.eval.conditions import CONDITIONS, ConditionedEncoder, choose_conditions
from eosin.eval.config import ConditionsConfig, EvalConfig
from eosin.eval.probe import Outcome, one_hot
from eosin.eval.results import load_results
from eosin.eval.run import evaluate
from eosin.eval.scoring import draw
from eosin.eval.sensitivity import PLAIN, score_conditions, split_outcome
from eosin.eval.tasks import TaskConfig

Writer = Callable[..., Path]
TILE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_condition_changes_a_tile_and_not_its_size(name: str) -> None:
    before = TILE.copy()
    changed = CONDITIONS[name](TILE)
    assert changed.dtype == np.uint8 and (before == TILE).all() and changed.flags.c_contiguous
    expected = (50, 40, 3) if name == "rotate-90" else TILE.shape
    assert changed.shape == expected
    assert changed.shape != TILE.shape or (changed != TILE).any()
    flat = np.full((32, 32, 3), 100, np.uint8)
    if not name.startswith("bright"):
        assert np.abs(CONDITIONS[name](flat).astype(int) - 100).max() <= 1


def test_blur_and_scale_are_pillows() -> None:
    smooth = np.asarray(Image.fromarray(TILE).filter(ImageFilter.GaussianBlur(3)))
    ours = CONDITIONS["blur-2"](smooth).astype(float)
    theirs = np.asarray(Image.fromarray(smooth).filter(ImageFilter.GaussianBlur(2)), float)
    assert np.abs(ours - theirs)[8:-8, 8:-8].max() < 4
    wide = CONDITIONS["scale-1.25"](TILE)
    whole = np.asarray(Image.fromarray(TILE).resize((62, 50), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(wide, whole[5:45, 6:56])
    small = CONDITIONS["scale-0.8"](TILE)
    inner = np.asarray(Image.fromarray(TILE).resize((40, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(small[4:36, 5:45], inner)


def test_names_and_patterns_choose_conditions() -> None:
    assert choose_conditions(["jpeg-*", "mirror"]) == ["mirror", "jpeg-60", "jpeg-30"]
    assert choose_conditions(["*"]) == list(CONDITIONS)
    with pytest.raises(ValueError, match="no condition 'fog'"):
        ConditionsConfig(transforms=["fog"])


def test_a_range_is_the_best_less_the_worst_on_shared_draws() -> None:
    generator = np.random.default_rng(1)
    n, labels = 200, generator.integers(0, 2, 200)
    groups = [f"g{i}" for i in generator.integers(0, 30, n)]
    shares = (0.9, 0.85, 0.6)
    guesses = [np.where(generator.random(n) < s, labels, 1 - labels) for s in shares]
    stacked = Outcome(
        votes=np.concatenate([one_hot(g, 2) for g in guesses]),
        runs=np.stack([np.concatenate(guesses)] * 2).astype(np.int16),
    )
    parts = split_outcome(stacked, n)
    assert [len(p.votes) for p in parts] == [n, n, n]
    outcomes = dict(zip((PLAIN, "dim", "dark"), parts, strict=True))
    scores, ranges = score_conditions("e", "p", outcomes, draw(labels, groups, 2, 500, 0))
    assert [s.condition for s in scores] == ["dim", "dark"]
    accuracy = [np.mean([(g == labels)[labels == c].mean() for c in (0, 1)]) for g in guesses]
    assert scores[1].change == pytest.approx(accuracy[2] - accuracy[0])
    assert scores[1].change_high < 0 and scores[1].change < scores[0].change
    (span,) = ranges
    assert span.value == pytest.approx(max(accuracy) - min(accuracy)) and span.conditions == 3
    assert 0 < span.low < span.value < span.high
    same, _ = score_conditions(
        "e", "p", {PLAIN: parts[0], "same": parts[0]}, draw(labels, groups, 2, 200, 0)
    )
    assert (same[0].change, same[0].change_low, same[0].change_high) == (0, 0, 0)


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Stripes that are across or along: turning by 90° turns one class into the other."""
    generator = np.random.default_rng(0)
    lines = ["path,label,group,split,scanner"]
    for patient in range(16):
        for i in range(6):
            stripes = 60 * (np.arange(32) // 4 % 2)[:, None, None]
            stripes = stripes.transpose(1, 0, 2) if i % 2 else stripes
            pixels = 100 + stripes + generator.normal(0, 8, (32, 32, 3))
            name = f"{patient}_{i}.png"
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(tmp_path / name)
            split = ["train", "test", "val"][patient % 3]
            scanner = "left" if patient % 2 else "right"
            lines.append(f"{name},{['across', 'along'][i % 2]},p{patient},{split},{scanner}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "labels.csv"


def test_an_evaluation_under_conditions_fits_no_probe_again(
    tmp_path: Path, labels: Path, write_encoder_folder: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EvalConfig(
        encoder=str(write_encoder_folder(tmp_path / "tiny")),
        task=TaskConfig(tiles=labels, confounder="scanner"),
        conditions=ConditionsConfig(transforms=["rotate-90", "rotate-180", "jpeg-60"]),
        out=tmp_path / "out",
        device="cpu",
        protocols=["linear/sklearn-l2@2"],
    )
    evaluate(config)
    results = load_results(config.out / "results.json")
    plain = results.score("tiny-cls", "linear/sklearn-l2@2").value
    by_condition = {c.condition: c for c in results.conditions if c.metric == "balanced_accuracy"}
    assert set(by_condition) == {"rotate-90", "rotate-180", "jpeg-60"}
    assert plain > 0.9 and by_condition["rotate-90"].value <= 0.5
    assert by_condition["jpeg-60"].value > 0.8
    span = next(r for r in results.ranges if r.metric == "balanced_accuracy")
    values = [plain, *(c.value for c in by_condition.values())]
    assert span.value == pytest.approx(max(values) - min(values)) and span.conditions == 4
    insight = results.insights["tiny-cls"]
    assert insight.lidar is not None and 1 <= insight.lidar <= 32
    assert results.insights["mean-colour"].lidar is None
    assert 0 < insight.cosines["rotate-90"] < insight.cosines["jpeg-60"] <= 1
    assert insight.confounding is not None and insight.leakage is not None
    assert results.insights["mean-colour"].confounding is not None
    # Without conditions the scores of plain tiles are the same: it is the same probe.
    bare = EvalConfig(**{**vars(config), "conditions": ConditionsConfig(), "out": tmp_path / "b"})
    evaluate(bare, with_report=False)
    again = load_results(bare.out / "results.json")
    assert [s.value for s in again.scores] == [s.value for s in results.scores]
    shown = " ".join(capsys.readouterr().out.split())
    assert "range over 4 conditions" in shown and "robustness index" in shown
    assert json.loads((config.out / "results.json").read_text())["ranges"]


def test_an_encoder_under_a_condition_has_a_digest_and_a_twin_of_its_own(
    tmp_path: Path, write_encoder_folder: Writer
) -> None:
    plain = load_encoder(str(write_encoder_folder(tmp_path / "tiny")), torch.device("cpu"))
    mirrored = ConditionedEncoder(plain, "mirror")
    assert len({plain.digest, mirrored.digest, ConditionedEncoder(plain, "blur-1").digest}) == 3
    tiles = TILE[None, :40, :40]
    expected = plain.embed(np.ascontiguousarray(tiles[:, :, ::-1]))
    np.testing.assert_array_equal(mirrored.embed(tiles), expected)
    twin = mirrored.random_twin(0)
    np.testing.assert_array_equal(
        twin.embed(tiles), plain.random_twin(0).embed(np.ascontiguousarray(tiles[:, :, ::-1]))
    )
