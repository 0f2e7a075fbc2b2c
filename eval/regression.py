"""The verb `eval regression`: numbers of tiles, such as the expression of genes, from features.

As `eosin eval`, with targets in the place of classes: the same encoders and floors, cache, splits
by group and intervals. Targets are taken as the table has them; for expression, normalise and take
logarithms first.
"""

import csv
import fnmatch
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from eosin.configs.errors import InputError
from eosin.data_curation.embed import FileTile
from eosin.eval.config import EvalConfig
from eosin.eval.intervals import draw_groups, index_groups, interval, tail_of
from eosin.eval.listing import read_columns, read_table, refuse_duplicates, refuse_missing
from eosin.eval.results import Difference, EncoderRecord, Results, Score, TaskRecord, save_results
from eosin.eval.ridge import PROTOCOLS, correlations, metrics_of, moments, predict
from eosin.eval.splits import SPLITS, carve_splits
from eosin.eval.table_rows import TableRow, load_rows
from eosin.eval.task_features import embed_files
from eosin.eval.tasks import TaskConfig
from eosin.launch.artefacts import replacing, stamp_of, write_text
from eosin.launch.device_names import DeviceName

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class RegressionConfig:
    """Scores an encoder, the same network at random weights and two colour floors."""

    encoder: str
    """As for `eosin eval`."""
    tiles: Path
    """A table with path, the targets, and maybe group and split."""
    targets: list[str]
    """Columns, or patterns such as 'gene_*'."""
    out: Path
    """Folder for results.json, predictions.parquet, targets.csv and the cached features."""
    extra_encoders: list[str] = field(default_factory=list)
    name: str = ""
    protocols: list[str] = field(default_factory=lambda: list(PROTOCOLS))
    seed: int = 0
    device: DeviceName = "auto"
    batch_size: int = 64
    n_bootstrap: int = 1000

    def __post_init__(self) -> None:
        unknown = [name for name in self.protocols if name not in PROTOCOLS]
        if unknown or not self.protocols:
            raise ValueError(f"protocols={self.protocols}: there are {', '.join(PROTOCOLS)}")
        if not self.targets:
            raise ValueError("targets=[]: name columns of the table")


@dataclass(frozen=True, kw_only=True)
class RegressionTask:
    """Tiles with T targets each, N of them, sorted by path."""

    tile_ids: list[str]
    images: list[FileTile]
    names: list[str]
    values: Floats
    """[N, T]"""
    groups: list[str]
    splits: npt.NDArray[np.str_]
    data_digest: str
    digest: str
    notes: tuple[str, ...]


def evaluate_regression(config: RegressionConfig) -> None:
    """Scores everything and writes results, predictions and a table of targets.

    Raises:
        InputError: the encoder or the table cannot be used.
    """
    console, notices = Console(), Console(stderr=True)
    task = load_regression(config)
    for note in task.notes:
        notices.print(f"note: {note}", highlight=False, markup=False)
    rows = load_rows(
        EvalConfig(
            encoder=config.encoder, task=TaskConfig(tiles=config.tiles), out=config.out,
            extra_encoders=config.extra_encoders, seed=config.seed, device=config.device,
            batch_size=config.batch_size,
        )
    )  # fmt: skip
    test = task.splits == "test"
    index, n_groups = index_groups([g for g, t in zip(task.groups, test, strict=True) if t])
    strata = np.zeros(n_groups, np.int64)
    weights, tail = draw_groups(strata, config.n_bootstrap, config.seed), tail_of(strata)
    scores, resamples, said = list[Score](), dict[tuple[str, str, str], Floats](), list[pa.Table]()
    by_target: list[list[object]] = []
    for row in rows:
        features = _features(config, task, row).astype(np.float64)
        for protocol in config.protocols:
            predictions, chosen = predict(
                protocol, features[~test], task.values[~test], task.splits[~test] == "val",
                features[test],
            )  # fmt: skip
            sums = moments(task.values[test], predictions, index, n_groups)
            for metric, function in metrics_of(sums).items():
                drawn = function(weights)
                low, high = interval(drawn, tail)
                value = float(function(np.ones((1, n_groups)))[0])
                name = row.record.name
                resamples[name, protocol, metric] = drawn
                scores.append(
                    Score(
                        encoder=name, protocol=protocol, metric=metric, value=value, low=low,
                        high=high, chosen=chosen,
                    )
                )  # fmt: skip
            each = correlations(sums.sum(axis=0))
            by_target += [
                [row.record.label, protocol, target, float(r)]
                for target, r in zip(task.names, each, strict=True)
            ]
            said.append(_predictions(task, test, row.record.name, protocol, predictions))
    results = _results(config, task, [row.record for row in rows], scores, resamples, tail)
    save_results(results, config.out / "results.json")
    with replacing(config.out / "predictions.parquet") as partial:
        pq.write_table(pa.concat_tables(said), partial, compression="zstd")
    write_text(config.out / "targets.csv", _csv(by_target))
    console.print(_table(results))
    console.print(f"results: {config.out / 'results.json'}", highlight=False, soft_wrap=True)


