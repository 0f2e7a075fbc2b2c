"""A slide scanned twice is found and left out; a neighbouring section and other slides are not."""

import json
from pathlib import Path

import cv2
import numpy as np
import pyarrow.compute as pc
import pytest
from numpy.typing import NDArray

from eosin.data_curation.duplicate_slides import SAME_CELLS, SlideFile, compare, find_slide_pairs
from eosin.data_curation.manifest import DUPLICATES, SELECTION, SLIDES, TILES, read_table
from eosin.data_curation.pyramid import write_pyramid
from eosin.data_curation.synthetic_layout import draw_layout
from eosin.data_curation.synthetic_section import draw_look, render
from eosin.launch.cli import main

SIDE_PX, MPP = 1536, 0.5


def scan_again(
    image: NDArray[np.uint8], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], float]:
    """The same glass, askew and upside down, by a scanner of another scale, tone and noise."""
    scale = 0.93
    centre = (image.shape[1] / 2, image.shape[0] / 2)
    matrix = cv2.getRotationMatrix2D(centre, 2.0, scale)
    matrix[:, 2] += (25, -18)
    glass = [float(value) for value in np.median(image[:48].reshape(-1, 3), axis=0)]
    again = cv2.warpAffine(
        image, matrix, image.shape[1::-1], flags=cv2.INTER_CUBIC, borderValue=glass
    )
    again = np.rot90(again, 2).astype(np.float64)
    again = 255 * (again / 255) ** np.array([1.15, 0.95, 1.1]) + rng.normal(0, 4, again.shape)
    return np.clip(again, 0, 255).astype(np.uint8), MPP / scale


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``first``, ``again`` (the same glass), ``next`` (the next section of it), ``other``."""
    folder = tmp_path_factory.mktemp("slides")
    for name, seed in (("first", 5), ("other", 6)):
        layout_rng, look_rng, cells, further, scanner = np.random.default_rng(seed).spawn(5)
        layout = draw_layout(
            layout_rng, cells=SIDE_PX // 16, cell_um=16 * MPP, region_um=300, artefact_share=0
        )
        look = draw_look(look_rng)
        image = render(cells, layout, look, MPP)
        scans = {name: (image, MPP)}
        if name == "first":
            scans["again"] = scan_again(image, scanner)
            scans["next"] = (render(further, layout, look, MPP), MPP)
        for called, (pixels, mpp) in scans.items():
            path = folder / f"{called}.tiff"
            write_pyramid(path, pixels, mpp=mpp, description="made up", quality=85)
    return folder


def test_only_the_second_scan_shows_the_same_cells(slides: Path) -> None:
    mpp = {"again": MPP / 0.93}
    files = {
        name: SlideFile(path=slides / f"{name}.tiff", mpp=(mpp.get(name, MPP),) * 2)
        for name in ("first", "again", "next", "other")
    }
    similarity = {name: compare(files["first"], file) for name, file in files.items()}
    assert similarity["first"] > 0.95
    assert similarity["again"] > SAME_CELLS + 0.15
    assert max(similarity["next"], similarity["other"]) < SAME_CELLS - 0.15
    names = list(files)
    pairs = find_slide_pairs(list(files.values()), 1)
    assert [(names[a], names[b]) for a, b in zip(pairs.first, pairs.second, strict=True)] == [
        ("first", "again")
    ]


def test_curate_leaves_the_second_scan_out(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    words = ["tile.mpp=0.55", "tile.size_px=128", "without_duplicates=true", "shard.workers=1"]
    assert main(["curate", f"slides={slides}", f"out={out}", *words]) == 0
    assert "is a second scan of" in capsys.readouterr().err
    table = read_table(out / "duplicates.parquet", DUPLICATES)
    tiles = read_table(out / "tiles.parquet", TILES)
    n_ok = {
        row["slide_id"]: row["n_ok"]
        for row in read_table(out / "slides.parquet", SLIDES).to_pylist()
    }
    less = min(("first", "again"), key=lambda name: n_ok[name])
    second = table.filter(pc.equal(table["kind"], "slide"))
    assert second.num_rows == n_ok[less] == pc.sum(pc.starts_with(second["tile_id"], less)).as_py()
    assert set(second["group"].to_pylist()) == {less}
    selected = read_table(out / "selection.parquet", SELECTION)["tile_id"]
    left = tiles.filter(pc.is_in(tiles["tile_id"], value_set=selected.combine_chunks()))
    assert less not in left["slide_id"].to_pylist()
    assert {"next", "other"} < set(left["slide_id"].to_pylist())
    assert json.loads((out / "selection.json").read_text())["dropped"]["duplicates"] > 0
