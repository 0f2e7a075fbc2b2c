"""Which patients are held out: by their names and a seed, and by who shares duplicates."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from eosin.data_curation.duplicate_groups import families
from eosin.data_curation.manifest import DUPLICATES, read_table
from eosin.data_curation.records import draw

Part: TypeAlias = Literal["all", "train", "held_out"]


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """A split of the tiles by group (patient)."""

    part: Part = "all"
    """``train`` or ``held_out``: the groups on one side of the split alone. Groups that share
    duplicates lie on the same side."""
    held_out: float = 0.1
    """Share of the groups that are held out. Which ones depends on their names and `seed` alone,
    so more slides of other patients change nothing."""
    seed: int = 0
    """Of the split; not of the draw."""

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, not {self.held_out}")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must be 0 to 2^63 - 1, not {self.seed}")


def in_part(groups: list[str], split: SplitOptions, duplicates: Path | None) -> NDArray[np.bool_]:
    """Whether each group is on the side that `split` asks for, bool [len(groups)].

    Args:
        groups: names.
        split: what is asked for.
        duplicates: a table of `eosin dedupe`, by which groups belong together.
    """
    if split.part == "all":
        return np.ones(len(groups), np.bool_)
    family = dict[str, str]()
    if duplicates is not None:
        table = read_table(duplicates, DUPLICATES)
        across = table.filter(pc.not_equal(table["group"], table["kept_group"]))
        pairs = zip(across["group"].to_pylist(), across["kept_group"].to_pylist(), strict=True)
        family = families(set(pairs))
    tickets = [draw(split.seed, family.get(name, name)) for name in groups]
    held_out = np.array([ticket < split.held_out * 2.0**64 for ticket in tickets], np.bool_)
    return held_out if split.part == "held_out" else ~held_out
