"""Duplicates: the match against a loop, planted copies, who stays, and what blocks leave out."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curated_tables import write_tables
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from eosin.configs.errors import InputError
from eosin.configs.load import load_config
from eosin.data_curation.cluster import cluster
from eosin.data_curation.cluster_config import ClusterConfig
from eosin.data_curation.dedupe import dedupe
from eosin.data_curation.dedupe_config import DedupeConfig
from eosin.data_curation.duplicate_groups import families, stand_ins
from eosin.data_curation.duplicate_match import best_correlation
from eosin.data_curation.duplicate_search import Spectra, find_pairs
from eosin.data_curation.embed_config import EmbedConfig
from eosin.data_curation.embed_tiles import embed
from eosin.data_curation.features import features_stamp, write_features
from eosin.data_curation.manifest import DUPLICATES, FEATURE_ROWS, read_table
from eosin.data_curation.synthetic_layout import draw_layout
from eosin.data_curation.synthetic_section import draw_look, render
from eosin.data_curation.tile_print import DIM, SIDE, hashes, pictures, tile_print

RGB = NDArray[np.uint8]
SIDE_PX = 176
MARGIN_PX = 22  # an eighth
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


def restained(tile: RGB, rng: np.random.Generator) -> RGB:
    """Another scan of another staining: densities and colours of the stains changed."""
    own = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
    density = -np.log((tile.astype(np.float64) + 1) / 256) @ np.linalg.inv(own)
    other = STAINS + rng.normal(0, 0.05, (3, 3))
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    mixed = (density * rng.uniform(0.7, 1.3, 3)) @ other
    return np.clip(256 * np.exp(-mixed) - 1, 0, 255).astype(np.uint8)


def recompressed(tile: RGB, quality: int) -> RGB:
    coded = cv2.imencode(".jpg", tile[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)[..., ::-1]


def noisy(tile: RGB, rng: np.random.Generator) -> RGB:
    return np.clip(tile + rng.normal(0, 6, tile.shape), 0, 255).astype(np.uint8)


def cut(image: RGB, x: int = 0, y: int = 0) -> RGB:
    """The middle of an image, or so many pixels beside it."""
    top, left = (image.shape[0] - SIDE_PX) // 2 + y, (image.shape[1] - SIDE_PX) // 2 + x
    return np.ascontiguousarray(image[top : top + SIDE_PX, left : left + SIDE_PX])


def moved(image: RGB, rng: np.random.Generator, margin_px: int = MARGIN_PX) -> RGB:
    x, y = rng.integers(-margin_px, margin_px + 1, 2)
    return cut(image, int(x), int(y))


COPIES: dict[str, Callable[[RGB, np.random.Generator], RGB]] = {
    "re-encoded": lambda image, rng: recompressed(cut(image), 60),
    "noise": lambda image, rng: noisy(cut(image), rng),
    "restained": lambda image, rng: restained(cut(image), rng),
    "moved": moved,
    "all at once": lambda image, rng: recompressed(
        noisy(restained(moved(image, rng), rng), rng), 75
    ),
}


def write_prints(folder: Path, prints: NDArray[Any], **columns: Any) -> Path:
    """A feature store of prints; tiles are called t0000 and on."""
    n = len(prints)
    rows = {field.name: pa.nulls(n, field.type) for field in FEATURE_ROWS}
    names = [f"t{number:04d}" for number in range(n)]
    rows |= {"tile_id": pa.array(names), "group": pa.array(names)}
    rows |= {name: pa.array(values) for name, values in columns.items()}
    write_features(
        folder,
        rows=pa.table(rows),
        dim=DIM,
        stamp=features_stamp("prints", hashes(prints).tobytes().hex()),
        compute=lambda start, stop: prints[start:stop].astype(np.float32),
        chunk_rows=4096,
        meta={"encoder": "tile-print"},
    )
    return folder


def found(out: Path, **keys: Any) -> pa.Table:
    dedupe(load_config(DedupeConfig, [], [f"{k}={v}" for k, v in {"out": out, **keys}.items()]))
    return read_table(out, DUPLICATES)


def planted(images: list[RGB], folder: Path) -> tuple[float, float]:
    """Recall of one copy of each image, and the share of originals that went for no copy of theirs.

    The copies come first by name for half of the images, so both may stay.
    """
    rng = np.random.default_rng(3)
    kinds = list(COPIES.values())
    pairs = [
        [tile_print(cut(image)), tile_print(kinds[number % len(kinds)](image, rng))]
        for number, image in enumerate(images)
    ]
    prints = np.stack([one for n, pair in enumerate(pairs) for one in (pair[:: 1 - 2 * (n % 2)])])
    table = found(folder / "d.parquet", prints=write_prints(folder / "prints", prints))
    source = [int(name[1:]) // 2 for name in table["tile_id"].to_pylist()]
    stays = [int(name[1:]) // 2 for name in table["kept_tile_id"].to_pylist()]
    right = sum(a == b for a, b in zip(source, stays, strict=True))
    return right / len(images), (table.num_rows - right) / len(images)


def synthetic_images(count: int) -> list[RGB]:
    """Squares of one synthetic slide that do not overlap, with tissue all over."""
    rng = np.random.default_rng(11)
    layout = draw_layout(rng, cells=256, cell_um=8.0, region_um=380, artefact_share=0)
    slide = render(rng, layout, draw_look(rng), 0.5)
    side, cell = SIDE_PX + 2 * MARGIN_PX, 16
    images = [
        slide[y : y + side, x : x + side]
        for y in range(0, len(slide) - side, side)
        for x in range(0, len(slide) - side, side)
        if layout.tissue[
            y // cell : -(-(y + side) // cell), x // cell : -(-(x + side) // cell)
        ].all()
    ]
    assert len(images) >= count, len(images)
    return images[:count]


@pytest.fixture(scope="module")
def synthetic() -> list[RGB]:
    return synthetic_images(100)


def test_the_match_is_that_of_a_loop_over_shifts() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.normal(0, 1, (3, SIDE, SIDE)).astype(np.float32) for _ in range(2))
    b[1] = np.roll(a[1], (2, -3), (0, 1)) + rng.normal(0, 0.5, (SIDE, SIDE))

    def slow(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
        best = -1.0
        for dy in range(-4, 5):
            for dx in range(-4, 5):
                here = one[max(0, dy) : SIDE + min(0, dy), max(0, dx) : SIDE + min(0, dx)]
                there = other[max(0, -dy) : SIDE + min(0, -dy), max(0, -dx) : SIDE + min(0, -dx)]
                energy = (here**2).sum() * (there**2).sum()
                best = max(best, float((here * there).sum() / energy**0.5))
        return best

    flat_a, flat_b = a.reshape(3, -1), b.reshape(3, -1)
    expected = [slow(one, other) for one, other in zip(a, b, strict=True)]
    assert best_correlation(flat_a, flat_b) == pytest.approx(expected, abs=1e-5)
    assert expected[1] > 0.8 > max(expected[0], expected[2])
    for flipped in (b, b[:, ::-1], b.transpose(0, 2, 1), b[:, ::-1, ::-1].transpose(0, 2, 1)):
        ways = [np.rot90(way, k) for way in (b[0], b[0].T) for k in range(4)]
        turned = best_correlation(flat_a, flipped.reshape(3, -1), turns=True)
        assert turned[0] == pytest.approx(max(slow(a[0], way) for way in ways), abs=1e-5)


def test_planted_copies_of_synthetic_tiles(synthetic: list[RGB], tmp_path: Path) -> None:
    recall, false = planted(synthetic, tmp_path)
    assert recall >= 0.99 and false <= 0.01, (recall, false)


def test_planted_copies_of_real_tiles(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "lung3"
    with (folder / "labels.csv").open() as file:
        rows = {row["group"]: row["path"] for row in csv.DictReader(file)}
    images = [
        np.asarray(Image.open(real_data / "lung3" / path).convert("RGB")) for path in rows.values()
    ]
    recall, false = planted(images, tmp_path)
    assert len(images) > 700
    assert recall >= 0.99 and false <= 0.01, (recall, false)


def test_spectra_find_what_a_comparison_of_all_finds(synthetic: list[RGB]) -> None:
    rng = np.random.default_rng(5)
    half = MARGIN_PX // 2  # two that were moved lie up to an eighth apart
    prints = np.stack(
        [tile_print(moved(image, rng, half)) for image in synthetic for _ in range(7)]
    )
    spectra = Spectra(prints, turns=False)
    assert spectra.of_middle(prints).shape[1] > 50  # enough for them to be fitted
    quick = find_pairs(prints, None, spectra, 0.45)
    first, second = np.triu_indices(len(prints), 1)
    some = (first // 7 == second // 7) | (rng.random(len(first)) < 0.03)
    first, second = first[some], second[some]
    alike = best_correlation(pictures(prints[first]), pictures(prints[second])) >= 0.45
    wanted = set(zip(first[alike].tolist(), second[alike].tolist(), strict=True))
    got = set(zip(quick.first.tolist(), quick.second.tolist(), strict=True))
    assert {(a, b) for a, b in got if a // 7 == b // 7} <= wanted
    assert len(got & wanted) >= 0.995 * len(wanted) > 1900


def test_who_stays_is_no_matter_of_order_and_leaves_no_pair() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, 200, (2, 300))
    first, second = first[first != second], second[first != second]
    rank = rng.permutation(200)
    gone, instead = stand_ins(first, second, rank)
    left = np.setdiff1d(np.arange(200), gone)
    assert not (np.isin(first, left) & np.isin(second, left)).any()
    assert np.isin(instead, left).all() and (rank[instead] < rank[gone]).all()
    pairs = set(zip(first, second, strict=True)) | set(zip(second, first, strict=True))
    for item, stays in zip(gone, instead, strict=True):
        others = [b for a, b in pairs if a == item and b in left]
        assert stays == min(others, key=lambda b: rank[b])
    order = rng.permutation(len(first))
    again = stand_ins(second[order], first[order], rank)
    assert np.array_equal(gone, again[0]) and np.array_equal(instead, again[1])
    chain = stand_ins(np.arange(9), np.arange(1, 10), np.arange(10))
    assert chain[0].tolist() == [1, 3, 5, 7, 9]  # of a row of overlapping tiles every other stays


def test_families_are_connected_components() -> None:
    rng = np.random.default_rng(2)
    pairs = rng.integers(0, 60, (40, 2))
    found = families((f"p{a:02d}", f"p{b:02d}") for a, b in pairs)
    graph = coo_array((np.ones(40), (pairs[:, 0], pairs[:, 1])), shape=(60, 60))
    _, labels = connected_components(graph, directed=False)
    for number in range(60):
        same = [f"p{other:02d}" for other in range(60) if labels[other] == labels[number]]
        assert found.get(f"p{number:02d}", f"p{number:02d}") == same[0]


def test_equal_and_empty_tiles(tmp_path: Path, synthetic: list[RGB]) -> None:
    rng = np.random.default_rng(4)
    glass = [np.full((SIDE_PX, SIDE_PX, 3), 240, np.uint8)] * 2
    glass += [
        recompressed(np.clip(240 + rng.normal(0, 1, g.shape), 0, 255).astype(np.uint8), 90)
        for g in glass
    ]
    first, second = cut(synthetic[0]), cut(synthetic[1])
    tiles = [first, second, first, noisy(first, rng), first, *glass]
    prints = np.stack([tile_print(tile) for tile in tiles])
    store = write_prints(tmp_path / "prints", prints, group=["a", "b", "b", "b", "a", *"aaaa"])
    table = found(tmp_path / "d.parquet", prints=store)
    assert table.select(["tile_id", "kept_tile_id", "kind"]).to_pylist() == [
        {"tile_id": "t0002", "kept_tile_id": "t0000", "kind": "exact"},
        {"tile_id": "t0003", "kept_tile_id": "t0000", "kind": "near"},
        {"tile_id": "t0004", "kept_tile_id": "t0000", "kind": "exact"},
        {"tile_id": "t0006", "kept_tile_id": "t0005", "kind": "exact"},
    ]  # glass with other noise is no copy: it shows nothing
    assert table["similarity"].is_null().to_pylist() == [True, False, True, True]
    done = json.loads((tmp_path / "d.json").read_text())
    assert done["kinds"] == {"exact": 3, "near": 1} and done["across_groups"] == 2


def test_the_sharpest_stays_and_its_stand_in_for_equal_ones(
    tmp_path: Path, synthetic: list[RGB]
) -> None:
    tile = cut(synthetic[2])
    soft = np.asarray(cv2.GaussianBlur(tile, (0, 0), 1.0), np.uint8)
    ids = write_tables(tmp_path, {"p-a": 3}, None, {"sharpness": [1.0, 2.5, 1.0]})
    prints = np.stack([tile_print(t) for t in (soft, tile, soft)])
    store = write_prints(tmp_path / "prints", prints, tile_id=ids, slide_id=["p-a"] * 3)
    table = found(tmp_path / "d.parquet", prints=store, tiles=tmp_path, slides=False)
    assert table["kept_tile_id"].to_pylist() == [ids[1]] * 2  # not the soft one's equal
    assert table["kind"].to_pylist() == ["near", "near"]


def test_clusters_bound_where_copies_are_looked_for(tmp_path: Path, synthetic: list[RGB]) -> None:
    rng = np.random.default_rng(6)
    for number, image in enumerate(synthetic):
        Image.fromarray(cut(image)).save(tmp_path / f"{number:03d}.png")
        Image.fromarray(noisy(cut(image), rng)).save(tmp_path / f"{number:03d}_copy.png")
    for encoder, out in (("tile-print", "prints"), ("stain-texture", "features")):
        words = [f"images={tmp_path}", f"encoder=builtin:{encoder}", f"out={tmp_path / out}"]
        embed(load_config(EmbedConfig, [], words))
    words = [f"features={tmp_path / 'features'}", f"out={tmp_path / 'clusters'}", "levels=[12]"]
    cluster(load_config(ClusterConfig, [], words))
    everywhere = found(tmp_path / "all.parquet", prints=tmp_path / "prints")
    assert everywhere.num_rows == len(synthetic)
    near = {"prints": tmp_path / "prints", "clusters": tmp_path / "clusters"}
    beside = found(tmp_path / "near.parquet", **near)
    assert beside.equals(everywhere)
    alone = found(tmp_path / "alone.parquet", **near, neighbours=0)
    labels = pq.read_table(tmp_path / "clusters" / "clusters.parquet").to_pylist()
    label = {row["tile_id"]: row["level_1"] for row in labels}
    pairs = zip(
        everywhere["tile_id"].to_pylist(), everywhere["kept_tile_id"].to_pylist(), strict=True
    )
    inside = [one for one, other in pairs if label[one] == label[other]]
    assert alone["tile_id"].to_pylist() == inside
    before = (tmp_path / "alone.parquet").stat().st_mtime_ns
    found(tmp_path / "alone.parquet", **near, neighbours=0)
    assert (tmp_path / "alone.parquet").stat().st_mtime_ns == before


def test_what_are_no_prints_is_refused(tmp_path: Path) -> None:
    write_features(
        tmp_path / "features",
        rows=pa.table(
            {
                f.name: pa.array(["x"] if f.type == pa.string() else [None], f.type)
                for f in FEATURE_ROWS
            }
        ),
        dim=3,
        stamp="s",
        compute=lambda start, stop: np.zeros((1, 3), np.float32),
        chunk_rows=1,
        meta={"encoder": "mean-colour"},
    )
    with pytest.raises(InputError, match="by mean-colour, not prints"):
        found(tmp_path / "d.parquet", prints=tmp_path / "features")
