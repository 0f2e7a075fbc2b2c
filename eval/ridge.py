"""Ridge regressions of many targets on frozen features.

``ridge/hest-pca256@1``
    HEST's: features standardised, their first 256 principal components (or as many as there are),
    no intercept, alpha = 100 / (components · targets), fitted on train and val (mahmoodlab/HEST
    afd42c3, ``bench/trainer.py``). Targets are not centred, so predictions of targets far from zero
    are off by their mean; the correlation that HEST reports does not see it.
``ridge/full@1``
    all features, standardised, with an intercept; alpha of 19 values by the mean correlation on
    val, then fitted on train and val.

The two rank encoders differently (HEST issues 140 and 144): never compare across them. Shapes:
N tiles, D features, T targets.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from eosin.eval.metrics import SummedMetric

HEST = "ridge/hest-pca256@1"
FULL = "ridge/full@1"
COMPONENTS = 256
ALPHAS = tuple(float(a) for a in 10.0 ** np.linspace(-3, 6, 19))

PROTOCOLS = {
    HEST: "standardised, 256 principal components, ridge without intercept, alpha = 100 / "
    "(components · targets), on train and val (HEST)",
    FULL: "standardised, ridge; alpha of 19 values by mean correlation on val, then fitted on "
    "train and val",
}

Floats = npt.NDArray[np.float64]


def predict(
    protocol: str, features: Floats, targets: Floats, is_val: npt.NDArray[np.bool_], asked: Floats
) -> tuple[Floats, dict[str, float]]:
    """Predictions [M, T] for features `asked` [M, D], and what was chosen.

    Args:
        protocol: of `PROTOCOLS`.
        features: of train and val, [N, D].
        targets: of train and val, [N, T].
        is_val: [N].
        asked: of the test tiles; their targets are not known here.
    """
    if protocol == HEST:
        return _hest(features, targets, asked)
    on_val = _paths(features[~is_val], targets[~is_val], features[is_val], ALPHAS)
    sums = [moments(targets[is_val], p, np.zeros(int(is_val.sum()), np.int64), 1) for p in on_val]
    scores = [float(mean_correlation(s)[0]) for s in sums]
    best = ALPHAS[int(np.argmax(scores))]
    return _paths(features, targets, asked, (best,))[0], {"alpha": best}


def _hest(features: Floats, targets: Floats, asked: Floats) -> tuple[Floats, dict[str, float]]:
    x, z = _standardised(features, asked)
    _, _, axes = np.linalg.svd(x, full_matrices=False)
    axes = axes[: min(COMPONENTS, len(axes))]
    x, z = x @ axes.T, z @ axes.T
    alpha = 100 / (x.shape[1] * targets.shape[1])
    weights = np.linalg.solve(x.T @ x + alpha * np.eye(x.shape[1]), x.T @ targets)
    return z @ weights, {"components": float(x.shape[1])}


def _paths(
    features: Floats, targets: Floats, asked: Floats, alphas: Sequence[float]
) -> list[Floats]:
    """Predictions for every alpha, from one decomposition."""
    x, z = _standardised(features, asked)
    mean = targets.mean(axis=0)
    u, singular, axes = np.linalg.svd(x, full_matrices=False)
    loads = u.T @ (targets - mean)  # [R, T]
    turned = z @ axes.T
    return [mean + (turned * (singular / (singular**2 + alpha))) @ loads for alpha in alphas]


def _standardised(features: Floats, asked: Floats) -> tuple[Floats, Floats]:
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    deviation[deviation == 0] = 1
    return (features - mean) / deviation, (asked - mean) / deviation


def moments(
    targets: Floats, predictions: Floats, groups: npt.NDArray[np.int64], n_groups: int
) -> Floats:
    """1, y, p, y², p², y p and (y - p)² of tiles [N, T] summed by group: [G, T, 7]."""
    ones = np.ones_like(targets)
    parts = (
        ones, targets, predictions, targets**2, predictions**2, targets * predictions,
        (targets - predictions) ** 2,
    )  # fmt: skip
    sums = np.zeros((n_groups, targets.shape[1], len(parts)))
    np.add.at(sums, groups, np.stack(parts, axis=2))
    return sums


def mean_correlation(sums: Floats) -> Floats:
    """Pearson's correlation, mean over targets, [..., T, 7] → [...]; a constant counts as 0."""
    mean: Floats = correlations(sums).mean(axis=-1)
    return mean


def correlations(sums: Floats) -> Floats:
    """Pearson's correlation of each target, [..., T, 7] → [..., T]."""
    n, y, p, yy, pp, yp, _ = np.moveaxis(sums, -1, 0)
    spread = (n * yy - y**2).clip(min=0) * (n * pp - p**2).clip(min=0)
    found: Floats = np.divide(
        n * yp - y * p, np.sqrt(spread), out=np.zeros_like(n), where=spread > 1e-12 * n**4
    )
    return found


def mean_r2(sums: Floats) -> Floats:
    """The coefficient of determination, mean over targets; a constant target is left out."""
    n, y, _, yy, _, _, errors = np.moveaxis(sums, -1, 0)
    total = yy - y**2 / n
    there = total > 1e-12 * n
    ratio = np.divide(errors, total, out=np.ones_like(total), where=there)
    value: Floats = ((1 - ratio) * there).sum(axis=-1) / there.sum(axis=-1).clip(min=1)
    return value


def metrics_of(sums: Floats) -> dict[str, SummedMetric]:
    """Correlation and R² of sums [G, T, 7]."""
    return {
        "pearson": SummedMetric(sums, mean_correlation),
        "r2": SummedMetric(sums, mean_r2),
    }
