"""The weight-free descriptor: what it does not mind, and what it tells apart."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from eosin.data_curation.embed import read_image
from eosin.data_curation.images import read_text_table
from eosin.data_curation.stain_texture import DIM, pattern_histogram, stain_texture
from eosin.data_curation.synthetic import SyntheticConfig, write_slides
from eosin.data_curation.synthetic_task import SyntheticTaskConfig, write_task


def some_tile(size_px: int = 128) -> NDArray[np.uint8]:
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 40, (size_px // 4, size_px // 4, 3)).repeat(4, 0).repeat(4, 1)
    return np.clip(np.array([190, 130, 180]) + noise, 0, 255).astype(np.uint8)


def naive_patterns(grey: NDArray[np.float32], step: float) -> NDArray[np.float64]:
    """Pixel by pixel, as the paper says it."""
    counts = np.zeros(10)
    ring = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]
    for y in range(1, grey.shape[0] - 1):
        for x in range(1, grey.shape[1] - 1):
            bits = [int(grey[y + dy, x + dx] >= grey[y, x] + step) for dy, dx in ring]
            changes = sum(bits[i] != bits[i - 1] for i in range(8))
            counts[sum(bits) if changes <= 2 else 9] += 1
    return np.sqrt(counts / counts.sum())


def test_patterns_are_those_of_the_paper() -> None:
    grey = np.random.default_rng(0).integers(0, 20, (17, 23)).astype(np.float32)
    np.testing.assert_allclose(pattern_histogram(grey), naive_patterns(grey, 2.0), atol=1e-6)


@pytest.mark.parametrize("size_px", [64, 128, 256])
def test_turns_and_flips_change_next_to_nothing(size_px: int) -> None:
    tile = some_tile(size_px)
    first = stain_texture(tile)
    other = stain_texture(np.roll(tile[::-1], 7, axis=2 - 1)[:, :, ::-1])
    assert first.shape == (DIM,) and first.dtype == np.float32
    for moved in (np.rot90(tile), np.rot90(tile, 2), tile[::-1], tile[:, ::-1]):
        change = np.linalg.norm(stain_texture(np.ascontiguousarray(moved)) - first)
        assert change < 0.02 * np.linalg.norm(other - first)  # colours exchanged, for scale


def test_any_tile_has_finite_features() -> None:
    rng = np.random.default_rng(0)
    tiles = [
        np.zeros((1, 1, 3), np.uint8),
        np.full((64, 64, 3), 255, np.uint8),
        np.zeros((2, 300, 3), np.uint8),
        rng.integers(0, 256, (50, 42, 3), np.uint8),
        rng.integers(0, 256, (513, 257, 3), np.uint8),
    ]
    for tile in tiles:
        features = stain_texture(tile)
        assert features.shape == (DIM,)
        assert np.isfinite(features).all() and np.abs(features).max() < 100


def accuracy(tiles: list[NDArray[np.uint8]], labels: list[str], groups: list[str]) -> float:
    """Of ten neighbours, none of the tile's own group."""
    features = np.stack([stain_texture(tile) for tile in tiles])
    knn = KNeighborsClassifier(10)
    return float(cross_val_score(knn, features, labels, groups=groups, cv=GroupKFold(5)).mean())


def test_tissue_classes_of_other_slides_are_told_apart(tmp_path: Path) -> None:
    slides = write_slides(
        tmp_path / "slides", SyntheticConfig(n_slides=8, size_px=1024, seed=7), workers=1
    )
    table = write_task(
        tmp_path / "task",
        dict.fromkeys(slides, "train"),
        SyntheticTaskConfig(size_px=64),
        workers=1,
    )
    rows = read_text_table(table, ("path", "label", "group")).to_pylist()
    tiles = [read_image(table.parent / row["path"]) for row in rows]
    labels, groups = ([row[name] for row in rows] for name in ("label", "group"))
    assert len(tiles) > 60 and len(set(labels)) == 8
    assert accuracy(tiles, labels, groups) > 0.3  # chance is 0.125


def test_real_lung_tiles_are_told_apart(real_data: Path) -> None:
    table = real_data / "lung3" / "labels.csv"
    rows = read_text_table(table, ("path", "label", "group")).to_pylist()[::5]
    tiles = [read_image(table.parent / row["path"]) for row in rows]
    labels, groups = ([row[name] for row in rows] for name in ("label", "group"))
    assert accuracy(tiles, labels, groups) > 0.85
