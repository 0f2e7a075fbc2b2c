"""A balanced draw of tiles: filters, caps, a budget shared out over a tree, tickets in its leaves.

One mechanism serves all published schemes (configs/sample/*.yaml): which columns make the tree,
what weighs, what is capped. The draw is a function of tables, options and seed. Shapes: N tiles.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from eosin.configs.errors import ConfigError, EosinError
from eosin.data_curation.tile_columns import Codes, TileColumns
from eosin.data_curation.water_filling import TreeLevel, carry_up, fill_tree

LeafOrder: TypeAlias = Literal["random", "closest", "farthest"]
NO_CAP = 1 << 60


@dataclass(frozen=True, kw_only=True)
class QuantileRule:
    """Keeps the tiles between two quantiles of a figure, e.g. a slide's most cellular fifth."""

    column: str
    """Of numbers, of tiles or clusters; a tile without one is kept."""
    low: float = 0.0
    high: float = 1.0
    """Shares in rising order: low=0.8 keeps the upper fifth."""
    within: str = "slide_id"
    """Column in whose values quantiles are taken apart; empty: in all tiles together."""

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low={self.low} and high={self.high} must rise within 0 to 1")


@dataclass(frozen=True, kw_only=True)
class BinRule:
    """Makes a column of equal-frequency bins of a figure, for the tree."""

    name: str
    """Of the new column."""
    column: str
    """Of numbers, of tiles or clusters."""
    count: int
    """Bins."""
    within: list[str] = field(default_factory=list)
    """Columns in whose values bins are made apart."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count={self.count} of the bins '{self.name}' must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How tiles are drawn from those that pass the thresholds."""

    total: int = 0
    """Tiles to draw; 0: as many as caps and filters leave."""
    tree: list[str] = field(default_factory=list)
    """Columns of tiles, slides or clusters, the coarsest first: the total is shared out evenly over
    the values of the first, each share over those of the second inside it, and so on; a value that
    has too little gives all, and the others share the rest. Empty: all tiles are alike."""
    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    """By column of the tree and value: how much more than others it gets; 1 where not said."""
    floors: dict[str, int] = field(default_factory=dict)
    """By column of the tree: the least that each value should get, where it has so much."""
    caps: dict[str, int] = field(default_factory=dict)
    """By column: the most tiles of one value. In the tree it bounds a value's share inside each
    parent; any other column is cut first, to those with the smallest tickets."""
    quantiles: list[QuantileRule] = field(default_factory=list)
    """Filters by rank, before everything else of the draw."""
    bins: list[BinRule] = field(default_factory=list)
    """Columns to make for the tree."""
    leaf: LeafOrder = "random"
    """Which tiles of a leaf are taken: by ticket, or by ``distance`` to their cluster's centre."""
    seed: int = 0
    """Of tickets and remainders. A tile's ticket depends on the seed, its slide and place alone."""

    def __post_init__(self) -> None:
        if self.total < 0:
            raise ValueError(f"total must not be negative, not {self.total}")
        if len(set(self.tree)) < len(self.tree):
            raise ValueError(f"tree={self.tree} names a column twice")
        for what, columns in (("weights", self.weights), ("floors", self.floors)):
            stray = [name for name in columns if name not in self.tree]
            if stray:
                raise ValueError(f"{what} names '{stray[0]}', which is not in tree={self.tree}")
        for column, values in self.weights.items():
            for value, weight in values.items():
                if not (0 < weight < np.inf):
                    raise ValueError(f"weight {weight} of {column}={value} must be positive")
        for what, numbers in (("floor", self.floors), ("cap", self.caps)):
            for column, number in numbers.items():
                if number < (1 if what == "cap" else 0):
                    raise ValueError(f"{what} {number} of '{column}' is too small")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must be 0 to 2^63 - 1, not {self.seed}")


@dataclass(frozen=True, eq=False)
class Drawn:
    """The result of a draw."""

    rows: NDArray[np.int64]
    """Of tiles.parquet, rising."""
    node: NDArray[np.int32]
    """[len(rows)], the leaf of each, an index into `paths`."""
    paths: list[str]
    """The values of each leaf's tree columns, joined by ``/``."""
    dropped: dict[str, int]
    """Tiles lost to each step of the draw, in its order."""
    unmet: list[str]
    """A line for each column of the tree some of whose values got less than their floor."""


