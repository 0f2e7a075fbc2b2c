"""What every probe said of every test tile, as a table: `PREDICTIONS` of `manifest`.

From it a score, an interval and a comparison can be made again without the tiles.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from eosin.configs.errors import InputError
from eosin.data_curation.manifest import PREDICTIONS, read_table
from eosin.eval.probe import Outcome, one_hot
from eosin.eval.tasks import Task


def predictions_table(task: Task, outcomes: dict[str, dict[str, Outcome]]) -> pa.Table:
    """One row a test tile, protocol and encoder, from outcomes by encoder and protocol."""
    test = np.flatnonzero(task.splits == "test").tolist()
    ids, groups = [task.tile_ids[i] for i in test], [task.groups[i] for i in test]
    labels = task.labels[test]
    return pa.concat_tables(
        predictions_of(encoder, protocol, outcome, ids, groups, labels)
        for encoder, by_protocol in outcomes.items()
        for protocol, outcome in by_protocol.items()
    )


def predictions_of(
    encoder: str,
    protocol: str,
    outcome: Outcome,
    ids: Sequence[str],
    groups: Sequence[str],
    labels: npt.NDArray[np.int64],
) -> pa.Table:
    """The rows of one encoder and protocol, for N tiles or slides called `ids`."""
    n = len(ids)
    certain = bool((outcome.votes.max(axis=1) == 1).all())
    own = {name: table[np.arange(n), labels] for name, table in outcome.values.items()}
    columns = {
        "encoder": [encoder] * n,
        "protocol": [protocol] * n,
        "tile_id": list(ids),
        "group": list(groups),
        "label": labels,
        "prediction": outcome.predictions,
        "votes": None if certain else outcome.votes.astype(np.float32),
        "scores": outcome.scores,
        "probabilities": [outcome.probabilities] * n,
        "values": [[(name, float(v[i])) for name, v in own.items()] for i in range(n)],
    }
    return pa.table(
        {f.name: _column(columns[f.name], f.type, n) for f in PREDICTIONS}, schema=PREDICTIONS
    )


def _column(values: object, kind: pa.DataType, n: int) -> pa.Array:
    if values is None:
        return pa.nulls(n, kind)
    if isinstance(values, np.ndarray) and values.ndim == 2:
        ends = pa.array(np.arange(n + 1) * values.shape[1], pa.int32())
        return pa.ListArray.from_arrays(ends, pa.array(values.ravel(), pa.float32()))
    return pa.array(values, kind)


def read_predictions(path: Path) -> pa.Table:
    """The table that `eosin eval` wrote.

    Raises:
        InputError: it is missing, damaged, or of an eosin that did not save votes and scores.
    """
    return read_table(path, PREDICTIONS)


def outcome_from(predictions: pa.Table, n_classes: int, encoder: str, protocol: str) -> Outcome:
    """What that encoder's probe said, in the order of the rows.

    Raises:
        InputError: the table has nothing of that encoder and protocol.
    """
    rows = rows_of(predictions, encoder, protocol)
    n = rows.num_rows
    predicted = rows["prediction"].to_numpy().astype(np.int64)
    votes = _matrix(rows["votes"], n)
    scores = _matrix(rows["scores"], n)
    names = [name for name, _ in rows["values"][0].as_py()]
    own = np.array([[value for _, value in row] for row in rows["values"].to_pylist()], np.float32)
    return Outcome(
        votes=one_hot(predicted, n_classes) if votes is None else votes.astype(np.float64),
        scores=scores,
        probabilities=bool(rows["probabilities"][0].as_py()),
        # of the tile's own class; there is no telling the others any more
        values={name: np.tile(own[:, [i]], (1, n_classes)) for i, name in enumerate(names)},
    )


def rows_of(predictions: pa.Table, encoder: str, protocol: str) -> pa.Table:
    """The rows of one encoder and protocol.

    Raises:
        InputError: there are none.
    """
    chosen = (pc.field("encoder") == encoder) & (pc.field("protocol") == protocol)
    rows = predictions.filter(chosen)
    if not rows.num_rows:
        raise InputError(f"no predictions of encoder '{encoder}' under protocol '{protocol}'")
    return rows


def _matrix(column: pa.ChunkedArray, n: int) -> npt.NDArray[np.float32] | None:
    if column.null_count:
        return None
    values: npt.NDArray[np.float32] = column.combine_chunks().flatten().to_numpy()
    return values.reshape(n, -1)
