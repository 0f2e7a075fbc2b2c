"""``mpp=native``: each slide at its own scale, its pixels untouched."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from eosin.configs.errors import ConfigError
from eosin.configs.load import load_config
from eosin.data_curation.manifest import SLIDES, TILES, Status, read_table
from eosin.data_curation.pyramid import TILE_PX, write_pyramid
from eosin.data_curation.shard_reader import ShardReader
from eosin.data_curation.shards import ShardConfig, shard
from eosin.data_curation.slide import Slide
from eosin.data_curation.tiles import TileConfig, plan, tile

WriteSlide = Callable[..., Path]


def test_each_slide_keeps_its_own_scale(
    tmp_path: Path, write_slide: WriteSlide, tissue_pixels: NDArray[np.uint8]
) -> None:
    scales = {"fine": (0.6, 0.6), "coarse": (0.7, 0.7), "unequal": (0.5, 0.51)}
    for name, mpp in scales.items():
        write_slide(tmp_path / "slides" / f"{name}.tiff", [tissue_pixels], mpp=mpp)
    words = [f"slides={tmp_path / 'slides'}", f"out={tmp_path}", "mpp=native", "size_px=64"]
    config = load_config(TileConfig, [], [*words, "workers=1"])
    assert "each slide's own scale" in plan(config)
    tile(config)
    slides = read_table(tmp_path / "slides.parquet", SLIDES).to_pylist()
    assert {slide["status"] for slide in slides} == {Status.OK}
    rows = read_table(tmp_path / "tiles.parquet", TILES).to_pylist()
    for row in rows:
        own = max(scales[row["slide_id"]])
        assert row["requested_mpp"] == pytest.approx(own, rel=1e-4)
        assert row["effective_mpp_x"] == pytest.approx(own, rel=1e-4)
        assert row["effective_mpp_y"] == pytest.approx(own, rel=1e-4)
    row = next(r for r in rows if r["slide_id"] == "fine" and r["tissue_fraction"] == 1)
    with Slide(tmp_path / "slides" / "fine.tiff") as slide:
        found = slide.read_tile(row["level0_x"], row["level0_y"], 64, row["requested_mpp"])
    y, x = round(row["level0_y"]), round(row["level0_x"])
    assert np.array_equal(found, tissue_pixels[y : y + 64, x : x + 64])


def test_slides_of_any_scale_hand_their_own_tiles_on(tmp_path: Path) -> None:
    rough = np.random.default_rng(0).integers(90, 220, (64, 64, 3), np.uint8)
    pixels = np.asarray(np.kron(rough, np.ones((8, 8, 1))), np.uint8)
    for name, mpp in (("a", 0.2527), ("b", 0.4991)):
        write_pyramid(tmp_path / f"{name}.tiff", pixels, mpp=mpp, description="", quality=80)
    words = [f"slides={tmp_path}", f"out={tmp_path}", "mpp=native", f"size_px={TILE_PX}"]
    tile(load_config(TileConfig, [], [*words, "workers=1", "min_tissue=0"]))
    words = [f"tiles={tmp_path}", f"out={tmp_path / 'shards'}", "workers=1"]
    shard(load_config(ShardConfig, [], words))
    reader = ShardReader(str(tmp_path / "shards"))
    rows = reader.index.table().to_pylist()
    assert len(rows) == 8
    for number, row in enumerate(rows):
        slide_id, x, y, _ = row["key"].split("_")
        with Slide(tmp_path / f"{slide_id}.tiff") as slide:
            wanted = slide.read_tile(int(x), int(y), TILE_PX, max(slide.mpp))
        assert np.array_equal(reader.image(number), wanted)  # to the bit: not encoded again


def test_other_words_are_refused(tmp_path: Path) -> None:
    for value, said in (("half", "or native, not 'half'"), ("-1", "mpp must be positive")):
        with pytest.raises(ConfigError, match=said):
            load_config(TileConfig, [], [f"slides={tmp_path}", f"out={tmp_path}", f"mpp={value}"])
