"""`eosin sample`: every mechanism against a loop, the presets, the review, and who reads what."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curated_tables import write_clusters, write_tables
from scipy.stats import entropy

import eosin.data_curation.tile_columns as module
from eosin.configs.errors import InputError
from eosin.configs.load import load_config
from eosin.data_curation.cluster import cluster
from eosin.data_curation.cluster_config import ClusterConfig
from eosin.data_curation.features import features_stamp, write_features
from eosin.data_curation.manifest import (
    DUPLICATES,
    FEATURE_ROWS,
    SELECTION,
    TILES,
    read_table,
    write_table,
)
from eosin.data_curation.review_file import Review, Verdict, write_review
from eosin.data_curation.sample import SampleConfig, sample
from eosin.data_curation.sampling import QuantileRule
from eosin.data_curation.tile_columns import TileColumns
from eosin.data_curation.water_filling import fill
from eosin.launch.cli import main

SLIDES = {"p1-a": 100, "p1-b": 400, "p2-a": 50, "p3-a": 1000, "p4-a": 30}
ORGAN = {"p1-a": "skin", "p1-b": "skin", "p2-a": "lung", "p3-a": "skin", "p4-a": "lung"}


@pytest.fixture
def curated(tmp_path: Path) -> Path:
    n = sum(SLIDES.values())
    cells = np.random.default_rng(0).random(n).astype(np.float32)
    columns = {"organ": ORGAN, "slide_group": {s: s[-1] for s in SLIDES}}
    ids = write_tables(tmp_path, SLIDES, columns, {"nuclei_fraction": cells})
    rng = np.random.default_rng(1)
    fine = np.minimum(rng.geometric(0.2, n) - 1, 19)
    write_clusters(
        tmp_path / "clusters",
        ids,
        fine.tolist(),
        distance=rng.random(n),
        level_2=(fine // 5).tolist(),
        slide_cluster=rng.integers(0, 4, n).tolist(),
        slide_distance=rng.random(n),
    )
    return tmp_path


def drawn(curated: Path, *overrides: str, files: tuple[str, ...] = (), **keys: Any) -> pa.Table:
    """The rows of tiles and clusters that a draw takes, with its stratum."""
    keys = {"tiles": curated, "out": curated / "selection.parquet"} | keys
    words = [f"{name}={value}" for name, value in keys.items()]
    sample(load_config(SampleConfig, list(files), [*words, *overrides]))
    chosen = read_table(curated / "selection.parquet", SELECTION)
    table = pq.read_table(curated / "tiles.parquet").drop_columns(["stain_vectors"])
    table = table.append_column(
        "organ",
        pa.array(
            [ORGAN[s] for s in pq.read_table(curated / "tiles.parquet")["slide_id"].to_pylist()]
        ),
    )
    clusters = pq.read_table(curated / "clusters" / "clusters.parquet").drop_columns(["slide_id"])
    table = table.join(clusters, "tile_id").join(chosen, "tile_id", join_type="inner")
    ids = chosen["tile_id"].to_pylist()
    order = {name: place for place, name in enumerate(ids)}
    assert len(order) == len(ids)
    whole = read_table(curated / "tiles.parquet", TILES)["tile_id"].to_pylist()
    assert ids == [name for name in whole if name in order]  # in the order of the tiles
    return table


def counts(table: pa.Table, *names: str) -> Counter[Any]:
    columns = [table[name].to_pylist() for name in names]
    return Counter(columns[0] if len(columns) == 1 else zip(*columns, strict=True))


def test_without_a_tree_all_tiles_are_alike(curated: Path) -> None:
    found = counts(drawn(curated, total=790), "slide_id")
    assert sum(found.values()) == 790
    for slide, size in SLIDES.items():
        assert found[slide] == pytest.approx(size / 2, abs=4 * (size / 4) ** 0.5)


def test_a_tree_is_water_filled_level_by_level(curated: Path) -> None:
    found = counts(drawn(curated, "tree=[organ,slide_id]", total=300), "organ", "slide_id")
    organs = fill(300, np.array([80, 1500]))
    assert organs.tolist() == [80, 220]
    assert found[("lung", "p2-a")] == 50 and found[("lung", "p4-a")] == 30
    skin = sorted(found[("skin", name)] for name in ("p1-a", "p1-b", "p3-a"))
    assert skin in ([73, 73, 74],)


def test_weights_floors_and_caps(curated: Path) -> None:
    found = counts(
        drawn(
            curated,
            "tree=[organ,slide_id]",
            "weights={organ: {skin: 4}}",
            "caps={slide_id: 40}",
            total=100,
        ),
        "slide_id",
    )
    assert sum(found[s] for s in SLIDES if ORGAN[s] == "lung") == 20
    assert max(found.values()) <= 40
    found = counts(
        drawn(curated, "tree=[slide_id]", "floors={slide_id: 30}", total=155), "slide_id"
    )
    assert found["p4-a"] == 30 and min(found.values()) >= 30 and sum(found.values()) == 155


def test_a_floor_that_the_total_cannot_meet_is_said(
    curated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = counts(drawn(curated, "tree=[slide_id]", "floors={slide_id: 30}", total=50), "slide_id")
    assert sum(found.values()) == 50 and max(found.values()) <= 30
    assert "5 of 5 values of 'slide_id' got less than floors.slide_id=30" in capsys.readouterr().err


def test_equal_figures_are_ranked_by_ticket_and_not_by_place(tmp_path: Path) -> None:
    write_tables(tmp_path, {"a": 1000}, tile_columns={"nuclei_fraction": np.zeros(1000)})
    rule = {"column": "nuclei_fraction", "low": 0.8}
    options = {
        "tiles": tmp_path,
        "out": tmp_path / "s.parquet",
        "quantiles": [QuantileRule(**rule)],
    }  # type: ignore[arg-type]
    sample(SampleConfig(**options))  # type: ignore[arg-type]
    ids = read_table(tmp_path / "tiles.parquet", TILES)["tile_id"].to_pylist()
    chosen = read_table(tmp_path / "s.parquet", SELECTION)["tile_id"].to_pylist()
    places = [ids.index(name) for name in chosen]
    assert len(places) == 200 and 350 < np.mean(places) < 650


def test_a_cap_outside_the_tree_keeps_the_smallest_tickets(curated: Path) -> None:
    table = drawn(curated, "tree=[organ]", "caps={group: 25}")
    found = counts(table, "group")
    assert found == {"p1": 25, "p2": 25, "p3": 25, "p4": 25}
    columns = TileColumns(curated / "tiles.parquet", curated / "slides.parquet", None)
    tickets, group = columns.tickets(0), columns.codes("group")
    ids = np.array(read_table(curated / "tiles.parquet", TILES)["tile_id"].to_pylist())
    for code in range(4):
        rows = np.flatnonzero(group.codes == code)
        expected = set(ids[rows[np.argsort(tickets[rows])[:25]]])
        assert expected == set(ids[rows]) & set(table["tile_id"].to_pylist())


def test_tickets_depend_on_seed_slide_and_place_alone(curated: Path, tmp_path: Path) -> None:
    write_tables(tmp_path / "other", {"p1-b": 400, "a-new-one": 7, "p9-z": 3})
    tables = [
        TileColumns(folder / "tiles.parquet", None, None)
        for folder in (curated, tmp_path / "other")
    ]
    by_id = []
    for table in tables:
        ids = read_table(table.path, TILES)["tile_id"].to_pylist()
        by_id.append(dict(zip(ids, table.tickets(5).tolist(), strict=True)))
    shared = by_id[0].keys() & by_id[1].keys()
    assert len(shared) == 400 and all(by_id[0][name] == by_id[1][name] for name in shared)
    assert len(set(by_id[0].values())) == len(by_id[0])
    other = tables[0].tickets(6)
    assert (other != tables[0].tickets(5)).all()
    uniform = np.sort(other / 2.0**64)
    assert np.abs(uniform - (np.arange(len(uniform)) + 0.5) / len(uniform)).max() < 0.05


def test_batches_change_nothing_and_seeds_do(
    curated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("tree=[level_2,level_1]", "caps={slide_id: 200}")
    clusters = {"clusters": curated / "clusters"}
    first = drawn(curated, *options, total=500, **clusters)["tile_id"].to_pylist()
    (curated / "selection.json").unlink()
    monkeypatch.setattr(module, "BATCH_ROWS", 37)
    assert drawn(curated, *options, total=500, **clusters)["tile_id"].to_pylist() == first
    other = drawn(curated, *options, total=500, seed=1, **clusters)["tile_id"].to_pylist()
    assert set(other) != set(first)


def test_the_ring_example_flattens(tmp_path: Path) -> None:
    """Density falls tenfold along a ring; a draw over its clusters' tree is near uniform."""
    rng = np.random.default_rng(0)
    n, pieces = 20_000, 40
    density = np.linspace(1, 10, pieces)
    piece = rng.choice(pieces, n, p=density / density.sum())
    angle = 2 * np.pi * (piece + rng.random(n)) / pieces
    around = (1 + 0.03 * rng.normal(size=n))[:, None] * np.c_[np.cos(angle), np.sin(angle)]
    ids = write_tables(tmp_path, {"ring": n})
    piece_of = dict(zip(ids, piece.tolist(), strict=True))
    rows = pa.table({f.name: pa.nulls(n, f.type) for f in FEATURE_ROWS} | {
        "tile_id": ids, "group": ["ring"] * n, "slide_id": ["ring"] * n,
    })  # fmt: skip
    features, clusters = tmp_path / "features", tmp_path / "clusters"
    write_features(
        features,
        rows=rows,
        dim=2,
        stamp=features_stamp("encoder", "ring"),
        compute=lambda start, stop: around[start:stop].astype(np.float32),
        chunk_rows=n,
        meta={},
    )
    cluster(ClusterConfig(features=features, out=clusters, levels=[400, 40], device="cpu"))
    kl = []
    for tree in ([], ["level_2", "level_1"]):
        out = tmp_path / "selection.parquet"
        sample(SampleConfig(tiles=tmp_path, out=out, total=2000, clusters=clusters, tree=tree))
        chosen = read_table(out, SELECTION)["tile_id"].to_pylist()
        found = np.bincount([piece_of[tile_id] for tile_id in chosen], minlength=pieces)
        kl.append(float(entropy(found / found.sum(), np.full(pieces, 1 / pieces))))
    assert kl[0] > 0.1 and kl[1] < kl[0] / 5


