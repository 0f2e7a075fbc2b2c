"""k-means whose result is a function of data, k and seed alone.

It does not depend on how many processes share the rows, how many threads multiply, in what chunks
rows are read, or on which device. Two things see to that. Labels are those of exact arithmetic: a
float32 product finds the two nearest centroids, and where their distances differ by less than its
rounding could (Higham, Accuracy and Stability, 2nd ed., ch. 3) the row is decided in float64, the
lowest index among equals. Sums are of integers: rows are rounded to multiples of a power of two, so
that addition has no order, a moved row can be taken out of its old sum exactly, and ranks are
joined by a plain all-reduce.

Lloyd's iterations skip rows that Hamerly's bounds (SDM 2010) prove to stay; the products are made
in tiles that fit the cache, each reduced to its two smallest before the next. Shapes: N rows of
this process, D features, K centroids.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from eosin.launch.process import World

BLOCK_ROWS = 8192
"""Rows that are held in float32 at a time."""
TILE_ROWS, TILE_CENTROIDS = 512, 1024
"""Of a product on a CPU: 2 MB of distances."""
DEVICE_TILE = 1 << 27
"""Distances of a product on a GPU."""
MANTISSA_BITS = 24
"""Rows are rounded to so many bits below their largest magnitude, float32's own precision."""
ROUNDING = 2.0**-24
"""Unit roundoff of float32."""


class Points(Protocol):
    """The rows of this process: a run of the rows of all processes, in the order of the ranks."""

    n_rows: int
    """N."""
    n_total: int
    """Of all processes."""
    dim: int
    """D."""
    device: torch.device
    largest: float
    """Largest magnitude of any value of any process."""

    def block(self, start: int, stop: int) -> Tensor:
        """Rows, float32 [stop - start, D] on the device; the same numbers at every call."""
        ...


@dataclass
class Assignment:
    """Which centroid each row is nearest to, and how surely."""

    labels: Tensor
    """int32 [N]."""
    upper: Tensor
    """float32 [N], at least the distance to the own centroid."""
    lower: Tensor
    """float32 [N], at most the distance to any other."""


@dataclass(frozen=True)
class Progress:
    """All that Lloyd's next iteration depends on."""

    centroids: Tensor
    """float32 [K, D]."""
    iterations: int = 0
    """Done."""
    inertia: float = math.inf
    """After the last one."""
    repaired: int = 0
    """Clusters that ran empty and were given the row farthest from its centroid."""
    is_last: bool = False
    """Whether the last iteration gained too little for another."""


@dataclass(frozen=True)
class Clustering:
    """Where Lloyd's iterations ended."""

    centroids: Tensor
    """float32 [K, D]."""
    labels: Tensor
    """int32 [N], nearest of `centroids`."""
    counts: Tensor
    """int64 [K], rows of all processes."""
    inertia: float
    """Sum of squared distances of all rows to the mean of their cluster."""
    progress: Progress


def lloyd(
    points: Points,
    begin: Progress,
    *,
    iterations: int,
    tolerance: float,
    world: World,
    save: Callable[[Progress], None] = lambda progress: None,
) -> Clustering:
    """Lloyd's iterations until they gain little.

    Args:
        points: the rows of this process.
        begin: where to go on, equal on every rank.
        iterations: at most so many in all, each an assignment and an update.
        tolerance: ends when an iteration lowers the inertia by less than this share of it.
        world: who shares the rows.
        save: called on every rank after each iteration; going on from what it was given ends where
            an uninterrupted call does.

    Raises:
        ValueError: there are fewer rows than centroids.
    """
    if points.n_total < len(begin.centroids):
        raise ValueError(f"{points.n_total} rows cannot have {len(begin.centroids)} clusters")
    sums = _Sums(points, len(begin.centroids), world)
    assignment = _unassigned(points)
    progress = begin
    while progress.iterations < iterations and not progress.is_last:
        before = progress.centroids
        _assign(points, before, assignment, sums)
        repaired = _repair(points, before, assignment, sums, world)
        centroids, inertia = sums.means(before), sums.inertia()
        _loosen(assignment, (centroids - before).double().square().sum(1).sqrt())
        progress = Progress(
            centroids=centroids,
            iterations=progress.iterations + 1,
            inertia=inertia,
            repaired=progress.repaired + repaired,
            is_last=world.agreed(progress.inertia - inertia <= tolerance * inertia),
        )
        save(progress)
    _assign(points, progress.centroids, assignment, sums)  # the labels of these centroids
    return Clustering(
        centroids=progress.centroids,
        labels=assignment.labels,
        counts=sums.counts,
        inertia=sums.inertia(),
        progress=progress,
    )


def assign(points: Points, centroids: Tensor) -> Tensor:
    """The nearest centroid of each row, int32 [N]: the lowest among equals."""
    assignment = _unassigned(points)
    for start, stop in spans(points.n_rows):
        rows = points.block(start, stop)
        label, _, _ = nearest(rows, centroids)
        assignment.labels[start:stop] = label
    return assignment.labels


