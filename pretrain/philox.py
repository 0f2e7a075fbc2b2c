"""Random numbers by counter: any draw of a run on its own, and many at once.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC
2011, section 4.3 and table 2) maps a counter of 128 bits to 128 random ones under a key of 64. It
is a bijection under each key, so two counters never give the same block.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 10
"""Seven pass every test of TestU01; ten are the usual margin."""

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
"""M0 and M1 of Philox4x32 (table 2)."""

WEYL = (0x9E3779B9, 0xBB67AE85)
"""What is added to the two key words after each round: the golden ratio and the square root of 3,
less 1."""

MAX_BLOCKS = 256
"""Of a view: the low byte of the counter's last word."""

_WORD = 0xFFFFFFFF
_LONG = 0xFFFFFFFFFFFFFFFF


class Counters(NamedTuple):
    """The places of N views, each of which has `MAX_BLOCKS` blocks of four numbers of its own."""

    position: NDArray[np.int64]
    """[N], in [0, 2^63)."""
    epoch: NDArray[np.int64]
    """[N], in [0, 2^32)."""
    view: NDArray[np.int64]
    """[N], in [0, 2^24)."""
    key: tuple[int, int]
    """From `stream_key`."""

    def draw(self, blocks: Sequence[int]) -> NDArray[np.float64]:
        """The numbers of some blocks for every view: multiples of 2^-32 in [0, 1), [K, 4, N]."""
        counter = (
            self.position & _WORD,
            self.position >> 32,
            self.epoch,
            self.view * MAX_BLOCKS + np.asarray(blocks, np.int64)[:, None],
        )
        words = philox(counter, self.key).swapaxes(0, 1)
        return np.multiply(words, 2.0**-32, dtype=np.float64)

    def of(self, chosen: NDArray[np.int64]) -> "Counters":
        """Those of some of the views."""
        return Counters(self.position[chosen], self.epoch[chosen], self.view[chosen], self.key)


def stream_key(seed: int, stream: int) -> tuple[int, int]:
    """The key of one use of a seed: its two words of 32 bits.

    For one stream no two seeds share a key.

    Args:
        seed: in [0, 2^64).
        stream: names the use; in [0, 2^64).

    Raises:
        ValueError: one of them lies outside.
    """
    for name, value in (("seed", seed), ("stream", stream)):
        if not 0 <= value <= _LONG:
            raise ValueError(f"{name} must lie in [0, 2^64), not {value}")
    mixed = _split_mix((_split_mix(seed) + stream) & _LONG)
    return mixed & _WORD, mixed >> 32


def philox(counter: Sequence[ArrayLike], key: tuple[int, int]) -> NDArray[np.uint64]:
    """The random words of many counters.

    Args:
        counter: four words c0 … c3, each below 2^32, of shapes that broadcast to one, […].
        key: two words, each below 2^32.

    Returns:
        uint64 [4, …], each below 2^32.
    """
    words = np.stack(np.broadcast_arrays(*counter)).astype(np.uint64)
    c0, c1, c2, c3 = (words[place, ...] for place in range(4))
    shift, low = np.uint64(32), np.uint64(_WORD)
    m0, m1 = (np.uint64(multiplier) for multiplier in MULTIPLIERS)
    first, second = np.empty_like(c0), np.empty_like(c0)
    k0, k1 = key
    for _ in range(ROUNDS):  # (c0, c1, c2, c3) ← (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ …)
        np.multiply(c0, m0, out=first)
        np.multiply(c2, m1, out=second)
        np.right_shift(second, shift, out=c0)
        c0 ^= c1
        c0 ^= np.uint64(k0)
        np.right_shift(first, shift, out=c2)
        c2 ^= c3
        c2 ^= np.uint64(k1)
        np.bitwise_and(second, low, out=c1)
        np.bitwise_and(first, low, out=c3)
        k0, k1 = (k0 + WEYL[0]) & _WORD, (k1 + WEYL[1]) & _WORD
    return words


def _split_mix(word: int) -> int:
    """A step of SplitMix64 (Steele, Lea and Flood, 2014): a bijection of [0, 2^64)."""
    word = (word + 0x9E3779B97F4A7C15) & _LONG
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _LONG
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _LONG
    return word ^ (word >> 31)