def draw_sample(
    columns: TileColumns,
    kept: NDArray[np.bool_],
    options: SampleOptions,
    given: dict[str, Codes] | None = None,
) -> Drawn:
    """Draws from the rows that `kept`, bool [N], allows.

    Args:
        columns: the tables.
        kept: what filters leave; not changed.
        options: the draw.
        given: columns that take the place of those of the tables (clusters that were merged).

    Raises:
        ConfigError: a column is missing or not of numbers; a weight names a value that is nowhere.
        EosinError: no tile is left.
    """
    kept, dropped = kept.copy(), dict[str, int]()
    given = dict(given or {})

    def codes(name: str) -> Codes:
        return given[name] if name in given else columns.codes(name)

    tickets = columns.tickets(options.seed)
    for rule in options.quantiles:
        inside = codes(rule.within).codes if rule.within else None
        outside = ~_between(columns.numbers(rule.column), inside, kept, rule, tickets)
        _cut(kept, outside, dropped, f"quantiles of {rule.column}")
    for bins in options.bins:
        within = [codes(name) for name in bins.within]
        given[bins.name] = _binned(columns, kept, bins, within, tickets)
    for name, cap in options.caps.items():
        if name not in options.tree:
            over = ~first_of_each(codes(name).codes, tickets, kept, cap)
            _cut(kept, over, dropped, f"cap of {name}")
    rows = np.flatnonzero(kept)
    if not len(rows):
        raise EosinError("no tile is left to draw from; relax filters and caps")
    leaf, levels, sizes, paths = _make_tree(rows, codes, options)
    budget = min(options.total or len(rows), len(rows))
    given_out = fill_tree(budget, levels, sizes, options.seed) or [np.array([budget])]
    takes = given_out[-1]
    order = tickets[rows]
    if options.leaf != "random":
        order = _by_distance(columns.numbers("distance")[rows], options.leaf, order)
    chosen = _smallest(leaf, order, takes)
    dropped["the draw"] = len(rows) - int(chosen.sum())
    unmet = _unmet(levels, given_out, sizes, options) if options.floors else []
    return Drawn(rows=rows[chosen], node=leaf[chosen], paths=paths, dropped=dropped, unmet=unmet)


def _unmet(
    levels: list[TreeLevel],
    given: list[NDArray[np.int64]],
    sizes: NDArray[np.int64],
    options: SampleOptions,
) -> list[str]:
    """Lines on floors that the total is too small for."""
    capacities, _ = carry_up(levels, sizes)
    lines = []
    for name, level, got, most in zip(options.tree, levels, given, capacities, strict=True):
        short = int((got < np.minimum(level.floors, most)).sum())
        if short:
            lines.append(
                f"{short} of {len(got)} values of '{name}' got less than floors.{name}="
                f"{options.floors.get(name, 0)}, though they have it: total is too small"
            )
    return lines


def first_of_each(
    codes: NDArray[np.int32],
    tickets: NDArray[np.uint64],
    kept: NDArray[np.bool_],
    cap: int,
) -> NDArray[np.bool_]:
    """The kept rows that are among the `cap` smallest tickets of their value, bool [N]."""
    rows = np.flatnonzero(kept)
    counts = np.bincount(codes[rows], minlength=int(codes.max(initial=0)) + 1)
    crowded = counts[codes[rows]] > cap  # the others need no sorting
    chosen = kept.copy()
    some = rows[crowded]
    takes = np.full(len(counts), cap, np.int64)
    chosen[some] = _smallest(codes[some], tickets[some], takes)
    return chosen


def _cut(
    kept: NDArray[np.bool_], lost: NDArray[np.bool_], dropped: dict[str, int], what: str
) -> None:
    dropped[what] = dropped.get(what, 0) + int((kept & lost).sum())
    kept &= ~lost


def _between(
    values: NDArray[np.float32],
    inside: NDArray[np.int32] | None,
    kept: NDArray[np.bool_],
    rule: QuantileRule,
    tickets: NDArray[np.uint64],
) -> NDArray[np.bool_]:
    """Rows whose rank among the kept ones of their group lies in the rule's share; NaN does too."""
    rows = np.flatnonzero(kept & ~np.isnan(values))
    group = np.zeros(len(rows), np.int32) if inside is None else inside[rows]
    share = _ranks(group, values[rows], tickets[rows])
    allowed = np.ones(len(values), np.bool_)
    allowed[rows] = (share >= rule.low) & ((share < rule.high) | (rule.high == 1))
    return allowed


def _ranks(
    group: NDArray[np.int32], values: NDArray[np.float32], tickets: NDArray[np.uint64]
) -> NDArray[np.float64]:
    """Place of each value in its group in rising order (equal ones by ticket), over its size."""
    order = np.lexsort((tickets, values, group))
    ordered = group[order]
    first = np.searchsorted(ordered, ordered, "left")
    size = np.searchsorted(ordered, ordered, "right") - first
    share = np.empty(len(values))
    share[order] = (np.arange(len(values)) - first) / size
    return share


