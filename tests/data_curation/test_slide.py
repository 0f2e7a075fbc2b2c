from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from eosin.data_curation.manifest import Status
from eosin.data_curation.slide import RegionError, Slide
from eosin.data_curation.slide_metadata import SlideError, pyramid_levels, scanned_bounds_px

WriteSlide = Callable[..., Path]
WAVE_UM = 12.0


def waves(x_um: NDArray[np.float64], y_um: NDArray[np.float64]) -> NDArray[np.float64]:
    """A smooth picture known at every point: RGB float [len(y), len(x), 3]."""
    across = np.sin(2 * np.pi * x_um / WAVE_UM)[None, :]
    down = np.sin(2 * np.pi * y_um / WAVE_UM)[:, None]
    return 128 + np.stack([100 * (across + 0 * down), 100 * (down + 0 * across)] * 2, -1)[..., :3]


def painted_level(
    size: tuple[int, int], mpp: tuple[float, float], downsample: float
) -> NDArray[np.uint8]:
    """What a level shows: the waves at the centres of its pixels."""
    x = (np.arange(size[0]) + 0.5) * downsample * mpp[0]
    y = (np.arange(size[1]) + 0.5) * downsample * mpp[1]
    return np.round(waves(x, y)).astype(np.uint8)


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("scan_mpp", "downsamples", "mpp"),
    [
        ((0.25, 0.25), [1.0], 0.25),
        ((0.2503, 0.2503), [1.0], 0.5),
        ((0.2456, 0.2531), [1.0, 2.0], 0.5),
        ((0.2503, 0.2503), [1.0, 2.0, 4.0], 1.3),
        ((0.26, 0.26), [1.0, 3.9998], 1.5),
    ],
)
def test_a_tile_shows_what_lies_at_its_exact_place_and_scale(
    tmp_path: Path,
    write_slide: WriteSlide,
    scan_mpp: tuple[float, float],
    downsamples: list[float],
    mpp: float,
) -> None:
    full = (1401, 1203)  # odd, so that no level is a whole fraction of level 0
    sizes = [(int(full[0] / d), int(full[1] / d)) for d in downsamples]
    levels = [painted_level(s, scan_mpp, d) for s, d in zip(sizes, downsamples, strict=True)]
    write_slide(tmp_path / "waves.tiff", levels, scan_mpp)
    with Slide(tmp_path / "waves.tiff") as slide:
        assert slide.mpp == pytest.approx(scan_mpp, rel=1e-6)
        for x, y, size in ((0.0, 0.0, 96), (333.3, 271.9, 128), (611.25, 500.5, 96)):
            rgb = slide.read_tile(x, y, size, mpp)
            centres = (np.arange(size) + 0.5) * mpp
            expected = waves(x * scan_mpp[0] + centres, y * scan_mpp[1] + centres)
            inner = (slice(4, -4), slice(4, -4))
            difference = (rgb.astype(float) - expected)[inner]
            steepest = 100 * 2 * np.pi * mpp / WAVE_UM  # grey values in a tile pixel
            assert np.abs(difference.mean(axis=(0, 1))).max() < 2.5
            assert np.abs(difference).max() < 0.25 * max(24.0, steepest)


def test_a_scale_error_of_one_thousandth_would_be_seen(
    tmp_path: Path, write_slide: WriteSlide
) -> None:
    write_slide(tmp_path / "s.tiff", [painted_level((1401, 1203), (0.25, 0.25), 1.0)], (0.25, 0.25))
    with Slide(tmp_path / "s.tiff") as slide:
        rgb = slide.read_tile(0.0, 0.0, 512, 0.5).astype(float)
    centres = np.arange(512) + 0.5
    errors = {
        scale: np.abs(rgb - waves(centres * 0.5 * scale, centres * 0.5 * scale))[4:-4, 4:-4].max()
        for scale in (0.999, 1.0, 1.001)
    }
    assert errors[1.0] < 3 < 5 * errors[1.0] < min(errors[0.999], errors[1.001])


def test_a_tile_on_whole_level_pixels_is_untouched(tmp_path: Path, write_slide: WriteSlide) -> None:
    pixels, half = noise(320, 384), noise(160, 192)
    path = write_slide(tmp_path / "noise.tiff", [pixels, half], (0.25, 0.25))
    with Slide(path) as slide:
        tile = slide.read_tile(64, 96, 100, 0.25)
        coarse = slide.read_tile(64, 96, 100, 0.5)
    np.testing.assert_array_equal(tile, tifffile.imread(path, key=0)[96:196, 64:164])
    np.testing.assert_array_equal(coarse, tifffile.imread(path, key=1)[48:148, 32:132])


