"""Tiles decoded from the file itself: OpenSlide's pixels to the bit, and its verdict where odd."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import pytest
import simplejpeg
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from eosin.configs.load import load_config
from eosin.data_curation.coded_tiles import CodedTiles, DecodedTiles
from eosin.data_curation.pyramid import TILE_PX, write_pyramid
from eosin.data_curation.shard_reader import ShardReader
from eosin.data_curation.shards import ShardConfig, shard
from eosin.data_curation.slide import RegionError, Slide
from eosin.data_curation.slide_metadata import Level
from eosin.data_curation.tiles import TileConfig, tile

RGB = NDArray[np.uint8]
WIDTH, HEIGHT = 900, 700  # edge tiles are not whole


def made_up(seed: int = 0) -> RGB:
    rough = np.random.default_rng(seed).integers(60, 255, (HEIGHT // 20, WIDTH // 20, 3), np.uint8)
    return np.asarray(Image.fromarray(rough).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("slide") / "slide.tiff"
    write_pyramid(found, made_up(), mpp=0.5, description="", quality=80)
    return found


def openslide_pixels(path: Path, x: int, y: int, width: int, height: int) -> RGB:
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((x, y), 0, (width, height)).convert("RGB"))


class Counter:
    """Counts what OpenSlide is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads = 0
        plain: Callable[..., Image.Image] = openslide.OpenSlide.read_region

        def read(*args: object) -> Image.Image:
            self.reads += 1
            return plain(*args)

        monkeypatch.setattr(openslide.OpenSlide, "read_region", read)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_place_has_openslides_pixels(path: Path, data: st.DataObject) -> None:
    size_px = data.draw(st.integers(1, 600))
    x = data.draw(st.integers(0, WIDTH - size_px))
    y = data.draw(st.integers(0, HEIGHT - size_px))
    with Slide(path) as slide:
        found = slide.read_tile(x, y, size_px, 0.5)
    assert np.array_equal(found, openslide_pixels(path, x, y, size_px, size_px))


