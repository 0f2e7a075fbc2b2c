"""Slides to shards in one command: what it packs, what it repeats, what it survives."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from eosin.configs.errors import TooManyFailedError
from eosin.data_curation.costs import COSTS_NAME
from eosin.data_curation.curate import CurateConfig, curate, plan
from eosin.data_curation.manifest import (
    FAILED,
    INDEX,
    SELECTION,
    SLIDES,
    TILES,
    read_table,
    write_table,
)
from eosin.data_curation.selection import SelectConfig
from eosin.data_curation.shard_reader import ShardReader, open_index
from eosin.data_curation.shards import ShardConfig, ShardOptions, shard
from eosin.data_curation.tiles import TileOptions
from eosin.data_curation.verify import find_problems
from eosin.launch.cli import main

WriteSlide = Callable[..., Path]


@pytest.fixture(scope="module")
def curated(
    tmp_path_factory: pytest.TempPathFactory,
    write_slide: WriteSlide,
    tissue_pixels: NDArray[np.uint8],
) -> Path:
    """A folder with ``slides`` and what became of them, ``out``; not to be changed."""
    folder = tmp_path_factory.mktemp("curated")
    for number in range(2):
        pixels = np.roll(tissue_pixels, 9 * number, axis=1)
        levels = [pixels, np.ascontiguousarray(pixels[::2, ::2])]
        write_slide(folder / "slides" / f"case.{number}.tiff", levels, mpp=(0.5, 0.5))
    curate(config_of(folder / "slides", folder / "out"))
    return folder


@pytest.fixture
def slides(curated: Path, tmp_path: Path) -> Path:
    """A copy of the slides, with ``out`` beside it: tiling knows them by size and time."""
    shutil.copytree(curated, tmp_path, dirs_exist_ok=True)
    return tmp_path / "slides"


def config_of(slides: Path, out: Path, min_tissue: float = 0.5) -> CurateConfig:
    return CurateConfig(
        slides=slides,
        out=out,
        tile=TileOptions(size_px=64, workers=1),
        select=SelectConfig(min_tissue=min_tissue),
        shard=ShardOptions(records_per_shard=40, workers=1),
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the measured costs, which no two runs share."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != COSTS_NAME
    }


def changed(folder: Path, before: dict[Path, int]) -> set[str]:
    now = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    return {path.name for path in now if now[path] != before.get(path)}


def test_the_shards_hold_the_selected_tiles_as_the_slides_show_them(
    curated: Path, tissue_pixels: NDArray[np.uint8]
) -> None:
    selected = read_table(curated / "out" / "selection.parquet", SELECTION)
    reader = ShardReader(curated / "out" / "shards")
    index = reader.index.table().to_pylist()
    assert sorted(r["key"] for r in index) == sorted(selected["tile_id"].to_pylist())
    assert len(index) > 30 and {r["slide_id"] for r in index} == {"case_0", "case_1"}
    assert {row["mpp"] for row in index} == {0.5}
    for row, record in enumerate(index):
        _, number, x, y, _ = record["key"].split("_")
        pixels = np.roll(tissue_pixels, 9 * int(number), axis=1)
        original = pixels[int(y) : int(y) + 64, int(x) : int(x) + 64]
        error = reader.image(row).astype(float) - original
        assert np.sqrt((error**2).mean()) < 8  # JPEG's; the tile beside it is some 30 away
    assert find_problems(curated / "out" / "shards", workers=1)[0] == []


def test_another_threshold_selects_and_shards_again_and_reads_no_other_tile(slides: Path) -> None:
    out = slides.parent / "out"
    curate(config_of(slides, out))  # only the paths are others here
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    curate(config_of(slides, out))
    assert changed(out, before) == set()
    curate(config_of(slides, out, min_tissue=0.9))
    now = changed(out, before)
    assert {"selection.parquet", "index.parquet", "000000.tar"} <= now
    assert not {"tiles.parquet", "slides.parquet", "overlay.png"} & now
    strict = contents(out)
    shutil.rmtree(out / "shards")
    (out / "selection.json").unlink()
    curate(config_of(slides, out, min_tissue=0.9))
    assert contents(out) == strict


def test_a_refused_slide_fails_the_command_after_the_others_are_in_the_shards(
    slides: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (slides / "text.svs").write_text("no slide")
    out = slides.parent / "out"
    shutil.rmtree(out / "shards")
    options = ["tile.size_px=64", "tile.workers=1", "shard.workers=1"]
    command = ["curate", f"slides={slides}", f"out={out}", *options]
    assert main(command) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 3 slides failed: text (unreadable" in last
    assert last.endswith("raise max_failed (tile.max_failed in curate)")
    assert sorted(open_index(out / "shards")["slide_id"].unique().to_pylist()) == [
        "case_0",
        "case_1",
    ]
    assert main([*command, "tile.max_failed=0.5"]) == 0


def test_a_column_of_the_slide_table_filters_tiles_and_reaches_the_index(slides: Path) -> None:
    out, listed = slides.parent / "out", slides.parent / "slides.csv"
    listed.write_text("path\nslides/case.0.tiff\nslides/case.1.tiff\n")
    options = ["tile.size_px=64", "tile.workers=1", "shard.workers=1", "shard.seed=1"]
    command = ["curate", f"slides={listed}", f"out={out}", *options]
    assert main(command) == 0
    without = (out / "slides.parquet").read_bytes()
    assert read_table(out / "slides.parquet", SLIDES).column_names == SLIDES.names
    listed.write_text("path,split,organ\nslides/case.0.tiff,train,\nslides/case.1.tiff,test,skin\n")
    tiled = (out / "slides" / "case_0" / "slide.json").stat().st_mtime_ns
    assert main([*command, "shard.keep=[split!=test]"]) == 0
    assert (out / "slides" / "case_0" / "slide.json").stat().st_mtime_ns == tiled
    index = open_index(out / "shards")
    assert index.column_names == [*INDEX.names, "split", "organ"]
    assert set(index["slide_id"].to_pylist()) == {"case_0"}
    assert set(index["split"].to_pylist()) == {"train"}
    assert set(index["organ"].to_pylist()) == {None}
    slide_table = read_table(out / "slides.parquet", SLIDES)
    assert slide_table["organ"].to_pylist() == [None, "skin"]
    labelled = contents(out)
    shutil.rmtree(out / "shards")
    (out / "tiles.json").unlink()
    assert main([*command, "shard.keep=[split!=test]"]) == 0
    assert contents(out) == labelled
    listed.write_text("path\nslides/case.0.tiff\nslides/case.1.tiff\n")
    assert main(command) == 0
    assert (out / "slides.parquet").read_bytes() == without


def test_when_no_slide_is_left_the_reason_is_in_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.svs").write_text("no slide")
    assert main(["curate", f"slides={tmp_path}", f"out={tmp_path / 'out'}"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "text (unreadable" in last and "; then: no tile of" in last


def test_a_slide_that_is_gone_is_named_before_anything_is_written(
    tmp_path: Path, slides: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = slides.parent / "out"
    curate(config_of(slides, out))
    (slides / "case.1.tiff").unlink()
    command = ["shard", f"tiles={out}", f"selection={out / 'selection.parquet'}", "workers=1"]
    assert main([*command, f"out={tmp_path / 'new'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "tiles have no file" in line and "case.1.tiff" in line
    assert not (tmp_path / "new").exists()


def test_regions_that_became_unreadable_are_counted_and_never_made_up(
    tmp_path: Path, slides: Path, break_tiles: Callable[..., None]
) -> None:
    out = tmp_path / "out"
    curate(config_of(slides, out))
    wanted = set(open_index(out / "shards")["key"].to_pylist())
    break_tiles(slides / "case.1.tiff", count=32)
    again = ShardConfig(
        tiles=out, selection=out / "selection.parquet", out=tmp_path / "new", workers=1
    )
    with pytest.raises(TooManyFailedError, match=r"tiles failed, more than max_failed"):
        shard(again)
    failed = read_table(again.out / "failed.parquet", FAILED).to_pylist()
    kept = set(open_index(again.out)["key"].to_pylist())
    assert {row["source"] for row in failed} == {"case_1"}
    assert kept | {row["key"] for row in failed} == wanted and 0 < len(failed) < 20


def test_a_selection_of_other_tiles_or_with_copies_is_refused(
    tmp_path: Path, slides: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(slides, tmp_path / "out")
    curate(config)
    selection = read_table(config.selection, SELECTION)
    command = ["shard", f"tiles={config.out}", f"selection={config.selection}", "out=never"]
    copies = pa.array([2] * selection.num_rows, pa.int32())
    write_table(selection.set_column(3, "copies", copies), config.selection, SELECTION)
    assert main(command) == 2
    assert "asks for copies" in capsys.readouterr().err
    tiles = read_table(config.out / "tiles.parquet", TILES)
    write_table(selection, config.selection, SELECTION)
    write_table(tiles.slice(0, 1), config.out / "tiles.parquet", TILES)
    assert main(command) == 2
    assert "which is not in tiles.parquet" in capsys.readouterr().err


KILLED = """
import sys
from pathlib import Path
from eosin.data_curation.curate import CurateConfig, curate
from eosin.data_curation.shards import ShardOptions
from eosin.data_curation.tiles import TileOptions
if __name__ == "__main__":
    slides, out = map(Path, sys.argv[1:])
    curate(CurateConfig(slides=slides, out=out, tile=TileOptions(size_px=64, workers=1),
                        shard=ShardOptions(records_per_shard=40, workers=1)))