def test_a_whole_factor_equals_pillows_box_filter_on_the_whole_image(
    tmp_path: Path, write_slide: WriteSlide
) -> None:
    pixels = noise(600, 600)
    whole = np.asarray(Image.fromarray(pixels).resize((200, 200), Image.Resampling.BOX))
    with Slide(write_slide(tmp_path / "noise.tiff", [pixels], (0.25, 0.25))) as slide:
        for x, y in ((0, 0), (300, 150), (360, 360)):
            tile = slide.read_tile(x, y, 80, 0.75)
            expected = whole[y // 3 : y // 3 + 80, x // 3 : x // 3 + 80]
            assert np.abs(tile.astype(int) - expected).max() <= 1


def test_a_slide_without_pyramid_reads_coarse_tiles_close_to_the_area_mean(
    tmp_path: Path, write_slide: WriteSlide
) -> None:
    pixels = painted_level((1600, 1600), (0.05, 0.05), 1.0)
    with Slide(write_slide(tmp_path / "flat.tiff", [pixels], (0.05, 0.05))) as slide:
        tile = slide.read_tile(0, 0, 80, 1.0)
        overview, readable = slide.overview(1.0)
    area = pixels.reshape(80, 20, 80, 20, 3).mean(axis=(1, 3))
    assert np.abs(tile - area).mean() < 2
    assert overview.shape == (80, 80, 3)
    assert readable.all()
    assert np.abs(overview - area).mean() < 2


def test_a_missing_scale_is_refused_and_a_given_one_used(
    tmp_path: Path, write_slide: WriteSlide
) -> None:
    path = write_slide(tmp_path / "s.tiff", [noise(128, 128)], None)
    with pytest.raises(SlideError, match="slide table") as refusal:
        Slide(path)
    assert refusal.value.status in (Status.NO_MPP, Status.IMPLAUSIBLE_MPP)
    with Slide(path, (0.5, 0.51)) as slide:
        assert (slide.mpp, slide.mpp_source) == ((0.5, 0.51), "table")


@pytest.mark.parametrize("mpp", [(1000.0, 1000.0), (0.04, 0.04), (0.5, 0.53)])
def test_an_implausible_scale_is_refused_and_named(
    tmp_path: Path, write_slide: WriteSlide, mpp: tuple[float, float]
) -> None:
    path = write_slide(tmp_path / "s.tiff", [noise(128, 128)], mpp)
    with pytest.raises(SlideError, match=f"{mpp[0]:g}") as refusal:
        Slide(path)
    assert refusal.value.status == Status.IMPLAUSIBLE_MPP
    with pytest.raises(SlideError, match="correct the slide table"):
        Slide(path, mpp)


def test_upsampling_is_refused_with_the_smallest_mpp_that_works(
    tmp_path: Path, write_slide: WriteSlide
) -> None:
    path = write_slide(tmp_path / "s.tiff", [noise(256, 256)], (0.499, 0.499))
    with Slide(path) as slide:
        with pytest.raises(SlideError) as refusal:
            slide.read_tile(0, 0, 64, 0.25)
        assert refusal.value.status == Status.UPSAMPLING
        smallest = float(refusal.value.reason.split("mpp=")[1].split()[0])
        assert slide.read_tile(0, 0, 64, smallest).shape == (64, 64, 3)
        with pytest.raises(SlideError):
            slide.read_tile(0, 0, 64, smallest - 2e-4)


def test_upsampling_where_it_is_allowed_is_the_mean_over_exact_areas(
    tmp_path: Path, write_slide: WriteSlide
) -> None:
    """A tile's pixel of 0.8 of the scan's: against the scan with each pixel drawn 5 × 5."""
    pixels = noise(200, 160)
    path = write_slide(tmp_path / "s.tiff", [pixels], (0.5, 0.5))
    fine = pixels.repeat(5, 0).repeat(5, 1).astype(np.float64)
    with Slide(path, max_upsample=0.25) as slide:
        found = slide.read_tile(8, 12, 100, 0.4)
        part = fine[60 : 60 + 400, 40 : 40 + 400]
        expected = part.reshape(100, 4, 100, 4, 3).mean((1, 3))
        assert np.abs(found - expected).max() <= 0.51
        with pytest.raises(SlideError, match=r"mpp=0\.4996 .* without max_upsample"):
            slide.read_tile(0, 0, 10, 0.39)
    with Slide(path, max_upsample=0.05) as slide, pytest.raises(SlideError):
        slide.read_tile(0, 0, 10, 0.4)


def test_a_text_file_is_not_a_slide(tmp_path: Path) -> None:
    path = tmp_path / "text.svs"
    path.write_text("not a slide")
    with pytest.raises(SlideError) as refusal:
        Slide(path)
    assert refusal.value.status == Status.UNREADABLE


def test_a_lost_region_raises_and_the_rest_stays_readable(
    tmp_path: Path, write_slide: WriteSlide, break_tiles: Callable[..., None]
) -> None:
    pixels = noise(512, 512)
    path = write_slide(tmp_path / "s.tiff", [pixels, noise(64, 64)])
    break_tiles(path, 16)  # the lowest two rows of tiles
    with Slide(path) as slide:
        for _ in range(2):
            with pytest.raises(RegionError, match="not decodable"):
                slide.read_tile(0, 448, 64, 1.0)
            np.testing.assert_array_equal(slide.read_tile(0, 0, 64, 1.0), pixels[:64, :64])
        _, readable = slide.overview(2.0)
    assert readable[:160].all()
    assert not readable[224:].any()


def test_a_truncated_slide_is_unreadable(tmp_path: Path, write_slide: WriteSlide) -> None:
    path = write_slide(tmp_path / "s.tiff", [noise(512, 512)])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(SlideError, match=r"not readable: .*the file") as refusal:
        Slide(path)
    assert refusal.value.status == Status.UNREADABLE
    assert str(tmp_path) not in refusal.value.reason


def test_an_area_never_scanned_is_no_tile_and_white_in_the_overview(
    tmp_path: Path, write_slide: WriteSlide
) -> None:
    path = write_slide(tmp_path / "s.tiff", [noise(256, 256)])
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tag = tiff.pages.first.tags["TileByteCounts"]
        counts = list(tag.value)
        counts[-1] = 0
        tag.overwrite(counts)
    with Slide(path) as slide:
        with pytest.raises(RegionError, match="never scanned"):
            slide.read_tile(192, 192, 64, 1.0)
        assert slide.read_tile(0, 0, 64, 1.0).shape == (64, 64, 3)
        overview, readable = slide.overview(1.0)
    assert readable.all()
    assert (overview[200:, 200:] == 255).all()


def test_a_tile_beyond_the_slide_is_refused(tmp_path: Path, write_slide: WriteSlide) -> None:
    with Slide(write_slide(tmp_path / "s.tiff", [noise(256, 256)])) as slide:
        for x, y in ((200, 0), (0, 200), (-5, 0)):
            with pytest.raises(RegionError, match="beyond"):
                slide.read_tile(x, y, 64, 1.0)


def test_metadata_bounds_and_levels_are_read_as_openslide_states_them() -> None:
    bounds = {f"openslide.bounds-{k}": v for k, v in zip("xy", ("10", "20"), strict=True)}
    size = {"openslide.bounds-width": "300", "openslide.bounds-height": "400"}
    assert scanned_bounds_px(bounds | size, (1000, 1000)) == (10, 20, 300, 400)
    assert scanned_bounds_px({}, (1000, 900)) == (0, 0, 1000, 900)
    levels = pyramid_levels({}, [(5477, 5154), (2738, 2577), (1370, 1289)], [1.0, 2.0002, 3.998])
    assert [level.downsample for level in levels] == [(1, 1), (2, 2), (4, 4)]
    bomb = {"openslide.level[0].tile-width": "65535", "openslide.level[0].tile-height": "65535"}
    with pytest.raises(SlideError, match="too large"):
        pyramid_levels(bomb, [(65535, 65535)], [1.0])


def test_real_slides_open_with_their_scale(real_data: Path) -> None:
    with Slide(real_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        assert slide.mpp == (0.499, 0.499)
        assert slide.scanner is not None
        assert slide.scanner.startswith("aperio")
        assert slide.read_tile(500, 500, 256, 0.5).shape == (256, 256, 3)
    with pytest.raises(SlideError, match="1000") as refusal:
        Slide(real_data / "slides" / "C3L-00601-26.tiff")
    assert refusal.value.status == Status.IMPLAUSIBLE_MPP
