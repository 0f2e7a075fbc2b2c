"""The verb `sample`: thresholds, duplicates, a pathologist's review, then a balanced draw.

Writes selection.parquet (`manifest.SELECTION`, in the order of tiles.parquet), which `eosin shard`
takes, and last ``selection.json`` with what every step cost, and the balance before and after.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from eosin.configs.errors import ConfigError, EosinError, InputError
from eosin.data_curation.balance import measure_balance
from eosin.data_curation.cluster_config import MARKER_NAME as CLUSTERS_MARKER
from eosin.data_curation.deny_list import Gate
from eosin.data_curation.manifest import DUPLICATES, SELECTION, Status, read_table, write_table
from eosin.data_curation.patient_split import SplitOptions, in_part
from eosin.data_curation.review_file import Review, read_review
from eosin.data_curation.sampling import Drawn, SampleOptions, draw_sample
from eosin.data_curation.selection import JUDGED, SelectConfig, alarm_lines, broken_rules
from eosin.data_curation.tile_columns import MISSING, Codes, TileColumns
from eosin.launch.artefacts import file_digest, is_done, mark_done, read_json, stamp_of

FORMAT = 3
"""Raise it when the same tables and options give another selection."""
_MANY = 5000  # values of a column that are too many to be named in selection.json


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SampleOptions):
    """Tiles to a balanced selection."""

    tiles: Path
    """tiles.parquet, or the folder of it; slides.parquet is taken from beside it."""
    out: Path
    """The selection, e.g. curated/selection.parquet."""
    clusters: Path | None = None
    """Folder of clusters.parquet, of `eosin cluster`; the tree may then name level_1 and on."""
    duplicates: Path | None = None
    """A table of `eosin dedupe`: its tiles are left out."""
    deny: Path | None = None
    """YAML file of what must not be trained on (`deny_list.DenyList`): such tiles are left out."""
    prints: Path | None = None
    """Prints of the tiles, where `deny` names images."""
    split: SplitOptions = field(default_factory=SplitOptions)
    """Patients to be held out, or those alone."""
    review: Path | None = None
    """review.json, in the form of `review_file`: clusters that were rejected are left out, merged
    ones count as one, and weights hold in the tree's column of their level."""
    select: SelectConfig = field(default_factory=SelectConfig)
    """Thresholds on the tiles' figures, before everything else."""

    @property
    def table(self) -> Path:
        """tiles.parquet itself."""
        return self.tiles / "tiles.parquet" if self.tiles.is_dir() else self.tiles


def sample(config: SampleConfig) -> None:
    """Draws the selection, unless it was drawn from the same tables with the same options.

    Raises:
        InputError: a table is missing, or the review is of other clusters.
        ConfigError: a column is missing.
        EosinError: no tile is left.
    """
    marker = config.out.with_suffix(".json")
    stamp = stamp_for(config)
    if not (is_done(marker, stamp) and config.out.is_file()):
        _draw(config, marker, stamp)
    done = read_json(marker)
    for line in done["alarms"]:
        print(f"sample: {line}", file=sys.stderr)
    reasons = ", ".join(f"{rule} {count}" for rule, count in done["dropped"].items() if count)
    print(f"sample: {done['n_selected']} of {done['n_tiles']} cells; dropped: {reasons}")
    if config.total > done["n_selected"]:
        print(
            f"sample: total={config.total} was asked for; caps, filters and what there is leave "
            f"{done['n_selected']}",
            file=sys.stderr,
        )
    for name, entry in done["balance"].items():
        before, after = (entry[when] for when in ("before", "after"))
        print(
            f"  {name:<16}{before['values']:>7} values, evenness {before['evenness']:.3f} → "
            f"{after['evenness']:.3f}, Gini {before['gini']:.3f} → {after['gini']:.3f}, largest "
            f"share {before['largest_share']:.3f} → {after['largest_share']:.3f}"
        )


def plan(config: SampleConfig) -> str:
    """What `sample` would draw from."""
    columns = _open(config)
    asked = f"{config.total} tiles" if config.total else "all that caps and filters leave"
    tree = " > ".join(config.tree) or "no tree: all alike"
    return f"{columns.n_rows} cells of {config.table}; {asked}, shared out by {tree}"


def stamp_for(config: SampleConfig) -> str:
    """The stamp of the finished selection."""
    slides = config.table.with_name("slides.parquet")
    inputs = {"tiles": config.table, "slides": slides if slides.is_file() else None}
    inputs |= {"duplicates": config.duplicates, "review": config.review}
    paths = ("tiles", "out", "clusters", "duplicates", "review", "deny", "prints")
    options = {name: value for name, value in asdict(config).items() if name not in paths}
    return stamp_of(
        stage="sample",
        format=FORMAT,
        options=options,
        inputs={name: _digest(path) for name, path in inputs.items()},
        clusters=_clusters_stamp(config),
        gate=Gate(config.deny, config.prints).stamp() if config.deny else None,
    )


