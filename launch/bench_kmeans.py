"""`eosin bench kmeans`: time to the same inertia, against plain Lloyd with k-means++, and faiss.

The plain side is what one writes first in torch: k-means++ row by row over all tiles, then products
with every centroid, an arg-min and a scattered sum, in float32. faiss is timed where it is
installed, at equal iterations on all tiles; its start is random rows.
"""

import importlib
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eosin.data_curation.kmeans import Progress
from eosin.data_curation.kmeans_fit import FitSettings, fit
from eosin.launch.bench import Row, in_turn, less_is_better, report
from eosin.launch.cards import CORE_TFLOPS, card_called
from eosin.launch.device_names import DeviceName
from eosin.launch.process import World, choose_device

SAME = 1.001
"""Inertias within this factor count as the same."""
PLAIN_ROWS = 16_384
"""Rows of a product on the plain side: its distances must fit into memory."""
GPU_MFU = 0.35
LARGE = ((10**6, 256, 5_000, 0), (10**9, 1024, 100_000, 256))
"""Rows, features, clusters and fitted rows a cluster, for which times are foretold."""


@dataclass(frozen=True, kw_only=True)
class BenchKmeansConfig:
    """k-means on made-up features: modes of unequal weight, a spectrum that falls off."""

    tiles: int = 200_000
    dim: int = 256
    k: int = 1000
    iterations: int = 25
    """Of Lloyd, on each side."""
    repeats: int = 3
    """Runs of each side, in turn; figures are medians."""
    threads: int = 1
    """Of each side."""
    device: DeviceName = "cpu"
    """Of ours and the plain side; faiss stays on the CPU."""
    json: Path | None = None
    """Where the rows are written, too; ``--json FILE`` is the same."""

    def __post_init__(self) -> None:
        for name in ("tiles", "dim", "k", "iterations", "repeats", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.tiles < self.k:
            raise ValueError(f"tiles={self.tiles} must not be fewer than k={self.k}")


@dataclass(frozen=True)
class Run:
    """One side's run: when it had which inertia."""

    start_s: float
    """For the first centroids."""
    steps: list[tuple[float, float]]
    """Seconds since the start was there and inertia, by iteration."""

    def until(self, inertia: float) -> float:
        """Seconds of Lloyd until the inertia was no more than that; infinite if it never was."""
        return next((s for s, found in self.steps if found <= inertia), math.inf)


def bench_kmeans(config: BenchKmeansConfig) -> None:
    """Times the sides in turn and reports them."""
    torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    features = made_up(config.tiles, config.dim, 3 * config.k)
    pairs = in_turn(
        lambda: run_ours(features, config, device),
        lambda: run_plain(features, config, device),
        config.repeats,
    )
    rows = compare(*pairs, config)
    rows += _against_faiss(features, config, device)
    title = (
        f"k-means of {config.tiles:,} × {config.dim} in {config.k:,} clusters, {device.type}, "
        f"{config.threads} threads, medians of {config.repeats} in turn"
    )
    report(title, rows, config.json)
    lloyd_s = statistics.median(run.steps[-1][0] / len(run.steps) for run in pairs[0])
    rate = 2.0 * config.tiles * config.k * config.dim / lloyd_s
    print("\n".join(_foretold(config.iterations, rate, device.type)))


def made_up(n: int, dim: int, modes: int, seed: int = 0) -> NDArray[np.float16]:
    """Features [n, dim] around `modes` centres of unequal weight."""
    rng = np.random.default_rng(seed)
    spectrum = (np.arange(1, dim + 1) ** -0.5).astype(np.float32)
    centres = 3 * rng.standard_normal((modes, dim), np.float32) * spectrum
    label = rng.choice(modes, n, p=rng.dirichlet(np.ones(modes)))
    noise = 1.5 * rng.standard_normal((n, dim), np.float32) * spectrum
    return (centres[label] + noise).astype(np.float16)


def run_ours(
    features: NDArray[np.float16],
    config: BenchKmeansConfig,
    device: torch.device,
    tolerance: float = 0.0,
) -> Run:
    """Ours, from the array to the last centroids."""
    began, times = time.perf_counter(), list[tuple[float, float]]()

    def note(progress: Progress) -> None:
        times.append((time.perf_counter() - began, progress.inertia))

    settings = FitSettings(iterations=config.iterations, tolerance=tolerance)
    fit(features, config.k, settings, world=World(), device=device, save=note)
    start_s = times[0][0]
    return Run(start_s, [(seconds - start_s, inertia) for seconds, inertia in times[1:]])


def run_plain(
    features: NDArray[np.float16], config: BenchKmeansConfig, device: torch.device
) -> Run:
    """Plain k-means++ and Lloyd."""
    began = time.perf_counter()
    rows = torch.from_numpy(features.astype(np.float32)).to(device)
    rows -= rows.mean(0)
    squares = rows.square().sum(1)
    centroids = plain_start(rows, squares, config.k)
    start_s = time.perf_counter() - began
    began, steps = time.perf_counter(), list[tuple[float, float]]()
    for _ in range(config.iterations):
        centroids, inertia = plain_iteration(rows, squares, centroids)
        steps.append((time.perf_counter() - began, inertia))
    return Run(start_s, steps)


def plain_start(rows: Tensor, squares: Tensor, k: int) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007), a draw by D² a centroid."""
    generator = torch.Generator().manual_seed(0)
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    nearest = torch.full_like(squares, math.inf)
    for _ in range(k - 1):
        last = rows[chosen[-1]]
        apart = torch.addmv(squares, rows, last, alpha=-2).add_(last.square().sum()).clamp_min_(0)
        nearest = torch.minimum(nearest, apart)
        steps = nearest.double().cumsum(0)
        drawn = torch.rand((), generator=generator, dtype=torch.float64) * float(steps[-1])
        chosen.append(min(int(torch.searchsorted(steps, drawn.to(rows.device))), len(rows) - 1))
    return rows[torch.tensor(chosen, device=rows.device)]


def plain_iteration(rows: Tensor, squares: Tensor, centroids: Tensor) -> tuple[Tensor, float]:
    """An assignment and an update; the inertia is that to the centroids before."""
    sums, counts = torch.zeros_like(centroids), torch.zeros(len(centroids), device=rows.device)
    norms, inertia = centroids.square().sum(1), 0.0
    for start in range(0, len(rows), PLAIN_ROWS):
        block = rows[start : start + PLAIN_ROWS]
        found = torch.addmm(norms, block, centroids.T, alpha=-2).min(1)
        inertia += float((found.values + squares[start : start + PLAIN_ROWS]).sum())
        sums.index_add_(0, found.indices, block)
        counts += torch.bincount(found.indices, minlength=len(centroids))
    means = sums / counts.clamp_min(1)[:, None]
    return torch.where((counts > 0)[:, None], means, centroids), inertia


def compare(ours: list[Run], plain: list[Run], config: BenchKmeansConfig) -> list[Row]:
    """Rows of start, Lloyd and both, to the worse of the two last inertias, within `SAME`."""
    target = SAME * max(run.steps[-1][1] for run in (*ours, *plain))

    def median(values: list[float]) -> float:
        return statistics.median(values)

    name = "kmeans"
    figures = {
        "start": [[run.start_s for run in runs] for runs in (ours, plain)],
        "Lloyd to the same inertia": [
            [run.until(target) for run in runs] for runs in (ours, plain)
        ],
        "both": [[run.start_s + run.until(target) for run in runs] for runs in (ours, plain)],
    }
    rows = [
        less_is_better(f"{name} {what}", "s", median(a), median(b))
        for what, (a, b) in figures.items()
    ]
    last = [median([run.steps[-1][1] for run in runs]) for runs in (ours, plain)]
    return [*rows, less_is_better(f"{name} inertia after {config.iterations}", "", *last)]


def _against_faiss(
    features: NDArray[np.float16], config: BenchKmeansConfig, device: torch.device
) -> list[Row]:
    """The same number of iterations of faiss's k-means on all tiles; [] where it is missing."""
    try:
        faiss: Any = importlib.import_module("faiss")
    except ImportError:
        print("bench kmeans: faiss is not installed here; 'pip install faiss-cpu' adds its rows")
        return []
    faiss.omp_set_num_threads(config.threads)
    rows = features.astype(np.float32)

    def run_faiss() -> tuple[float, float]:
        began = time.perf_counter()
        kmeans = faiss.Kmeans(
            config.dim,
            config.k,
            niter=config.iterations,
            seed=1,
            max_points_per_centroid=-(-config.tiles // config.k),
        )
        kmeans.train(rows)
        return time.perf_counter() - began, float(kmeans.obj[-1])

    def run_all() -> tuple[float, float]:
        began = time.perf_counter()
        run = run_ours(features, config, device, tolerance=-math.inf)
        return time.perf_counter() - began, run.steps[-1][1]

    ours, theirs = in_turn(run_all, run_faiss, config.repeats)
    name = f"kmeans {config.iterations} iterations against faiss"
    seconds, inertia = (
        [statistics.median(run[which] for run in runs) for runs in (ours, theirs)]
        for which in (0, 1)
    )
    return [less_is_better(name, "s", *seconds), less_is_better(f"{name}, inertia", "", *inertia)]


def _foretold(iterations: int, rate: float, device: str) -> list[str]:
    """Lloyd's time on larger sets, from the operations and the rate that was measured here."""
    on_card = GPU_MFU * card_called("H100").tflops * 1e12
    lines = [
        f"measured here: {rate / 1e9:,.0f} GFLOP/s of distances, those that bounds saved included "
        f"({CORE_TFLOPS * 1e3:,.0f} is a core's share of a training step)"
    ]
    for n, dim, k, fitted in LARGE:
        rows = min(n, fitted * k) if fitted else n
        flops = 2.0 * k * dim * (iterations * rows + n)
        lines.append(
            f"{n:,} × {dim} in {k:,} clusters, fitted on {rows:,}: {flops:.2g} operations, "
            f"{flops / rate / 3600:,.1f} h at the rate measured on this {device}, "
            f"{flops / on_card / 3600:,.2f} h of an H100 at {GPU_MFU:.0%} of its peak"
        )
    return lines
