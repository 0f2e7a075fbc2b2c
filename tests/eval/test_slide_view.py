"""What is laid over a slide lies where its tiles are."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from eosin.configs.errors import InputError
from eosin.data_curation.manifest import TILES, read_table
from eosin.data_curation.tiles import TileConfig, tile
from eosin.eval.attention_maps import write_attention
from eosin.eval.bags import grid_cells
from eosin.eval.heads.training import Bag
from eosin.eval.slide_view import lay_over, slides_of, view_slides


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide of 1,536 × 1,024 px at 0.5 µm/px, tissue on its left half, tiled in 128 px at 1."""
    tmp_path = tmp_path_factory.mktemp("tiled")
    generator = np.random.default_rng(0)
    pixels = np.full((1024, 1536, 3), 245, np.uint8)
    pixels[:, :768] = (170, 90, 150)
    pixels[:, :768] += generator.integers(0, 60, (1024, 768, 3), dtype=np.uint8)
    tifffile.imwrite(
        tmp_path / "s.tiff", pixels, tile=(256, 256), photometric="rgb",
        resolution=(20_000, 20_000), resolutionunit="CENTIMETER",
    )  # fmt: skip
    (tmp_path / "slides.csv").write_text("path,mpp\ns.tiff,0.5\n")
    tile(
        TileConfig(
            slides=tmp_path / "slides.csv", out=tmp_path / "tiles", mpp=1.0, size_px=128, workers=1
        )
    )
    return tmp_path / "tiles"


def test_tiles_lie_at_their_places_and_read_as_they_were(tiled: Path) -> None:
    assert slides_of(tiled) == {"s"}
    (view,) = view_slides(tiled, ["s"])
    overview, corner, mpp = view.overview()
    assert corner == (0, 0) and mpp == pytest.approx(768 / 1100)
    rows = read_table(tiled / "tiles.parquet", TILES).to_pylist()
    chosen = [r for r in rows if r["column"] == 1 and r["row"] == 2]
    ids = [r["tile_id"] for r in chosen]
    (box,) = view.boxes(ids, corner, mpp)
    assert box.tolist() == [round(v / mpp) for v in (128, 256, 256, 384)]
    laid = lay_over(overview, np.array([box]), np.array([[255, 255, 0]], np.uint8))
    inside = laid[box[1] + 2 : box[3] - 2, box[0] + 2 : box[2] - 2].astype(int)
    assert (inside[..., 0] - inside[..., 2] > 100).all()
    outside = laid.copy()
    outside[box[1] : box[3], box[0] : box[2]] = 0
    assert np.ptp(outside.astype(int), axis=2).max() == 0  # grey elsewhere
    (pixels,) = view.read(ids)
    assert pixels.shape == (128, 128, 3) and 110 < pixels.mean() < 200


def test_attention_is_drawn_on_its_slide(tiled: Path, tmp_path: Path) -> None:
    rows = [r for r in read_table(tiled / "tiles.parquet", TILES).to_pylist() if not r["reason"]]
    rows = [r for r in rows if r["status"] == "ok"]
    places = np.array([[r["level0_x"], r["level0_y"]] for r in rows])
    bag = Bag(
        slide_id="s",
        tile_ids=[r["tile_id"] for r in rows],
        features=np.zeros((len(rows), 2), np.float16),
        cells=grid_cells(places, "s"),
    )
    weights = np.arange(len(rows), dtype=np.float32)
    weights /= weights.sum()
    views = view_slides(tiled, ["s"])
    pictures = write_attention([bag], [weights], tmp_path, "x", 1, "who", views)
    assert [p.path.name for p in pictures] == ["attention-x-s.png"]
    first = pictures[0].path.read_bytes()
    with Image.open(pictures[0].path) as picture:
        assert picture.size[0] == 2160
    write_attention([bag], [weights], tmp_path, "x", 1, "who", views)
    assert pictures[0].path.read_bytes() == first


def test_a_slide_that_is_gone_or_unknown_is_one_line(tiled: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="knows no slide 'other'"):
        view_slides(tiled, ["other"])
    (view,) = view_slides(tiled, ["s"])
    with pytest.raises(InputError, match="tile the slides again"):
        replace(view, path=tmp_path / "gone.tiff").overview()
