"""Permutations that are computed, not stored: where a place goes under a key, for many at once.

A keyed Feistel network permutes a rectangle of at least n cells, nearly a square; what lands
outside the n is sent through again until it lands inside (cycle walking; Black and Rogaway,
"Ciphers with arbitrary finite domains", 2002). Size and key may differ from element to element.
"""

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
"""Of the network, an even number. Four make it pseudo-random (Luby and Rackoff, 1988); eight are
plenty where there are more than a dozen cells."""

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""Step between the words of a SplitMix64 stream: 2^64 over the golden ratio, made odd."""

_HALF = np.uint64(32)
_STIRS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # of SplitMix64


def shuffle(
    places: NDArray[np.int64], sizes: NDArray[np.int64], keys: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """Where each place goes.

    Args:
        places: int64 [B], each in [0, its size).
        sizes: int64 [B], cells that are permuted, at most 2^52.
        keys: uint64 [B]; which permutation of the cells.

    Returns:
        int64 [B], each in [0, its size). All places of one size and key: each cell once.
    """
    bound = sizes.astype(np.uint64)
    height = np.sqrt(bound.astype(np.float64)).astype(np.uint64)
    height += height * height < bound  # the least one with height² >= size
    width = (bound + height - np.uint64(1)) // height
    cells = _network(places.astype(np.uint64), height, width, keys)
    outside = np.flatnonzero(cells >= bound)
    while outside.size:
        again = (part[outside] for part in (cells, height, width, keys))
        cells[outside] = _network(*again)
        outside = outside[cells[outside] >= bound[outside]]
    return cells.astype(np.int64)


def stir(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), a bijection of 64-bit words.

    Each bit in stirs all bits out. uint64 of any shape, left as it is.
    """
    words = words ^ (words >> np.uint64(30))
    words *= _STIRS[0]
    words ^= words >> np.uint64(27)
    words *= _STIRS[1]
    words ^= words >> np.uint64(31)
    return words


def seed_key(*entropy: int) -> int:
    """64 bits that follow from whole numbers, none negative; others for others."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def nth_key(key: int, n: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Word n of the SplitMix64 stream of a key, for n >= 0: different words for different n."""
    return stir(np.uint64(key) + (n.astype(np.uint64) + np.uint64(1)) * GOLDEN)


def _network(
    cells: NDArray[np.uint64],
    height: NDArray[np.uint64],
    width: NDArray[np.uint64],
    keys: NDArray[np.uint64],
) -> NDArray[np.uint64]:
    """One pass of the network: a bijection of [0, height · width), both below 2^32."""
    row, column = np.divmod(cells, width)
    keys = keys.copy()
    for _ in range(ROUNDS // 2):
        row = _turn(row, height, column + keys)
        keys += GOLDEN
        column = _turn(column, width, row + keys)
        keys += GOLDEN
    return np.asarray(row * width + column, np.uint64)


def _turn(
    places: NDArray[np.uint64], size: NDArray[np.uint64], words: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Places of a ring moved on by what the words, which are used up, say."""
    steps = words
    steps *= _STIRS[0]  # less than `stir`: the half that is kept is the one that is stirred
    steps ^= steps >> _HALF
    steps *= _STIRS[1]
    steps >>= _HALF
    steps *= size
    steps >>= _HALF  # uniform in [0, size), without a division
    steps += places
    # Modulo size: where it is below, the difference wraps around 2^64 and is the larger one.
    return np.asarray(np.minimum(steps, steps - size), np.uint64)
