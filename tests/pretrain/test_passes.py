"""Passes over strata: every record once a pass, shard after shard, entered anywhere."""

from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from eosin.pretrain import passes
from eosin.pretrain.passes import Passes


@st.composite
def some_counts(draw: st.DrawFn) -> NDArray[np.int64]:
    """[K, S], each stratum with a record at least."""
    n_strata, n_shards = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    rows = st.lists(st.integers(0, 4), min_size=n_shards, max_size=n_shards).filter(any)
    return np.array(draw(st.lists(rows, min_size=n_strata, max_size=n_strata)), np.int64)


def stream(counts: NDArray[np.int64], seed: int, stratum: int, turn: int) -> list[tuple[int, int]]:
    n = int(counts[stratum].sum())
    places = Passes(counts, seed).at(np.full(n, stratum), turn * n + np.arange(n))
    return list(zip(*(part.tolist() for part in places), strict=True))


@given(some_counts(), st.integers(0, 99), st.integers(0, 5))
def test_a_pass_goes_through_whole_shards_in_the_same_order_for_all_strata(
    counts: NDArray[np.int64], seed: int, turn: int
) -> None:
    shards = []
    for stratum, row in enumerate(counts):
        places = stream(counts, seed, stratum, turn)
        runs = [(shard, len(list(run))) for shard, run in groupby(s for s, _ in places)]
        assert dict(runs) == {s: c for s, c in enumerate(row.tolist()) if c}
        assert len(runs) == np.count_nonzero(row)
        assert [rank for _, rank in places] == [i for _, count in runs for i in range(count)]
        shards.append([shard for shard, _ in runs])
    for first in shards:
        for second in shards:
            assert [s for s in first if s in second] == [s for s in second if s in first]


@given(some_counts(), st.data())
def test_room_for_little_gives_the_same(counts: NDArray[np.int64], data: st.DataObject) -> None:
    asked = st.tuples(st.integers(0, len(counts) - 1), st.integers(0, 200))
    calls = data.draw(st.lists(st.lists(asked, min_size=1, max_size=30), min_size=1, max_size=6))
    tight = Passes(counts, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "SPARE_CELLS", 0)
        tight = Passes(counts, 0)
    for call in calls:
        stratum, rank = np.array(call).T
        n = counts.sum(1)[stratum]
        shard, local = tight.at(stratum, rank)
        for place in zip(stratum, rank, n, shard, local, strict=True):
            k, r, m, *found = (int(part) for part in place)
            assert stream(counts, 0, k, r // m)[r % m] == tuple(found)


def test_all_orders_of_three_shards_come_equally_often() -> None:
    shard, _ = Passes(np.array([[1, 1, 1]]), 4).at(np.zeros(18_000, int), np.arange(18_000))
    orders, counts = np.unique(shard.reshape(-1, 3), axis=0, return_counts=True)
    assert len(orders) == 6
    assert stats.chisquare(counts).pvalue > 1e-3


def test_two_windows_make_each_pass_once_however_often_a_stratum_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(passes, "SPARE_CELLS", 0)
    made: list[tuple[Passes, int, int]] = []
    plain = Passes._append

    def noted(self: Passes, turn: int, stratum: int) -> None:
        made.append((self, turn, stratum))
        plain(self, turn, stratum)

    monkeypatch.setattr(Passes, "_append", noted)
    counts = np.stack([np.full(200, 50), np.ones(200, int)])
    tiles, windows = np.array([25_100, 25_100]), 25  # a window shows the second 5.02 times
    rng = np.random.default_rng(0)
    for first in range(0, windows - 1, 5):
        held = Passes(counts, 0, tiles, windows)
        for _ in range(20):
            stratum = np.arange(64) % 2
            rank = rng.integers(first * 1004, (first + 2) * 1004, 64)
            found, expected = held.at(stratum, rank), Passes(counts, 0).at(stratum, rank)
            assert np.array_equal(found, expected)
        mine = [(turn, stratum) for made_by, turn, stratum in made if made_by is held]
        assert len(mine) == len(set(mine)) >= 11
    # No more than the bound, but for two passes of each, without which nothing can be found.
    monkeypatch.setattr(passes, "MAX_CELLS", 1000)
    bounded = Passes(counts, 0, tiles, windows)
    bounded.at(np.ones(2000, int), np.arange(2000))
    assert bounded._room == len(bounded._starts) == 1000
    monkeypatch.setattr(passes, "MAX_CELLS", 10)
    assert Passes(counts, 0, tiles, windows)._room == 800
