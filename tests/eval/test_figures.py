"""Pictures of an evaluation."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import confusion_matrix

from eosin.eval.figures import (
    confusion,
    confusion_counts,
    feature_map,
    overlay_sheet,
    principal_colours,
    score_bars,
    tile_sheet,
)
from eosin.eval.results import EncoderRecord, Results, Score, TaskRecord
from eosin.launch.pictures import DPI, PAGE_PX

CLASSES = ["$a$ <b>", "glands", "a class with a very long name indeed, and\na second line"]


def made_results() -> Results:
    encoders = [
        EncoderRecord(name=n, label=n, kind=kind, pooling="cls", dim=8, digest="00")
        for n, kind in (("net", "encoder"), ("twin", "random"), ("mean", "floor"))
    ]
    scores = [
        Score(encoder=e.name, protocol=protocol, metric="balanced_accuracy", value=value,
              low=value - 0.1, high=value + 0.05, chosen={})
        for protocol in ("knn/uni20@1", "linear/sklearn-l2@1")
        for e, value in zip(encoders, (0.9, 0.6, 0.3), strict=True)
    ]  # fmt: skip
    task = TaskRecord(
        name="made", classes=CLASSES, tiles={"test": 60}, groups={"test": 20}, digest="11"
    )
    return Results(
        task=task, encoders=encoders, scores=scores, differences=[], bootstrap_draws=100, seed=0
    )


def made_predictions(seed: int = 0, n: int = 60) -> pa.Table:
    draw = np.random.default_rng(seed)
    return pa.table(
        {
            "encoder": ["net"] * n + ["twin"] * n,
            "protocol": ["knn/uni20@1"] * 2 * n,
            "label": pa.array(draw.integers(0, 3, 2 * n), pa.int32()),
            "prediction": pa.array(draw.integers(0, 3, 2 * n), pa.int32()),
        }
    )


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.info["dpi"][0] == pytest.approx(DPI, rel=1e-3)
        return np.asarray(image.convert("RGB"))


def test_score_bars_fill_the_page_and_depend_on_the_scores_alone(tmp_path: Path) -> None:
    for name in ("one", "two"):
        score_bars(made_results(), tmp_path / f"{name}.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    picture = read(tmp_path / "one.png")
    assert picture.shape[1] == PAGE_PX
    assert 0.02 < (picture < 250).mean() < 0.5


def test_confusion_counts_agree_with_scikit_learn() -> None:
    table = made_predictions()
    counts = confusion_counts(table, 3, "twin", "knn/uni20@1")
    label, prediction = (table[name].to_numpy()[60:] for name in ("label", "prediction"))
    np.testing.assert_array_equal(counts, confusion_matrix(label, prediction, labels=[0, 1, 2]))


def test_confusion_draws_class_names_as_they_are(tmp_path: Path) -> None:
    confusion(made_predictions(), made_results(), "net", "knn/uni20@1", tmp_path / "c.png")
    assert read(tmp_path / "c.png").shape == (3 * 84 + 300, 3 * 84 + 400, 3)


def test_confusion_of_an_encoder_without_predictions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'mean'"):
        confusion(made_predictions(), made_results(), "mean", "knn/uni20@1", tmp_path / "c.png")
    assert not list(tmp_path.iterdir())


def test_tile_sheet_shows_each_tile_pixel_for_pixel_at_its_own_size(tmp_path: Path) -> None:
    # 7 columns and a one-letter name leave cells of the largest size: tiles are shown 1:1
    tiles = [noise(248, 248, seed) for seed in range(9)]
    tile_sheet(tiles, ["b"] * 8 + ["a"], tmp_path / "t.png", columns=7)
    sheet = read(tmp_path / "t.png")
    assert sheet.shape == (3 * 256 - 8, PAGE_PX, 3)
    left = 40 + 13
    np.testing.assert_array_equal(sheet[:248, left : left + 248], tiles[8])  # class a comes first
    np.testing.assert_array_equal(sheet[256:504, left + 256 : left + 504], tiles[1])
    np.testing.assert_array_equal(sheet[512:760, left : left + 248], tiles[7])


def test_tile_sheet_keeps_the_shape_of_odd_tiles(tmp_path: Path) -> None:
    black = np.zeros((25, 50, 3), np.uint8)
    tile_sheet([black], ["a"], tmp_path / "t.png")
    inside = (read(tmp_path / "t.png")[:, 53 : 53 + 248] == 0).all(axis=2)
    assert inside.any(axis=0).sum() == 2 * inside.any(axis=1).sum() == 248


def test_sheets_refuse_unequal_lengths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1, 2"):
        tile_sheet([noise(8, 8)], ["a", "b"], tmp_path / "t.png")


def test_overlay_sheet_holds_every_overlay(tmp_path: Path) -> None:
    paths = []
    for index, colour in enumerate([(200, 0, 0), (0, 200, 0), (0, 0, 200)]):
        paths.append(tmp_path / f"{index}.png")
        Image.new("RGB", (300, 200 + 100 * index), colour).save(paths[-1])
    overlay_sheet(paths, ["one", "two", "three"], tmp_path / "sheet.png")
    sheet = read(tmp_path / "sheet.png")
    cell_px = (PAGE_PX + 8) // 3 - 8
    assert sheet.shape[1] == 3 * (cell_px + 8) - 8
    for colour, height in (((200, 0, 0), 2 / 3), ((0, 200, 0), 1.0), ((0, 0, 200), 4 / 3)):
        seen = int((sheet == colour).all(axis=2).sum())
        assert seen == pytest.approx(cell_px * cell_px * height, rel=0.01)


def test_principal_colours_are_scikit_learns_components_stretched() -> None:
    draw = np.random.default_rng(0)
    grids = [draw.normal(size=(4, 5, 16)) * np.linspace(3, 1, 16), draw.normal(size=(2, 3, 16))]
    scores = PCA(3).fit_transform(np.concatenate([grid.reshape(-1, 16) for grid in grids]))
    colours = principal_colours(grids)
    assert [c.shape for c in colours] == [(4, 5, 3), (2, 3, 3)]
    flat = np.concatenate([c.reshape(-1, 3) for c in colours]).astype(float)
    for axis in range(3):
        assert abs(np.corrcoef(flat[:, axis], scores[:, axis])[0, 1]) > 0.99


def test_principal_colours_of_constant_or_narrow_tokens_are_finite() -> None:
    assert principal_colours([np.ones((2, 2, 8))])[0].shape == (2, 2, 3)
    assert principal_colours([np.arange(8.0).reshape(2, 2, 2)])[0][..., 2].max() == 0


def test_feature_map_stands_below_its_image(tmp_path: Path) -> None:
    tokens = [np.random.default_rng(0).normal(size=(4, 4, 8)).astype(np.float32)]
    feature_map(tokens, [noise(64, 64)], tmp_path / "f.png")
    sheet = read(tmp_path / "f.png")
    assert sheet.shape == (2 * 532 + 8, 532, 3)
    cells = sheet[540:].reshape(4, 133, 4, 133, 3)
    np.testing.assert_array_equal(cells[:, 66, :, 66], principal_colours(tokens)[0])
