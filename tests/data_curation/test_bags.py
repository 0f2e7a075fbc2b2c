"""Bags from everybody's files, stored by blocks; published mistakes with coordinates refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import torch

from eosin.configs.errors import InputError
from eosin.data_curation.bag_lattice import find_lattice
from eosin.data_curation.bag_store import GAP, BagStore, block_order, runs_of, side_by_side
from eosin.data_curation.features import open_features
from eosin.data_curation.h5_bags import write_atlaspatch, write_h5, write_stamp
from eosin.data_curation.import_bags import BagsConfig, make_bags
from eosin.data_curation.npz_bags import write_slide2vec
from eosin.launch.cli import main

DIM = 6
LEVEL0, MPP, SIZE = 0.25, 0.5, 256
FOOTPRINT = 512


def tiles_of(seed: int, columns: int = 9, rows: int = 7) -> tuple[npt.NDArray[np.int64], Any]:
    """Corners [N, 2] of three quarters of a grid, in an order of their own, and features."""
    generator = np.random.default_rng(seed)
    cells = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2)
    cells = generator.permutation(cells)[: len(cells) * 3 // 4]
    features = generator.normal(size=(len(cells), DIM)).astype(np.float32)
    return cells.astype(np.int64) * FOOTPRINT + np.array([1000, 2000]), features


def attributes(**changes: Any) -> dict[str, Any]:
    return {
        "name": "a", "patch_size": SIZE, "patch_size_level0": FOOTPRINT, "patch_level": 0,
        "downsample": [2.0, 2.0], "level0_magnification": 40, "target_magnification": 20,
        "overlap": 0, "level0_width": 50000, "level0_height": 40000, "mpp": MPP,
        "level0_mpp": LEVEL0, "encoder": "uni", "encoder_digest": "e1", "transform_digest": "t1",
        "pooling": "cls", **changes,
    }  # fmt: skip


Writer = Callable[[Path, str, Any, Any], None]


def trident(folder: Path, slide: str, coords: Any, features: Any, **changes: Any) -> None:
    """As TRIDENT writes it, which is not as we do: no scale, None as a word, chunks of one row."""
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / f"{slide}.h5", "w") as file:
        made = file.create_dataset("features", data=features, chunks=(1, features.shape[1]))
        made.attrs.update({"name": slide, "savetodir": "None", "encoder": "uni_v1"})
        made = file.create_dataset("coords", data=coords)
        made.attrs.update({
            "patch_size": SIZE, "patch_size_level0": FOOTPRINT, "level0_magnification": 40,
            "target_magnification": 20, "overlap": 0, "name": slide, "savetodir": "None",
            "level0_width": 50000, "level0_height": 40000, **changes,
        })  # fmt: skip


def clam(folder: Path, slide: str, coords: Any, features: Any, **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / f"{slide}.h5", "w") as file:
        file.create_dataset("features", data=features)
        made = file.create_dataset("coords", data=coords)
        made.attrs.update({"patch_size": SIZE, "patch_level": 1, **changes})
        made.attrs["downsample"] = (2.0, 2.0)


def ours(folder: Path, slide: str, coords: Any, features: Any, **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_h5(folder / f"{slide}.h5", features, None, coords, attributes(**changes))


def stamp(folder: Path, slide: str, coords: Any, features: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_stamp(folder / f"{slide}.h5", features, coords * LEVEL0, attributes())


def atlaspatch(folder: Path, slide: str, coords: Any, features: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atlaspatch(folder / f"{slide}.h5", features, coords, attributes())


def slide2vec(folder: Path, slide: str, coords: Any, features: Any) -> None:
    tissue = np.ones(len(coords), np.float32)
    write_slide2vec(folder, slide, features, coords, tissue, attributes())


def slide2vec_pt(folder: Path, slide: str, coords: Any, features: Any) -> None:
    """As it writes them by default: a tensor; and the tiles as x and y."""
    slide2vec(folder, slide, coords, features)
    path = folder / "tile_embeddings" / f"{slide}.npz"
    path.unlink()
    torch.save(torch.from_numpy(features), path.with_suffix(".pt"))
    np.savez(folder / "tiles" / f"{slide}.coordinates.npz", x=coords[:, 0], y=coords[:, 1])


LAYOUTS: dict[str, tuple[Writer, dict[str, Any]]] = {
    "trident": (trident, {"mpp": MPP}),
    "clam": (clam, {"mpp": MPP, "encoder": "uni"}),
    "ours": (ours, {}),
    "stamp": (stamp, {}),
    "atlaspatch": (atlaspatch, {}),
    "slide2vec": (slide2vec, {}),
    "slide2vec pt": (slide2vec_pt, {}),
}


def imported(files: Path, out: Path, **options: Any) -> BagStore:
    make_bags(BagsConfig(files=files, out=out, **options))
    return BagStore(out)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_becomes_the_same_bags(name: str, tmp_path: Path) -> None:
    write, options = LAYOUTS[name]
    given = {slide: tiles_of(seed) for seed, slide in enumerate(("a", "b.1"))}
    for slide, (coords, features) in given.items():
        write(tmp_path / "files", slide, coords, features)
    (tmp_path / "slides.csv").write_text("slide,group,stain\na,p1,H&E\nb.1,p2,HER2\n")
    store = imported(tmp_path / "files", tmp_path / "out", table=tmp_path / "slides.csv", **options)
    assert store.slide_ids == ["a", "b_1"] and store.groups == ["p1", "p2"]
    assert store.stains == ["H&E", "HER2"] and store.dim == DIM
    for slide_id, (coords, features) in zip(store.slide_ids, given.values(), strict=True):
        bag = store.read(slide_id)
        assert len(bag) == len(coords) == len(set(bag.tile_ids))
        scale = MPP if name == "stamp" else LEVEL0  # of its level 0, which it does not say
        places = {(x * LEVEL0, y * LEVEL0): row for row, (x, y) in enumerate(coords.tolist())}
        corners_um = bag.corner_px * scale
        rows = [places[x, y] for x, y in corners_um.tolist()]
        np.testing.assert_array_equal(bag.features, features[rows].astype(np.float16))
        np.testing.assert_allclose(bag.centre_um, corners_um + SIZE * MPP / 2)
        cells = (corners_um - corners_um.min(axis=0)) / (SIZE * MPP)
        np.testing.assert_array_equal(bag.cells - bag.cells.min(axis=0), cells)
        assert (bag.mpp == MPP).all() and (bag.section == 1).all()
    # a feature store like any other
    assert open_features(tmp_path / "out").offsets is not None


def test_it_is_done_once_and_again_when_a_file_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coords, features = tiles_of(0)
    ours(tmp_path / "files", "a", coords, features)
    command = ["bags", f"files={tmp_path / 'files'}", f"out={tmp_path / 'out'}"]
    assert main([*command, "--dry-run"]) == 0 and not (tmp_path / "out").exists()
    assert main(command) == 0
    before = (tmp_path / "out" / "features.npy").read_bytes()
    assert main(command) == 0 and "there already" in capsys.readouterr().out
    ours(tmp_path / "files", "a", coords, features + 1)
    assert main(command) == 0
    assert (tmp_path / "out" / "features.npy").read_bytes() != before
    ours(tmp_path / "files", "a", coords, features)
    assert main(command) == 0
    assert (tmp_path / "out" / "features.npy").read_bytes() == before


def test_a_window_is_what_lies_in_it_and_few_reads(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    coords, features = tiles_of(1, 150, 130)
    ours(tmp_path / "files", "a", coords, features)
    store = imported(tmp_path / "files", tmp_path / "out")
    whole = store.read("a")
    order = block_order(whole.corner_px, FOOTPRINT)
    np.testing.assert_array_equal(order, np.arange(len(whole)))  # stored in that order
    side = SIZE * MPP
    reads, read = [], []
    for corner in generator.uniform(-5, 140, (40, 2)) * side:
        found = store.window("a", tuple(corner), (20 * side, 20 * side))
        inside = (whole.centre_um >= corner) & (whole.centre_um < corner + 20 * side)
        rows = np.flatnonzero(inside.all(axis=1))
        np.testing.assert_array_equal(found.features, whole.features[rows])
        np.testing.assert_array_equal(found.cells, whole.cells[rows])
        assert found.tile_ids == [whole.tile_ids[row] for row in rows.tolist()]
        runs = list(runs_of(rows))
        if len(rows) > 250:
            reads.append(len(runs))
            read.append(sum(stop - start for _, _, start, stop in runs) / len(rows))
    # by rows of the grid it were 20 runs, or all of the slide's width 20 times: 150 / 20 = 7.5
    assert np.median(reads) <= 6 and np.median(read) < 4
    assert len(store.window("a", (-1e6, 0), (1, 1))) == 0


def test_runs_join_what_lies_close() -> None:
    rows = np.array([3, 4, 9, 9 + GAP + 1, 500])
    assert list(runs_of(rows)) == [(0, 3, 3, 10), (3, 4, 74, 75), (4, 5, 500, 501)]
    assert list(runs_of(np.empty(0, np.int64))) == []


def test_pieces_with_a_grid_of_their_own_keep_it(tmp_path: Path) -> None:
    """CLAM lays a grid a contour; TITAN's indices would put tiles of two of them in one cell."""
    coords, features = tiles_of(0)
    other = coords + np.array([12 * FOOTPRINT + 200, 3 * FOOTPRINT + 77])
    clam(tmp_path / "files", "a", np.concatenate([coords, other]), np.tile(features, (2, 1)))
    bag = imported(tmp_path / "files", tmp_path / "out", mpp=MPP).read("a")
    assert sorted(np.unique(bag.origin, return_counts=True)[1]) == [len(coords)] * 2
    together = side_by_side(bag.cells, bag.origin)
    assert len(np.unique(together, axis=0)) == len(bag) and together.min() == 0
    for number in (1, 2):
        own = bag.origin == number
        np.testing.assert_array_equal(
            together[own] - together[own][0], bag.cells[own] - bag.cells[own][0]
        )
        steps = (bag.corner_px[own] - bag.corner_px[own][0]) / FOOTPRINT
        np.testing.assert_array_equal(bag.cells[own] - bag.cells[own][0], steps)
        assert len(np.unique(bag.cells[own], axis=0)) == own.sum()


