"""`eosin cluster`: the same files from any number of processes, after any kill; levels; slides."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from ranks import ranks_of

from eosin.configs.errors import InputError
from eosin.data_curation.cluster import cluster, plan
from eosin.data_curation.cluster_config import ClusterConfig
from eosin.data_curation.features import features_stamp, write_features
from eosin.data_curation.hierarchy import build_level
from eosin.data_curation.kmeans_fit import FitSettings, fit
from eosin.data_curation.manifest import CLUSTERS, FEATURE_ROWS, read_table
from eosin.launch.cli import main
from eosin.launch.process import World

N, DIM = 3000, 12


def write_store(folder: Path, features: NDArray[np.float32], n_slides: int = 7) -> Path:
    n = len(features)
    slides = np.sort(np.arange(n) % n_slides)
    columns = {field.name: pa.nulls(n, field.type) for field in FEATURE_ROWS}
    ids = pa.array([f"tile{i}" for i in range(n)])
    names = pa.array([f"slide{s}" for s in slides])
    rows = pa.table({**columns, "tile_id": ids, "group": names, "slide_id": names})
    write_features(
        folder,
        rows=rows,
        dim=features.shape[1],
        stamp=features_stamp("encoder", str(n)),
        compute=lambda start, stop: features[start:stop],
        chunk_rows=1000,
        meta={},
    )
    return folder


def made_up(n: int = N, modes: int = 60) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    centres = 3 * rng.normal(size=(modes, DIM))
    return (centres[rng.integers(0, modes, n)] + rng.normal(size=(n, DIM))).astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store"), made_up())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def alone(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    cluster(ClusterConfig(features=store, out=out, levels=[50, 8], within_slide=6, device="cpu"))
    return out


def test_the_table_is_what_the_centroids_say(store: Path, alone: Path) -> None:
    table = read_table(alone / "clusters.parquet", CLUSTERS)
    features = np.load(store / "features.npy").astype(np.float64)
    fine, coarse = (np.load(alone / f"centroids_{n}.npy").astype(np.float64) for n in (1, 2))
    apart = np.linalg.norm(features[:, None] - fine[None], axis=-1)
    label = table["level_1"].to_numpy()
    assert np.array_equal(label, apart.argmin(1))
    np.testing.assert_allclose(table["distance"].to_numpy(), apart.min(1), rtol=1e-4)
    parents = np.linalg.norm(fine[:, None] - coarse[None], axis=-1).argmin(1)
    assert np.array_equal(table["level_2"].to_numpy(), parents[label])
    assert fine.shape == (50, DIM) and coarse.shape == (8, DIM)
    assert table["tile_id"].to_pylist() == [f"tile{i}" for i in range(N)]


def test_clusters_in_a_slide_are_of_that_slide_alone(store: Path, alone: Path) -> None:
    table = pq.read_table(alone / "clusters.parquet")
    features = np.load(store / "features.npy").astype(np.float64)
    slides = np.array(table["slide_id"].to_pylist())
    label, apart = table["slide_cluster"].to_numpy(), table["slide_distance"].to_numpy()
    for slide in np.unique(slides):
        own = slides == slide
        assert set(label[own]) == set(range(6))
        means = np.stack([features[own & (label == c)].mean(0) for c in range(6)])
        distance = np.linalg.norm(features[own] - means[label[own]], axis=1)
        np.testing.assert_allclose(apart[own], distance, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_writes_the_same_bytes(
    store: Path, alone: Path, tmp_path: Path, count: int
) -> None:
    arguments = ["-m", "eosin.launch.cli", "cluster", f"features={store}", "device=cpu"]
    arguments += [f"out={tmp_path / 'out'}", "levels=[50,8]", "within_slide=6"]
    with ranks_of(count, arguments, tmp_path / "log") as ranks:
        for rank in ranks:
            assert rank.process.wait(120) == 0, rank.log.read_text()
    assert contents(tmp_path / "out") == contents(alone)


def test_a_killed_command_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", made_up(30_000, 300))
    options = ["levels=[200,20]", "device=cpu", "tolerance=0", "iterations=60"]
    command = [sys.executable, "-m", "eosin.launch.cli", "cluster", f"features={store}", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, f"out={tmp_path / 'whole'}"], check=True, env=environment)
    process = subprocess.Popen([*command, f"out={tmp_path / 'out'}"], env=environment)
    state = tmp_path / "out" / ".work" / "progress.safetensors"
    while process.poll() is None and not state.exists():
        time.sleep(0.002)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.exists() and not (tmp_path / "out" / "clusters.json").exists()
    subprocess.run([*command, f"out={tmp_path / 'out'}"], check=True, env=environment)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_second_call_does_nothing(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ClusterConfig(features=store, out=tmp_path, levels=[20], device="cpu")
    cluster(config)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    cluster(config)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert "up to date" in capsys.readouterr().out
    cluster(ClusterConfig(features=store, out=tmp_path, levels=[30], device="cpu"))
    assert len(np.load(tmp_path / "centroids_1.npy")) == 30


def test_few_points_fit_and_all_are_assigned(store: Path, tmp_path: Path) -> None:
    cluster(
        ClusterConfig(
            features=store, out=tmp_path, levels=[20], points_per_centroid=40, device="cpu"
        )
    )
    table = read_table(tmp_path / "clusters.parquet", CLUSTERS)
    features = np.load(store / "features.npy").astype(np.float64)
    centroids = np.load(tmp_path / "centroids_1.npy").astype(np.float64)
    apart = np.linalg.norm(features[:, None] - centroids[None], axis=-1)
    assert np.array_equal(table["level_1"].to_numpy(), apart.argmin(1))


def test_a_level_flattens_the_density_of_the_one_below() -> None:
    """A crowd and a thin line: coarse clusters of centroids share them by extent, not by number."""
    rng = np.random.default_rng(0)
    crowd = rng.normal(0, 0.05, (9000, 2))
    line = np.stack([rng.uniform(1, 4, 1000), rng.normal(0, 0.02, 1000)], 1)
    rows = np.concatenate([crowd, line]).astype(np.float32)
    fine = fit(rows, 200, FitSettings(), world=World(), device=torch.device("cpu"))
    level = build_level(
        fine.centroids + fine.frame.centre,
        20,
        FitSettings(),
        resamples=3,
        closest=0,
        device=torch.device("cpu"),
    )
    on_line = (level.centroids[:, 0] > 0.7).sum()
    direct = fit(rows, 20, FitSettings(), world=World(), device=torch.device("cpu"))
    assert on_line >= 10 > (direct.centroids[:, 0] + direct.frame.centre[0] > 0.7).sum() - 8
    assert level.parents.shape == (200,) and set(level.parents) == set(range(20))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (["levels=[10,20]"], "must fall"),
        (["levels=[4000]"], "3000 tiles cannot have 4000"),
        (["levels=[0]"], "at least 1"),
        (["iterations=0"], "iterations"),
    ],
)
def test_nonsense_is_named(
    store: Path, tmp_path: Path, keys: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cluster", f"features={store}", f"out={tmp_path / 'o'}", *keys]) == 2
    assert named in capsys.readouterr().err


def test_a_missing_store_and_a_dry_run(store: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        cluster(ClusterConfig(features=tmp_path / "nowhere", out=tmp_path / "o"))
    said = plan(ClusterConfig(features=store, out=tmp_path / "o"))
    assert "3000 tiles × 12" in said and "15 clusters" in said
    assert not (tmp_path / "o").exists()
