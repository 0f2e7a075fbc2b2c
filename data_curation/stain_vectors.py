"""The two stains of a slide: their colours as optical densities, estimated from its pixels."""

import cv2
import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float64]
"""[2, 3]: unit optical densities in R, G, B of haematoxylin (or what stands for it) and eosin."""

HAEMATOXYLIN_EOSIN: Vectors = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])
"""Ruifrok and Johnston, AQCH 2001."""

STAINS: NDArray[np.float64] = np.array([*HAEMATOXYLIN_EOSIN, [0.268, 0.570, 0.776]])
"""And DAB, as published, [3, 3]."""
_UNMIX = np.linalg.inv(STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True))

FEWEST_PIXELS = 100
"""Of fewer stained pixels nothing is estimated."""
FAINTEST = 0.15
"""Mean optical density per channel from which a pixel counts as stained: beta of the paper, in
natural logarithms."""
_SPARSITY = 0.1
_PERCENTILE = 1.0
"""Alpha of the paper."""


def unmix_haematoxylin(density: NDArray[np.float32]) -> NDArray[np.float32]:
    """Amount of haematoxylin beside eosin and DAB in each pixel, float32 [h, w].

    Args:
        density: optical densities, float32 [h, w, 3].
    """
    return np.asarray(cv2.transform(density, _UNMIX[:, :1].T), np.float32)


def macenko(density: NDArray[np.floating]) -> Vectors | None:
    """The stain vectors by Macenko's method; None where too few pixels are stained.

    Macenko et al., "A method for normalizing histology slides for quantitative analysis", ISBI
    2009: in the plane of the two leading eigenvectors of the densities' covariance, the extreme
    directions (1st and 99th percentile of the angle) are the stains; the one with more red density
    is haematoxylin.

    Args:
        density: optical densities of pixels, [N, 3], natural logarithms, glass 0.
    """
    stained = density[density.mean(1) > FAINTEST].astype(np.float64)
    if len(stained) < FEWEST_PIXELS:
        return None
    centred = stained - stained.mean(0)
    _, directions = np.linalg.eigh(centred.T @ centred)
    plane = directions[:, [2, 1]]
    plane *= np.where(plane.sum(0) < 0, -1, 1)
    along = stained @ plane
    angle = np.sort(np.arctan2(along[:, 1], along[:, 0]))
    edge = round(_PERCENTILE / 100 * (len(angle) - 1))
    extremes = angle[[edge, -1 - edge]]
    found = np.stack([np.cos(extremes), np.sin(extremes)], 1) @ plane.T
    found = np.clip(found, 0, None)
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)
    return np.asarray(found if found[0, 0] >= found[1, 0] else found[::-1], np.float64)


def vahadane(density: NDArray[np.floating], start: Vectors, seed: int = 0) -> Vectors | None:
    """The stain vectors by sparse non-negative dictionary learning; None where macenko gives none.

    Vahadane et al., "Structure-preserving color normalization and sparse stain separation for
    histological images", IEEE TMI 2016, eq. 3 (lambda 0.1), by scikit-learn. It starts from
    `start`, Macenko's estimate: from a random start the result changes from run to run.

    Args:
        density: optical densities of pixels, [N, 3].
        start: [2, 3].
        seed: of the order of its batches.
    """
    from sklearn.decomposition import MiniBatchDictionaryLearning  # slow to import, seldom needed

    stained = density[density.mean(1) > FAINTEST].astype(np.float64)
    if len(stained) < FEWEST_PIXELS:
        return None
    learner = MiniBatchDictionaryLearning(
        n_components=2,
        alpha=_SPARSITY,
        max_iter=10,
        batch_size=256,
        dict_init=np.maximum(start, 1e-3),
        fit_algorithm="cd",
        positive_code=True,
        positive_dict=True,
        random_state=seed,
    )
    found = np.asarray(learner.fit(stained).components_, np.float64)
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)
    return found if found[0, 0] >= found[1, 0] else found[::-1]


def concentrations(density: NDArray[np.floating], vectors: Vectors) -> NDArray[np.float64]:
    """Amounts of both stains in pixels, [N, 2], by least squares: OD = amounts · vectors.

    Args:
        density: optical densities, [N, 3].
        vectors: [2, 3].
    """
    return np.asarray(density @ np.linalg.pinv(vectors), np.float64)
