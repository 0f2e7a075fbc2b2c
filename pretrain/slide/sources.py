"""The bags that slide encoders learn from: slides as several stores know them, grouped to samples.

A source is one store of bags: of one tile encoder, at one scale. A slide may lie in several. What a
sample is, a slide or a patient with all slides, is the config's choice; groups are known to all, so
that a patient is never held against itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from eosin.configs.errors import InputError
from eosin.data_curation.bag_store import BagStore
from eosin.data_curation.images import read_text_table
from eosin.data_curation.strata import Strata
from eosin.launch.artefacts import stamp_of

Unit: TypeAlias = Literal["slide", "group"]
STATISTICS_ROWS = 65_536
"""Of a store, that its mean and spread are taken over at most, evenly spaced."""


@dataclass(frozen=True)
class Source:
    """One store, opened."""

    name: str
    """Of its encoder, and its scale."""
    store: BagStore
    tile_um: float
    """Side of its tiles."""

    @property
    def dim(self) -> int:
        """D: of its features."""
        return self.store.dim


@dataclass(frozen=True)
class Slide:
    """One slide, in all stores that know it."""

    slide_id: str
    group: str
    stain: str | None
    sources: tuple[int, ...]
    """Numbers of the stores that know it."""
    row: int
    """Of the table; -1 without one."""


@dataclass(frozen=True)
class Sample:
    """What stands at one place of the order."""

    key: str
    """slide_id, or the group."""
    group: int
    """Number of the group among all."""
    slides: tuple[Slide, ...]


class Sources:
    """Stores of bags, joined by slide.

    Args:
        bags: folders of `eosin bags` or `eosin extract`.
        table: what to take: columns slide, and maybe group, stain, split (then ``train`` alone) and
            others; None: every slide of the stores.
        unit: what a sample is.
        stains: of which every sample must have a slide each.
        keys: samples that alone are taken; None: all.

    Raises:
        InputError: a folder holds no bags, stores disagree about a slide's group, the table lacks
            a column or names a slide that no store knows, or nothing is left.
    """

    def __init__(
        self,
        bags: Sequence[Path],
        table: Path | None,
        unit: Unit,
        stains: int = 1,
        keys: frozenset[str] | None = None,
    ) -> None:
        self._arguments = (tuple(bags), table, unit, stains, keys)
        self.sources = [_open(folder) for folder in bags]
        self.table = None if table is None else read_text_table(table, ("slide",))
        self.slides = self._join(table)
        self.groups = sorted({slide.group for slide in self.slides})
        number = {group: at for at, group in enumerate(self.groups)}
        members: dict[str, list[Slide]] = {}
        for slide in self.slides:
            members.setdefault(slide.slide_id if unit == "slide" else slide.group, []).append(slide)
        self.samples = [
            Sample(key, number[of[0].group], tuple(of))
            for key, of in sorted(members.items())
            if len({slide.stain for slide in of}) >= stains and (keys is None or key in keys)
        ]
        self.left_out = len(members) - len(self.samples)
        """Samples without slides of enough stains, or not among `keys`."""
        if not self.samples:
            raise InputError(
                f"{_named(bags)}: no sample has slides of {stains} stains"
                if members
                else f"{_named(bags)}: no slide is left to train on"
            )
        self.digest = stamp_of(
            stores=[source.store.meta["stamp"] for source in self.sources],
            samples=[[s.key, s.group, *(x.slide_id for x in s.slides)] for s in self.samples],
            stains=[str(slide.stain) for slide in self.slides],
        )

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), self._arguments  # a worker maps the files itself

    def only(self, keys: frozenset[str]) -> "Sources":
        """The same with these samples alone."""
        return type(self)(*self._arguments[:-1], keys=keys)

    def strata(self, column: str) -> tuple[Strata, list[npt.NDArray[np.int64]]]:
        """Samples counted by a column of the table (of its first slide), and which they are.

        Raises:
            InputError: the table has no such column.
        """
        if not column:
            n = len(self.samples)
            return Strata(("",), np.array([[n]], np.int64)), [np.arange(n)]
        if self.table is None or column not in self.table.column_names:
            raise InputError(f"mixture.column={column}: the table of slides has no such column")
        values = self.table[column].to_pylist()
        of = np.array([values[sample.slides[0].row] for sample in self.samples])
        names = sorted(set(of.tolist()))
        rows = [np.flatnonzero(of == name) for name in names]
        counts = np.array([[len(r)] for r in rows], np.int64)
        return Strata(tuple(names), counts, stamp_of(column=column, of=of.tolist())), rows

    def statistics(self, source: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Mean and standard deviation of a source's features, fp32 [D] each.

        Over at most `STATISTICS_ROWS` rows, evenly spaced; a constant channel has a spread of 1.
        """
        features = self.sources[source].store.store.features
        step = -(-len(features) // STATISTICS_ROWS)
        rows = np.asarray(features[::step], np.float64)
        spread = rows.std(axis=0)
        spread[spread < 1e-6] = 1.0
        return rows.mean(axis=0).astype(np.float32), spread.astype(np.float32)

    def _join(self, path: Path | None) -> list[Slide]:
        known: dict[str, list[int]] = {}
        for number, source in enumerate(self.sources):
            for slide_id in source.store.slide_ids:
                known.setdefault(slide_id, []).append(number)
        said: dict[str, int] = {}
        columns: dict[str, list[str | None]] = {}
        if self.table is not None:
            columns = {name: self.table[name].to_pylist() for name in self.table.column_names}
            said = {str(name): row for row, name in enumerate(columns["slide"])}
            if len(said) != self.table.num_rows:
                raise InputError(f"{path}: a slide is named twice")
            split = columns.get("split")
            said = {s: r for s, r in said.items() if split is None or split[r] == "train"}
            lost = sorted(said.keys() - known.keys())
            if lost:
                raise InputError(
                    f"{path}: {len(lost)} slides are in no store of bags, the first is '{lost[0]}'"
                )
            known = {slide_id: of for slide_id, of in known.items() if slide_id in said}
        return [self._slide(name, of, said, columns) for name, of in sorted(known.items())]

    def _slide(
        self,
        slide_id: str,
        sources: list[int],
        said: dict[str, int],
        columns: dict[str, list[str | None]],
    ) -> Slide:
        row = said.get(slide_id, -1)
        owners = [self.sources[number].store.owner(slide_id) for number in sources]
        groups, stains = {group for group, _ in owners}, {stain for _, stain in owners} - {None}
        group, stain = (
            columns[name][row] or None if name in columns else None for name in ("group", "stain")
        )
        if group is None:
            if len(groups) > 1:
                raise InputError(
                    f"slide '{slide_id}' is of the groups {sorted(groups)} in different stores; "
                    "say which in the column group of bags.table"
                )
            group = groups.pop()
        if stain is None and len(stains) == 1:
            stain = stains.pop()
        return Slide(slide_id, str(group), stain, tuple(sources), row)


@dataclass(frozen=True, kw_only=True)
class BagsConfig:
    """Which bags are learnt from."""

    stores: list[Path] = field(default_factory=list)
    """Folders of `eosin bags` or `eosin extract layout=bags`, one a tile encoder or scale."""
    table: Path | None = None
    """CSV with the column slide, and maybe group (patient), stain, split (only ``train``
    is taken) and columns for `mixture`; null: all slides, with the groups that the stores know."""
    unit: Unit = "slide"
    """What a sample is: a slide, or a group (patient) with all its slides."""

    def __post_init__(self) -> None:
        if not self.stores:
            raise ValueError("bags.stores=[]: name folders of 'eosin bags'")


def _open(folder: Path) -> Source:
    store = BagStore(folder)
    name = str(store.meta.get("encoder") or folder.name)
    mpp = float(np.median(store.store.rows["mpp"].to_numpy()))
    return Source(f"{name} at {mpp:g} µm/px", store, store.tile_um)


def _named(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))
