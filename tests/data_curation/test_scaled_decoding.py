"""``decoding=scaled``: JPEGs decoded at a part of their size, close to the exact mean."""

import io
import json
import struct
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from eosin.data_curation.pyramid import TILE_PX, write_pyramid
from eosin.data_curation.shard_reader import ShardReader
from eosin.data_curation.shards import ShardConfig, shard
from eosin.data_curation.slide import Slide
from eosin.data_curation.synthetic import SyntheticConfig, write_slide
from eosin.data_curation.tiles import TileConfig, tile


def without_levels(path: Path) -> Path:
    """The slide with its first level alone: the pointer to the second directory is set to 0."""
    with tifffile.TiffFile(path) as tiff:
        start = tiff.pages.first.offset
    content = bytearray(path.read_bytes())
    (entries,) = struct.unpack_from("<H", content, start)
    struct.pack_into("<I", content, start + 2 + 12 * entries, 0)
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scaled")
    drawn = SyntheticConfig(n_slides=1, size_px=1536, seed=4, region_um=200, artefact_share=0.0)
    return without_levels(write_slide(folder, 0, drawn))


def psnr(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    error = ((found.astype(float) - expected) ** 2).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-6)))


def test_the_slide_has_one_level(path: Path) -> None:
    with Slide(path) as slide:
        assert len(slide.levels) == 1


@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_a_coded_tile_is_what_pillow_makes_of_it(path: Path, shrink: int) -> None:
    side = TILE_PX // shrink
    with Slide(path, decoding="scaled") as slide:
        coded = slide.coded_tile(TILE_PX, 2 * TILE_PX, TILE_PX, 0.5)
        assert coded is not None
        with Image.open(io.BytesIO(coded)) as image:
            image.draft("RGB", (side, side))
            expected = np.asarray(image)
        found = slide.read_tile(TILE_PX, 2 * TILE_PX, side, 0.5 * shrink)
        assert np.array_equal(found, expected)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_tile_is_close_to_the_exact_one(path: Path, data: st.DataObject) -> None:
    mpp = data.draw(st.floats(0.5, 6))
    side = data.draw(st.integers(16, min(160, int(1536 * 0.5 / mpp) - 1)))
    room = 1536 - side * mpp / 0.5
    x, y = (data.draw(st.floats(0, room)) for _ in range(2))
    with Slide(path) as exact, Slide(path, decoding="scaled") as scaled:
        expected, found = exact.read_tile(x, y, side, mpp), scaled.read_tile(x, y, side, mpp)
    assert found.shape == expected.shape
    if mpp < 1 - 1e-3:
        assert np.array_equal(found, expected)
    else:
        assert psnr(found, expected) > 36


def test_whole_factors_are_close_on_a_real_slide(real_data: Path) -> None:
    slide_path = real_data / "slides" / "CMU-1-Small-Region.svs"
    with Slide(slide_path, (0.5, 0.5)) as exact, Slide(
        slide_path, (0.5, 0.5), decoding="scaled"
    ) as scaled:  # fmt: skip
        for mpp, least, usual in ((1.0, 45, 50), (2.0, 45, 52)):
            places = [(x, y) for x in range(0, 1600, 328) for y in range(0, 2300, 464)]
            found = [
                psnr(scaled.read_tile(*at, 128, mpp), exact.read_tile(*at, 128, mpp))
                for at in places
            ]
            assert min(found) > least and np.median(found) > usual, mpp


def test_what_was_done_is_written_down(path: Path, tmp_path: Path) -> None:
    options = {"slides": path, "mpp": 1.0, "size_px": 128, "workers": 1}
    tile(TileConfig(out=tmp_path / "exact", **options))
    tile(TileConfig(out=tmp_path / "scaled", decoding="scaled", **options))
    for name in ("exact", "scaled"):
        slides = pq.read_table(tmp_path / name / "slides.parquet")
        assert slides["decoding"].to_pylist() == [name]
        out = tmp_path / f"shards_{name}"
        shard(ShardConfig(tiles=tmp_path / "exact", out=out, workers=1, decoding=name))
        assert json.loads((out / "shards.json").read_text())["decoding"] == name
    readers = [ShardReader(str(tmp_path / f"shards_{name}")) for name in ("exact", "scaled")]
    assert readers[0].digest != readers[1].digest
    apart = [psnr(readers[0].image(row), readers[1].image(row)) for row in range(len(readers[0]))]
    assert 38 < min(apart) < 100
    with pytest.raises(ValueError, match="decoding=scaled goes with tiles whose pixels are copied"):
        ShardConfig(tiles=path, out=tmp_path, decoding="scaled", pixels="slides")


def test_tiles_that_do_not_divide_and_other_readers_are_exact(tmp_path: Path) -> None:
    rough = np.random.default_rng(0).integers(60, 255, (40, 40, 3), np.uint8)
    image = np.asarray(Image.fromarray(rough).resize((600, 600), Image.Resampling.BICUBIC))
    plain = tmp_path / "plain.tiff"
    tifffile.imwrite(
        plain, image, photometric="rgb", tile=(64, 64), resolution=(2e4, 2e4),
        resolutionunit="CENTIMETER", metadata=None,
    )  # fmt: skip
    write_pyramid(tmp_path / "c.tiff", image, mpp=0.5, description="", quality=90)
    for slide_path in (plain, tmp_path / "c.tiff"):
        with Slide(slide_path) as exact, Slide(slide_path, decoding="scaled") as scaled:
            args = (10.0, 20.0, 100, 1.0)  # the pyramid has a level for it: nothing to scale
            assert np.array_equal(scaled.read_tile(*args), exact.read_tile(*args))
