"""Pieces of very unequal size, shared among tasks so that all end at about the same time."""

import heapq
from collections.abc import Mapping


def pack(sizes: Mapping[str, int], tasks: int) -> list[list[str]]:
    """Longest processing time first: each piece, from the largest, goes to the emptiest task.

    The fullest task holds at most 4/3 of what the best packing would give it (Graham, 1969).

    Args:
        sizes: of the pieces, in any unit.
        tasks: at most so many.

    Returns:
        The pieces of each task, none of them empty, the fullest task first.
    """
    heap: list[tuple[int, int]] = [(0, index) for index in range(min(tasks, len(sizes)))]
    packed: list[list[str]] = [[] for _ in heap]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, index = heapq.heappop(heap)
        packed[index].append(name)
        heapq.heappush(heap, (load + max(1, sizes[name]), index))
    loads = {index: load for load, index in heap}
    return [packed[index] for index in sorted(loads, key=lambda index: -loads[index])]