def test_closest_tiles_are_taken_where_asked(curated: Path) -> None:
    keys = {"clusters": curated / "clusters", "total": 60}
    for leaf, first in (("closest", 1), ("farthest", -1)):
        table = drawn(curated, "tree=[level_1]", f"leaf={leaf}", **keys).to_pylist()
        whole = pq.read_table(curated / "clusters" / "clusters.parquet").to_pylist()
        for label in range(10):
            taken = [r["distance"] for r in table if r["level_1"] == label]
            all_ = sorted(r["distance"] for r in whole if r["level_1"] == label)[::first]
            assert sorted(taken)[::first] == all_[: len(taken)] and taken


def test_presets_do_what_their_papers_say(curated: Path) -> None:
    clusters = {"clusters": curated / "clusters"}

    def spread(name: str, *columns: str, **keys: Any) -> Counter[Any]:
        return counts(drawn(curated, files=(f"sample/{name}",), **keys), *columns)

    assert spread("uni", "organ", total=120) == {"skin": 60, "lung": 60}
    found = spread("hierarchical", "level_2", total=200, **clusters)
    sizes = counts(pq.read_table(curated / "clusters" / "clusters.parquet"), "level_2")
    expected = fill(200, np.array([sizes[level] for level in range(4)]))
    assert sorted(found.values()) == sorted(expected.tolist())
    assert spread("h2g", "group", total=100, **clusters) == dict.fromkeys(
        ("p1", "p2", "p3", "p4"), 25
    ) | {"p4": 25}
    groups = spread("rudolfv", "slide_id", total=400, **clusters)
    assert sum(n for s, n in groups.items() if s.endswith("b")) == 200
    assert spread("pluto", "slide_id", total=100) == dict.fromkeys(SLIDES, 20)
    strata = spread("starc9", "stratum", total=1000, **clusters)
    inside = [n for path, n in strata.items() if path.startswith("p3-a/0/")]
    assert len(inside) == 5 and max(inside) - min(inside) <= 1  # the preset's own distance bins
    bins = spread("starc9", "slide_id", "slide_cluster", total=400, **clusters)
    inside = [n for (slide, _), n in bins.items() if slide == "p3-a"]
    assert max(inside) - min(inside) <= 1
    table = drawn(curated, files=("sample/kimianet",))
    whole = pq.read_table(curated / "tiles.parquet").to_pylist()
    for slide, size in SLIDES.items():
        cells = sorted(r["nuclei_fraction"] for r in whole if r["slide_id"] == slide)
        taken = [r["nuclei_fraction"] for r in table.to_pylist() if r["slide_id"] == slide]
        assert sorted(taken) == cells[-len(taken) :] and len(taken) == pytest.approx(
            size / 5, abs=1
        )


