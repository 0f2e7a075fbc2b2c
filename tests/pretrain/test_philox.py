"""Counter-based numbers: the published vectors, a naive loop, and that no two places collide."""

import itertools

import numpy as np
import pytest
from scipy import stats

from eosin.pretrain.philox import Counters, philox, stream_key

ONES = 0xFFFFFFFF


def naive(counter: list[int], key: list[int]) -> list[int]:
    """A round at a time, in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right & ONES, (left >> 32) ^ c3 ^ k1, left & ONES
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers that come with Random123, for philox4x32 with 10 rounds
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_the_known_answers_come_out(counter: str, key: str, words: str) -> None:
    asked, keys, expected = ([int(w, 16) for w in text.split()] for text in (counter, key, words))
    assert naive(asked, keys) == expected
    assert philox(asked, (keys[0], keys[1])).tolist() == expected


def test_many_at_once_are_each_alone() -> None:
    rng = np.random.default_rng(0)
    first, second, third = rng.integers(0, 2**32, (3, 5), dtype=np.int64)
    blocks = np.arange(4)[:, None]
    key = (int(first[0]), int(second[0]))
    together = philox((first, second, third, blocks), key)
    assert together.shape == (4, 4, 5)
    for block, place in np.ndindex(4, 5):
        counter = [int(column[place]) for column in (first, second, third)]
        assert together[:, block, place].tolist() == naive([*counter, block], list(key))


def test_no_two_places_share_a_block() -> None:
    positions = (0, 1, 2**32 - 1, 2**32, 10**10, 2**40 - 1)
    places = itertools.product(positions, (0, 1, 2**16, 2**20 - 1), (0, 1, 63))
    position, epoch, view = np.array(list(places)).T
    drawn = Counters(position, epoch, view, stream_key(0, 1)).draw(range(0, 256, 51))
    blocks = drawn.swapaxes(1, 2).reshape(-1, 4)  # those of a bijection: all differ
    assert len(np.unique(blocks, axis=0)) == len(blocks) == 6 * 6 * 4 * 3


def test_no_two_seeds_share_a_key() -> None:
    seeds = [*range(5000), *(2**64 - 1 - seed for seed in range(5000))]
    assert len({stream_key(seed, 7) for seed in seeds}) == len(seeds)
    assert stream_key(3, 7) != stream_key(3, 8)
    assert all(0 <= word <= ONES for seed in seeds for word in stream_key(seed, 7))


@pytest.mark.parametrize("bad", [-1, 2**64])
def test_a_seed_that_is_none_is_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=rf"seed must lie in \[0, 2\^64\), not {bad}"):
        stream_key(bad, 0)
    with pytest.raises(ValueError, match="stream"):
        stream_key(0, bad)


def test_numbers_are_uniform_and_those_of_neighbours_unrelated() -> None:
    position = np.arange(4000)
    counters = Counters(position, position * 0, position * 0, stream_key(5, 0))
    drawn = counters.draw((0, 1))  # [2, 4, N]
    assert drawn.min() >= 0 and drawn.max() < 1
    assert stats.kstest(drawn.reshape(-1), "uniform").pvalue > 1e-3
    later = counters._replace(epoch=counters.epoch + 1).draw((0,))
    other = counters._replace(view=counters.view + 1).draw((0,))
    seeded = counters._replace(key=stream_key(6, 0)).draw((0,))
    rows = np.concatenate([part.reshape(-1, 4000) for part in (drawn, later, other, seeded)])
    rows = np.concatenate([rows, np.roll(rows, 1, axis=1)])  # and of the position before
    related = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(related).max() < 4.5 / np.sqrt(4000)  # 780 pairs
