import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image

from eosin.configs.errors import EosinError, InputError
from eosin.data_curation import tile_slide as tile_slide_module
from eosin.data_curation import tiles as tiles_module
from eosin.data_curation.isolation import Lost
from eosin.data_curation.manifest import SLIDES, TILES, Status, read_table
from eosin.data_curation.shard_reader import ShardReader
from eosin.data_curation.shards import ShardConfig, shard
from eosin.data_curation.slide_list import slide_bytes
from eosin.data_curation.tiles import TileConfig, pieces, plan, tile

WriteSlide = Callable[..., Path]
Pixels = NDArray[np.uint8]


def config_of(slides: Path, out: Path, **options: Any) -> TileConfig:
    settings = {"mpp": 1.0, "size_px": 64, "workers": 1, "max_failed": 0.0} | options
    return TileConfig(slides=slides, out=out, **settings)


def rows_of(out: Path, name: str) -> list[dict[str, Any]]:
    schema = SLIDES if name == "slides" else TILES
    rows: list[dict[str, Any]] = read_table(out / f"{name}.parquet", schema).to_pylist()
    return rows


def content_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def levels_of(pixels: Pixels) -> list[Pixels]:
    height, width = pixels.shape[:2]
    half = Image.fromarray(pixels).resize((width // 2, height // 2), Image.Resampling.BOX)
    return [pixels, np.asarray(half)]


@pytest.fixture
def slides(tmp_path: Path, write_slide: WriteSlide, tissue_pixels: Pixels) -> Path:
    """Two readable slides of one patient each."""
    for name in ("one", "two"):
        write_slide(tmp_path / "slides" / f"{name}.tiff", levels_of(tissue_pixels))
        tissue_pixels = np.ascontiguousarray(tissue_pixels[:, ::-1])
    return tmp_path / "slides"


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the start of a process where the test is not about processes."""

    def run(function: Any, jobs: Any, **_: Any) -> Iterator[tuple[Any, Any]]:
        yield from ((job, function(job)) for job in jobs)

    monkeypatch.setattr(tiles_module, "run_isolated", run)


@pytest.mark.usefixtures("in_this_process")
def test_slides_become_tables_and_pictures(slides: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tile(config_of(slides, out))
    one, two = rows_of(out, "slides")
    cells = rows_of(out, "tiles")
    assert (one["slide_id"], two["slide_id"]) == ("one", "two")
    assert one["status"] == two["status"] == "ok"
    assert one["n_cells"] == 64
    assert len(cells) == 128
    assert one["tissue_area_mm2"] == pytest.approx(np.pi * 0.15**2, rel=0.1)
    keys = [(cell["slide_id"], cell["row"], cell["column"]) for cell in cells]
    assert keys == sorted(keys)
    middle = next(c for c in cells if (c["row"], c["column"]) == (3, 3))
    assert (middle["level0_x"], middle["level0_y"]) == (192, 192)
    assert middle["tile_id"] == "one_192_192_1000"
    assert middle["status"] == "ok"
    assert middle["tissue_fraction"] == 1
    assert middle["effective_mpp_x"] == pytest.approx(1.0, rel=1e-3)
    corner = cells[0]
    assert (corner["status"], corner["tissue_fraction"]) == ("empty", 0)
    assert corner["sharpness"] is None
    assert "min_tissue" in corner["reason"]
    assert {c["status"] for c in cells} == {"ok", "empty"}
    with Image.open(out / "slides" / "one" / "overlay.png") as overlay:
        assert max(overlay.size) >= 1200


@pytest.mark.usefixtures("in_this_process")
def test_a_second_call_does_nothing_and_a_changed_slide_alone_is_tiled_again(
    slides: Path, tmp_path: Path, tissue_pixels: Pixels, write_slide: WriteSlide
) -> None:
    out = tmp_path / "out"
    tile(config_of(slides, out))
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    tile(config_of(slides, out))
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before
    write_slide(slides / "two.tiff", levels_of(tissue_pixels[:448]))
    tile(config_of(slides, out))
    changed = {
        p.relative_to(out).parts[1]
        for p in before
        if p.stat().st_mtime_ns != before[p] and "slides" in p.relative_to(out).parts
    }
    assert changed == {"two"}
    assert [row["n_cells"] for row in rows_of(out, "slides")] == [64, 56]


@pytest.mark.usefixtures("in_this_process")
def test_parts_and_a_last_call_over_all_leave_what_one_call_leaves(
    slides: Path, tmp_path: Path
) -> None:
    (slides / "bad.tiff").write_bytes(b"not a slide")
    tile(config_of(slides, tmp_path / "whole", max_failed=1.0))
    parted = tmp_path / "parted"
    left = pieces(config_of(slides, parted))
    assert left == {
        name: (slides / f"{name}.tiff").stat().st_size for name in ("bad", "one", "two")
    }
    for names in ("two\n", "bad\n"):  # a part is not judged: the bad slide is no error
        (tmp_path / "only.txt").write_text(names)
        tile(config_of(slides, parted, only=tmp_path / "only.txt"))
        assert not (parted / "tiles.parquet").exists()
    assert set(pieces(config_of(slides, parted))) == {"bad", "one"}  # it is tried once more
    tile(config_of(slides, parted, max_failed=1.0))
    assert content_of(parted) == content_of(tmp_path / "whole")
    (tmp_path / "only.txt").write_text("three\n")
    with pytest.raises(InputError, match="names three, which is no slide here"):
        tile(config_of(slides, parted, only=tmp_path / "only.txt"))


def test_the_size_of_a_slide_is_that_of_all_its_files(tmp_path: Path) -> None:
    for name, size in (
        ("a.svs", 10),
        ("b.mrxs", 1),
        ("b/x.dat", 50),
        ("c/1.dcm", 7),
        ("c/2.dcm", 8),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    sizes = [slide_bytes(tmp_path / name) for name in ("a.svs", "b.mrxs", "c/1.dcm")]
    assert sizes == [10, 51, 15]


@pytest.mark.usefixtures("in_this_process")
def test_a_run_killed_between_a_part_and_its_marker_leaves_no_older_marker(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    tile(config_of(slides, out))
    whole = content_of(out)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for module in (tile_slide_module, tiles_module):
        with monkeypatch.context() as patched:
            patched.setattr(module, "mark_done", killed)
            with pytest.raises(KeyboardInterrupt):
                tile(config_of(slides, out, size_px=32))
        tile(config_of(slides, out))
        assert content_of(out) == whole


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("name", ["tiles.parquet", "slides.parquet", "slides/one/tiles.parquet"])
def test_a_lost_table_is_remade(slides: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    tile(config_of(slides, out))
    whole = content_of(out)
    (out / name).unlink()
    tile(config_of(slides, out))
    assert content_of(out) == whole


def test_tables_do_not_depend_on_the_number_of_workers(slides: Path, tmp_path: Path) -> None:
    tile(config_of(slides, tmp_path / "a", workers=1))
    tile(config_of(slides, tmp_path / "b", workers=2))
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")


def test_kill_and_rerun_leave_the_same_bytes(
    tmp_path: Path, write_slide: WriteSlide, tissue_pixels: Pixels
) -> None:
    folder, out, reference = tmp_path / "slides", tmp_path / "out", tmp_path / "reference"
    for index in range(3):
        pixels = np.roll(tissue_pixels, 16 * index, axis=0)
        write_slide(folder / f"s{index}.tiff", levels_of(np.tile(pixels, (2, 2, 1))))
    tile(config_of(folder, reference, size_px=32))
    arguments = ["tile", f"slides={folder}", f"out={out}", "mpp=1.0", "size_px=32", "workers=1"]
    command = [sys.executable, "-m", "eosin.launch.cli", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(out.glob("slides/*/slide.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list(out.glob("slides/*/slide.json"))) < 3
    assert not (out / "tiles.parquet").exists()
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert content_of(out) == content_of(reference)


@pytest.mark.usefixtures("in_this_process")
def test_bad_slides_are_counted_and_named_and_the_rest_is_kept(
    slides: Path,
    tmp_path: Path,
    write_slide: WriteSlide,
    tissue_pixels: Pixels,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (slides / "text.svs").write_text("not a slide")
    write_slide(slides / "scaleless.tiff", [tissue_pixels], (1000.0, 1000.0))
    write_slide(slides / "coarse.tiff", [tissue_pixels], (2.0, 2.0))
    cut = write_slide(slides / "cut.tiff", [tissue_pixels])
    cut.write_bytes(cut.read_bytes()[:-5000])
    write_slide(slides / "glass.tiff", [np.full((256, 256, 3), 242, np.uint8)])
    out = tmp_path / "out"
    with pytest.raises(EosinError, match=r"4 of 7 slides failed: coarse \(upsampling") as failure:
        tile(config_of(slides, out, max_failed=0.5))
    assert "\n" not in str(failure.value)
    statuses = {row["slide_id"]: row["status"] for row in rows_of(out, "slides")}
    assert statuses == {
        "coarse": "upsampling",
        "cut": "unreadable",
        "glass": "empty",
        "one": "ok",
        "scaleless": "implausible_mpp",
        "text": "unreadable",
        "two": "ok",
    }
    assert all(row["reason"] for row in rows_of(out, "slides") if row["status"] != "ok")
    tile(config_of(slides, out, max_failed=0.6))
    assert "7 slides (2 ok" in capsys.readouterr().out


@pytest.mark.usefixtures("in_this_process")
def test_an_unreadable_region_is_a_row_with_its_reason(
    tmp_path: Path, write_slide: WriteSlide, break_tiles: Callable[..., None], tissue_pixels: Pixels
) -> None:
    path = write_slide(tmp_path / "slides" / "s.tiff", levels_of(tissue_pixels))
    break_tiles(path, 32)  # the lower half of level 0
    out = tmp_path / "out"
    with pytest.raises(EosinError, match=r"\d+ of \d+ tiles could not be read"):
        tile(config_of(path, out))
    rows = rows_of(out, "tiles")
    bad = [row for row in rows if row["status"] == "unreadable"]
    assert bad
    assert {row["row"] for row in bad} <= {4, 5, 6, 7}
    assert all("not decodable" in row["reason"] and row["sharpness"] is None for row in bad)
    assert {row["row"] for row in rows if row["status"] == "ok"} <= {0, 1, 2, 3}
    (slide,) = rows_of(out, "slides")
    assert (slide["status"], slide["n_unreadable"]) == ("ok", len(bad))


def test_a_slide_that_kills_its_reader_is_crashed_and_tried_again(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def losing_two(function: Any, jobs: Any, **_: Any) -> Iterator[tuple[Any, Any]]:
        for job in jobs:
            lost = Lost(status=Status.CRASHED, reason="the reader died")
            yield job, lost if job.source.slide_id == "two" else function(job)

    with monkeypatch.context() as patched:
        patched.setattr(tiles_module, "run_isolated", losing_two)
        with pytest.raises(EosinError, match=r"two \(crashed: the reader died"):
            tile(config_of(slides, out))
    assert [row["status"] for row in rows_of(out, "slides")] == ["ok", "crashed"]
    assert {row["slide_id"] for row in rows_of(out, "tiles")} == {"one"}
    tile(config_of(slides, out))
    assert [row["status"] for row in rows_of(out, "slides")] == ["ok", "ok"]


@pytest.mark.usefixtures("in_this_process")
def test_a_table_supplies_scale_and_group(
    tmp_path: Path, write_slide: WriteSlide, tissue_pixels: Pixels
) -> None:
    write_slide(tmp_path / "s.tiff", levels_of(tissue_pixels), (1000.0, 1000.0))
    listed = tmp_path / "slides.csv"
    listed.write_text("path,mpp,group,stain\ns.tiff,1,patient-7,HE\n")
    tile(config_of(listed, tmp_path / "out"))
    (slide,) = rows_of(tmp_path / "out", "slides")
    assert (slide["mpp_x"], slide["mpp_source"], slide["group"]) == (1.0, "table", "patient-7")
    cells = rows_of(tmp_path / "out", "tiles")
    assert {(cell["group"], cell["stain"]) for cell in cells} == {("patient-7", "HE")}
    listed.write_text("path,mpp,group\ns.tiff,1,patient-8\n")
    marker = tmp_path / "out" / "slides" / "s" / "slide.json"
    before = marker.stat().st_mtime_ns
    tile(config_of(listed, tmp_path / "out"))
    assert marker.stat().st_mtime_ns == before, "another group does not need the slide again"
    assert {cell["group"] for cell in rows_of(tmp_path / "out", "tiles")} == {"patient-8"}


@pytest.mark.usefixtures("in_this_process")
def test_glass_alone_is_said(tmp_path: Path, write_slide: WriteSlide) -> None:
    path = write_slide(tmp_path / "glass.tiff", [np.full((256, 256, 3), 242, np.uint8)])
    with pytest.raises(EosinError, match="no tile with tissue"):
        tile(config_of(path, tmp_path / "out"))


def test_a_folder_without_slides_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no slide in"):
        tile(config_of(tmp_path, tmp_path / "out"))


@pytest.mark.parametrize(
    "option", [{"mpp": 0.0}, {"size_px": -1}, {"max_failed": 2.0}, {"min_tissue": 1.5}]
)
def test_a_senseless_option_names_itself(tmp_path: Path, option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        config_of(tmp_path, tmp_path, **option)


def test_the_plan_counts_without_writing(slides: Path, tmp_path: Path) -> None:
    (slides / "text.svs").write_text("not a slide")
    out = tmp_path / "out"
    text = plan(config_of(slides, out))
    assert "3 slides, 0 of them done" in text
    assert "128 cells" in text
    assert "text: unreadable" in text
    assert "tiles/s" in text
    assert not out.exists()


def test_real_slides_give_the_cells_they_should(real_data: Path, tmp_path: Path) -> None:
    with pytest.raises(EosinError, match=r"1 of 2 slides failed: C3L-00601-26 \(implausible_mpp"):
        tile(config_of(real_data / "slides", tmp_path / "fine", mpp=0.5, size_px=256, workers=2))
    rows = rows_of(tmp_path / "fine", "slides")
    assert [(row["status"], row["n_cells"]) for row in rows] == [("implausible_mpp", 0), ("ok", 88)]
    assert 45 <= rows[1]["n_ok"] <= 60
    listed = tmp_path / "slides.csv"
    listed.write_text(f"path,mpp\n{real_data / 'slides' / 'C3L-00601-26.tiff'},4\n")
    tile(config_of(listed, tmp_path / "coarse", mpp=4.0, size_px=256))
    (row,) = rows_of(tmp_path / "coarse", "slides")
    assert (row["n_cells"], row["mpp_source"]) == (420, "table")
    assert 140 <= row["n_ok"] <= 165
    cells = read_table(tmp_path / "coarse" / "tiles.parquet", TILES)
    effective = np.stack([cells["effective_mpp_x"], cells["effective_mpp_y"]])
    assert np.abs(effective / 4 - 1).max() < 1e-3
    assert cells.schema.equals(pa.schema(list(TILES)), check_metadata=False)


@pytest.mark.usefixtures("in_this_process")
def test_a_slide_a_little_too_coarse_is_admitted_where_the_user_says_so(
    tmp_path: Path, write_slide: WriteSlide
) -> None:
    pixels = np.full((256, 256, 3), (200, 120, 170), np.uint8)
    write_slide(tmp_path / "slides" / "s.tiff", [pixels], (0.52, 0.52))
    with pytest.raises(EosinError, match="upsampling"):
        tile(config_of(tmp_path / "slides", tmp_path / "out", mpp=0.5))
    tile(config_of(tmp_path / "slides", tmp_path / "out", mpp=0.5, max_upsample=0.05))
    (slide,) = rows_of(tmp_path / "out", "slides")
    assert (slide["status"], slide["mpp_x"]) == ("ok", 0.52)
    tiles = [row for row in rows_of(tmp_path / "out", "tiles") if row["status"] == "ok"]
    assert tiles and all(row["effective_mpp_x"] == pytest.approx(0.5) for row in tiles)
    shard(ShardConfig(tiles=tmp_path / "out", out=tmp_path / "shards", workers=1))
    reader = ShardReader(str(tmp_path / "shards"))
    assert len(reader) == len(tiles)
    assert reader.image(0).shape[0] == tiles[0]["size_px"]
    with pytest.raises(ValueError, match=r"max_upsample is 0 to 0\.25, not 0\.5"):
        config_of(tmp_path / "slides", tmp_path / "out", mpp=0.5, max_upsample=0.5)
