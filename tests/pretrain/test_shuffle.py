"""Computed permutations: each cell once, whatever the sizes and keys beside it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from eosin.pretrain.shuffle import nth_key, seed_key, shuffle, stir

KEYS = st.integers(0, 2**64 - 1)


def shuffled(n: int, key: int) -> NDArray[np.int64]:
    return shuffle(np.arange(n), np.full(n, n), np.full(n, key, np.uint64))


@given(st.integers(1, 2000), KEYS)
def test_each_cell_comes_exactly_once(n: int, key: int) -> None:
    assert np.array_equal(np.sort(shuffled(n, key)), np.arange(n))


@given(st.lists(st.tuples(st.integers(1, 60), KEYS), min_size=1, max_size=8), st.randoms())
def test_sizes_and_keys_of_the_neighbours_do_not_matter(parts, random) -> None:  # type: ignore[no-untyped-def]
    asked = [(place, n, key) for n, key in parts for place in range(n)]
    expected = [cell for n, key in parts for cell in shuffled(n, key).tolist()]
    mixed = list(range(len(asked)))
    random.shuffle(mixed)
    places, sizes = np.array([asked[i][:2] for i in mixed]).T
    keys = np.array([asked[i][2] for i in mixed], np.uint64)
    assert shuffle(places, sizes, keys).tolist() == [expected[i] for i in mixed]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_orders_of_a_few_cells_come_equally_often(n: int) -> None:
    times = 100 * math.factorial(n)
    keys = nth_key(seed_key(1), np.arange(times))
    cells = shuffle(np.tile(np.arange(n), times), np.full(n * times, n), np.repeat(keys, n))
    orders, counts = np.unique(cells.reshape(-1, n), axis=0, return_counts=True)
    assert len(orders) == math.factorial(n)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_neighbours_part() -> None:
    order = shuffled(20_000, 3)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.03
    gaps = np.abs(np.diff(order)) / len(order)  # of two uniform places: density 2 (1 - gap)
    assert stats.kstest(gaps, lambda gap: 2 * gap - gap**2).pvalue > 1e-3


def test_sizes_next_to_a_square_up_to_2_52() -> None:
    sides = np.array([1, 2, 3, 1000, 94_906_265 // 2, 2**26])
    sizes = np.concatenate([sides**2 - 1, sides**2, np.minimum(sides**2 + 1, 2**52)])
    sizes = sizes[(sizes > 0) & (sizes <= 2**52)]
    cells = shuffle(sizes - 1, sizes, np.full(len(sizes), 9, np.uint64))
    assert ((cells >= 0) & (cells < sizes)).all()
    big = 10**15
    cells = shuffle(np.arange(5000), np.full(5000, big), np.full(5000, 9, np.uint64))
    assert len(set(cells.tolist())) == 5000
    assert stats.kstest(cells / big, "uniform").pvalue > 1e-3


def test_the_stirring_is_that_of_splitmix64() -> None:
    # First words of the stream of seed 0, as in the public test vectors.
    golden = np.uint64(0x9E3779B97F4A7C15)
    words = stir(golden * np.arange(1, 4, dtype=np.uint64))
    assert words.tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert nth_key(0, np.arange(3)).tolist() == words.tolist()
