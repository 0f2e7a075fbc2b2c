"""Nested cross-validation by group: every group is test once, and chosen by groups of its own.

The outer folds part all groups; what is not test in an outer fold is parted again into inner folds,
each of which is once what training is stopped by. Nothing that is fitted, standardised, cut,
weighed or stopped sees the outer fold. A function of labels, groups and seed. Legend: S slides, F
outer and J inner folds.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedGroupKFold

from eosin.configs.errors import InputError
from eosin.eval.heads.training import Member

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Folds:
    """Who is test when."""

    outer: Rows
    """The outer fold in which each slide is test, [S]."""
    inner: Rows
    """In each outer fold, the inner fold in which a slide stops the training; -1: it is test.
    [F, S]"""

    def test(self, fold: int) -> Rows:
        """Rows of the test slides."""
        return np.flatnonzero(self.outer == fold)

    def parts(self, fold: int) -> Iterator[tuple[Rows, Rows]]:
        """Rows that are learnt from and rows that training is stopped by, of each inner fold."""
        for number in range(int(self.inner[fold].max()) + 1):
            held = self.inner[fold] == number
            yield np.flatnonzero(~held & (self.outer != fold)), np.flatnonzero(held)

    def members(self, seed: int) -> list[Member]:
        """The heads of a cross-validation: F · J, those of an outer fold together."""
        return [
            Member(seed=1000 * seed + number, train=train, val=val)
            for fold in range(len(self.inner))
            for number, (train, val) in enumerate(self.parts(fold))
        ]


def draw_folds(
    strata: Rows, groups: Sequence[str], n_outer: int, n_inner: int, seed: int, where: str
) -> Folds:
    """Folds of whole groups, strata in proportion as far as the groups allow.

    Args:
        strata: class or event of each slide, [S].
        groups: of each slide.
        n_outer: F.
        n_inner: J.
        seed: of the draws.
        where: the table, for messages.

    Raises:
        InputError: too few groups, or a stratum that some training would not see.
    """
    names = np.asarray(groups)
    if len(set(groups)) < n_outer * 2:
        raise InputError(
            f"{where}: {len(set(groups))} groups are too few for {n_outer} folds: give fewer"
        )
    outer = _folds(strata, names, np.arange(len(strata)), n_outer, seed, where)
    inner = np.full((n_outer, len(strata)), -1, np.int64)
    for fold in range(n_outer):
        rows = np.flatnonzero(outer != fold)
        inner[fold, rows] = _folds(
            strata[rows], names[rows], rows, n_inner, 1000 * (seed + 1) + fold, where
        )
    found = Folds(outer, inner)
    refuse_crossing(found, groups)
    for fold in range(n_outer):
        for train, _ in found.parts(fold):
            absent = np.setdiff1d(strata, strata[train])
            if len(absent):
                raise InputError(
                    f"{where}: too few groups of class {absent[0]}: some training would see none; "
                    "give fewer folds"
                )
    return found


def refuse_crossing(folds: Folds, groups: Sequence[str]) -> None:
    """Refuses folds in which a group is on two sides.

    Raises:
        InputError: naming it.
    """
    names = np.asarray(groups)
    for fold in range(len(folds.inner)):
        test = set(names[folds.test(fold)])
        for train, val in folds.parts(fold):
            learnt, stopped = set(names[train]), set(names[val])
            crossing = (learnt & stopped) | (test & (learnt | stopped))
            if crossing:
                raise InputError(
                    f"group '{min(crossing)}' is on two sides of fold {fold}: it must not be"
                )


def _folds(
    strata: Rows, groups: npt.NDArray[np.str_], rows: Rows, count: int, seed: int, where: str
) -> Rows:
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    found = np.zeros(len(rows), np.int64)
    with warnings.catch_warnings():
        # It warns of classes with fewer slides than folds; what matters is checked afterwards.
        warnings.simplefilter("ignore", UserWarning)
        try:
            for number, (_, inside) in enumerate(splitter.split(rows, strata, groups)):
                found[inside] = number
        except ValueError as error:
            raise InputError(f"{where}: {count} folds cannot be had: {error}") from error
    return found
