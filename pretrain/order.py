"""Which record stands where: the order of training as a pure function of (seed, epoch, position).

No permutation is stored. A record's place is found by a keyed Feistel network over the smallest
square of at least n cells; what lands outside the n records is sent through again until it lands
inside (cycle walking; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). So an
epoch over a billion tiles costs no memory, and any position can be asked for alone.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 8
"""Of the Feistel network; four make it pseudo-random (Luby and Rackoff, 1988), eight are plenty."""

ORDER_STREAM = 0x6F72646572
"""Keeps the keys of the order apart from every other use of the same seed ("order" in ASCII)."""


def sample_at(seed: int, epoch: int, position: ArrayLike, n: int) -> NDArray[np.int64]:
    """Rows of the index at `position`, in the order of one epoch.

    Args:
        seed: of the run; not negative.
        epoch: from 0.
        position: one or many places in the epoch, each in [0, n).
        n: records in the index.

    Returns:
        int64, of the shape of `position`. Over all positions each row comes exactly once.

    Raises:
        ValueError: a position lies outside [0, n).
    """
    asked = np.asarray(position, np.int64)
    if asked.size and (asked.min() < 0 or asked.max() >= n):
        raise ValueError(f"position must lie in [0, {n}), not {asked.min()} … {asked.max()}")
    entropy = np.random.SeedSequence((seed, epoch, ORDER_STREAM))
    keys = np.asarray(entropy.generate_state(ROUNDS, np.uint64), np.uint64)
    side = np.uint64(math.isqrt(max(n - 1, 0)) + 1)  # the least one with side² >= n
    cells = _permute(asked.astype(np.uint64).reshape(-1), keys, side)
    while (outside := cells >= np.uint64(n)).any():
        cells[outside] = _permute(cells[outside], keys, side)
    return cells.astype(np.int64).reshape(asked.shape)


def epoch_order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """All rows of one epoch in their order: int64 [n], a permutation of 0 … n-1."""
    return sample_at(seed, epoch, np.arange(n), n)


def locate(step: int, batch_size: int, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Epoch and position of each sample of a step, both int64 [B].

    Epochs follow one another without a gap: a batch may straddle two, and no sample is dropped.
    """
    running = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epoch, position = np.divmod(running, n)
    return epoch, position


def _permute(
    cells: NDArray[np.uint64], keys: NDArray[np.uint64], side: np.uint64
) -> NDArray[np.uint64]:
    """One pass of the network: a bijection of [0, side²)."""
    left, right = np.divmod(cells, side)
    for key in keys:
        left, right = right, (left + _mix(right + key) % side) % side
    return left * side + right


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): each bit in stirs all bits out."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
