"""Where k-means starts: k-means|| on a sample, and k-means++ on what it found.

k-means|| (Bahmani et al., VLDB 2012) draws about K rows a round by D², so that the distances of a
round are one matrix product; the classical k-means++ needs K passes instead. Here each candidate is
then replaced by the mean of its rows and weighted by their number, which makes of the sample a set
of some thousand weighted points; greedy k-means++ (as in scikit-learn: the best of 2 + ln K draws)
and weighted iterations of Lloyd on those cost next to nothing.
"""

import math

import numpy as np
import torch
from torch import Tensor

from eosin.data_curation.kmeans import Points, spans, two_smallest

ROUNDS = 5
"""Of draws by D², the first uniform draw included; each of about K candidates."""
WEIGHTED_ITERATIONS = 15
"""Of Lloyd on the weighted candidates."""
TRIALS_UP_TO, MOST_TRIALS = 2000, 10
"""So many starts on the weighted candidates, the best of which is taken, as keep clusters times
starts within the first: with few clusters a single misplaced one is dear."""


def start_centroids(points: Points, k: int, seed: int) -> Tensor:
    """`k` centroids to start from, float32 [K, D]: a function of the points, `k` and `seed`.

    Args:
        points: a sample, all of it in this process.
        k: at most as many as there are points.
        seed: of all draws.
    """
    if points.n_rows <= 2 * k:
        rows = points.block(0, points.n_rows)
        ones = torch.ones(len(rows), device=rows.device)
        return plus_plus(rows, ones, k, seed)
    candidates, labels = _oversample(points, k, seed)
    means, weights = _means(points, labels, len(candidates))
    if len(means) < k:  # too few different rows: the candidates stand for themselves
        means, weights = candidates, torch.ones(len(candidates), device=candidates.device)
    best, least = torch.zeros(0, device=means.device), math.inf
    for trial in range(min(max(1, TRIALS_UP_TO // k), MOST_TRIALS)):
        centroids = plus_plus(means, weights, k, seed + (trial << 32))
        for _ in range(WEIGHTED_ITERATIONS):
            nearest = _nearest(means, centroids)[1]
            centroids = _weighted_means(means, weights, nearest, centroids)
        inertia = float((_nearest(means, centroids)[0].double() * weights).sum())
        if inertia < least:
            best, least = centroids, inertia
    return best


def plus_plus(rows: Tensor, weights: Tensor, k: int, seed: int) -> Tensor:
    """Greedy k-means++ on weighted rows, float32 [n, D] and [n]: `k` of them, [k, D].

    Random numbers come from (seed, number of the centroid) alone. Of equal candidates the first is
    taken; where every row left lies on a centroid, the rest are rows in their order.
    """
    n, trials = len(rows), 2 + int(math.log(k))
    squares = rows.square().sum(1)
    chosen: list[int] = []
    nearest = torch.ones(n, device=rows.device)  # the first is drawn by weight alone
    for number in range(k):
        steps = (nearest * weights).double().cumsum(0)
        total = float(steps[-1])
        if total <= 0:
            chosen += [row % n for row in range(number, k)]
            break
        draws = _random(seed, number, 1 if number == 0 else trials) * total
        candidates = torch.searchsorted(steps, torch.from_numpy(draws).to(rows.device), right=True)
        candidates.clamp_max_(n - 1)
        apart = torch.addmm(squares, rows[candidates], rows.T, alpha=-2)  # [T, n]
        apart.add_(squares[candidates][:, None]).clamp_min_(0)
        apart[torch.arange(len(candidates), device=rows.device), candidates] = 0
        closer = apart if number == 0 else torch.minimum(apart, nearest)
        best = int((closer @ weights).argmin())
        chosen.append(int(candidates[best]))
        nearest = closer[best]
    return rows[torch.tensor(chosen, device=rows.device)]


def _oversample(points: Points, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Candidates [M, D] of all rounds, and the nearest of them to each row, int64 [N]."""
    device, n = points.device, points.n_rows
    drawn = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(n)[:k]
    candidates = _pick(points, np.sort(drawn))
    distance = torch.full((n,), math.inf, device=device)
    labels = torch.zeros(n, dtype=torch.int64, device=device)
    known = 0
    for round_ in range(ROUNDS):
        fresh = candidates[known:]
        for start, stop in spans(n):
            found, label = _nearest(points.block(start, stop), fresh)
            closer = found < distance[start:stop]
            labels[start:stop] = torch.where(closer, label + known, labels[start:stop])
            distance[start:stop] = torch.minimum(found, distance[start:stop])
        known = len(candidates)
        total = float(distance.sum(dtype=torch.float64))
        if round_ == ROUNDS - 1 or total <= 0:
            break
        chance = distance.double() * (k / total)
        hit = torch.from_numpy(_random(seed, round_ + 1, n)).to(device) < chance
        candidates = torch.cat([candidates, _pick(points, np.flatnonzero(hit.cpu().numpy()))])
    return candidates, labels


def _nearest(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance to the nearest centroid, float32 [n], and its index, int64 [n]."""
    if not len(centroids):
        infinite = torch.full((len(rows),), math.inf, device=rows.device)
        return infinite, torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    first, _, label = two_smallest(rows, centroids, centroids.square().sum(1) / 2)
    return (2 * first + rows.square().sum(1)).clamp_min_(0), label.long()


def _means(points: Points, labels: Tensor, n_candidates: int) -> tuple[Tensor, Tensor]:
    """The mean of each candidate's rows and their number, without candidates that have none."""
    sums = torch.zeros(n_candidates, points.dim, device=points.device)
    for start, stop in spans(points.n_rows):
        sums.index_add_(0, labels[start:stop], points.block(start, stop))
    counts = torch.bincount(labels, minlength=n_candidates).float()
    has = counts > 0
    return sums[has] / counts[has][:, None], counts[has]


def _weighted_means(rows: Tensor, weights: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """The weighted mean of each centroid's rows; one without rows stays."""
    sums = torch.zeros_like(centroids).index_add_(0, labels, rows * weights[:, None])
    total = torch.zeros(len(centroids), device=rows.device).index_add_(0, labels, weights)
    return torch.where((total > 0)[:, None], sums / total.clamp_min(1e-30)[:, None], centroids)


def _pick(points: Points, rows: np.ndarray) -> Tensor:
    """These rows, float32 [n, D]."""
    found = [torch.zeros(0, points.dim, device=points.device)]
    for start, stop in spans(points.n_rows):
        inside = rows[(rows >= start) & (rows < stop)] - start
        if len(inside):
            found.append(points.block(start, stop)[torch.from_numpy(inside).to(points.device)])
    return torch.cat(found)


def _random(seed: int, number: int, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1) of (seed, number)."""
    return np.random.Generator(np.random.Philox(key=[seed, number])).random(count)
