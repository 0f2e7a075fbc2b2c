"""Every protocol by name. A new one is a file with a `Family`, and a place in `FAMILIES`."""

import fnmatch
import time
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from eosin.eval import (
    few_labels,
    fewshot,
    knn,
    linear,
    linear_eva,
    linear_uni,
    prototypes,
    retrieval,
)
from eosin.eval.probe import Family, Labelled, Outcome

FAMILIES: tuple[Family, ...] = (
    linear.FAMILY,
    linear_uni.FAMILY,
    linear_eva.FAMILY,
    knn.FAMILY,
    fewshot.FAMILY,
    prototypes.FAMILY,
    retrieval.FAMILY,
    few_labels.FAMILY,
)

DESCRIPTIONS = {name: what for family in FAMILIES for name, what in family.protocols.items()}
"""Name and version → one line that says exactly what it does."""

USUAL = [name for family in FAMILIES for name in family.usual]
"""Those that are run when nothing else is asked for."""


def choose(wanted: Sequence[str]) -> list[str]:
    """The protocols that names, ``usual``, or patterns such as ``knn/*`` stand for, in order.

    Raises:
        ValueError: one stands for none.
    """
    chosen: set[str] = set()
    for pattern in wanted:
        found = USUAL if pattern == "usual" else fnmatch.filter(DESCRIPTIONS, pattern)
        if not found:
            raise ValueError(f"no protocol '{pattern}'; there are {', '.join(DESCRIPTIONS)}")
        chosen |= set(found)
    if not chosen:
        raise ValueError("no protocol is named; 'usual' stands for " + ", ".join(USUAL))
    return [name for name in DESCRIPTIONS if name in chosen]


def run_protocols(
    names: Sequence[str],
    labelled: Labelled,
    test_features: npt.NDArray[np.float32],
    n_classes: int,
    seed: int,
) -> Iterator[tuple[str, Outcome, float]]:
    """Name, outcome and seconds of each protocol that the task affords, a family at a time.

    The seconds of a family are divided evenly among its protocols.
    """
    for family in FAMILIES:
        wanted = [name for name in family.protocols if name in names]
        began = time.perf_counter()
        if wanted:
            outcomes = family.run(labelled, test_features, n_classes, seed, wanted)
            each = (time.perf_counter() - began) / max(len(outcomes), 1)
            yield from ((name, outcome, each) for name, outcome in outcomes.items())