def load_regression(config: RegressionConfig) -> RegressionTask:
    """Reads the table, finds the targets, carves what splits are missing.

    Raises:
        InputError: a target is missing, no number, or the same everywhere in train.
    """
    source = config.tiles
    columns = read_columns(source)
    names = [c for c in columns if any(fnmatch.fnmatchcase(c, p) for p in config.targets)]
    lost = [p for p in config.targets if not fnmatch.filter(columns, p)]
    if lost:
        raise InputError(f"{source} has no column '{lost[0]}'; it has {', '.join(columns)}")
    table = read_table(source, ("path", *names), ("group", "split")).sort_by("path")
    tile_ids: list[str] = table["path"].to_pylist()
    refuse_duplicates(tile_ids, source)
    paths = [source.parent / tile_id for tile_id in tile_ids]
    refuse_missing(paths, source)
    values = np.stack([_numbers(table[name].to_pylist(), name, source) for name in names], axis=1)
    groups = table["group"].to_pylist() if "group" in table.column_names else tile_ids
    given = table["split"].to_pylist() if "split" in table.column_names else None
    # splits are balanced by whether the first target is above its median
    halves = (values[:, 0] > np.median(values[:, 0])).astype(np.int64)
    splits, notes = carve_splits(
        halves, groups, given, [f"low {names[0]}", f"high {names[0]}"], config.seed, str(source)
    )
    if "group" not in table.column_names:
        notes.insert(0, "no groups are given, so each tile is its own: splits may leak")
    images = [FileTile(path) for path in paths]
    with ThreadPoolExecutor(8) as pool:
        checksums = list(pool.map(lambda image: image.checksum(), images))
    return RegressionTask(
        tile_ids=tile_ids,
        images=images,
        names=names,
        values=values,
        groups=groups,
        splits=splits,
        data_digest=stamp_of(tiles=tile_ids, groups=groups, checksums=checksums),
        digest=stamp_of(
            tiles=tile_ids, checksums=checksums, targets=names, values=values.tolist(),
            groups=groups, splits=splits.tolist(),
        ),
        notes=tuple(notes),
    )  # fmt: skip


def _numbers(texts: Sequence[str], name: str, source: Path) -> Floats:
    try:
        values = np.array([float(text) for text in texts])
    except ValueError as error:
        raise InputError(f"{source}: column '{name}' holds something that is no number") from error
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0]) + 1
        raise InputError(f"{source}: column '{name}' is not finite in a row such as {row}")
    return values


def _features(
    config: RegressionConfig, task: RegressionTask, row: TableRow
) -> npt.NDArray[np.float32]:
    return embed_files(
        row.encoder, task.images, task.tile_ids, task.groups, task.data_digest,
        config.out / "features" / row.record.name, config.batch_size,
    )  # fmt: skip


def _results(
    config: RegressionConfig,
    task: RegressionTask,
    records: list[EncoderRecord],
    scores: list[Score],
    resamples: dict[tuple[str, str, str], Floats],
    tail: float,
) -> Results:
    main, values = records[0].name, {(s.encoder, s.protocol, s.metric): s.value for s in scores}
    differences = []
    for (name, protocol, metric), theirs in resamples.items():
        if name != main:
            low, high = interval(resamples[main, protocol, metric] - theirs, tail)
            differences.append(
                Difference(
                    encoder=main, baseline=name, protocol=protocol, metric=metric,
                    value=values[main, protocol, metric] - values[name, protocol, metric],
                    low=low, high=high,
                )
            )  # fmt: skip
    groups = np.asarray(task.groups)
    return Results(
        task=TaskRecord(
            name=config.name or config.tiles.stem,
            classes=task.names,
            tiles={s: int((task.splits == s).sum()) for s in SPLITS},
            groups={s: len(set(groups[task.splits == s])) for s in SPLITS},
            digest=task.digest,
        ),
        encoders=records,
        scores=scores,
        differences=differences,
        bootstrap_draws=config.n_bootstrap,
        seed=config.seed,
        protocols={name: PROTOCOLS[name] for name in config.protocols},
    )


def _predictions(
    task: RegressionTask,
    test: npt.NDArray[np.bool_],
    encoder: str,
    protocol: str,
    predictions: Floats,
) -> pa.Table:
    rows = np.flatnonzero(test).tolist()
    columns: dict[str, object] = {
        "encoder": [encoder] * len(rows),
        "protocol": [protocol] * len(rows),
        "tile_id": [task.tile_ids[i] for i in rows],
        "group": [task.groups[i] for i in rows],
    }
    columns |= {name: predictions[:, i] for i, name in enumerate(task.names)}
    return pa.table(columns)


def _csv(rows: list[list[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["encoder", "protocol", "target", "pearson"])
    writer.writerows(rows)
    return text.getvalue()


def _table(results: Results) -> Table:
    table = Table(
        title=f"{results.task.name}: mean correlation over {len(results.task.classes)} targets "
        "[95 % interval over groups]"
    )
    table.add_column("encoder")
    for protocol in results.protocols:
        table.add_column(protocol, justify="right")
    for encoder in results.encoders:
        found = [results.score(encoder.name, p, "pearson") for p in results.protocols]
        cells = [f"{s.value:.3f} \\[{s.low:.3f}, {s.high:.3f}]" for s in found]
        table.add_row(encoder.label, *cells)
    return table
