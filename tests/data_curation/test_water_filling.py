"""Water-filling: P1 to P3 of the published scheme, and against pouring drop by drop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import entropy

from eosin.data_curation.balance import measure_balance
from eosin.data_curation.water_filling import TreeLevel, fill, fill_tree

HUGE = 1 << 60


def pour(total: int, capacities: list[int], floors: list[int]) -> list[int]:
    """Drop by drop into the child that has least and room; floors first."""
    given = list(floors) if sum(floors) <= total else [0] * len(floors)
    room = capacities if sum(floors) <= total else floors
    for _ in range(total - sum(given)):
        open_ = [j for j in range(len(room)) if given[j] < room[j]]
        if not open_:
            break
        given[min(open_, key=lambda j: given[j])] += 1
    return given


vessels = st.lists(st.integers(0, 30), min_size=1, max_size=12)


@settings(deadline=None)
@given(st.integers(0, 200), vessels, st.data())
def test_it_ends_where_drops_do(total: int, capacities: list[int], data: st.DataObject) -> None:
    floors = [data.draw(st.integers(0, c)) for c in capacities]
    given_ = fill(total, np.array(capacities), floors=np.array(floors))
    assert sorted(given_.tolist()) == sorted(pour(total, capacities, floors))


@settings(deadline=None)
@given(st.integers(0, 300), vessels, st.integers(0, 9))
def test_published_properties(total: int, capacities: list[int], seed: int) -> None:
    room = np.array(capacities)
    order = np.random.default_rng(seed).integers(0, 1 << 60, len(room)).astype(np.uint64)
    given_ = fill(total, room, order=order)
    assert given_.sum() == min(total, room.sum())  # P1
    assert (given_ <= room).all() and (given_ >= 0).all()  # P2
    for i in range(len(room)):  # P3: who got less is exhausted, or it is one drop
        for j in range(len(room)):
            assert given_[i] >= given_[j] or given_[i] == room[i] or given_[j] - given_[i] <= 1


@settings(deadline=None)
@given(st.integers(1, 10**12), st.lists(st.integers(0, 10**11), min_size=1, max_size=20))
def test_large_numbers_are_exact(total: int, capacities: list[int]) -> None:
    room = np.array(capacities)
    given_ = fill(total, room)
    assert given_.sum() == min(total, room.sum()) and (given_ <= room).all()
    left = given_[given_ < room]
    assert not len(left) or left.max() - left.min() <= 1


@settings(deadline=None)
@given(vessels, st.integers(0, 200), st.lists(st.floats(0.01, 50), min_size=12, max_size=12))
def test_weights_divide_what_is_not_exhausted(
    capacities: list[int], total: int, weights: list[float]
) -> None:
    room, weight = np.array(capacities), np.array(weights[: len(capacities)])
    given_ = fill(total, room, weight)
    assert given_.sum() == min(total, room.sum())
    level = np.where(given_ < room, (given_ + 1) / weight, np.inf).min()
    assert (given_ / weight <= level * (1 + 1e-9)).all()  # nobody is above the next drop


def test_remainders_go_by_the_order_given() -> None:
    order = np.array([3, 1, 2], np.uint64)
    assert fill(4, np.array([5, 5, 5]), order=order).tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"weights": np.array([1.0, 0.0])}, "positive"),
        ({"weights": np.array([1.0, np.inf])}, "positive"),
        ({"floors": np.array([4, 0])}, "above"),
        ({"floors": np.array([-1, 0])}, "negative"),
    ],
)
def test_nonsense_is_refused(keys: dict[str, NDArray[np.float64]], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        fill(3, np.array([3, 3]), **keys)  # type: ignore[arg-type]


def level(parents: list[int], **keys: list[float]) -> TreeLevel:
    count = len(parents)
    return TreeLevel(
        parents=np.array(parents),
        weights=np.array(keys.get("weights", [1.0] * count), float),
        caps=np.array(keys.get("caps", [HUGE] * count), np.int64),
        floors=np.array(keys.get("floors", [0] * count), np.int64),
    )


def test_a_tree_is_filled_from_the_top() -> None:
    organs = level([0, 0])
    slides = level([0, 0, 0, 1])
    above, below = fill_tree(60, [organs, slides], np.array([100, 5, 100, 1000]), seed=0)
    assert above.tolist() == [30, 30] and below.tolist()[3] == 30
    assert below.tolist()[1] == 5 and sorted(below.tolist()[:3:2]) in ([12, 13], [12, 13])


def test_caps_and_floors_deep_in_the_tree_are_kept() -> None:
    organs, slides = (
        level([0, 0]),
        level([0, 0, 1, 1], caps=[10, 10, 50, HUGE], floors=[0, 7, 0, 0]),
    )
    above, below = fill_tree(100, [organs, slides], np.array([99, 99, 99, 99]), seed=0)
    assert above.tolist() == [20, 80] and below.tolist() == [10, 10, 40, 40]
    above, below = fill_tree(10, [organs, slides], np.array([99, 99, 99, 99]), seed=0)
    assert below[1] >= 7 and below.sum() == 10


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 400), st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5))
def test_every_node_gives_what_its_children_give(
    total: int, seed: int, n_top: int, n_children: int
) -> None:
    rng = np.random.default_rng(seed)
    middle = level(sorted(rng.integers(0, n_top, n_top * n_children).tolist()))
    leaf_parents = rng.integers(0, len(middle.parents), 40)
    leaves = rng.integers(0, 20, 40)
    top, mid, low = fill_tree(
        total, [level([0] * n_top), middle, level(leaf_parents.tolist())], leaves, seed
    )
    assert (low <= leaves).all() and low.sum() == min(total, leaves.sum())
    assert np.bincount(leaf_parents, low, len(mid)).tolist() == mid.tolist()
    assert np.bincount(middle.parents, mid, n_top).tolist() == top.tolist()


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30).filter(any))
def test_balance_is_that_of_scipy_and_of_the_definition(counts: list[int]) -> None:
    found = measure_balance(np.array(counts))
    present = np.array([c for c in counts if c], float)
    k = len(present)
    assert found.entropy == pytest.approx(float(entropy(present)), abs=1e-9)
    differences = np.abs(present[:, None] - present[None]).sum()
    assert found.gini == pytest.approx(differences / (2 * k * present.sum()), abs=1e-9)
    assert found.largest_share == pytest.approx(present.max() / present.sum())
    assert (found.values, found.total) == (k, int(present.sum()))


def test_an_empty_set_has_no_balance() -> None:
    with pytest.raises(ValueError, match="nothing"):
        measure_balance(np.zeros(3, np.int64))
