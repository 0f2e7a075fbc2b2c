"""From pairs of alike items to what is left out, and to what must stay together.

Alike is no equivalence: of a row of overlapping tiles each is like the next, but the first is not
like the last. So nothing is left out for being like something that is left out itself.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


def stand_ins(
    first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], rank: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """What to leave out so that no pair is left, and what stands for it.

    Items are gone through by rank: one stays unless one that stays already is its pair, of which
    the best-ranked stands for it. The order of the pairs does not matter.

    Args:
        first: [P], items of the pairs.
        second: likewise.
        rank: [N], of all items, each another; the lower stays.

    Returns:
        The items left out, rising, and for each the item that stands for it.
    """
    ranks = np.stack([rank[first], rank[second]])
    better, worse = ranks.min(0), ranks.max(0)
    order = np.lexsort((better, worse))
    gone: dict[int, int] = {}
    for low, high in zip(better[order].tolist(), worse[order].tolist(), strict=True):
        # Pairs come by the rank of the worse: what became of the better is known by now.
        if low not in gone:
            gone.setdefault(high, low)
    item = np.empty(len(rank), np.int64)
    item[rank] = np.arange(len(rank))
    left = item[np.fromiter(gone.keys(), np.int64, len(gone))]
    stands = item[np.fromiter(gone.values(), np.int64, len(gone))]
    rising = np.argsort(left)
    return left[rising], stands[rising]


def families(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Names that pairs connect, each with the first (as text) of its family.

    A name that is in no pair is its own family and is not listed.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for one, other in pairs:
        a, b = sorted((root(one), root(other)))
        parent[b] = a
    return {name: root(name) for name in sorted(parent)}