def test_openslide_is_only_asked_to_compare(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Slide(path) as slide:
        counter = Counter(monkeypatch)
        for x in range(0, 500, 100):
            slide.read_tile(x, 30, 200, 0.5)
        assert counter.reads == 2  # the tiles on which both are compared


def test_real_slides_have_openslides_pixels(
    real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for name, mpp in (("CMU-1-Small-Region.svs", 0.499), ("C3L-00601-26.tiff", 4.0)):
        whole = real_data / "slides" / name
        with Slide(whole, (mpp, mpp)) as slide, monkeypatch.context() as patched:
            width, height = slide.size_px
            places = rng.integers(0, (width - 256, height - 256), (40, 2)).tolist()
            places += [(0, 0), (width - 256, height - 256)]
            wanted = [openslide_pixels(whole, x, y, 256, 256) for x, y in places]
            counter = Counter(patched)
            for (x, y), expected in zip(places, wanted, strict=True):
                assert np.array_equal(slide.read_tile(x, y, 256, mpp), expected), (name, x, y)
            assert counter.reads == 2


def spoilt(path: Path, copy: Path, change: Callable[[bytes], bytes]) -> Path:
    """A copy whose second tile of the first level is changed, in as many bytes."""
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        start, size = page.dataoffsets[1], page.databytecounts[1]
    data[start : start + size] = change(bytes(data[start : start + size])).ljust(size, b"\0")[:size]
    copy.write_bytes(data)
    return copy


@pytest.mark.parametrize(
    "change",
    [
        lambda tile: b"",
        lambda tile: tile[: len(tile) // 2],
        lambda tile: tile[:2] + b"\xff\xd9",
        lambda tile: np.random.default_rng(0).bytes(len(tile)),
        lambda tile: simplejpeg.encode_jpeg(made_up()[:64, :64].copy(), 50),
    ],
    ids=["empty", "cut", "no image", "noise", "smaller"],
)
def test_a_damaged_tile_is_refused_and_the_others_read(
    path: Path, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    with Slide(spoilt(path, tmp_path / "slide.tiff", change)) as slide:
        good = slide.read_tile(0, 0, 200, 0.5)
        with pytest.raises(RegionError):
            slide.read_tile(200, 0, 200, 0.5)
        assert np.array_equal(slide.read_tile(0, 0, 200, 0.5), good)
        assert slide.coded_tile(TILE_PX, 0, TILE_PX, 0.5) is None
    assert np.array_equal(good, openslide_pixels(path, 0, 0, 200, 200))


def test_a_level_that_differs_is_openslides(path: Path) -> None:
    """Where OpenSlide says otherwise (another reading of the colours, say), it is followed."""
    with openslide.OpenSlide(path) as slide:
        level = Level(index=0, size_px=slide.dimensions, downsample=(1, 1), openslide_downsample=1)
    off_by_one = lambda level, place: openslide_pixels(path, *place) // 2  # noqa: E731
    nothing = lambda level, place: None  # noqa: E731
    for read in (off_by_one, nothing):
        coded = CodedTiles(path, [level], read, DecodedTiles())
        assert coded.pixels(level, (0, 0, 50, 50)) is None
        assert coded.jpeg(level, (0, 0, TILE_PX, TILE_PX)) is None
        coded.close()


def test_storage_that_fails_is_openslides_to_report(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    wanted = openslide_pixels(path, 10, 20, 300, 300)
    for name in ("pread", "open"):
        with monkeypatch.context() as patched, Slide(path) as slide:
            patched.setattr(f"eosin.data_curation.coded_tiles.os.{name}", fail)
            assert np.array_equal(slide.read_tile(10, 20, 300, 0.5), wanted)
            assert slide.coded_tile(0, 0, TILE_PX, 0.5) is None


def test_other_tiffs_are_left_to_openslide(tmp_path: Path) -> None:
    plain = tmp_path / "plain.tiff"
    tifffile.imwrite(
        plain, made_up(), photometric="rgb", tile=(64, 64), metadata=None,
        resolution=(20000, 20000), resolutionunit="CENTIMETER",
    )  # fmt: skip
    with Slide(plain) as slide:
        assert np.array_equal(slide.read_tile(10, 20, 300, 0.5), made_up()[20:320, 10:310])
        assert slide.coded_tile(0, 0, 64, 0.5) is None


def test_a_tile_of_the_file_is_handed_on_as_it_is(path: Path) -> None:
    with Slide(path) as slide:
        coded = slide.coded_tile(TILE_PX, TILE_PX, TILE_PX, 0.5)
        assert coded is not None
        with tifffile.TiffFile(path) as tiff:
            raw = path.read_bytes()[tiff.pages.first.dataoffsets[5] :]
        scan = raw[raw.index(b"\xff\xda") : raw.index(b"\xff\xd9") + 2]
        assert coded.endswith(scan)  # not coded again
        with Image.open(io.BytesIO(coded)) as image:
            assert image.size == (TILE_PX, TILE_PX)
        wanted = slide.read_tile(TILE_PX, TILE_PX, TILE_PX, 0.5)
        assert np.array_equal(simplejpeg.decode_jpeg(coded, strict=True), wanted)
        assert slide.coded_tile(TILE_PX + 1, 0, TILE_PX, 0.5) is None  # off the file's grid
        assert slide.coded_tile(0, 0, TILE_PX // 2, 0.5) is None  # another size
        assert slide.coded_tile(0, 0, TILE_PX, 0.6) is None  # another scale
        assert slide.coded_tile(3 * TILE_PX, 0, TILE_PX, 0.5) is None  # beyond the edge
        half = slide.coded_tile(0, 0, TILE_PX, 1.0)  # of the second level
        assert half is not None
        assert np.array_equal(simplejpeg.decode_jpeg(half), slide.read_tile(0, 0, TILE_PX, 1.0))


def test_shards_hold_the_files_own_tiles_or_their_equal(path: Path, tmp_path: Path) -> None:
    words = [f"slides={path}", f"out={tmp_path}", "mpp=0.5", f"size_px={TILE_PX}"]
    tile(load_config(TileConfig, [], [*words, "workers=1", "min_tissue=0"]))
    sizes = {}
    for passes in (True, False):
        out = tmp_path / str(passes)
        words = [f"tiles={tmp_path}", f"out={out}", "workers=1", f"pass_through={passes}"]
        shard(load_config(ShardConfig, [], words))
        reader = ShardReader(str(out))
        rows = reader.index.table().to_pylist()
        assert len(rows) == 6
        for row, facts in enumerate(rows):
            found = reader.image(row)
            _, x, y, _ = str(facts["key"]).rsplit("_", 3)
            expected = openslide_pixels(path, int(x), int(y), TILE_PX, TILE_PX)
            apart = int(np.abs(found.astype(int) - expected).max())
            assert apart == 0 if passes else 0 < apart < 40
        sizes[passes] = sum(row["size"] for row in rows)
    assert sizes[True] != sizes[False]


def test_the_cache_keeps_what_was_used_last() -> None:
    cache = DecodedTiles(max_mb=1)
    pixels, slide = np.zeros((256, 256, 3), np.uint8), object()
    for index in range(5):  # 0.2 MB each
        cache.put((slide, 0, index), pixels)
    assert cache.get((slide, 0, 0)) is not None
    cache.put((slide, 0, 5), pixels)
    assert cache.get((slide, 0, 1)) is None and cache.get((slide, 0, 0)) is not None
    assert cache.get((object(), 0, 0)) is None
