"""Colour descriptors: what a tile's colours alone tell, without a network.

They are the floors of every table of scores. On NCT-CRC-HE-100K a mean colour alone passes 50 %
accuracy and a colour histogram 82 % (arXiv 2409.11546); an encoder that does not beat them has
learnt no architecture of tissue.
"""

import numpy as np
import numpy.typing as npt

HISTOGRAM_BINS = 8
"""Bins per channel of the joint histogram: 8³ = 512 features."""


def mean_colour(tile: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Mean red, green and blue of an RGB tile [H, W, 3], in [0, 1]; shape [3]."""
    mean: npt.NDArray[np.float64] = tile.reshape(-1, 3).mean(axis=0) / 255
    return mean.astype(np.float32)


def colour_histogram(tile: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Square roots of the joint RGB histogram's frequencies; shape [512], unit L2 norm.

    With the root, the L2 distance that probes measure is the Hellinger distance between the
    histograms: a stronger floor than raw frequencies, where the largest bins drown the others.
    """
    bins = tile.reshape(-1, 3).astype(np.int64) * HISTOGRAM_BINS // 256
    joint = (bins[:, 0] * HISTOGRAM_BINS + bins[:, 1]) * HISTOGRAM_BINS + bins[:, 2]
    counts = np.bincount(joint, minlength=HISTOGRAM_BINS**3)
    return np.sqrt(counts / len(joint)).astype(np.float32)
