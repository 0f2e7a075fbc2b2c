"""The other reader: OpenSlide's pixels on what both read, and refusals in words."""

import sys
from pathlib import Path

import numpy as np
import openslide
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from eosin.data_curation import slide as slide_module
from eosin.data_curation.fastslide_reader import FastSlideHandle
from eosin.data_curation.slide import RegionError, Slide
from eosin.data_curation.slide_list import list_slides
from eosin.data_curation.slide_metadata import SlideError
from eosin.data_curation.synthetic import SyntheticConfig, write_slide
from eosin.data_curation.tile_slide import tile_slide
from eosin.data_curation.tiles import TileConfig, _job


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    drawn = SyntheticConfig(n_slides=1, size_px=1024, seed=6, region_um=200, artefact_share=0.0)
    return write_slide(tmp_path_factory.mktemp("slides"), 0, drawn)


def assert_alike(found: Image.Image, expected: Image.Image) -> None:
    apart = [
        np.abs(np.asarray(found.convert(mode), np.int16) - np.asarray(expected.convert(mode)))
        for mode in ("L", "RGB")
    ]
    assert apart[0].mean() < 0.8 and apart[0].max() <= 12
    assert apart[1].mean() < 3


def test_both_readers_give_the_same_pixels(path: Path) -> None:
    """But for how JPEG's halved colours are enlarged: brightness is the same."""
    rng = np.random.default_rng(0)
    theirs, ours = openslide.OpenSlide(path), FastSlideHandle(path)
    assert ours.dimensions == theirs.dimensions
    assert ours.level_dimensions == theirs.level_dimensions
    assert ours.level_downsamples == pytest.approx(theirs.level_downsamples)
    assert float(ours.properties["openslide.mpp-x"]) == pytest.approx(0.5)
    for level, factor in enumerate(theirs.level_downsamples):
        width, height = theirs.level_dimensions[level]
        for _ in range(5):
            size = (int(rng.integers(1, width // 2)), int(rng.integers(1, height // 2)))
            at = tuple(int(factor) * int(rng.integers(0, side // 2)) for side in (width, height))
            assert_alike(ours.read_region(at, level, size), theirs.read_region(at, level, size))


def test_a_slide_of_its_own_format_is_tiled(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slide_module, "ONLY_FASTSLIDE", frozenset({".tiff"}))
    monkeypatch.setattr(slide_module.CodedTiles, "pixels", lambda *_: None)
    with Slide(path) as slide:
        assert slide.scanner == "fastslide Generic TIFF" and slide.mpp == (0.5, 0.5)
        found = slide.read_tile(100.5, 30.25, 200, 1.0)
        with pytest.raises(RegionError, match="beyond"):
            slide.read_tile(1000, 0, 100, 0.5)
    monkeypatch.undo()
    with Slide(path) as slide:
        expected = slide.read_tile(100.5, 30.25, 200, 1.0)
    assert_alike(Image.fromarray(found), Image.fromarray(expected))
    monkeypatch.setattr(slide_module, "ONLY_FASTSLIDE", frozenset({".tiff"}))
    config = TileConfig(slides=path, out=tmp_path, size_px=128, workers=1)
    (source,) = list_slides(path)
    record = tile_slide(_job(source, config))
    assert record["status"] == "ok" and record["scanner"] == "fastslide Generic TIFF"
    assert pq.read_table(tmp_path / "slides" / source.slide_id / "tiles.parquet").num_rows == 64


def test_what_it_does_not_read_is_a_reason(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.isyntax"
    bad.write_bytes(b"no slide" * 1000)
    with pytest.raises(SlideError, match="not readable") as caught:
        Slide(bad)
    assert "bad" not in caught.value.reason  # a file's name may name a person
    assert [source.slide_id for source in list_slides(tmp_path)] == ["bad"]
    with pytest.raises(openslide.OpenSlideError, match="reach beyond level 0"):
        FastSlideHandle(path).read_region((1000, 0), 0, (100, 10))
    grey = tmp_path / "grey.tiff"
    tifffile.imwrite(grey, np.full((256, 256), 9, np.uint16), tile=(64, 64), metadata=None)
    with pytest.raises(SlideError):
        FastSlideHandle(grey)
    monkeypatch.setitem(sys.modules, "fastslide", None)
    with pytest.raises(SlideError, match=r"pip install 'eosin\[fastslide\]' for .isyntax"):
        Slide(bad)


def test_dicom_that_openslide_does_not_know_is_asked_of_it(tmp_path: Path) -> None:
    unknown = tmp_path / "x.dcm"
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    unknown.write_bytes((tmp_path / "x.png").read_bytes())
    with pytest.raises(SlideError, match="not readable"):  # fastslide's word, not OpenSlide's
        Slide(unknown)
    other = tmp_path / "x.svs"
    other.write_bytes(unknown.read_bytes())
    with pytest.raises(SlideError, match="not a slide format that OpenSlide reads"):
        Slide(other)