def _binned(
    columns: TileColumns,
    kept: NDArray[np.bool_],
    rule: BinRule,
    within: list[Codes],
    tickets: NDArray[np.uint64],
) -> Codes:
    """Equal-frequency bins 0 … count - 1 of the kept rows; rows without a figure are in bin 0."""
    values = columns.numbers(rule.column)
    rows = np.flatnonzero(kept & ~np.isnan(values))
    group = np.zeros(len(rows), np.int64)
    for column in within:
        group = group * len(column.values) + column.codes[rows]
    group = np.unique(group, return_inverse=True)[1]
    share = _ranks(group.astype(np.int32), values[rows], tickets[rows])
    bins = np.zeros(columns.n_rows, np.int32)
    bins[rows] = np.minimum((share * rule.count).astype(np.int32), rule.count - 1)
    return Codes(bins, [str(number) for number in range(rule.count)])


def _make_tree(
    rows: NDArray[np.int64], codes: Callable[[str], Codes], options: SampleOptions
) -> tuple[NDArray[np.int32], list[TreeLevel], NDArray[np.int64], list[str]]:
    """The leaf of each row, the levels of the tree, the size and the path of each leaf."""
    node = np.zeros(len(rows), np.int64)
    paths, levels = [""], list[TreeLevel]()
    for name in options.tree:
        column = codes(name)
        width = len(column.values)
        key = node * width + column.codes[rows]
        found, node = _number(key, len(paths) * width)
        parents, value = np.divmod(found, width)
        said = options.weights.get(name, {})
        unknown = sorted(set(said) - set(column.values))
        if unknown:
            raise ConfigError(
                f"weights: no tile has {name}={unknown[0]}; there are: "
                f"{', '.join(column.values[:20])}"
            )
        weights = np.array([said.get(v, 1.0) for v in column.values])
        count = len(found)
        levels.append(
            TreeLevel(
                parents=parents,
                weights=weights[value],
                caps=np.full(count, options.caps.get(name, NO_CAP), np.int64),
                floors=np.full(count, options.floors.get(name, 0), np.int64),
            )
        )
        paths = [
            f"{paths[p]}/{column.values[v]}" if paths[p] else column.values[v]
            for p, v in zip(parents.tolist(), value.tolist(), strict=True)
        ]
    leaf = node.astype(np.int32)
    return leaf, levels, np.bincount(leaf, minlength=len(paths)), paths


def _number(key: NDArray[np.int64], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The different keys, rising, and the number of each row's among them."""
    if size > 1 << 27:
        found, number = np.unique(key, return_inverse=True)
        return found, number.astype(np.int64)
    present = np.zeros(size, np.bool_)
    present[key] = True
    return np.flatnonzero(present), (np.cumsum(present) - 1)[key]


def _smallest(
    leaf: NDArray[np.int32], order: NDArray[np.uint64], takes: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """The rows that are among the first `takes` of their leaf by `order`, bool [n].

    Leaf and order are packed into one number, so that one sort serves; orders that are equal in
    its bits are taken by row.
    """
    bits = max(1, int(max(len(takes) - 1, 1)).bit_length())
    packed = (leaf.astype(np.uint64) << np.uint64(64 - bits)) | (order >> np.uint64(bits))
    place = np.argsort(packed, kind="stable")
    del packed
    sizes = np.bincount(leaf, minlength=len(takes))
    first = np.cumsum(sizes) - sizes
    chosen = np.zeros(len(leaf), np.bool_)
    taken = np.minimum(takes, sizes)
    # Of each leaf's run in `place`, the first `taken`.
    starts = np.repeat(first, taken)
    within = np.arange(len(starts)) - np.repeat(np.cumsum(taken) - taken, taken)
    chosen[place[starts + within]] = True
    return chosen


def _by_distance(
    distance: NDArray[np.float32], leaf: LeafOrder, tickets: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Orders by distance, and by ticket among equal ones; tiles without a distance come last."""
    filled = np.where(np.isnan(distance), np.float32(np.inf), np.abs(distance))  # no -0
    filled = filled.astype(np.float32)
    bits = filled.view(np.uint32).astype(np.uint64)
    if leaf == "farthest":
        bits = np.where(np.isnan(distance), np.uint64(0xFFFFFFFF), np.uint64(0x7FFFFFFF) - bits)
    packed: NDArray[np.uint64] = (bits << np.uint64(32)) | (tickets >> np.uint64(32))
    return packed
