"""The verb `dedupe`: tiles that repeat another, within a slide, across slides, or on a second scan.

Takes the prints of tiles (`eosin embed encoder=builtin:tile-print`) and writes a table in the form
of `manifest.DUPLICATES`, which `eosin sample` leaves out, and last a marker beside it. Tiles with
equal pixels are found by hash, all others by their prints: inside each cluster and between it and
its neighbours where there are clusters, else all with all.
"""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from eosin.configs.errors import InputError
from eosin.data_curation.cluster_config import MARKER_NAME as CLUSTERS_MARKER
from eosin.data_curation.dedupe_config import DedupeConfig
from eosin.data_curation.duplicate_blocks import blocks
from eosin.data_curation.duplicate_groups import stand_ins
from eosin.data_curation.duplicate_search import Pairs, Spectra, find_pairs, join
from eosin.data_curation.duplicate_slides import SlideFile, find_slide_pairs
from eosin.data_curation.features import FeatureStore
from eosin.data_curation.manifest import (
    DUPLICATES,
    SLIDES,
    TILES,
    open_table,
    read_table,
    write_table,
)
from eosin.data_curation.tile_print import VERSION, hashes, open_prints
from eosin.data_curation.worker_pool import count_workers
from eosin.launch.artefacts import file_digest, is_done, mark_done, read_json, stamp_of
from eosin.launch.progress import Meter, format_seconds

FORMAT = 1
"""Raise it when the same prints and options give another table."""
_NAMED = 5  # pairs of slides that are named
_MANY = 200_000  # tiles from which all with all takes long


@dataclass(frozen=True)
class SecondScan:
    """A slide that shows the glass of another."""

    left_out: str
    kept: str
    similarity: float
    """See `duplicate_slides.compare`."""


def dedupe(config: DedupeConfig) -> None:
    """Writes the table, unless it is there for the same prints, clusters and options.

    Raises:
        InputError: an input is missing or is of other tiles.
    """
    marker = config.out.with_suffix(".json")
    store = open_prints(config.prints)
    stamp = stamp_for(config, store)
    if not (is_done(marker, stamp) and config.out.is_file()):
        started = time.monotonic()
        table, slides = _find(config, store)
        marker.unlink(missing_ok=True)
        write_table(table, config.out, DUPLICATES)
        kinds = {e["values"]: e["counts"] for e in pc.value_counts(table["kind"]).to_pylist()}
        across = int(pc.sum(pc.not_equal(table["group"], table["kept_group"])).as_py() or 0)
        mark_done(
            marker,
            stamp,
            tiles=store.rows.num_rows,
            kinds=dict(sorted(kinds.items())),
            across_groups=across,
            slides=[asdict(pair) for pair in slides],
        )
        print(f"dedupe: {format_seconds(time.monotonic() - started)}", file=sys.stderr)
    done = read_json(marker)
    for pair in done["slides"][:_NAMED]:
        print(
            f"dedupe: {pair['left_out']} is a second scan of {pair['kept']} "
            f"(similarity {pair['similarity']:.2f})",
            file=sys.stderr,
        )
    counted = ", ".join(f"{kind} {count}" for kind, count in done["kinds"].items()) or "none"
    across = done["across_groups"]
    apart = f"; {across} of them across groups (patients)" if across else ""
    print(f"dedupe: of {done['tiles']} tiles these repeat another: {counted}{apart} → {config.out}")


def plan(config: DedupeConfig) -> str:
    """What `dedupe` would compare."""
    store = open_prints(config.prints)
    n = store.rows.num_rows
    if config.clusters is None:
        hint = "; clusters=… would save most of them" if n > _MANY else ""
        return f"{n} prints, all with all: {n * (n - 1) / 2:.3g} comparisons of spectra{hint}"
    found = list(blocks(config.clusters, config.neighbours, store, np.arange(n)))
    pairs = sum(len(own) * (len(own) - 1) / 2 + len(own) * len(near) for own, near in found)
    return f"{n} prints in {len(found)} clusters: {pairs:.3g} comparisons of spectra"


