"""Bad slides: each ends as a row with a status and a reason; no crash, hang or made-up pixel."""

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile.bad_slides import MPP, SIDE_PX, TILE_PX, BadSlide, good_pixels, write_bad_slides

from eosin.configs.errors import TooManyFailedError
from eosin.configs.load import load_config
from eosin.data_curation.isolation import Lost, run_isolated
from eosin.data_curation.manifest import SLIDES, TILES, Status, read_table
from eosin.data_curation.slide import Slide
from eosin.data_curation.tiff_header import check_tiff_header
from eosin.data_curation.tiles import TileConfig, tile

CELLS = (SIDE_PX // TILE_PX) ** 2
TOLERANCE = 8  # grey values, for JPEG
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[BadSlide], Path]:
    """All bad slides and a good one, tiled by one command under limits of time and memory."""
    folder = tmp_path_factory.mktemp("bad")
    cases = write_bad_slides(folder / "slides")
    words = [f"slides={folder / 'slides'}", f"out={folder}", f"mpp={MPP}", f"size_px={TILE_PX}"]
    words += ["workers=1", f"timeout_s={TIMEOUT_S}", "max_memory_gb=2"]
    started = time.monotonic()
    with pytest.raises(TooManyFailedError, match="slides failed"):
        tile(load_config(TileConfig, [], words))
    assert time.monotonic() - started < TIMEOUT_S  # none took its time out
    return cases, folder


def row_of(case: BadSlide, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    stem = case.name.rpartition(".")[0]
    return next(row for name, row in rows.items() if name in (stem, f"slides_{stem}"))


def test_each_bad_slide_is_a_row_that_says_why(tiled: tuple[list[BadSlide], Path]) -> None:
    cases, folder = tiled
    assert len(cases) >= 40
    rows = {
        row["slide_id"]: row for row in read_table(folder / "slides.parquet", SLIDES).to_pylist()
    }
    assert len(rows) == len(cases) + 1  # and none is missing
    assert rows["good"]["status"] == Status.OK and rows["good"]["n_ok"] == CELLS
    for case in cases:
        row = row_of(case, rows)
        said = f"{case.name}: {row['status']}, {row['n_ok']} tiles, {row['reason']}"
        assert row["status"] not in (Status.CRASHED, Status.TIMEOUT), said
        assert (row["status"] == Status.OK) == (row["n_ok"] > 0), said
        assert row["reason"].isprintable() and (row["reason"] or row["status"] == Status.OK), said
        if case.fate == "refused":
            assert row["n_ok"] == 0, said
        if case.fate == "partly":
            assert row["n_ok"] > 0 and row["n_ok"] + row["n_unreadable"] > CELLS // 2, said


def test_no_pixel_is_made_up(tiled: tuple[list[BadSlide], Path]) -> None:
    _, folder = tiled
    slides = {r["slide_id"]: r for r in read_table(folder / "slides.parquet", SLIDES).to_pylist()}
    truth, compared = good_pixels(), 0
    for row in read_table(folder / "tiles.parquet", TILES).to_pylist():
        if row["status"] != Status.OK:
            assert row["reason"]
            continue
        slide = slides[row["slide_id"]]
        with Slide(Path(slide["path"]), (slide["mpp_x"], slide["mpp_y"])) as opened:
            found = opened.read_tile(row["level0_x"], row["level0_y"], TILE_PX, MPP)
        y, x = round(row["level0_y"]), round(row["level0_x"])
        apart = np.abs(found.astype(int) - truth[y : y + TILE_PX, x : x + TILE_PX])
        assert apart.max() <= TOLERANCE, row["tile_id"]
        compared += 1
    assert compared > 100


def test_some_are_only_found_by_their_directories(tiled: tuple[list[BadSlide], Path]) -> None:
    """What OpenSlide would read as colours: tiles at the file's start, too few tiles."""
    _, folder = tiled
    slides = {r["slide_id"]: r for r in read_table(folder / "slides.parquet", SLIDES).to_pylist()}
    assert "where its header is" in slides["offsets_0"]["reason"]
    assert "32 tiles, but lists 16" in slides["width_twice"]["reason"]
    for name in ("offsets_0", "width_twice"):
        with Slide(Path(slides[name]["path"])) as opened:  # which suspects nothing
            opened.read_tile(0, 0, TILE_PX, MPP)


def test_real_slides_pass(real_data: Path) -> None:
    for path in (real_data / "slides").iterdir():
        check_tiff_header(path)


def test_what_cannot_be_opened_is_not_judged_by_its_directories(tmp_path: Path) -> None:
    check_tiff_header(tmp_path / "gone.tiff")
    check_tiff_header(tmp_path)


def test_memory_has_an_end() -> None:
    with pytest.raises(MemoryError):
        list(run_isolated(bytearray, [10, 3_000_000_000], workers=1, timeout_s=60, max_bytes=10**9))
    small = run_isolated(len, [b"123"], workers=1, timeout_s=60, max_bytes=10**9)
    assert [result for _, result in small] == [3]
    killed = run_isolated(signal.raise_signal, [int(signal.SIGKILL)], workers=1, timeout_s=60)
    assert isinstance(next(killed)[1], Lost)