def _digest(path: Path | None) -> str | None:
    if path is None:
        return None
    if not path.is_file():
        raise InputError(f"{path} does not exist; run the step that writes it first")
    return file_digest(path)


def _clusters_stamp(config: SampleConfig) -> str | None:
    if config.clusters is None:
        return None
    marker = config.clusters / CLUSTERS_MARKER
    if not marker.is_file():
        raise InputError(f"{config.clusters} holds no finished clusters; run 'eosin cluster'")
    return str(read_json(marker)["stamp"])


def _open(config: SampleConfig) -> TileColumns:
    slides = config.table.with_name("slides.parquet")
    clusters = config.clusters / "clusters.parquet" if config.clusters else None
    return TileColumns(config.table, slides if slides.is_file() else None, clusters)


def _draw(config: SampleConfig, marker: Path, stamp: str) -> None:
    columns = _open(config)
    kept, dropped, alarms = _pass_thresholds(columns, config.select)
    before = kept.copy()
    if config.duplicates is not None:
        _leave_out(columns, kept, config.duplicates, dropped)
    if config.deny is not None:
        _leave_out_denied(columns, kept, Gate(config.deny, config.prints), dropped)
    if config.split.part != "all":
        _leave_out_part(columns, kept, config, dropped)
    given, weights = dict[str, Codes](), dict(config.weights)
    if config.review is not None:
        _obey(columns, kept, config, given, weights, dropped)
    options = SampleOptions(**{n: getattr(config, n) for n in SampleOptions.__dataclass_fields__})
    options = _with_weights(options, weights)
    drawn = draw_sample(columns, kept, options, given)
    if not len(drawn.rows):
        raise EosinError("no tile is left; relax select.*, caps and filters")
    marker.unlink(missing_ok=True)
    write_table(_table(columns, drawn), config.out, SELECTION)
    mark_done(
        marker,
        stamp,
        n_tiles=columns.n_rows,
        n_selected=len(drawn.rows),
        dropped=dropped | drawn.dropped,
        alarms=alarms + drawn.unmet,
        balance=_balance(columns, before, drawn.rows, config.tree, given),
    )


def _pass_thresholds(
    columns: TileColumns, config: SelectConfig
) -> tuple[NDArray[np.bool_], dict[str, int], list[str]]:
    """The readable tiles that pass, what each rule cost, and alarms."""
    n = columns.n_rows
    readable, broken = np.zeros(n, np.bool_), dict[str, NDArray[np.bool_]]()
    dropped: dict[str, int] = {}
    for start, batch in columns.batches(["status", *JUDGED]):
        span = slice(start, start + len(batch))
        readable[span] = pc.equal(batch["status"], Status.OK).to_numpy()
        for counted in pc.value_counts(batch["status"]).to_pylist():
            if counted["values"] != Status.OK:
                name = counted["values"]
                dropped[name] = dropped.get(name, 0) + counted["counts"]
        for rule, mask in broken_rules(batch, config).items():
            broken.setdefault(rule, np.zeros(n, np.bool_))[span] = mask
    kept = readable.copy()
    for rule, mask in broken.items():
        dropped[rule] = int((kept & mask).sum())
        kept &= ~mask
    slide = columns.slide
    alarms = alarm_lines(slide.values, slide.codes, readable, kept, broken, config.alarm_share)
    if config.max_tiles_per_slide:
        raise ConfigError(
            "select.max_tiles_per_slide belongs to a selection without a draw: here, give "
            f"caps.slide_id={config.max_tiles_per_slide}"
        )
    return kept, dropped, alarms


def _leave_out(
    columns: TileColumns, kept: NDArray[np.bool_], path: Path, dropped: dict[str, int]
) -> None:
    """Takes the tiles that repeat another out of `kept`."""
    repeated = read_table(path, DUPLICATES)["tile_id"].combine_chunks()
    found = 0
    for start, batch in columns.batches(["tile_id"]):
        span = slice(start, start + len(batch))
        hit = pc.is_in(batch["tile_id"], value_set=repeated).to_numpy()
        found += int(hit.sum())
        dropped["duplicates"] = dropped.get("duplicates", 0) + int((kept[span] & hit).sum())
        kept[span] &= ~hit
    if found < len(repeated):
        raise InputError(f"{path} names tiles that are not in {columns.path}; run dedupe again")


def _leave_out_denied(
    columns: TileColumns, kept: NDArray[np.bool_], gate: Gate, dropped: dict[str, int]
) -> None:
    """Takes what the deny list forbids out of `kept`."""
    dropped["denied"] = 0
    for start, batch in columns.batches(["tile_id", "group", "slide_id"]):
        span = slice(start, start + len(batch))
        tiles = batch.filter(pa.array(kept[span]))
        denied = gate.leaks(tiles, columns.slides)["tile_id"].combine_chunks()
        dropped["denied"] += len(denied)
        kept[span] &= ~pc.is_in(batch["tile_id"], value_set=denied).to_numpy()


