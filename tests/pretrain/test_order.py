"""The order of training: each record as often as it should be, at places the seed alone decides."""

import copy
import math
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from omegaconf import OmegaConf
from scipy import stats

from eosin.configs.errors import ConfigError
from eosin.data_curation.strata import Strata
from eosin.pretrain import order as order_module
from eosin.pretrain.order import MixtureConfig, Order, StratumShare, locate
from eosin.pretrain.passes import Passes

PLAIN = MixtureConfig()
SEEDS = st.integers(0, 2**32)


def strata(counts: ArrayLike) -> Strata:
    """Named a, b, c, … or, where there is one, not at all."""
    table = np.array(counts, np.int64)
    return Strata(("",) if len(table) == 1 else tuple("abcdefgh"[: len(table)]), table)


def weighted(*weights: float) -> MixtureConfig:
    return MixtureConfig(column="organ", weights=dict(zip("abcdefgh", weights, strict=False)))


def records(order: Order, epoch: int) -> list[tuple[int, int, int]]:
    """Every (stratum, shard, rank) of an epoch, in order."""
    places = order.at(epoch, np.arange(order.n))
    return list(zip(*(part.tolist() for part in places), strict=True))


@st.composite
def some_strata(draw: st.DrawFn, max_strata: int = 4) -> Strata:
    """Small, with empty shards among them; each stratum has a record."""
    n_strata, n_shards = draw(st.integers(1, max_strata)), draw(st.integers(1, 8))
    rows = st.lists(st.integers(0, 6), min_size=n_shards, max_size=n_shards).filter(any)
    return strata(draw(st.lists(rows, min_size=n_strata, max_size=n_strata)))


@st.composite
def some_orders(draw: st.DrawFn) -> Order:
    """With and without a mixture."""
    parts = draw(some_strata())
    mixtures = [MixtureConfig(column="organ", power=draw(st.sampled_from([0.0, 0.5, 1.0])))]
    mixtures.append(weighted(*[draw(st.sampled_from([0.3, 1, 2.5])) for _ in parts.names]))
    mixture = draw(st.sampled_from(mixtures)) if len(parts.names) > 1 else PLAIN
    seed, window_shards = draw(SEEDS), draw(st.integers(0, 9))
    try:
        return Order(parts, mixture, seed, window_shards)
    except ConfigError:  # a share too small for one tile
        return Order(parts, PLAIN, seed, window_shards)


@given(some_strata(), SEEDS, st.integers(0, 1000), st.integers(0, 9))
def test_without_weights_each_record_comes_exactly_once_an_epoch(
    parts: Strata, seed: int, epoch: int, window_shards: int
) -> None:
    expected = [
        (stratum, shard, rank)
        for (stratum, shard), count in np.ndenumerate(parts.counts)
        for rank in range(count)
    ]
    assert sorted(records(Order(parts, PLAIN, seed, window_shards), epoch)) == expected


@settings(max_examples=60)
@given(some_strata(max_strata=3), st.data(), st.integers(0, 9))
def test_with_weights_strata_and_records_are_within_one_of_their_targets(
    parts: Strata, data: st.DataObject, window_shards: int
) -> None:
    weights = [data.draw(st.sampled_from([0, 1, 1.7, 30])) for _ in parts.names]
    assume(any(weights))
    mixture = MixtureConfig(column="organ", weights=dict(zip(parts.names, weights, strict=True)))
    total = sum(map(Fraction, weights))
    have = parts.counts.sum(1).tolist()
    n = sum(m for m, weight in zip(have, weights, strict=True) if weight)
    targets = [n * Fraction(weight) / total for weight in weights]
    assume(not any(0 < target < 1 for target in targets))  # mostly refused; see below
    order = Order(parts, mixture, 3, window_shards)
    assert order.n == n
    tiles = Counter[int]()
    seen = Counter[tuple[int, int, int]]()
    for epoch in range(3):
        places = records(order, epoch)
        counts = Counter(stratum for stratum, _, _ in places)
        for k, target in enumerate(targets):
            assert abs(counts[k] - target) < 1
            assert order.describe()[k].tiles == counts[k]
        tiles.update(counts)
        now = Counter(places)
        seen.update(now)
        for (k, shard), count in np.ndenumerate(parts.counts):
            for rank in range(count):  # since the start of the run, and in this epoch alone
                assert abs(seen[k, shard, rank] - tiles[k] / have[k]) < 1
                assert abs(now[k, shard, rank] - counts[k] / have[k]) < 2


