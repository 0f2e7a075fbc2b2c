"""Shards that point into slides: the same records as copies, with the pixels as the slides hold."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from eosin.configs.errors import ConfigError, InputError, TooManyFailedError
from eosin.configs.load import load_config
from eosin.data_curation.energon_index import EnergonConfig, write_energon
from eosin.data_curation.manifest import (
    FAILED,
    INDEX,
    REFERENCE,
    SLIDES,
    TILES,
    read_table,
    write_table,
)
from eosin.data_curation.records import file_identity
from eosin.data_curation.shard_marker import index_digest, read_marker
from eosin.data_curation.shards import ShardConfig, plan, shard
from eosin.data_curation.slide import RegionError, Slide
from eosin.data_curation.slide_metadata import SlideError
from eosin.data_curation.slide_pool import SlidePool
from eosin.data_curation.tiles import TileConfig, tile

WriteSlide = Callable[..., Path]


@pytest.fixture(scope="module")
def tiled(
    tmp_path_factory: pytest.TempPathFactory,
    write_slide: WriteSlide,
    tissue_pixels: NDArray[np.uint8],
) -> Path:
    """Two slides, one scanned finer than its tiles, and ``out`` of `eosin tile`; not to change."""
    folder = tmp_path_factory.mktemp("tiled")
    for number, mpp in enumerate((0.5, 0.48)):
        pixels = np.roll(tissue_pixels, 9 * number, axis=1)
        levels = [pixels, np.ascontiguousarray(pixels[::2, ::2])]
        write_slide(folder / "slides" / f"case_{number}.tiff", levels, mpp=(mpp, mpp))
    tile(TileConfig(slides=folder / "slides", out=folder / "out", size_px=64, workers=1))
    return folder


@pytest.fixture
def slides(tiled: Path, tmp_path: Path) -> Path:
    """The same in a folder of the test's own."""
    shutil.copytree(tiled, tmp_path / "own")
    point_at(tmp_path / "own")
    return tmp_path / "own"


def point_at(folder: Path) -> None:
    """Makes the table of slides name the ones in `folder`."""
    table = folder / "out" / "slides.parquet"
    slides = read_table(table, SLIDES)
    names = [Path(path).name for path in slides["path"].to_pylist()]
    paths = pa.array([str(folder / "slides" / name) for name in names])
    place = slides.column_names.index("path")
    write_table(slides.set_column(place, "path", paths), table, SLIDES)


def config_of(folder: Path, out: Path, **options: Any) -> ShardConfig:
    named = {"pixels": "slides", "records_per_shard": 10, "workers": 1, **options}
    return ShardConfig(tiles=folder / "out", out=out, **named)


def rows_of(shards: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(shards / "index.parquet", INDEX).to_pylist()
    return rows


def contents(folder: Path) -> dict[str, bytes]:
    found = folder.rglob("*")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found if p.is_file()}


def test_copies_and_slides_give_the_same_records_in_the_same_order(
    tiled: Path, tmp_path: Path
) -> None:
    shard(config_of(tiled, tmp_path / "copy", pixels="copy"))
    shard(config_of(tiled, tmp_path / "slides"))
    copies, places = rows_of(tmp_path / "copy"), rows_of(tmp_path / "slides")
    assert len(copies) > 30
    same = [name for name in INDEX.names if name not in ("shard", "suffix", "offset", "size")]
    same.remove("checksum")
    for copy, place in zip(copies, places, strict=True):
        assert {name: copy[name] for name in same} == {name: place[name] for name in same}
        assert Path(copy["shard"]).stem == Path(place["shard"]).stem
        assert place["shard"].endswith(".slides")
        assert [place[n] for n in ("suffix", "offset", "size", "checksum")] == ["slide", 0, 0, ""]
    counts = [
        [shard["count"] for shard in read_marker(tmp_path / name)["shards"].values()]
        for name in ("copy", "slides")
    ]
    assert counts[0] == counts[1]
    assert index_digest(tmp_path / "copy") != index_digest(tmp_path / "slides")
    assert not list((tmp_path / "slides").glob("*.tar"))
    with pytest.raises(InputError, match="points into slides: there are no tars for Energon"):
        write_energon(EnergonConfig(shards=tmp_path / "slides"))
    assert list(places[0]) == [*INDEX.names, *REFERENCE.names]


def test_the_pool_reads_each_tile_as_the_slide_gives_it_in_any_order(
    tiled: Path, tmp_path: Path
) -> None:
    shard(config_of(tiled, tmp_path))
    rows = rows_of(tmp_path)
    assert len({row["source_mpp_x"] for row in rows}) == 2
    order = np.random.default_rng(0).permutation(len(rows))
    with SlidePool(max_open=1) as pool:
        for number in order:
            row = rows[number]
            with Slide(Path(row["source_path"]), (row["source_mpp_x"], row["source_mpp_y"])) as one:
                expected = one.read_tile(
                    row["level0_x"], row["level0_y"], row["size_px"], row["requested_mpp"]
                )
            read = pool.read(row)
            assert read.shape == (row["height_px"], row["width_px"], 3) and read.dtype == np.uint8
            assert np.array_equal(read, expected)