def stamp_for(config: DedupeConfig, store: FeatureStore) -> str:
    """The stamp of the finished table."""
    names = ("similarity", "turns", "neighbours", "slides")
    clusters = None
    if config.clusters is not None:
        marker = config.clusters / CLUSTERS_MARKER
        if not marker.is_file():
            raise InputError(f"{config.clusters} holds no finished clusters; run 'eosin cluster'")
        clusters = read_json(marker)["stamp"]
    tables = [config.tiles / name for name in _TABLES] if config.tiles else []
    for path in tables:
        if not path.is_file():
            raise InputError(f"{path} does not exist; run 'eosin tile' first")
    return stamp_of(
        stage="dedupe",
        format=FORMAT,
        version=VERSION,
        prints=store.meta["stamp"],
        options={name: getattr(config, name) for name in names},
        clusters=clusters,
        tables=[file_digest(path) for path in tables],
    )


_TABLES = ("tiles.parquet", "slides.parquet")


def _find(config: DedupeConfig, store: FeatureStore) -> tuple[pa.Table, list[SecondScan]]:
    """The table, and the pairs of slides."""
    n = store.rows.num_rows
    rank = _ranks(config, store)
    slides = _second_scans(config, store) if config.slides and config.tiles else []
    second = pa.array([pair.left_out for pair in slides], pa.string())
    doubled = pc.is_in(store.rows["slide_id"].combine_chunks(), value_set=second).to_numpy(False)
    rows = np.flatnonzero(~doubled)
    stands, similarity = np.arange(n), np.full(n, np.nan, np.float32)
    kind = np.zeros(n, np.int8)
    # Of equal tiles the best-ranked stands for the others, and alone is compared with more.
    best, copy_of = _equal(hashes(store.features)[rows], rank[rows])
    unique = rows[best]
    stands[rows] = unique[copy_of]
    kind[stands != np.arange(n)] = _KINDS.index("exact")
    pairs = _near(config, store, np.sort(unique))
    gone, instead = stand_ins(pairs.first, pairs.second, rank)
    replaced, score = np.arange(n), np.full(n, np.nan, np.float32)
    replaced[gone], score[gone] = instead, _score_of(pairs, gone, instead)
    moved = replaced[stands] != stands
    kind[moved], similarity[moved] = _KINDS.index("near"), score[stands[moved]]
    stands = replaced[stands]
    kind[doubled] = _KINDS.index("slide")
    _stand_for_slides(store, slides, stands, rank, similarity)
    return _table(store, stands, kind, similarity), slides


_KINDS = ("", "exact", "near", "slide")


def _ranks(config: DedupeConfig, store: FeatureStore) -> NDArray[np.int64]:
    """The place of each tile among all, 0 the first to stay: the sharpest, then the first by id."""
    ids = store.rows["tile_id"].combine_chunks()
    by_id = np.empty(len(ids), np.int64)
    by_id[pc.sort_indices(ids).to_numpy()] = np.arange(len(ids))
    sharpness = np.full(len(ids), -np.inf)
    if config.tiles is not None:
        tiles = open_table(config.tiles / _TABLES[0], TILES).read(["tile_id", "sharpness"])
        place = pc.index_in(ids, tiles["tile_id"].combine_chunks())
        if place.null_count:
            lost = ids.filter(place.is_null())[0].as_py()
            raise InputError(f"{config.prints} has '{lost}', which is not in {config.tiles}")
        found = tiles["sharpness"].combine_chunks().take(place)
        sharpness = pc.fill_null(found.cast(pa.float64()), -np.inf).to_numpy()
    rank = np.empty(len(ids), np.int64)
    rank[np.lexsort((by_id, -sharpness))] = np.arange(len(ids))
    return rank