@given(some_orders(), st.integers(0, 5), st.data())
def test_any_positions_asked_alone_are_those_of_the_whole(
    order: Order, epoch: int, data: st.DataObject
) -> None:
    whole = order.at(epoch, np.arange(order.n))
    rows = st.lists(st.integers(0, order.n - 1), min_size=2, max_size=2)
    asked = np.array(data.draw(st.lists(rows, max_size=10)), np.int64).reshape(-1, 2)
    for other in (order, copy.copy(order)):  # the copy has made no tables yet
        for part, all_of_it in zip(other.at(epoch, asked), whole, strict=True):
            assert part.dtype == np.int64
            assert np.array_equal(part, all_of_it[asked])
    assert [int(part) for part in order.at(epoch, 0)] == [int(part[0]) for part in whole]


@given(some_orders(), st.integers(0, 3), st.integers(1, 9))
def test_a_window_holds_an_equal_part_of_every_stratum(
    order: Order, epoch: int, window_shards: int
) -> None:
    parts, mixture, seed, _ = order._arguments
    order = Order(parts, mixture, seed, window_shards)
    tiles = [row.tiles for row in order.describe()]
    used = parts.counts[np.array(tiles) > 0].sum(0)
    windows, passes = math.ceil(np.count_nonzero(used) / window_shards), Passes(parts.counts, seed)
    have, start = records(order, epoch), 0
    for window in range(windows):
        expected = []
        for k, n in enumerate(tiles):
            ranks = epoch * n + np.arange(n * window // windows, n * (window + 1) // windows)
            shards, local = passes.at(np.full_like(ranks, k), ranks)
            expected += [(k, *place) for place in zip(shards.tolist(), local.tolist(), strict=True)]
        assert sorted(have[start : start + len(expected)]) == sorted(expected)
        start += len(expected)
    assert start == order.n


def test_small_tables_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    order = Order(strata([[3, 0, 5, 2, 9], [1, 1, 1, 1, 1], [0, 0, 7, 7, 0]]), PLAIN, 5, 1)
    whole = records(order, 2)
    monkeypatch.setattr(order_module, "TABLE_CELLS", 4)
    assert records(copy.copy(order), 2) == whole


@pytest.mark.parametrize("window_shards", [1, 2, 3, 5])
def test_a_window_touches_its_shards_and_one_more(window_shards: int) -> None:
    sizes, n, windows = np.full(23, 12), 22 * 12, math.ceil(22 / window_shards)
    sizes[7] = 0
    one_by_one = Order(strata([sizes]), PLAIN, 8, 1).at(3, np.arange(n)).shard
    shuffled = one_by_one.reshape(22, 12)  # a window a shard
    assert (shuffled == shuffled[:, :1]).all()
    place = {int(shard): index for index, shard in enumerate(shuffled[:, 0])}
    shards = Order(strata([sizes]), PLAIN, 8, window_shards).at(3, np.arange(n)).shard
    for window in np.split(shards, [n * w // windows for w in range(1, windows)]):
        touched = sorted({place[int(shard)] for shard in window})
        assert touched == list(range(touched[0], touched[-1] + 1))
        assert len(touched) <= window_shards + 1


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    parts = strata([[10] * 5])
    orders = {tuple(records(Order(parts, PLAIN, s, 2), e)) for s in range(5) for e in range(5)}
    assert len(orders) == 25
    sets = {  # what the first window holds
        frozenset(records(Order(parts, PLAIN, seed, 2), epoch)[:16])
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(sets) > 5


@pytest.mark.parametrize("window_shards", [0, 1, 2])
def test_a_record_lands_everywhere_equally_often(window_shards: int) -> None:
    order = Order(strata([[2] * 6]), PLAIN, 0, window_shards)
    epochs = [order.at(epoch, np.arange(12)) for epoch in range(900)]
    first = [int(np.flatnonzero((p.shard == 0) & (p.rank == 0))[0]) for p in epochs]
    assert stats.chisquare(np.bincount(first, minlength=12)).pvalue > 1e-3


def test_neighbours_share_a_shard_as_often_as_chance_has_it() -> None:
    order = Order(strata([[500] * 40]), PLAIN, 1, 8)
    for window in order.at(0, np.arange(order.n)).shard.reshape(5, 4000):
        same = int((window[1:] == window[:-1]).sum())
        chance = stats.binom(3999, 499 / 3999)
        assert 1e-3 < chance.cdf(same) < 1 - 1e-3


@pytest.mark.parametrize(
    ("mixture", "tiles"),
    [
        (weighted(1, 1, 1), [34, 33, 33]),
        (weighted(2, 1, 1), [50, 25, 25]),
        (weighted(0, 3, 1), [0, 30, 10]),
        (MixtureConfig(column="organ"), [60, 30, 10]),
        (MixtureConfig(column="organ", power=0), [34, 33, 33]),
        (MixtureConfig(column="organ", power=0.5), [47, 34, 19]),  # √60 : √30 : √10
    ],
)
def test_shares_follow_the_mixture(mixture: MixtureConfig, tiles: list[int]) -> None:
    order = Order(strata([[40, 20], [0, 30], [10, 0]]), mixture, 0, 1)
    rows = [StratumShare(*row) for row in zip("abc", [60, 30, 10], tiles, strict=True)]
    assert order.describe() == rows
    assert [row.times_seen for row in rows] == [tiles[0] / 60, tiles[1] / 30, tiles[2] / 10]


def test_a_stratum_without_records_takes_no_part_unless_it_has_a_weight() -> None:
    parts = strata([[3, 1], [0, 0]])
    power = Order(parts, MixtureConfig(column="organ", power=0), 0, 1)
    assert [row.tiles for row in power.describe()] == [4, 0]
    assert power.describe()[1].times_seen == 0
    with pytest.raises(ConfigError, match="a weight, but no record: 'b'"):
        Order(parts, weighted(1, 1), 0, 1)


def test_what_the_weights_leave_out_or_make_up_is_named() -> None:
    parts = strata([[1], [1], [1]])
    with pytest.raises(ConfigError, match=r"'organ': no weight for 'c'; no such value: 'liver'"):
        Order(parts, MixtureConfig(column="organ", weights={"a": 1, "b": 1, "liver": 1}), 0, 1)
    many = Strata(tuple(f"{k:03d}" for k in range(100)), np.ones((100, 1), np.int64))
    with pytest.raises(ConfigError, match=r"'018', '019' and 79 more; no such value: 'x'$"):
        Order(many, MixtureConfig(column="slide", weights={"x": 1, "099": 0}), 0, 1)


def test_a_share_without_one_tile_is_refused_with_its_size() -> None:
    with pytest.raises(ConfigError, match=r"'b' \(0.0099 of 6 tiles\)"):
        Order(strata([[5], [1]]), weighted(100, 1), 0, 1)
    with pytest.raises(ConfigError, match="no record"):
        Order(strata([[0, 0]]), PLAIN, 0, 1)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"column": "c", "weights": {"a": -1}}, r"weights\[a\]"),
        ({"column": "c", "weights": {"a": math.inf}}, r"weights\[a\]"),
        ({"column": "c", "weights": {"a": 0, "b": 0}}, "all be 0"),
        ({"column": "c", "power": 1.5}, r"power must lie in \[0, 1\]"),
        ({"column": "c", "power": 0.5, "weights": {"a": 1}}, "power must be 1 beside weights"),
        ({"weights": {"a": 1}}, "need a column"),
        ({"power": 0.5}, "need a column"),
    ],
)
def test_a_mixture_that_says_nothing_or_too_much_is_refused(
    keys: dict[str, object], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        MixtureConfig(**keys)  # type: ignore[arg-type]


def test_a_mixture_comes_from_a_config_file() -> None:
    read = OmegaConf.merge(
        OmegaConf.structured(MixtureConfig),
        OmegaConf.create("{column: organ, weights: {colon: 2, '3': 0.5}}"),
    )
    mixture = MixtureConfig(column="organ", weights={"colon": 2.0, "3": 0.5})
    assert OmegaConf.to_object(read) == mixture


def test_strata_that_do_not_fit_their_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, S\]"):
        Strata(("",), np.ones((2, 3), np.int64))
    with pytest.raises(ValueError, match="not -1"):
        Strata(("",), np.array([[3, -1]]))


