"""`eosin bench kmeans`: a fair baseline, and figures that are what they say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from eosin.launch.bench_kmeans import (
    BenchKmeansConfig,
    Run,
    compare,
    made_up,
    plain_iteration,
    plain_start,
    run_ours,
    run_plain,
)
from eosin.launch.cli import main

SMALL = BenchKmeansConfig(tiles=4000, dim=16, k=50, iterations=12, repeats=1)


def test_the_plain_side_is_lloyds_algorithm() -> None:
    rows = torch.from_numpy(made_up(2000, 8, 60).astype(np.float32))
    squares = rows.square().sum(1)
    centroids = plain_start(rows, squares, 20)
    assert len({tuple(row.tolist()) for row in centroids}) == 20
    for _ in range(5):
        moved, inertia = plain_iteration(rows, squares, centroids)
        expected = KMeans(20, init=centroids.numpy(), n_init=1, max_iter=1).fit(rows.numpy())
        label = torch.cdist(rows, centroids).argmin(1)
        direct = float((rows - centroids[label]).square().sum())
        assert inertia == pytest.approx(direct, rel=1e-4)
        assert expected.inertia_ <= inertia * (1 + 1e-6)
        centroids = moved


def test_both_sides_reach_about_the_same_inertia() -> None:
    features, device = made_up(SMALL.tiles, SMALL.dim, 150), torch.device("cpu")
    ours, plain = run_ours(features, SMALL, device), run_plain(features, SMALL, device)
    assert ours.steps[-1][1] == pytest.approx(plain.steps[-1][1], rel=0.05)
    assert all(a[0] < b[0] for a, b in zip(ours.steps, ours.steps[1:], strict=False))


def test_times_are_to_the_worse_of_the_last_inertias() -> None:
    ours = Run(1.0, [(1.0, 100.0), (2.0, 90.0), (3.0, 80.0)])
    plain = Run(10.0, [(5.0, 120.0), (10.0, 95.0), (15.0, 89.95)])
    by_name = {row.name: row for row in compare([ours], [plain], SMALL)}
    lloyd = by_name["kmeans Lloyd to the same inertia"]
    assert (lloyd.ours, lloyd.baseline) == (2.0, 15.0)  # 90 is within 0.1 % of 89.95
    assert by_name["kmeans both"].ratio == pytest.approx(25 / 3)
    assert by_name["kmeans start"].ratio == pytest.approx(10)


def test_the_command_prints_and_writes_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    keys = ["tiles=2000", "dim=8", "k=20", "iterations=5", "repeats=1"]
    assert main(["bench", "kmeans", *keys, "--json", str(file)]) == 0
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    assert rows["kmeans both"]["ours"] > 0
    said = capsys.readouterr().out
    assert "1,000,000,000 × 1024 in 100,000 clusters" in said and "GFLOP/s" in said
