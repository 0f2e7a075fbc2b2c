"""The order of training: each record once an epoch, at places that follow from the seed alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from eosin.pretrain.order import epoch_order, locate, sample_at


@given(st.integers(0, 2**32), st.integers(0, 1000), st.integers(1, 3000))
def test_each_record_comes_exactly_once_an_epoch(seed: int, epoch: int, n: int) -> None:
    assert np.array_equal(np.sort(epoch_order(seed, epoch, n)), np.arange(n))


def test_a_position_asked_for_alone_is_the_one_of_the_whole_order() -> None:
    order = epoch_order(5, 2, 37)
    assert [int(sample_at(5, 2, position, 37)) for position in range(37)] == order.tolist()
    assert sample_at(5, 2, [[3, 4], [5, 6]], 37).tolist() == order[[[3, 4], [5, 6]]].tolist()


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(epoch_order(seed, epoch, 50)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_a_record_lands_everywhere_equally_often() -> None:
    places = [int(np.flatnonzero(epoch_order(0, epoch, 10) == 0)[0]) for epoch in range(3000)]
    assert stats.chisquare(np.bincount(places, minlength=10)).pvalue > 1e-3


def test_all_orders_of_four_records_come_equally_often() -> None:
    orders, counts = np.unique(
        [epoch_order(1, epoch, 4) for epoch in range(4800)], axis=0, return_counts=True
    )
    assert len(orders) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_neighbours_in_the_order_are_not_neighbours_in_the_index() -> None:
    order = epoch_order(3, 0, 20_000)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.03
    gaps = np.abs(np.diff(order)) / len(order)  # of two uniform places: density 2 (1 - gap)
    assert stats.kstest(gaps, lambda gap: 2 * gap - gap**2).pvalue > 1e-3


def test_an_epoch_over_a_billion_records_costs_no_memory() -> None:
    rows = sample_at(0, 7, np.arange(4096) * 244_140, 1_000_000_000)
    assert len(set(rows.tolist())) == 4096
    assert stats.kstest(rows / 1e9, "uniform").pvalue > 1e-3


def test_a_place_beyond_the_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 5\)"):
        sample_at(0, 0, 5, 5)


@pytest.mark.parametrize(("batch_size", "n"), [(4, 10), (3, 7), (5, 5), (1, 3)])
def test_batches_straddle_epochs_without_dropping_a_sample(batch_size: int, n: int) -> None:
    places = []
    for step in range(3 * n):
        epochs, positions = locate(step, batch_size, n)
        assert epochs.shape == positions.shape == (batch_size,)
        places += list(zip(epochs.tolist(), positions.tolist(), strict=True))
    assert places == [divmod(sample, n) for sample in range(3 * n * batch_size)]