def test_distance_bins_are_equally_frequent(curated: Path) -> None:
    table = drawn(
        curated,
        "bins=[{name: bin, column: distance, count: 4, within: [level_1]}]",
        "tree=[level_1,bin]",
        clusters=curated / "clusters",
        total=10**6,
    )
    assert len(table) == sum(SLIDES.values())
    strata = counts(table, "stratum")
    for label in range(8):
        inside = [strata[f"{label}/{number}"] for number in range(4)]
        assert max(inside) - min(inside) <= 1


def test_thresholds_duplicates_and_their_counts(curated: Path) -> None:
    ids = read_table(curated / "tiles.parquet", TILES)["tile_id"].to_pylist()
    repeats = pa.table(
        {
            "tile_id": sorted(ids[:10]),
            "kept_tile_id": [ids[20]] * 10,
            "kind": ["near"] * 10,
            "similarity": pa.array([0.99] * 10, pa.float32()),
            "group": ["p1"] * 10,
            "kept_group": ["p1"] * 10,
        }
    )
    write_table(repeats, curated / "duplicates.parquet", DUPLICATES)
    table = drawn(curated, duplicates=curated / "duplicates.parquet")
    assert not set(ids[:10]) & set(table["tile_id"].to_pylist())
    assert len(table) == len(ids) - 10
    done = json.loads((curated / "selection.json").read_text())
    assert done["dropped"]["duplicates"] == 10
    with pytest.raises(InputError, match="run dedupe again"):
        write_tables(curated, {"p1-b": 5})
        drawn(curated, duplicates=curated / "duplicates.parquet")


