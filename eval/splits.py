"""Splits by group: checking the given ones, carving the missing ones.

Without any split, about a quarter of the tiles becomes test and a fifth of the rest val; without
val alone, a fifth of train does. Folds are scikit-learn's StratifiedGroupKFold: whole groups,
classes in proportion as far as the groups allow.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedGroupKFold

from eosin.configs.errors import InputError

SPLITS = ("train", "val", "test")
TEST_FOLDS = 4
"""Test is one of so many folds of all tiles."""
VAL_FOLDS = 5
"""Val is one of so many folds of what is not test."""

Splits = npt.NDArray[np.str_]


def carve_splits(
    labels: npt.NDArray[np.int64],
    groups: Sequence[str],
    given: Sequence[str] | None,
    classes: Sequence[str],
    seed: int,
    where: str,
) -> tuple[Splits, list[str]]:
    """The split of every tile [N], and notes on what was carved.

    Args:
        labels: indices into `classes`, [N].
        groups: the group of every tile.
        given: the split of every tile, as far as the task gives splits.
        classes: names of the classes.
        seed: of the carving.
        where: the task's file or folder, for messages.

    Raises:
        InputError: an unknown split, a group in two splits, a class absent from train or test, or
            too few groups to carve.
    """
    notes = []
    if given is None:
        splits = np.full(len(labels), "train")
        everything = np.ones(len(labels), np.bool_)
        splits[_carve(labels, groups, everything, TEST_FOLDS, seed, where)] = "test"
        notes.append(f"no splits are given: test is one of {TEST_FOLDS} folds of the groups")
    else:
        splits = np.array(given)
        _check_given(splits, groups, where)
    if "val" not in splits:
        train = splits == "train"
        splits[_carve(labels, groups, train, VAL_FOLDS, seed, where)] = "val"
        notes.append(f"no val split is given: val is one of {VAL_FOLDS} folds of train's groups")
    for split in ("train", "test"):
        absent = np.setdiff1d(np.arange(len(classes)), labels[splits == split])
        if len(absent):
            raise InputError(
                f"{where}: class '{classes[absent[0]]}' is absent from {split}; "
                "it needs groups of its own there"
            )
    return splits, notes


def _check_given(splits: Splits, groups: Sequence[str], where: str) -> None:
    unknown = sorted(set(splits.tolist()) - set(SPLITS))
    if unknown:
        raise InputError(f"{where}: unknown split '{unknown[0]}'; there are: {', '.join(SPLITS)}")
    for needed in ("train", "test"):
        if needed not in splits:
            raise InputError(f"{where}: no tile has the split '{needed}'")
    home: dict[str, str] = {}
    for group, split in zip(groups, splits.tolist(), strict=True):
        if home.setdefault(group, split) != split:
            raise InputError(
                f"{where}: group '{group}' is in {home[group]} and in {split}; "
                "a group must not cross a split"
            )


def _carve(
    labels: npt.NDArray[np.int64],
    groups: Sequence[str],
    among: npt.NDArray[np.bool_],
    folds: int,
    seed: int,
    where: str,
) -> npt.NDArray[np.intp]:
    """The tiles of one fold of those `among`.

    Of the folds, the first that leaves the most classes on both sides: with few groups a class
    could otherwise be lost from train or test though another fold would have kept it.
    """
    rows = np.flatnonzero(among)
    names, group_of = np.unique(np.asarray(groups)[rows], return_inverse=True)
    if len(names) < 2:
        raise InputError(f"{where}: one group alone ('{names[0]}') cannot be split; give splits")
    splitter = StratifiedGroupKFold(min(folds, len(names)), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # It warns of classes with fewer tiles than folds; what matters is checked afterwards.
        warnings.simplefilter("ignore", UserWarning)
        try:
            candidates = list(splitter.split(rows, labels[rows], group_of))
        except ValueError as error:
            raise InputError(f"{where}: too few tiles a class to carve splits: {error}") from error
    kept = [len(set(labels[rows[a]]) & set(labels[rows[b]])) for a, b in candidates]
    _, inside = candidates[int(np.argmax(kept))]
    fold: npt.NDArray[np.intp] = rows[inside]
    return fold