def test_a_place_beyond_the_epoch_and_a_negative_window_are_refused() -> None:
    order = Order(strata([[5]]), PLAIN, 0, 0)
    for position in (5, -1):
        with pytest.raises(ValueError, match=r"\[0, 5\)"):
            order.at(0, position)
    with pytest.raises(ValueError, match="window_shards must not be negative"):
        Order(strata([[5]]), PLAIN, 0, -1)


def test_shares_of_ten_billion_records_are_exact() -> None:
    counts = np.array([[10**10 // 4 + 1, 10**10 // 4], [3, 4], [10**10 // 2 - 5, 10**10 // 2 + 7]])
    order = Order(strata(counts), MixtureConfig(column="organ"), 0, 1)
    assert [row.tiles for row in order.describe()] == counts.sum(1).tolist()
    assert order.n == counts.sum()


def test_any_place_among_ten_billion_records_is_found_at_once() -> None:
    order = Order(strata([np.full(100_000, 100_000)]), PLAIN, 0, 8)
    positions = np.random.default_rng(0).integers(0, order.n, 4096)
    places = order.at(7, positions)
    assert places.rank.max() < 100_000
    for part in (places.shard, places.rank):
        assert stats.kstest(part / 100_000, "uniform").pvalue > 1e-3
    pairs = set(zip(places.shard.tolist(), places.rank.tolist(), strict=True))
    assert len(pairs) == len(set(positions.tolist()))
    begin = time.perf_counter()
    for _ in range(5):
        order.at(7, positions)
    assert time.perf_counter() - begin < 1  # about 10 ms


def test_the_order_has_not_changed() -> None:
    # A change here breaks the resuming of every run that was begun before it.
    plain = Order(strata([[3, 2, 0, 4]]), PLAIN, 17, 2)
    mixed = Order(strata([[3, 1], [0, 3]]), weighted(1, 3), 17, 1)
    assert [f"{s}.{r}" for _, s, r in records(plain, 1)] == GOLDEN_PLAIN
    assert ["ab"[k] + f"{s}.{r}" for k, s, r in records(mixed, 1)] == GOLDEN_MIXED


GOLDEN_PLAIN = ["0.2", "0.0", "0.1", "3.0", "3.3", "3.1", "1.1", "1.0", "3.2"]
GOLDEN_MIXED = ["b1.0", "a0.1", "b1.2", "a0.2", "b1.1", "b1.2", "b1.0"]


@pytest.mark.parametrize(("batch_size", "n"), [(4, 10), (3, 7), (5, 5), (1, 3)])
def test_batches_straddle_epochs_without_dropping_a_sample(batch_size: int, n: int) -> None:
    places = []
    for step in range(3 * n):
        epochs, positions = locate(step, batch_size, n)
        assert epochs.shape == positions.shape == (batch_size,)
        places += list(zip(epochs.tolist(), positions.tolist(), strict=True))
    assert places == [divmod(sample, n) for sample in range(3 * n * batch_size)]