"""


@pytest.mark.parametrize("seen", ["slides/case_0/slide.json", "selection.json"])
def test_a_killed_command_goes_on_to_the_same_bytes(slides: Path, seen: str) -> None:
    out, script = slides.parent / "out", slides.parent / "killed.py"
    curate(config_of(slides, out))
    whole = contents(out)
    if seen.startswith("slides"):
        shutil.rmtree(out)
    else:
        shutil.rmtree(out / "shards")
        (out / "selection.json").unlink()
    script.write_text(KILLED)
    process = subprocess.Popen([sys.executable, str(script), str(slides), str(out)])
    while process.poll() is None and not (out / seen).exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / seen).exists() and not (out / "shards" / "shards.json").exists()
    curate(config_of(slides, out))
    assert contents(out) == whole


def test_with_an_encoder_tiles_are_clustered_and_drawn_evenly(slides: Path) -> None:
    out = slides.parent / "balanced"
    command = ["curate", f"slides={slides}", f"out={out}", "tile.size_px=64", "tile.workers=1"]
    command += ["embed.encoder=builtin:stain-texture", "cluster.levels=[6]", "shard.workers=1"]
    command += ["sample.tree=[level_1]", "sample.total=24", "select.min_sharpness=0"]
    assert main(command) == 0
    selected = read_table(out / "selection.parquet", SELECTION).to_pylist()
    index = open_index(out / "shards").to_pylist()
    assert len(selected) == 24 == len(index)
    cluster_of = {row["tile_id"]: row["cluster"] for row in selected}
    assert {row["key"]: row["cluster"] for row in index} == cluster_of
    sizes = [list(cluster_of.values()).count(name) for name in set(cluster_of.values())]
    assert len(sizes) > 3 and max(sizes) < 12
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert main(command) == 0
    assert changed(out, before) == set()
    assert main([*command, "sample.seed=1"]) == 0
    now = changed(out, before)
    assert "selection.parquet" in now and not {"tiles.parquet", "features.npy"} & now


def test_a_tree_of_clusters_needs_an_encoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["curate", "slides=nowhere", f"out={tmp_path}", "sample.tree=[level_1]"]
    assert main(command) == 2
    assert "embed.encoder=builtin:stain-texture" in capsys.readouterr().err


def test_a_dry_run_says_what_there_is_to_tile(tmp_path: Path, slides: Path) -> None:
    said = plan(config_of(slides, tmp_path / "new"))
    assert "2 slides" in said and "selection.parquet" in said
    assert not (tmp_path / "new").exists()


def test_a_real_slide_becomes_sound_shards(tmp_path: Path, real_data: Path) -> None:
    config = CurateConfig(
        slides=real_data / "slides" / "CMU-1-Small-Region.svs",
        out=tmp_path,
        tile=TileOptions(workers=1),
        shard=ShardOptions(workers=1),
    )
    curate(config)
    reader = ShardReader(tmp_path / "shards")
    assert 30 < len(reader) < 54
    assert reader.image(0).shape == (256, 256, 3)
    assert find_problems(tmp_path / "shards", workers=1)[0] == []


def test_a_curation_without_an_encoder_does_not_wait_for_torch() -> None:
    modules = "curate, shards, sample, tiles, review_file, deny_list"
    script = f"import sys; from eosin.data_curation import {modules}; print('torch' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "False"