def test_a_review_is_obeyed(curated: Path) -> None:
    verdicts = {
        0: Verdict(name="tumour", weight=3.0),
        1: Verdict(rejected=True),
        2: Verdict(merged_into=0),
        3: Verdict(name="stroma"),
    }
    write_review(
        curated / "review.json", Review(clusters_stamp="clusters", level=1, verdicts=verdicts)
    )
    keys = {"clusters": curated / "clusters", "review": curated / "review.json", "total": 100}
    found = counts(drawn(curated, "tree=[level_1]", **keys), "level_1")
    others = [found[number] for number in (3, 4, 5, 6)]
    assert found[1] == 0 and max(others) - min(others) <= 1
    assert found[0] + found[2] == pytest.approx(3 * others[0], abs=3)
    with pytest.raises(Exception, match="does not name level_1"):
        drawn(curated, "tree=[organ]", **keys)
    write_clusters(
        curated / "clusters",
        read_table(curated / "tiles.parquet", TILES)["tile_id"].to_pylist(),
        [0] * sum(SLIDES.values()),
        stamp="others",
    )
    with pytest.raises(InputError, match="other clusters"):
        drawn(curated, "tree=[level_1]", **keys)


def test_tiles_that_are_not_clustered_are_a_value_of_their_own(curated: Path) -> None:
    ids = read_table(curated / "tiles.parquet", TILES)["tile_id"].to_pylist()
    write_clusters(curated / "clusters", ids[5:700:3], [4] * len(ids[5:700:3]), stamp="some")
    keys = {"tiles": curated, "out": curated / "s.parquet", "total": 100}
    sample(SampleConfig(tree=["level_1"], clusters=curated / "clusters", **keys))  # type: ignore[arg-type]
    assert counts(read_table(curated / "s.parquet", SELECTION), "stratum") == {
        "4": 50,
        "unknown": 50,
    }
    write_clusters(curated / "clusters", [ids[3], "foreign"], [0, 1], stamp="other")
    with pytest.raises(InputError, match="stands elsewhere"):
        sample(SampleConfig(tree=["level_1"], clusters=curated / "clusters", **keys))  # type: ignore[arg-type]


def test_the_second_call_does_nothing_and_balance_is_written(curated: Path) -> None:
    drawn(curated, "tree=[organ]", total=100)
    before = (curated / "selection.parquet").stat().st_mtime_ns
    drawn(curated, "tree=[organ]", total=100)
    assert (curated / "selection.parquet").stat().st_mtime_ns == before
    balance = json.loads((curated / "selection.json").read_text())["balance"]["organ"]
    assert balance["counts"] == {"lung": [80, 50], "skin": [1500, 50]}
    assert balance["after"]["evenness"] == pytest.approx(1)
    assert balance["before"]["evenness"] < 0.5


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (["tree=[colour]"], "no column 'colour'"),
        (["tree=[organ,organ]"], "twice"),
        (["weights={organ: {skin: 2}}"], "not in tree"),
        (["tree=[organ]", "weights={organ: {toe: 2}}"], "organ=toe"),
        (["tree=[organ]", "weights={organ: {skin: 0}}"], "positive"),
        (["caps={slide_id: 0}"], "too small"),
        (["quantiles=[{column: organ}]"], "no column 'organ' of tiles"),
        (["quantiles=[{column: stain}]"], "not numbers"),
        (["quantiles=[{column: sharpness, low: 0.9, high: 0.1}]"], "rise"),
        (["clusters=CURATED/nowhere"], "eosin cluster"),
        (["duplicates=CURATED/nowhere.parquet"], "nowhere"),
        (["select.max_tiles_per_slide=5"], "caps.slide_id=5"),
    ],
)
def test_nonsense_is_named(
    curated: Path, keys: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [key.replace("CURATED", str(curated)) for key in keys]
    assert main(["sample", f"tiles={curated}", f"out={curated / 's.parquet'}", *keys]) == 2
    assert named in capsys.readouterr().err
    assert not (curated / "s.parquet").exists()