def test_corners_of_an_exact_grid_that_were_rounded_are_taken(tmp_path: Path) -> None:
    """256 px at 0.5 µm/px are 507.5347 px of 0.2522 µm: nobody can write that as whole pixels."""
    cells, features = tiles_of(0, 60, 50)
    exact = SIZE * MPP / 0.2522
    coords = np.round((cells - [1000, 2000]) // FOOTPRINT * exact).astype(np.int64)
    ours(tmp_path / "files", "a", coords, features, patch_size_level0=508, level0_mpp=0.2522)
    bag = imported(tmp_path / "files", tmp_path / "out").read("a")
    found = np.round(bag.corner_px / exact)
    np.testing.assert_array_equal(bag.cells - bag.cells[0], found - found[0])
    # overlapping tiles say by how much
    half = np.round((cells - [1000, 2000]) // FOOTPRINT * exact / 2).astype(np.int64)
    ours(tmp_path / "more", "a", half, features, patch_size_level0=508, level0_mpp=0.2522,
         overlap=128)  # fmt: skip
    bag = imported(tmp_path / "more", tmp_path / "out2").read("a")
    found = np.round(bag.corner_px / (exact / 2))
    np.testing.assert_array_equal(bag.cells - bag.cells[0], found - found[0])


def refused(tmp_path: Path, write: Callable[[Path], None], **options: Any) -> str:
    """What is said; the name of the file is in it, and nothing is left that looks done."""
    write(tmp_path / "files")
    with pytest.raises(InputError) as caught:
        imported(tmp_path / "files", tmp_path / "out", **options)
    assert not (tmp_path / "out" / "meta.json").exists()
    assert not (tmp_path / ".out.features").exists()
    said = str(caught.value)
    assert str(tmp_path / "files") in said and "\n" not in said
    return said


def test_published_mistakes_are_refused(tmp_path: Path) -> None:
    """Each as a file that holds what the program took for true."""
    coords, features = tiles_of(0)
    # STAMP 148: one tile taken for 256 µm, 1,013 px at 0.2525 µm/px, where they lie 512 px apart
    said = refused(
        tmp_path / "a", lambda f: trident(f, "a", coords, features, patch_size_level0=1013), mpp=MPP
    )
    assert "tiles lie 512 level-0 px apart, which is no whole number of the 1013 px" in said

    def in_micrometres(folder: Path) -> None:
        folder.mkdir(parents=True)
        with h5py.File(folder / "a.h5", "w") as file:
            file["feats"], file["coords"] = features, coords * 0.2525
            file.attrs.update({"unit": "um", "tile_size_um": 256.0, "tile_size_px": 512})

    assert "is no whole number of the 512 px" in refused(tmp_path / "b", in_micrometres)
    # STAMP 159: corners scaled to [0, 1000] and divided by 256: 16 places are left
    scaled = np.floor((coords - coords.min(0)) / np.ptp(coords, axis=0).max() * 1000 / 256) * 256
    said = refused(tmp_path / "c", lambda f: trident(f, "a", scaled, features), mpp=MPP)
    assert "tiles lie in" in said and "two tiles cannot be one" in said

    # slide2vec 244: level-0 corners where those at the tiles' own scale were meant
    def unscaled(folder: Path) -> None:
        slide2vec(folder, "a", coords, features)
        for path in folder.rglob("*.meta.json"):
            path.write_text(json.dumps({**json.loads(path.read_text()), "tile_size_lv0": 256}))

    said = refused(tmp_path / "d", unscaled)
    assert "cover 128 µm, and 256 level-0 px of 0.25 µm are 64 µm" in said
    # and where nothing says what level 0 is
    said = refused(
        tmp_path / "e", lambda f: trident(f, "a", coords, features, patch_size_level0=256), mpp=MPP
    )
    assert "every tile lies 2 or more footprints of 256 px from the next" in said
    said = refused(tmp_path / "f", lambda f: trident(f, "a", coords // 2, features), mpp=MPP)
    assert "tiles lie 256 level-0 px apart, which is no whole number of the 512 px" in said


def spoilt(name: str) -> tuple[Callable[[Path], None], dict[str, Any], str]:
    coords, features = tiles_of(0)
    bad, twins, zeros = features.copy(), coords.copy(), features.copy()
    bad[3, 2], zeros[5] = np.nan, 0
    twins[4] = twins[9]
    nowhere = coords.astype(np.float64)
    nowhere[2, 0] = np.inf
    small = {"mpp": MPP, "footprint_px": 500.0}
    strewn = np.random.default_rng(0).integers(0, 50000, coords.shape)

    def two(**second: Any) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            ours(folder, "a", coords, features)
            ours(folder, "b", coords, features, **second)

        return write

    def wider(folder: Path) -> None:
        ours(folder, "a", coords, features)
        ours(folder, "b", coords, np.tile(features, 2))

    cases: dict[str, tuple[Callable[[Path], None], dict[str, Any], str]] = {
        "no scale": (lambda f: trident(f, "a", coords, features), {}, "names no mpp"),
        "twins": (lambda f: ours(f, "a", twins, features), {}, "two tiles cannot be one"),
        "no number": (lambda f: ours(f, "a", nowhere, features), {}, "corner of tile 2 is"),
        "strewn": (lambda f: ours(f, "a", strewn, features), {}, "on no lattice|whole number"),
        "not finite": (
            lambda f: ours(f, "a", coords, bad),
            {},
            "1 rows are not finite, first row 3",
        ),
        "zeros": (lambda f: ours(f, "a", coords, zeros), {}, "1 of 47 rows are zero, first row 5"),
        "lengths": (lambda f: ours(f, "a", coords[1:], features), {}, "do not belong together"),
        "encoder": (two(encoder="uni2"), {}, "its encoder is uni2, and uni in .*a.h5"),
        "weights": (two(encoder_digest="e2"), {}, "its encoder digest is e2, and e1"),
        "transform": (two(transform_digest="t2"), {}, "its transform digest is t2"),
        "pooling": (two(pooling="mean"), {}, "its pooling is mean, and cls"),
        "width": (wider, {}, "12.* features a tile, and .*6"),
        "sizes": (lambda f: clam(f, "a", coords, features), small, "whole number"),
        "overlap": (lambda f: ours(f, "a", coords, features, overlap=300), {}, "cannot overlap"),
        "scales": (lambda f: ours(f, "a", coords, features, mpp=1.0), {}, "is of another level"),
    }
    return cases[name]


@pytest.mark.parametrize(
    "name",
    ["no scale", "twins", "no number", "strewn", "not finite", "zeros", "lengths", "encoder",
     "weights", "transform", "pooling", "width", "sizes", "overlap", "scales"],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(name: str, tmp_path: Path) -> None:
    write, options, words = spoilt(name)
    assert re.search(words, refused(tmp_path, write, **options))


def test_rows_of_zeros_are_left_out_on_request(tmp_path: Path) -> None:
    coords, features = tiles_of(0)
    features[5] = 0
    ours(tmp_path / "files", "a", coords, features)
    store = imported(tmp_path / "files", tmp_path / "out", leave_out_zeros=True)
    assert len(store.read("a")) == len(coords) - 1


def test_tiles_that_are_meant_to_lie_apart(tmp_path: Path) -> None:
    coords, features = tiles_of(0)
    trident(tmp_path / "files", "a", coords, features, patch_size_level0=256)
    bag = imported(tmp_path / "files", tmp_path / "out", mpp=MPP, sparse=True).read("a")
    assert np.gcd.reduce(bag.cells[:, 0] - bag.cells[0, 0]) == 2


def test_files_that_are_none_are_one_line(tmp_path: Path) -> None:
    for name, content in {"a.h5": b"no hdf5", "b.npz": b"no zip", "c.pt": b"\x80\x02."}.items():
        folder = tmp_path / name[0]
        folder.mkdir()
        (folder / name).write_bytes(content)
        if name != "a.h5":
            (folder / f"{name[0]}.meta.json").write_text("{}")
        with pytest.raises(InputError, match=name):
            imported(folder, tmp_path / "out")
    with pytest.raises(InputError, match="does not exist"):
        imported(tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no files that end in"):
        imported(tmp_path / "empty", tmp_path / "out")
    coords, features = tiles_of(0)
    for part in ("x", "y"):
        ours(tmp_path / "twice" / part, "a", coords, features)
    with pytest.raises(InputError, match="are of one slide, a"):
        imported(tmp_path / "twice", tmp_path / "out")
    (tmp_path / "slides.csv").write_text("slide\na\nz\n")
    with pytest.raises(InputError, match="names 1 slides without a file: z"):
        imported(tmp_path / "twice" / "x", tmp_path / "out", table=tmp_path / "slides.csv")


def test_a_lattice_does_not_depend_on_the_order_of_tiles() -> None:
    coords, _ = tiles_of(3)
    shuffled = np.random.default_rng(0).permutation(len(coords))
    first = find_lattice(coords.astype(np.float64), FOOTPRINT, FOOTPRINT, "x")
    again = find_lattice(coords[shuffled].astype(np.float64), FOOTPRINT, FOOTPRINT, "x")
    np.testing.assert_array_equal(first.cells[shuffled], again.cells)


def test_parts_of_other_shapes_are_one_line(tmp_path: Path) -> None:
    """A slide's vector in the place of its tiles, corners in one row, too few pieces of tissue."""
    coords, features = tiles_of(0)
    trident(tmp_path / "a", "a", coords, features)
    for name, key, values, words in (
        ("b", "features", features.mean(axis=0), r"features of shape \[6\] and 47 corners"),
        ("c", "coords", coords[:, 0], r"corners of shape \[47\] are not x and y"),
        ("d", "contour_index", np.zeros(3, np.int32), "do not belong together"),
    ):
        trident(tmp_path / name, "a", coords, features)
        with h5py.File(tmp_path / name / "a.h5", "a") as file:
            if key in file:
                del file[key]
            file[key] = values
        with pytest.raises(InputError, match=words):
            imported(tmp_path / name, tmp_path / "out", mpp=MPP)