def _leave_out_part(
    columns: TileColumns, kept: NDArray[np.bool_], config: SampleConfig, dropped: dict[str, int]
) -> None:
    """Takes the groups of the other side of the split out of `kept`."""
    group = columns.codes("group")
    gone = ~in_part(group.values, config.split, config.duplicates)[group.codes]
    dropped["other part"] = int((kept & gone).sum())
    kept &= ~gone


def _obey(
    columns: TileColumns,
    kept: NDArray[np.bool_],
    config: SampleConfig,
    given: dict[str, Codes],
    weights: dict[str, dict[str, float]],
    dropped: dict[str, int],
) -> None:
    """Leaves out rejected clusters, and counts and weighs the others as the review says."""
    assert config.review is not None
    review = read_review(config.review)
    if review.clusters_stamp != _clusters_stamp(config):
        raise InputError(
            f"{config.review} is a review of other clusters than {config.clusters}: numbers would "
            "not mean the same; make the page again and review it"
        )
    name = f"level_{review.level}"
    column = columns.codes(name)
    numbers = [None if value == MISSING else int(value) for value in column.values]
    rejected = np.array([n is not None and review.of(n).rejected for n in numbers])
    hit = rejected[column.codes]
    dropped["rejected clusters"] = int((kept & hit).sum())
    kept &= ~hit
    merged = [MISSING if n is None else str(review.stratum(n)) for n in numbers]
    values = sorted(set(merged))
    place = {value: code for code, value in enumerate(values)}
    given[name] = Codes(np.array([place[m] for m in merged], np.int32)[column.codes], values)
    said = _weights_of(review, values)
    if said:
        if name not in config.tree:
            raise ConfigError(
                f"{config.review} weighs clusters, but tree={config.tree} does not name {name}"
            )
        weights[name] = said | weights.get(name, {})


def _weights_of(review: Review, values: list[str]) -> dict[str, float]:
    weights = {v: review.of(int(v)).weight for v in values if v != MISSING}
    return {value: weight for value, weight in weights.items() if weight != 1.0}


def _with_weights(options: SampleOptions, weights: dict[str, dict[str, float]]) -> SampleOptions:
    return SampleOptions(**{**options.__dict__, "weights": weights})


def _table(columns: TileColumns, drawn: Drawn) -> pa.Table:
    """As `manifest.SELECTION`."""
    ids: list[pa.ChunkedArray] = []
    for start, batch in columns.batches(["tile_id"]):
        low, high = np.searchsorted(drawn.rows, [start, start + len(batch)])
        ids += batch["tile_id"].take(pa.array(drawn.rows[low:high] - start)).chunks
    count = len(drawn.rows)
    paths = pa.array([path or "all" for path in drawn.paths], pa.string())
    return pa.table(
        {
            "tile_id": pa.chunked_array(ids, pa.string()),
            "stratum": paths.take(pa.array(drawn.node)),
            "cluster": _cluster_paths(columns, drawn.rows),
            "copies": pa.array(np.ones(count, np.int32)),
            "reason": pa.repeat("drawn", count),
        }
    )


def _cluster_paths(columns: TileColumns, rows: NDArray[np.int64]) -> pa.Array:
    """``coarsest/…/finest`` of each row; null where a tile is not clustered."""
    if columns.clusters is None:
        return pa.nulls(len(rows), pa.string())
    levels = sorted(n for n in columns.clusters.schema_arrow.names if n.startswith("level_"))
    levels.sort(key=lambda name: -int(name.removeprefix("level_")))
    parts = []
    for name in levels:
        column = columns.codes(name)
        values = pa.array([None if v == MISSING else v for v in column.values], pa.string())
        parts.append(values.take(pa.array(column.codes[rows])))
    return pc.binary_join_element_wise(*parts, "/")


def _balance(
    columns: TileColumns,
    before: NDArray[np.bool_],
    after: NDArray[np.int64],
    tree: list[str],
    given: dict[str, Codes],
) -> dict[str, Any]:
    """By column, the balance of what passed the thresholds and of what was drawn."""
    names = ["slide_id", "group", "stain", *(n for n in tree if n in columns.names)]
    if columns.slides is not None:
        known = {"path", "status", "reason", "quickhash"}
        text = [f.name for f in columns.slides.schema if pa.types.is_string(f.type)]
        names += [name for name in text if name not in known]
    if columns.clusters is not None:
        names += [n for n in columns.clusters.schema_arrow.names if n.startswith("level_")]
    found: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        column = given.get(name) or columns.codes(name)
        count = len(column.values)
        if count < 2:
            continue
        pair = {
            "before": np.bincount(column.codes[before], minlength=count),
            "after": np.bincount(column.codes[after], minlength=count),
        }
        entry: dict[str, Any] = {
            when: asdict(measure_balance(counts)) for when, counts in pair.items()
        }
        if count <= _MANY:
            entry["counts"] = {
                value: [int(pair["before"][code]), int(pair["after"][code])]
                for code, value in enumerate(column.values)
            }
        found[name] = entry
    return found