def distances(points: Points, centroids: Tensor, labels: Tensor) -> Tensor:
    """L2 distance of each row to its centroid, float32 [N], by differences in float64."""
    found = torch.empty(points.n_rows, dtype=torch.float32, device=points.device)
    for start, stop in spans(points.n_rows):
        own = centroids[labels[start:stop].long()].double()
        found[start:stop] = (points.block(start, stop).double() - own).square().sum(1).sqrt()
    return found


def nearest(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest centroid in exact arithmetic, and bounds on the distances around it.

    Args:
        rows: float32 [n, D].
        centroids: float32 [K, D].

    Returns:
        Labels int32 [n]; float32 [n], not less than the distance to it; float32 [n], not more than
        that to any other (infinite where there is no other).
    """
    half_norms = centroids.double().square().sum(1) / 2  # [K]
    squares = rows.double().square().sum(1)  # [n]
    first, second, label = two_smallest(rows, centroids, half_norms.float())
    # |computed - true| of |c|²/2 - x·c, by the bound on inner products, doubled for the addition
    gamma = 2 * (rows.shape[1] + 2) * ROUNDING
    largest = half_norms.mul(2).sqrt().max()
    error = gamma * (squares.sqrt() * largest + largest**2)  # [n]
    close = torch.nonzero(second - first <= 2 * error).ravel()
    low, high = second.double() - error, first.double() + error
    for some in close.split(max(1, DEVICE_TILE // (8 * len(centroids)))):
        exact = half_norms - rows[some].double() @ centroids.double().T  # [f, K]
        best = exact.min(1).values
        equal = exact <= (best + 1e-13 * (squares[some] + largest**2))[:, None]
        label[some] = equal.int().argmax(1).to(torch.int32)
        exact.scatter_(1, label[some].long()[:, None], math.inf)
        low[some], high[some] = exact.min(1).values, best
    upper = (2 * high + squares).clamp_min_(0).sqrt_()
    lower = (2 * low + squares).clamp_min_(0).sqrt_()
    return label, (upper * (1 + 1e-6)).float(), (lower * (1 - 1e-6)).float()


def two_smallest(
    rows: Tensor, centroids: Tensor, half_norms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The two smallest of |c|²/2 - x·c as float32 finds them.

    Args:
        rows: float32 [n, D].
        centroids: float32 [K, D].
        half_norms: float32 [K], |c|²/2.

    Returns:
        float32 [n] each (the second infinite where K is 1), and the first's index, int32 [n].
    """
    n, k = len(rows), len(centroids)
    on_cpu = rows.device.type == "cpu"
    step_k = min(k, TILE_CENTROIDS if on_cpu else DEVICE_TILE)
    step_n = TILE_ROWS if on_cpu else max(1, DEVICE_TILE // step_k)
    first = torch.full((n,), math.inf, device=rows.device)
    second, label = first.clone(), torch.zeros(n, dtype=torch.int32, device=rows.device)
    for start in range(0, n, step_n):
        span = slice(start, start + step_n)
        for left in range(0, k, step_k):
            some = centroids[left : left + step_k]
            scores = torch.addmm(half_norms[left : left + step_k], rows[span], some.T, alpha=-1)
            # numpy's argmin is vectorised on a CPU, torch's is ten times slower there
            index = torch.from_numpy(scores.numpy().argmin(1)) if on_cpu else scores.argmin(1)
            best = scores.gather(1, index[:, None])
            scores.scatter_(1, index[:, None], math.inf)
            runner_up = scores.amin(1)
            best = best[:, 0]
            better = best < first[span]
            second[span] = torch.where(
                better, torch.minimum(first[span], runner_up), torch.minimum(second[span], best)
            )
            label[span] = torch.where(better, (index + left).to(torch.int32), label[span])
            first[span] = torch.minimum(first[span], best)
    return first, second, label


class _Sums:
    """Sums and counts of the clusters in whole numbers, over all processes."""

    def __init__(self, points: Points, k: int, world: World) -> None:
        self.world = world
        exponent = MANTISSA_BITS - math.frexp(points.largest or 1.0)[1]
        self.scale = 2.0**exponent
        device = points.device
        self.sums = torch.zeros(k, points.dim, dtype=torch.int64, device=device)
        self.counts = torch.zeros(k, dtype=torch.int64, device=device)
        self._delta, self._delta_counts = torch.zeros_like(self.sums), torch.zeros_like(self.counts)
        squares = 0
        for start, stop in spans(points.n_rows):
            whole = (points.block(start, stop) * self.scale).round_().to(torch.int64)
            each = whole.square().sum(1)  # under 2^63 up to 32,768 features
            squares += (int((each >> 32).sum()) << 32) + int((each & 0xFFFFFFFF).sum())
        self.squares = sum(int(text) for text in world.gather(str(squares)))
        """Of all rows, a whole number."""

    def move(self, rows: Tensor, old: Tensor, new: Tensor) -> None:
        """Takes rows [n, D] out of the clusters `old` [n] (-1: of none) and into `new`."""
        whole = (rows * self.scale).round_().to(torch.int32).to(torch.int64)
        ones = torch.ones_like(new, dtype=torch.int64)
        self._delta.index_add_(0, new, whole)
        self._delta_counts.index_add_(0, new, ones)
        had = old >= 0
        self._delta.index_add_(0, old[had], whole[had], alpha=-1)
        self._delta_counts.index_add_(0, old[had], ones[had], alpha=-1)

    def share(self) -> None:
        """Adds what moved in every process."""
        if self.world.group is not None:
            dist.all_reduce(self._delta, group=self.world.group)
            dist.all_reduce(self._delta_counts, group=self.world.group)
        self.sums += self._delta
        self.counts += self._delta_counts
        self._delta.zero_()
        self._delta_counts.zero_()

    def means(self, centroids: Tensor) -> Tensor:
        """The mean of every cluster, float32 [K, D]; an empty one keeps its centroid."""
        means = self.sums.double() / (self.scale * self.counts.clamp_min(1))[:, None]
        return torch.where((self.counts > 0)[:, None], means.float(), centroids)

    def inertia(self) -> float:
        """Squared distances of all rows to the means of their clusters: Σ|x|² - Σ|s|²/n."""
        around = self.sums.double().square().sum(1) / self.counts.clamp_min(1)
        return max(0.0, self.squares - math.fsum(around.tolist())) / self.scale**2


def _assign(points: Points, centroids: Tensor, assignment: Assignment, sums: _Sums) -> None:
    """Assigns every row that may have moved, and moves it in the sums."""
    for start, stop in spans(points.n_rows):
        upper, lower = assignment.upper[start:stop], assignment.lower[start:stop]
        maybe = torch.nonzero(upper >= lower).ravel()
        if not len(maybe):
            continue
        block = points.block(start, stop)
        labels = assignment.labels[start:stop]
        known = labels[maybe] >= 0
        if bool(known.all()):
            own = centroids[labels[maybe].long()]
            exact = (block[maybe] - own).square_().sum(1).sqrt_()
            upper[maybe] = exact * (1 + (points.dim + 8) * ROUNDING)  # of each sum, and of the rest
            maybe = maybe[upper[maybe] >= lower[maybe]]
            if not len(maybe):
                continue
        rows = block if len(maybe) == len(block) else block[maybe]
        new, upper[maybe], lower[maybe] = nearest(rows, centroids)
        old = labels[maybe]
        changed = torch.nonzero(new != old).ravel()
        sums.move(rows[changed], old[changed].long(), new[changed].long())
        labels[maybe] = new
    sums.share()


def _loosen(assignment: Assignment, steps: Tensor) -> None:
    """Keeps the bounds true after the centroids moved by `steps` [K]."""
    steps = (steps * (1 + 1e-6)).float()
    assignment.upper += steps[assignment.labels.long()]
    largest = steps.topk(min(2, len(steps))).values
    if len(steps) < 2:
        return
    farthest = assignment.labels == int(steps.argmax())
    assignment.lower -= torch.where(farthest, largest[1], largest[0])
    assignment.upper *= 1 + 4 * ROUNDING
    assignment.lower -= 4 * ROUNDING * assignment.lower.abs()


def _repair(
    points: Points, centroids: Tensor, assignment: Assignment, sums: _Sums, world: World
) -> int:
    """Gives each empty cluster the row that is farthest from its centroid; how many there were."""
    empty = torch.nonzero(sums.counts == 0).ravel()
    if not len(empty):
        return 0
    far = distances(points, centroids, assignment.labels)
    crowd = sums.counts[assignment.labels.long()] > len(empty)  # it must not run empty in turn
    order = np.lexsort((np.arange(points.n_rows), -torch.where(crowd, far, -1.0).cpu().numpy()))
    mine = [(float(far[row]), row) for row in order[: len(empty)].tolist() if crowd[row]]
    found = sorted(
        (-distance, rank, row)
        for rank, text in enumerate(world.gather(" ".join(f"{d.hex()} {row}" for d, row in mine)))
        for distance, row in _pairs(text)
    )
    for cluster, (_, rank, row) in zip(empty.tolist(), found, strict=False):
        if rank == world.rank:
            new = torch.tensor([cluster], device=points.device)
            old = assignment.labels[row : row + 1].long()
            sums.move(points.block(row, row + 1), old, new)
            assignment.labels[row] = cluster
            assignment.upper[row], assignment.lower[row] = math.inf, 0.0
    sums.share()
    return min(len(empty), len(found))


def _pairs(text: str) -> list[tuple[float, int]]:
    words = text.split()
    pairs = zip(words[::2], words[1::2], strict=True)
    return [(float.fromhex(distance), int(row)) for distance, row in pairs]


def _unassigned(points: Points) -> Assignment:
    shape, device = (points.n_rows,), points.device
    return Assignment(
        labels=torch.full(shape, -1, dtype=torch.int32, device=device),
        upper=torch.full(shape, math.inf, device=device),
        lower=torch.zeros(shape, device=device),
    )


def spans(n_rows: int) -> list[tuple[int, int]]:
    """Start and stop of the blocks of so many rows."""
    return [(start, min(start + BLOCK_ROWS, n_rows)) for start in range(0, n_rows, BLOCK_ROWS)]
