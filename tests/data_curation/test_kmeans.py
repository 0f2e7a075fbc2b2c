"""k-means: exact labels, whole sums, and the same result however the work is cut."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

import eosin.data_curation.kmeans as module
from eosin.data_curation.kmeans import Progress, lloyd, nearest
from eosin.data_curation.kmeans_fit import FitSettings, Fitted, fit
from eosin.data_curation.kmeans_points import ArrayPoints, Frame, sample_rows, share_of
from eosin.data_curation.kmeans_start import plus_plus, start_centroids
from eosin.launch.process import World

CPU = torch.device("cpu")


def mixture(n: int, dim: int, modes: int, seed: int = 0) -> NDArray[np.float32]:
    """Modes of unequal weight, with a spectrum that falls off."""
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, dim + 1) ** -0.5
    centres = 3 * rng.normal(size=(modes, dim)) * spectrum
    label = rng.choice(modes, n, p=rng.dirichlet(np.ones(modes)))
    return (centres[label] + rng.normal(size=(n, dim)) * spectrum).astype(np.float32)


def points_of(array: NDArray[np.floating], chunk_rows: int = 65_536) -> ArrayPoints:
    frame = Frame(centre=np.zeros(array.shape[1], np.float32), unit=False)
    largest = float(np.abs(array).max())
    return ArrayPoints(array, range(len(array)), frame, CPU, largest, chunk_rows)


def fitted(array: NDArray[np.floating], k: int, seed: int = 0, **keys: object) -> Fitted:
    return fit(array, k, FitSettings(seed=seed), world=World(), device=CPU, **keys)  # type: ignore[arg-type]


def naive_labels(rows: NDArray[np.floating], centroids: NDArray[np.floating]) -> NDArray[np.int64]:
    """By differences in float64, the first among equals."""
    apart = ((rows[:, None].astype(float) - centroids[None].astype(float)) ** 2).sum(-1)
    return apart.argmin(1)


def naive_lloyd(
    rows: NDArray[np.float32], centroids: NDArray[np.float32], iterations: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    current = centroids.astype(float)
    for _ in range(iterations):
        label = naive_labels(rows, current.astype(np.float32))
        for cluster in range(len(current)):
            if (label == cluster).any():
                current[cluster] = rows[label == cluster].astype(float).mean(0)
    return current, naive_labels(rows, current.astype(np.float32))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 40), st.integers(1, 9), st.integers(0, 10**6), st.booleans()
)
def test_labels_are_those_of_exact_arithmetic(
    n: int, k: int, dim: int, seed: int, crowded: bool
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(-2, 3, (n + k, dim)).astype(np.float32)  # many exact ties
    if crowded:  # a large common part, beside which float32 cannot tell the small ones apart
        values = values * np.float32(2**-10) + np.float32(512)
    rows, centroids = values[:n], values[n:]
    label, upper, lower = nearest(torch.from_numpy(rows), torch.from_numpy(centroids))
    expected = naive_labels(rows, centroids)
    assert np.array_equal(label.numpy(), expected)
    apart = np.sqrt(((rows[:, None].astype(float) - centroids[None].astype(float)) ** 2).sum(-1))
    own = apart[np.arange(n), expected]
    apart[np.arange(n), expected] = math.inf
    assert (upper.numpy() >= own * (1 - 1e-7)).all()
    assert (lower.numpy() <= apart.min(1) * (1 + 1e-7)).all()


def test_iterations_are_those_of_a_naive_loop() -> None:
    rows = mixture(3000, 12, 30)
    start = rows[:25].copy()
    found = lloyd(
        points_of(rows),
        Progress(torch.from_numpy(start)),
        iterations=12,
        tolerance=0.0,
        world=World(),
    )
    expected, label = naive_lloyd(rows, start, found.progress.iterations)
    assert np.array_equal(found.labels.numpy(), label)
    np.testing.assert_allclose(found.centroids.numpy(), expected, rtol=1e-5, atol=1e-5)
    means = np.stack([rows[label == c].astype(float).mean(0) for c in range(25)])
    assert found.inertia == pytest.approx(((rows - means[label]) ** 2).sum(), rel=1e-5)
    assert found.counts.tolist() == np.bincount(label, minlength=25).tolist()


def test_skipped_rows_change_nothing_and_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = mixture(20_000, 16, 20, seed=3)
    computed = []

    def counted(some: torch.Tensor, centroids: torch.Tensor) -> object:
        computed.append(len(some))
        return nearest(some, centroids)

    monkeypatch.setattr(module, "nearest", counted)
    start = torch.from_numpy(rows[:20].copy())
    found = lloyd(points_of(rows), Progress(start), iterations=30, tolerance=0.0, world=World())
    assert np.array_equal(found.labels.numpy(), naive_labels(rows, found.centroids.numpy()))
    assert sum(computed) < 0.6 * 20_000 * (found.progress.iterations + 1)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["mixture", "digits", "blobs"])
def test_inertia_is_that_of_the_best_of_five_of_scikit_learn(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, k = {
        "mixture": lambda: (mixture(4000, 16, 90, seed), 30),
        "digits": lambda: (load_digits().data.astype(np.float32), 40),
        "blobs": lambda: (rng.normal(size=(3000, 4)).astype(np.float32), 50),
    }[name]()
    best = KMeans(k, n_init=5, random_state=seed, tol=1e-6, max_iter=300).fit(rows).inertia_
    settings_ = FitSettings(seed=seed, iterations=100, tolerance=1e-6)
    found = fit(rows, k, settings_, world=World(), device=CPU)
    assert found.inertia * len(rows) <= 1.01 * best


def test_chunks_threads_and_half_precision_files_change_nothing(tmp_path: Path) -> None:
    rows = mixture(9000, 24, 60).astype(np.float16)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    whole = fitted(rows, 40)
    before = torch.get_num_threads()
    for chunk_rows, threads in ((7, 1), (1000, 2), (10**6, 1)):
        torch.set_num_threads(threads)
        try:
            found = fitted(mapped, 40, chunk_rows=chunk_rows)
        finally:
            torch.set_num_threads(before)
        assert torch.equal(found.labels, whole.labels)
        assert np.array_equal(found.centroids, whole.centroids)
        assert found.inertia == whole.inertia


def test_seeds_matter_and_repeat() -> None:
    rows = mixture(3000, 8, 40)
    first, same, other = fitted(rows, 30, 0), fitted(rows, 30, 0), fitted(rows, 30, 1)
    assert np.array_equal(first.centroids, same.centroids)
    assert not np.array_equal(first.centroids, other.centroids)


def test_going_on_from_any_iteration_ends_in_the_same_place() -> None:
    rows = mixture(3000, 8, 40)
    steps: list[Progress] = []
    whole = fitted(rows, 30, save=steps.append)
    assert len(steps) > 4
    for progress in steps[:: len(steps) // 3]:
        again = fitted(rows, 30, begin=progress)
        assert torch.equal(again.labels, whole.labels)
        assert np.array_equal(again.centroids, whole.centroids)
        assert (again.inertia, again.iterations) == (whole.inertia, whole.iterations)


def test_an_empty_cluster_is_given_the_farthest_row() -> None:
    rows = np.concatenate([np.zeros((50, 2)), np.full((50, 2), 10.0), [[30.0, 0.0]]])
    rows = rows.astype(np.float32)
    start = torch.tensor([[0.0, 0.0], [10.0, 10.0], [500.0, 500.0]])
    found = lloyd(points_of(rows), Progress(start), iterations=10, tolerance=0.0, world=World())
    assert found.progress.repaired == 1
    assert sorted(found.counts.tolist()) == [1, 50, 50] and found.inertia == 0


@pytest.mark.parametrize(
    "rows",
    [
        np.ones((40, 3), np.float32),
        np.eye(5, dtype=np.float32).repeat(8, 0),
        np.zeros((40, 1), np.float16),
        np.arange(40, dtype=np.float32)[:, None],
    ],
    ids=["equal", "five", "zeros", "line"],
)
def test_few_different_rows_end_well(rows: NDArray[np.floating]) -> None:
    found = fitted(rows, 10)
    assert np.isfinite(found.centroids).all() and len(found.labels) == 40
    distinct = len(np.unique(rows, axis=0))
    if distinct <= 10:
        assert found.inertia == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 7), (7, 1), (30, 29)])
def test_odd_sizes(n: int, k: int) -> None:
    found = fitted(mixture(n, 3, 5), k)
    assert set(found.labels.tolist()) == set(range(k))


def test_what_cannot_be_clustered_is_said() -> None:
    rows = mixture(20, 3, 5)
    with pytest.raises(ValueError, match="20 rows cannot have 21"):
        fitted(rows, 21)
    rows[13, 1] = np.nan
    with pytest.raises(ValueError, match="row 13"):
        fitted(rows, 3)


def test_cosine_forgets_the_length() -> None:
    rows = mixture(2000, 8, 20)
    lengths = np.random.default_rng(0).uniform(0.5, 20, (2000, 1)).astype(np.float32)
    plain, scaled = fitted(rows, 15, unit=True), fitted(rows * lengths, 15, unit=True)
    agree = (plain.labels == scaled.labels).float().mean()
    assert agree > 0.99


@pytest.mark.parametrize(("n", "m"), [(10, 10), (1000, 3), (10**9, 1000), (50, 20)])
def test_samples_are_different_rows_in_order(n: int, m: int) -> None:
    rows = sample_rows(n, m, 5)
    assert len(rows) == m and (np.diff(rows) > 0).all() and rows[0] >= 0 and rows[-1] < n
    assert np.array_equal(rows, sample_rows(n, m, 5))


def test_shares_cover_all_rows_once() -> None:
    shares = [share_of(1001, World(rank=rank, size=4)) for rank in range(4)]
    assert [row for share in shares for row in share] == list(range(1001))


def test_weighted_rows_are_drawn_by_their_weight() -> None:
    rows = torch.eye(4).repeat_interleave(5, 0)
    chosen = plus_plus(rows, torch.ones(20), 4, seed=0)
    assert {tuple(row.tolist()) for row in chosen} == {tuple(row) for row in torch.eye(4).tolist()}
    weights = torch.ones(20)
    weights[:15] = 0
    assert torch.equal(plus_plus(rows, weights, 1, seed=0)[0], rows[15])


def test_the_start_is_better_than_random_rows() -> None:
    rows = mixture(6000, 16, 40)
    found = start_centroids(points_of(rows), 40, seed=0).numpy()
    random = rows[np.random.default_rng(0).choice(6000, 40, replace=False)]

    def inertia(centroids: NDArray[np.float32]) -> float:
        return float(((rows - centroids[naive_labels(rows, centroids)]) ** 2).sum())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        best = KMeans(40, n_init=5, random_state=0).fit(rows).inertia_
    assert inertia(found) < 1.1 * best < inertia(random)