def _equal(
    keys: NDArray[np.void], rank: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The best-ranked row of each value, and for each row the place of its value's among them."""
    order = np.argsort(rank)
    _, first, inverse = np.unique(keys[order], return_index=True, return_inverse=True)
    copy_of = np.empty(len(keys), np.int64)
    copy_of[order] = inverse
    return order[first], copy_of


def _near(config: DedupeConfig, store: FeatureStore, rows: NDArray[np.int64]) -> Pairs:
    """Pairs of alike prints among `rows`, as rows of the store."""
    prints = store.features
    spectra = Spectra(prints[_sampled(rows)], turns=config.turns)
    found = []
    with Meter("dedupe", len(rows), "tiles") as meter:
        for own, near in blocks(config.clusters, config.neighbours, store, rows):
            mine = prints[own]
            inside = find_pairs(mine, None, spectra, config.similarity, seen=meter.advance)
            found.append(Pairs(own[inside.first], own[inside.second], inside.similarity))
            if len(near):
                across = find_pairs(mine, prints[near], spectra, config.similarity)
                ends = np.sort([own[across.first], near[across.second]], axis=0)
                found.append(Pairs(ends[0], ends[1], across.similarity))
    return join(found)


def _sampled(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows enough to fit `Spectra` to."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, 50_000).astype(np.int64))]


def _second_scans(config: DedupeConfig, store: FeatureStore) -> list[SecondScan]:
    """Slides to leave out, with the scan that stays and how alike they are."""
    assert config.tiles is not None
    table = read_table(config.tiles / _TABLES[1], SLIDES)
    present = pc.is_in(table["slide_id"], value_set=store.rows["slide_id"].combine_chunks())
    rows = table.filter(present).to_pylist()
    files = [SlideFile(path=Path(r["path"]), mpp=(r["mpp_x"], r["mpp_y"])) for r in rows]
    pairs = find_slide_pairs(files, count_workers(config.workers))
    order = sorted(range(len(rows)), key=lambda i: (-rows[i]["n_ok"], rows[i]["slide_id"]))
    rank = np.empty(len(rows), np.int64)
    rank[order] = np.arange(len(rows))
    gone, instead = stand_ins(pairs.first, pairs.second, rank)
    return [
        SecondScan(rows[one]["slide_id"], rows[other]["slide_id"], round(float(value), 4))
        for one, other, value in zip(
            gone.tolist(), instead.tolist(), _score_of(pairs, gone, instead), strict=True
        )
    ]


def _score_of(
    pairs: Pairs, one: NDArray[np.int64], other: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The similarity of each pair (one, other), whichever of the two comes first in `pairs`."""
    known = {
        (a, b): value
        for a, b, value in zip(
            pairs.first.tolist(), pairs.second.tolist(), pairs.similarity.tolist(), strict=True
        )
    }
    wanted = zip(np.minimum(one, other).tolist(), np.maximum(one, other).tolist(), strict=True)
    return np.array([known[pair] for pair in wanted], np.float32)


def _stand_for_slides(
    store: FeatureStore,
    slides: list[SecondScan],
    stands: NDArray[np.int64],
    rank: NDArray[np.int64],
    similarity: NDArray[np.float32],
) -> None:
    """For all tiles of a second scan stands the best tile of the first, or what stands for that."""
    names = store.rows["slide_id"].combine_chunks()
    for pair in slides:
        kept, left_out = (
            np.flatnonzero(pc.equal(names, name).to_numpy(False))
            for name in (pair.kept, pair.left_out)
        )
        stands[left_out] = stands[kept[np.argmin(rank[kept])]]
        similarity[left_out] = pair.similarity


def _table(
    store: FeatureStore,
    stands: NDArray[np.int64],
    kind: NDArray[np.int8],
    similarity: NDArray[np.float32],
) -> pa.Table:
    """As `manifest.DUPLICATES`."""
    left_out = np.flatnonzero(stands != np.arange(len(stands)))
    ids, groups = (store.rows[name].combine_chunks() for name in ("tile_id", "group"))
    gone, kept = pa.array(left_out), pa.array(stands[left_out])
    table = pa.table(
        {
            "tile_id": ids.take(gone),
            "kept_tile_id": ids.take(kept),
            "kind": pa.array(_KINDS).take(pa.array(kind[left_out])),
            "similarity": pa.array(similarity[left_out], from_pandas=True),
            "group": groups.take(gone),
            "kept_group": groups.take(kept),
        }
    )
    return table.sort_by("tile_id")