def test_whole_pixels_of_a_tile_are_those_of_the_image(
    tiled: Path, tmp_path: Path, tissue_pixels: NDArray[np.uint8]
) -> None:
    shard(config_of(tiled, tmp_path))
    checked = 0
    with SlidePool() as pool:
        for row in rows_of(tmp_path):
            if row["slide_id"] == "case_0":
                x, y = round(row["level0_x"]), round(row["level0_y"])
                assert np.array_equal(pool.read(row), tissue_pixels[y : y + 64, x : x + 64])
                checked += 1
    assert checked > 10


def test_the_least_recently_used_slide_is_closed_first(
    tiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        shutil.copy(tiled / "slides" / "case_0.tiff", tmp_path / f"{name}.tiff")
    row = {"level0_x": 64.0, "level0_y": 64.0, "size_px": 64, "requested_mpp": 0.5}
    scale = {"source_mpp_x": 0.5, "source_mpp_y": 0.5}
    opened, closed = [], []
    real_open, real_close = openslide.OpenSlide.__init__, openslide.OpenSlide.close

    def open_counted(self: openslide.OpenSlide, path: Path) -> None:
        self.name = Path(path).stem
        opened.append(self.name)
        real_open(self, path)

    def close_counted(self: openslide.OpenSlide) -> None:
        closed.append(self.name)
        real_close(self)

    monkeypatch.setattr(openslide.OpenSlide, "__init__", open_counted)
    monkeypatch.setattr(openslide.OpenSlide, "close", close_counted)
    pool = SlidePool(max_open=2)
    for name in "abacab":
        path = tmp_path / f"{name}.tiff"
        source = {"source_path": str(path), "source_identity": file_identity(path)}
        pool.read({**row, **scale, **source})
    assert opened == ["a", "b", "c", "b"] and closed == ["b", "c"]
    pool.close()
    assert sorted(closed) == ["a", "b", "b", "c"]
    with pytest.raises(ValueError, match="max_open must be 1 or more"):
        SlidePool(max_open=0)


def test_a_pool_travels_without_its_open_slides(tiled: Path, tmp_path: Path) -> None:
    shard(config_of(tiled, tmp_path))
    row = rows_of(tmp_path)[0]
    with SlidePool(max_open=3) as pool:
        expected = pool.read(row)
        with multiprocessing.get_context("spawn").Pool(1) as processes:
            assert np.array_equal(processes.apply(SlidePool.read, (pool, row)), expected)


def test_a_slide_that_changed_or_is_gone_is_named(slides: Path, tmp_path: Path) -> None:
    shard(config_of(slides, tmp_path / "shards"))
    rows = {row["slide_id"]: row for row in rows_of(tmp_path / "shards")}
    os.utime(slides / "slides" / "case_0.tiff", ns=(0, 5))
    (slides / "slides" / "case_1.tiff").unlink()
    with SlidePool() as pool:
        with pytest.raises(SlideError, match=r"case_0\.tiff changed since the index was made"):
            pool.read(rows["case_0"])
        with pytest.raises(SlideError, match=r"case_1\.tiff is missing"):
            pool.read(rows["case_1"])


def test_after_an_unreadable_region_the_pool_goes_on(
    slides: Path, tmp_path: Path, break_tiles: Callable[..., None]
) -> None:
    path = slides / "slides" / "case_0.tiff"
    before = path.stat()
    break_tiles(path, count=32)  # the lower half
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    shard(config_of(slides, tmp_path / "shards"))
    rows = [row for row in rows_of(tmp_path / "shards") if row["slide_id"] == "case_0"]
    broken = next(row for row in rows if row["level0_y"] > 256)
    sound = next(row for row in rows if row["level0_y"] < 190)
    with SlidePool() as pool:
        expected = pool.read(sound)
        for _ in range(2):
            with pytest.raises(RegionError, match=r"case_0\.tiff: not decodable"):
                pool.read(broken)
            assert np.array_equal(pool.read(sound), expected)


def test_a_slide_that_vanished_while_open_can_come_back(
    slides: Path, tmp_path: Path, break_tiles: Callable[..., None]
) -> None:
    path = slides / "slides" / "case_0.tiff"
    break_tiles(path, count=32)
    shard(config_of(slides, tmp_path / "shards"))
    rows = [row for row in rows_of(tmp_path / "shards") if row["slide_id"] == "case_0"]
    sound = next(row for row in rows if row["level0_y"] < 190)
    broken = next(row for row in rows if row["level0_y"] > 256)
    with SlidePool() as pool:
        expected = pool.read(sound)
        path.rename(tmp_path / "away.tiff")
        for _ in range(2):  # open, then not
            with pytest.raises(SlideError, match=r"case_0\.tiff"):
                pool.read(broken)
        (tmp_path / "away.tiff").rename(path)
        assert np.array_equal(pool.read(sound), expected)


def test_bad_slides_become_failed_rows_and_count(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = slides / "slides" / "case_1.tiff"
    path.write_bytes(path.read_bytes()[:100])
    out = tmp_path / "shards"
    for _ in range(2):  # the verdict does not change when nothing is left to do
        with pytest.raises(TooManyFailedError, match="tiles failed, more than max_failed="):
            shard(config_of(slides, out))
    failed = read_table(out / "failed.parquet", FAILED).to_pylist()
    assert {row["source"] for row in failed} == {"case_1"}
    assert {row["status"] for row in failed} == {"unreadable"}
    assert {row["slide_id"] for row in rows_of(out)} == {"case_0"}
    shard(config_of(slides, tmp_path / "all", max_failed=1))
    assert "the pixels stay in the slides" in capsys.readouterr().out
    # One that cannot serve the scale is found by opening it, too.
    path = slides / "out" / "tiles.parquet"
    table = read_table(path, TILES)
    finer = pa.array([0.25] * table.num_rows)
    place = table.column_names.index("requested_mpp")
    write_table(table.set_column(place, "requested_mpp", finer), path, TILES)
    shard(config_of(slides, tmp_path / "finer", max_failed=1))
    failed = read_table(tmp_path / "finer" / "failed.parquet", FAILED).to_pylist()
    assert {row["status"] for row in failed} == {"unreadable", "upsampling"}
    assert rows_of(tmp_path / "finer") == []


def test_workers_make_the_same_bytes_and_a_second_run_none(tiled: Path, tmp_path: Path) -> None:
    config = config_of(tiled, tmp_path / "one", records_per_shard=1)
    shard(config)
    shard(replace(config, out=tmp_path / "two", workers=2))  # two for shards, but not for slides
    whole = contents(tmp_path / "one")
    assert contents(tmp_path / "two") == whole
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")}
    shard(config)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")} == before
    (tmp_path / "one" / "000001.json").write_text(json.dumps({"schema_version": 1}))
    (tmp_path / "one" / "parts" / "000002.parquet").unlink()
    shard(config)
    assert contents(tmp_path / "one") == whole


def test_moved_slides_rewrite_the_rows_and_keep_the_digest(slides: Path, tmp_path: Path) -> None:
    shard(config_of(slides, tmp_path / "shards"))
    digest = index_digest(tmp_path / "shards")
    moved = tmp_path / "elsewhere"
    slides.rename(moved)  # with their times
    point_at(moved)
    shard(config_of(moved, tmp_path / "shards"))
    rows = rows_of(tmp_path / "shards")
    assert {Path(row["source_path"]).parent for row in rows} == {moved / "slides"}
    assert index_digest(tmp_path / "shards") == digest
    with SlidePool() as pool:
        assert pool.read(rows[0]).shape == (64, 64, 3)


def test_a_folder_goes_from_copies_to_slides_and_back(tiled: Path, tmp_path: Path) -> None:
    copying = config_of(tiled, tmp_path / "a", pixels="copy")
    shard(copying)
    copied = contents(tmp_path / "a")
    shard(replace(copying, pixels="slides"))
    shard(config_of(tiled, tmp_path / "b"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    shard(copying)
    assert contents(tmp_path / "a") == copied


KILLED = """
import sys
from pathlib import Path
from eosin.data_curation.shards import ShardConfig, shard
if __name__ == "__main__":
    tiles, out = map(Path, sys.argv[1:])
    shard(ShardConfig(tiles=tiles, out=out, pixels="slides", records_per_shard=2, workers=1))
"""


def test_a_killed_run_goes_on_to_the_same_bytes(tiled: Path, tmp_path: Path) -> None:
    shard(config_of(tiled, tmp_path / "a", records_per_shard=2))
    out, script = tmp_path / "b", tmp_path / "killed.py"
    script.write_text(KILLED)
    process = subprocess.Popen([sys.executable, str(script), str(tiled / "out"), str(out)])
    while process.poll() is None and len(list(out.glob("0*.json"))) < 2:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "shards.json").exists()
    shard(config_of(tiled, out, records_per_shard=2))
    assert contents(out) == contents(tmp_path / "a")


def test_a_dry_run_reads_no_tile_and_says_so(tiled: Path, tmp_path: Path) -> None:
    said = plan(config_of(tiled, tmp_path / "no"))
    assert "2 slides are opened once" in said and "no pixels are copied" in said
    assert not (tmp_path / "no").exists()


def test_columns_and_configs_that_cannot_be_are_refused(slides: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pixels=slides goes with tiles"):
        load_config(ShardConfig, (), ["out=o", "images=a", "pixels=slides"])
    with pytest.raises(ConfigError, match="pixels"):
        load_config(ShardConfig, (), ["out=o", "tiles=a", "pixels=none"])
    path = slides / "out" / "slides.parquet"
    table = read_table(path, SLIDES)
    names = pa.array(["x"] * table.num_rows)
    write_table(table.append_column("source_path", names), path, SLIDES)
    with pytest.raises(InputError, match="column 'source_path', a name that pixels=slides needs"):
        shard(config_of(slides, tmp_path / "shards"))
