"""What features say of an encoder without any label.

``rankme``
    exp of the entropy of the singular values' shares, of the features as they are, not centred
    (Garrido et al. 2023, eq. 1; `diagnostics` of the training): how many directions are in use.
    Centred or squared variants that go by the same name give other numbers.
``alpha``
    minus the slope of log eigenvalue against log rank of the covariance, between ranks 11 and 100
    or half of what there is (α-ReQ, Agrawal et al. 2022): near 1 is best, larger is a spectrum that
    falls too fast.
``mean_cosine``
    of pairs of different tiles: near 1, all tiles look alike to the encoder.
``uniformity``
    log of the mean of exp(-2 |a - b|²) over pairs of unit features (Wang and Isola 2020, eq. 3);
    lower is more spread out; 0 is collapse.

An encoder counts as collapsed where ``rankme`` is below 2 or ``mean_cosine`` above 0.98: the second
is what a slide encoder fed with wrong coordinates showed on every slide while no error was raised
(KatherLab/STAMP issue 159). Shapes: N tiles, D features, V views.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from eosin.pretrain.diagnostics import rankme

MOST_TILES = 10_000
"""Spectra and pairs are those of so many tiles at most, evenly spaced."""
COLLAPSED_RANK = 2.0
COLLAPSED_COSINE = 0.98

Features = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class LabelFree:
    """See the module."""

    rankme: float
    alpha: float | None
    """None where fewer than 24 directions are in use: there is no slope to take."""
    mean_cosine: float
    uniformity: float
    collapsed: bool


def label_free(features: Features) -> LabelFree:
    """All figures of features [N, D], N at least 2."""
    chosen = features[_evenly(len(features))].astype(np.float64)
    rank = float(rankme(torch.from_numpy(chosen)))
    cosine, spread = _pairs(chosen)
    return LabelFree(
        rankme=rank,
        alpha=alpha(chosen),
        mean_cosine=cosine,
        uniformity=spread,
        collapsed=rank < COLLAPSED_RANK or cosine > COLLAPSED_COSINE,
    )


def alpha(features: npt.NDArray[np.float64]) -> float | None:
    """The exponent of the spectrum of the covariance of [N, D]."""
    centred = features - features.mean(axis=0)
    eigenvalues = np.linalg.svd(centred, compute_uv=False) ** 2
    in_use = int((eigenvalues > 1e-12 * eigenvalues[0]).sum()) if eigenvalues[0] > 0 else 0
    last = min(100, in_use // 2)
    if last < 12:
        return None
    ranks = np.arange(11, last + 1) if last > 22 else np.arange(1, last + 1)
    slope = np.polyfit(np.log(ranks), np.log(eigenvalues[ranks - 1]), 1)[0]
    return float(-slope)


def lidar(views: npt.NDArray[np.float64], floor: float = 1e-4) -> float:
    """LiDAR (Thilak et al. 2024): the effective rank of what tells tiles apart despite the views.

    Args:
        views: features of V ≥ 2 views (augmentations) of N tiles, [N, V, D].
        floor: added to the diagonal of the covariance within tiles, which N · V samples may not
            fill.

    Returns:
        exp of the entropy of the eigenvalues of W^-½ B W^-½, with B the covariance of the tiles'
        means and W that of the views around them.
    """
    means = views.mean(axis=1)
    between = np.cov(means, rowvar=False, ddof=1)
    around = (views - means[:, None]).reshape(-1, views.shape[-1])
    within = around.T @ around / (len(means) * (views.shape[1] - 1))
    values, vectors = np.linalg.eigh(within + floor * np.eye(len(within)))
    whitening = (vectors / np.sqrt(values)) @ vectors.T
    spectrum = np.linalg.eigvalsh(whitening @ between @ whitening).clip(min=0)
    shares = spectrum / max(spectrum.sum(), 1e-300)
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _pairs(features: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Mean cosine and uniformity over all pairs of different rows."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    n = len(unit)
    cosines = float((np.square(unit.sum(axis=0)).sum() - np.square(unit).sum()) / (n * (n - 1)))
    total = 0.0
    for start in range(0, n, 1024):
        block = unit[start : start + 1024]
        apart = (2 - 2 * (block @ unit.T)).clip(min=0)
        close = np.exp(-2 * apart)
        close[np.arange(len(block)), start + np.arange(len(block))] = 0
        total += float(close.sum())
    return cosines, float(np.log(total / (n * (n - 1))))


def _evenly(n: int) -> npt.NDArray[np.intp]:
    """At most `MOST_TILES` rows of n."""
    return np.unique(np.linspace(0, n - 1, min(n, MOST_TILES)).round().astype(np.intp))
