"""Labels of slides or patients for many tasks at once: classes, and times to an event.

A cell that is empty is a label that is not there; it costs nothing and teaches nothing. Legend: n
samples, B samples of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from eosin.configs.errors import InputError
from eosin.data_curation.images import read_text_table
from eosin.launch.artefacts import file_digest
from eosin.pretrain.hazards import cut_times, interval_of


@dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """Which labels are learnt."""

    table: Path
    """CSV with a column slide or group, as `bags.unit` has it, and a column a task."""
    classes: list[str] = field(default_factory=list)
    """Columns whose values are classes."""
    survival: list[str] = field(default_factory=list)
    """Names of times: ``os`` reads the columns os_time and os_event (1 or 0)."""
    intervals: int = 4
    """That a time is cut into, at quantiles of the times of events."""
    weight: float = 1.0
    """In the total."""
    smoothing: float = 0.03
    """Of labels (MOOZY)."""
    balanced: bool = True
    """Classes weigh inversely to how often they come."""

    def __post_init__(self) -> None:
        if not self.classes and not self.survival:
            raise ValueError("labels: name columns in classes= or survival=")
        if self.weight <= 0 or not 0 <= self.smoothing < 1 or self.intervals < 2:
            raise ValueError(
                f"labels: weight={self.weight} > 0, smoothing={self.smoothing} in [0, 1) and "
                f"intervals={self.intervals} > 1 are needed"
            )


@dataclass(frozen=True)
class Task:
    """One column, or one time."""

    name: str
    outputs: int
    """Classes, or intervals."""
    target: npt.NDArray[np.int64]
    """Class, or interval, of each sample; -1: not known, [n]."""
    event: npt.NDArray[np.int64] | None
    """For a time: whether the event came, [n]."""
    names: tuple[str, ...]
    """Of the classes; the cuts of a time."""
    weights: npt.NDArray[np.float32]
    """Of the classes, [outputs]; ones for a time."""


@dataclass(frozen=True)
class Labels:
    """All tasks."""

    tasks: tuple[Task, ...]
    digest: str


def read_labels(config: LabelsConfig, unit: str, keys: Sequence[str]) -> Labels:
    """The labels of samples.

    Args:
        config: of the table.
        unit: slide or group.
        keys: of the samples.

    Raises:
        InputError: a column is missing, a key comes twice, a time is none, a task has one class or
            no sample.
    """
    names = [*config.classes]
    for name in config.survival:
        names += [f"{name}_time", f"{name}_event"]
    table = read_text_table(config.table, (unit,))
    for name in names:
        if name not in table.column_names:
            raise InputError(
                f"{config.table} has no column '{name}'; it has {', '.join(table.column_names)}"
            )
    rows = table[unit].to_pylist()
    if len(set(rows)) < len(rows):
        raise InputError(f"{config.table}: a {unit} is named twice")
    at = {key: row for row, key in enumerate(rows)}
    order = np.array([at.get(key, -1) for key in keys])
    tasks = [_classes(config, table, name, order) for name in config.classes]
    tasks += [_survival(config, table, name, order) for name in config.survival]
    return Labels(tuple(tasks), file_digest(config.table))


def _classes(
    config: LabelsConfig, table: pa.Table, name: str, order: npt.NDArray[np.int64]
) -> Task:
    cells = table[name].to_pylist()
    values = [cells[row].strip() if row >= 0 and cells[row] else "" for row in order.tolist()]
    classes = sorted(set(values) - {""})
    if len(classes) < 2:
        raise InputError(
            f"{config.table}: column '{name}' has {len(classes)} classes among the samples; a task "
            "needs two"
        )
    target = np.array([classes.index(v) if v else -1 for v in values], np.int64)
    counts = np.bincount(target[target >= 0], minlength=len(classes))
    weights = counts.sum() / (len(classes) * counts) if config.balanced else np.ones(len(classes))
    return Task(name, len(classes), target, None, tuple(classes), weights.astype(np.float32))


def _survival(
    config: LabelsConfig, table: pa.Table, name: str, order: npt.NDArray[np.int64]
) -> Task:
    columns = [table[f"{name}_{part}"].to_pylist() for part in ("time", "event")]
    times, events = np.full(len(order), np.nan), np.zeros(len(order), np.int64)
    for sample, row in enumerate(order.tolist()):
        time, event = (column[row] if row >= 0 else "" for column in columns)
        if not time or not event:
            continue
        try:
            times[sample] = float(time)
        except ValueError:
            times[sample] = np.inf
        if not 0 <= times[sample] < np.inf or event not in ("0", "1"):
            raise InputError(
                f"{config.table}: {name}_time={time}, {name}_event={event}: a time is a number "
                "of 0 or more, an event 1 or 0"
            )
        events[sample] = int(event)
    known = np.isfinite(times)
    try:
        cuts = cut_times(times[known], events[known] == 1, config.intervals)
    except ValueError as error:
        raise InputError(f"{config.table}: {name}: {error}") from error
    target = np.full(len(order), -1, np.int64)
    target[known] = interval_of(times[known], cuts)
    ones = np.ones(config.intervals, np.float32)
    return Task(name, config.intervals, target, events, tuple(f"{c:g}" for c in cuts), ones)
