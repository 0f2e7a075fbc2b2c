"""Sharing a budget out evenly: water poured into vessels of unequal size, down a tree.

At each node every child gets min(x w_j, a_j), w_j its weight, a_j what it holds, with one level x
for all so that the sum is the budget (Vo et al. 2024, arXiv 2405.15613, there with equal
weights): small children give all they have and the others share the rest. Shapes: J children.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

_BISECTIONS = 200


def fill(
    total: int,
    capacities: NDArray[np.int64],
    weights: NDArray[np.float64] | None = None,
    floors: NDArray[np.int64] | None = None,
    order: NDArray[np.uint64] | None = None,
) -> NDArray[np.int64]:
    """What each child gets, int64 [J]: as even as can be, and min(total, Σ capacities) together.

    Args:
        total: the budget.
        capacities: int64 [J], the most that each can give.
        weights: float64 [J], positive; equal by default.
        floors: int64 [J], the least that each gets, at most its capacity; 0 by default. Where
            their sum is above the budget, they are what the budget is shared out over.
        order: uint64 [J]; what cannot be divided goes to the smallest of them first.

    Raises:
        ValueError: a weight is not positive, a number negative, or a floor above its capacity.
    """
    count = len(capacities)
    weights = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    floors = np.zeros(count, np.int64) if floors is None else floors
    order = np.arange(count, dtype=np.uint64) if order is None else order
    if total < 0 or (capacities < 0).any() or (floors < 0).any():
        raise ValueError("a budget, capacity or floor is negative")
    if not (weights > 0).all() or not np.isfinite(weights).all():
        raise ValueError("weights must be positive numbers")
    if (floors > capacities).any():
        raise ValueError("a floor is above what there is")
    if int(capacities.sum()) <= total:
        return capacities.astype(np.int64)
    if int(floors.sum()) >= total:
        if not floors.any():
            return np.zeros(count, np.int64)
        capacities, floors = floors, np.zeros(count, np.int64)
        if int(capacities.sum()) == total:
            return capacities.astype(np.int64)

    def at(level: float) -> NDArray[np.int64]:
        wanted = np.minimum(np.floor(level * weights), 2.0**62).astype(np.int64)
        return np.clip(wanted, floors, capacities)

    low, high = 0.0, float((capacities / weights).max()) + 1
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if int(at(middle).sum()) <= total:
            low = middle
        else:
            high = middle
    taken = at(low)
    rest = total - int(taken.sum())
    rising = np.flatnonzero(at(high) > taken)
    taken[rising[np.argsort(order[rising], kind="stable")[:rest]]] += 1
    return taken


@dataclass(frozen=True)
class TreeLevel:
    """The nodes of one level of a tree, J of them."""

    parents: NDArray[np.int64]
    """[J], index into the level above; zeros where that is the root."""
    weights: NDArray[np.float64]
    """[J], relative to the other children of the same parent."""
    caps: NDArray[np.int64]
    """[J], the most that each may give; a very large number where there is no cap."""
    floors: NDArray[np.int64]
    """[J], the least that each should give, where it has so much."""


def fill_tree(
    total: int, levels: Sequence[TreeLevel], leaves: NDArray[np.int64], seed: int
) -> list[NDArray[np.int64]]:
    """What every node of a tree gives, level by level, int64 [J] each.

    Args:
        total: the budget of the root.
        levels: from below the root down to the leaves.
        leaves: int64 [J of the last level], what each leaf holds.
        seed: decides with a node's place who gets what cannot be divided.
    """
    capacities, floors = carry_up(levels, leaves)
    budgets = [np.array([total], np.int64)]
    for depth, level in enumerate(levels):
        given = np.zeros(len(level.parents), np.int64)
        order = _tickets(seed, depth, len(given))
        by_parent = np.argsort(level.parents, kind="stable")
        edges = np.searchsorted(level.parents[by_parent], np.arange(len(budgets[-1]) + 1))
        for parent, (first, stop) in enumerate(itertools.pairwise(edges.tolist())):
            children = by_parent[first:stop]
            given[children] = fill(
                int(budgets[-1][parent]),
                capacities[depth][children],
                level.weights[children],
                floors[depth][children],
                order[children],
            )
        budgets.append(given)
    return budgets[1:]


def carry_up(
    levels: Sequence[TreeLevel], leaves: NDArray[np.int64]
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Capacities and floors of every node: its own, and what its children can and must give.

    Args:
        levels: see `fill_tree`.
        leaves: likewise.

    Returns:
        int64 [J] each, level by level.
    """
    held, least = leaves.astype(np.int64), np.zeros(len(leaves), np.int64)
    capacities: list[NDArray[np.int64]] = []
    floors: list[NDArray[np.int64]] = []
    for depth in range(len(levels) - 1, -1, -1):
        level = levels[depth]
        capacity = np.minimum(held, level.caps)
        floor = np.minimum(np.maximum(level.floors, least), capacity)
        capacities.insert(0, capacity)
        floors.insert(0, floor)
        above = len(levels[depth - 1].parents) if depth else 1
        held, least = np.zeros(above, np.int64), np.zeros(above, np.int64)
        np.add.at(held, level.parents, capacity)
        np.add.at(least, level.parents, floor)
    return capacities, floors


def _tickets(seed: int, depth: int, count: int) -> NDArray[np.uint64]:
    digest = xxhash.xxh3_64_intdigest(f"{seed} {depth}".encode())
    return np.random.Generator(np.random.Philox(key=digest)).integers(
        0, 1 << 63, count, dtype=np.uint64
    )
