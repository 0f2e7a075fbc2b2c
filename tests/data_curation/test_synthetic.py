"""Synthetic slides: real files, known tissue, classes that colour alone does not tell apart."""

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import spearmanr
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from eosin.configs.errors import InputError
from eosin.data_curation.pyramid import write_pyramid
from eosin.data_curation.slide import Slide
from eosin.data_curation.synthetic import (
    CLASSES,
    SyntheticConfig,
    Truth,
    class_of_region,
    read_truth,
    slide_path,
    write_slide,
    write_slides,
)
from eosin.data_curation.synthetic_layout import TRUTH_DOWNSAMPLE
from eosin.data_curation.synthetic_tissue import PAINTERS, paint

SMALL = SyntheticConfig(n_slides=3, size_px=768, region_um=150)
N_SLIDES = 9
TILE_PX = 256


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Nine slides of the default kind."""
    folder = tmp_path_factory.mktemp("slides")
    return write_slides(folder, SyntheticConfig(n_slides=N_SLIDES), workers=1)


def pixels_of(slide: Path) -> NDArray[np.uint8]:
    with openslide.OpenSlide(slide) as opened:
        return np.asarray(opened.read_region((0, 0), 0, opened.dimensions).convert("RGB"))


def enlarged(plane: NDArray[np.generic]) -> NDArray[np.generic]:
    return plane.repeat(TRUTH_DOWNSAMPLE, 0).repeat(TRUTH_DOWNSAMPLE, 1)


@pytest.mark.parametrize("mpp", [0.5, 0.2527, 1 / 3])
def test_openslide_reads_back_the_pyramid_and_its_scale(tmp_path: Path, mpp: float) -> None:
    coarse = np.random.default_rng(0).integers(60, 240, (20, 16, 3), np.uint8)
    image = np.asarray(cv2.resize(coarse, (1100, 1300)), np.uint8)
    write_pyramid(tmp_path / "s.tiff", image, mpp=mpp, description="x", quality=95)
    with openslide.OpenSlide(tmp_path / "s.tiff") as slide:
        for axis in "xy":
            assert float(slide.properties[f"openslide.mpp-{axis}"]) == pytest.approx(mpp, rel=1e-6)
        assert slide.level_dimensions == ((1100, 1300), (550, 650), (275, 325))
        for level, size in enumerate(slide.level_dimensions):
            ours = np.asarray(slide.read_region((0, 0), level, size).convert("RGB"), np.int32)
            box = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX), np.int32)
            assert np.abs(ours - box).mean() < 1.5


def test_a_second_tiff_reader_sees_the_same_pixels(tmp_path: Path) -> None:
    slide = write_slide(tmp_path, 0, SMALL)
    with Image.open(slide) as opened:
        by_libtiff = np.asarray(opened.convert("RGB"), np.int32)
    assert np.abs(by_libtiff - pixels_of(slide)).max() <= 4  # two JPEG decoders


def test_equal_configuration_gives_equal_bytes_in_any_process(tmp_path: Path) -> None:
    write_slides(tmp_path / "a", SMALL, workers=1)
    write_slides(tmp_path / "b", SMALL, workers=2)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 3 * SMALL.n_slides
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_another_seed_or_index_gives_another_slide(tmp_path: Path) -> None:
    one = write_slide(tmp_path / "a", 0, SMALL).read_bytes()
    assert one != write_slide(tmp_path / "a", 1, SMALL).read_bytes()
    other = SyntheticConfig(n_slides=3, size_px=768, region_um=150, seed=1)
    assert one != write_slide(tmp_path / "b", 0, other).read_bytes()


def test_a_second_call_writes_only_what_is_missing_or_changed(tmp_path: Path) -> None:
    def times() -> list[int]:
        return [slide_path(tmp_path, index).stat().st_mtime_ns for index in range(3)]

    write_slides(tmp_path, SMALL, workers=1)
    before = times()
    slide_path(tmp_path, 1).with_suffix(".truth.json").unlink()
    write_slides(tmp_path, SMALL, workers=1)
    after = times()
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    write_slides(tmp_path, SyntheticConfig(n_slides=3, size_px=768, seed=4), workers=1)
    assert not set(times()) & set(after)


def test_a_killed_run_is_finished_by_the_next_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=write_slides, args=(tmp_path / "killed", SMALL, 1))
    process.start()
    marker = slide_path(tmp_path / "killed", 0).with_suffix(".truth.json")
    while not marker.exists() and process.is_alive():
        process.join(0.005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    finished = slide_path(tmp_path / "killed", 0).stat().st_mtime_ns
    write_slides(tmp_path / "killed", SMALL, workers=1)
    write_slides(tmp_path / "whole", SMALL, workers=1)
    assert slide_path(tmp_path / "killed", 0).stat().st_mtime_ns == finished
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "killed").iterdir())) == len(list((tmp_path / "whole").iterdir()))


def test_stained_pixels_lie_in_the_tissue_of_the_truth(slides: list[Path]) -> None:
    for slide in slides:
        truth, pixels = read_truth(slide), pixels_of(slide)
        tissue, square = truth.tissue.astype(np.uint8), np.ones((3, 3), np.uint8)
        inner = enlarged(np.asarray(cv2.erode(tissue, square))) > 0
        outer = enlarged(np.asarray(cv2.dilate(tissue, square))) == 0
        pen = enlarged(truth.pen)
        near_pen = enlarged(np.asarray(cv2.dilate(truth.pen.astype(np.uint8), square))) > 0
        saturation = pixels.max(-1).astype(int) - pixels.min(-1)
        assert (saturation[inner] > 25).mean() > 0.5
        assert (saturation[outer & ~near_pen] > 25).mean() < 0.002
        assert 0.4 < tissue.mean() < 0.85
        if truth.pen.any():
            assert (saturation[pen] > 25).mean() > 0.5 or pixels[pen].mean() < 90


def test_the_blurred_patch_is_less_sharp_than_the_same_class_elsewhere(tmp_path: Path) -> None:
    config = SyntheticConfig(artefact_share=1, size_px=1024)
    checked = 0
    for index in range(4):
        slide = write_slide(tmp_path, index, config)
        truth = read_truth(slide)
        laplacian = cv2.Laplacian(cv2.cvtColor(pixels_of(slide), cv2.COLOR_RGB2GRAY), cv2.CV_32F)
        energy = cv2.resize(laplacian**2, truth.blur.shape[::-1], interpolation=cv2.INTER_AREA)
        spot = cv2.erode(truth.blur.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        for value in range(1, len(CLASSES)):
            here = (truth.class_map == value) & ~truth.pen & ~truth.fold
            if (here & spot).sum() > 40 and (here & ~truth.blur).sum() > 40:
                assert energy[here & spot].mean() < 0.6 * energy[here & ~truth.blur].mean()
                checked += 1
    assert checked >= 3


def test_folds_are_darker_than_the_tissue_around_them(tmp_path: Path) -> None:
    slide = write_slide(tmp_path, 0, SyntheticConfig(artefact_share=1, size_px=1024))
    truth, pixels = read_truth(slide), pixels_of(slide).astype(np.float32)
    cells = cv2.resize(pixels.mean(-1), truth.fold.shape[::-1], interpolation=cv2.INTER_AREA)
    around = cv2.dilate(truth.fold.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
    around &= truth.tissue & ~truth.fold & ~truth.pen
    assert cells[truth.fold & ~truth.pen].mean() < cells[around].mean() - 10


def test_every_class_has_its_share_of_tissue(slides: list[Path]) -> None:
    maps = np.stack([read_truth(slide).class_map for slide in slides])
    counts = np.bincount(maps.ravel(), minlength=len(CLASSES))
    assert len(counts) == len(CLASSES)
    shares = counts[1:] / counts[1:].sum()
    assert shares.min() > 0.05
    for class_map in maps:
        assert len(np.unique(class_map)) >= 6  # glass and at least five classes


def tiles_of(slides: list[Path]) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
    """(slide, class, tile) of every cell of a grid that is 80 % one class."""
    for number, slide in enumerate(slides):
        truth, pixels = read_truth(slide), pixels_of(slide)
        for y in range(0, pixels.shape[0], TILE_PX):
            for x in range(0, pixels.shape[1], TILE_PX):
                value, share = class_of_region(truth, x, y, TILE_PX, TILE_PX)
                if value and share >= 0.8:
                    yield number, value, pixels[y : y + TILE_PX, x : x + TILE_PX]


def local_binary_patterns(tile: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Rotation-invariant uniform patterns of standardised density at four radii, [40]."""
    density = -np.log((tile[..., 0].astype(np.float32) + 1) / 256)
    density = (density - density.mean()) / density.std()
    parts = []
    for r in (1, 2, 4, 8):
        smooth = cv2.GaussianBlur(density, (0, 0), 0.5 * r)
        h, w = (side - r for side in smooth.shape)
        around = [(0, r), (r, r), (r, 0), (r, -r), (0, -r), (-r, -r), (-r, 0), (-r, r)]
        bits = np.stack(
            [smooth[r + dy : h + dy, r + dx : w + dx] > smooth[r:h, r:w] for dy, dx in around]
        )
        uniform = (bits != np.roll(bits, 1, 0)).sum(0) <= 2
        code = np.where(uniform, bits.sum(0), 9)
        parts.append(np.bincount(code.ravel(), minlength=10) / code.size)
    return np.concatenate(parts)


def colour_histogram(tile: NDArray[np.uint8]) -> NDArray[np.float64]:
    counts = [np.histogram(tile[..., channel], 16, (0, 256))[0] for channel in range(3)]
    return np.sqrt(np.concatenate(counts) / tile[..., 0].size)


def test_architecture_tells_the_classes_apart_and_colour_does_not(slides: list[Path]) -> None:
    rows = list(tiles_of(slides))
    assert len(rows) > 12 * N_SLIDES
    held_out = np.array([number for number, _, _ in rows]) % 3 == 0
    label = np.array([value for _, value, _ in rows])

    def score(features: list[NDArray[np.float64]]) -> float:
        table = StandardScaler().fit_transform(np.stack(features))
        model = KNeighborsClassifier(9).fit(table[~held_out], label[~held_out])
        return float(balanced_accuracy_score(label[held_out], model.predict(table[held_out])))

    mean_colour = score([tile.mean((0, 1)) for _, _, tile in rows])
    histogram = score([colour_histogram(tile) for _, _, tile in rows])
    texture = score([local_binary_patterns(tile) for _, _, tile in rows])
    assert mean_colour < 0.30
    assert histogram < 0.45
    assert texture > 0.75


def test_loads_of_stain_do_not_depend_on_the_class() -> None:
    loads = np.array(
        [
            [
                [stain.mean() for stain in paint(name, (256, 256), 1.0, rng)]
                for rng in np.random.default_rng(order).spawn(10)
            ]
            for order, name in enumerate(PAINTERS)
        ]
    )  # [classes, regions, stains]
    between = loads.mean(1).std(0)
    within = loads.std(1).mean(0)
    assert (between < within).all()


def test_the_majority_class_of_a_rectangle_is_weighed_by_area() -> None:
    class_map = np.array([[1, 1, 2], [0, 2, 2]], np.uint8)
    plain = np.zeros(class_map.shape, bool)
    truth = Truth(class_map=class_map, tissue=class_map > 0, pen=plain, blur=plain, fold=plain)
    assert class_of_region(truth, 0, 0, 32, 16) == (1, 1.0)
    assert class_of_region(truth, 0, 0, 48, 32) == (2, pytest.approx(0.5))
    assert class_of_region(truth, 12, 0, 28, 16) == (1, pytest.approx(20 / 28))
    assert class_of_region(truth, 0, 16, 16, 16) == (0, 1.0)
    assert class_of_region(truth, 38, 0, 16, 32) == (2, pytest.approx(10 / 16))
    assert class_of_region(truth, 200, 200, 16, 16) == (0, 1.0)


def test_the_stain_vectors_beside_a_slide_explain_its_colours(tmp_path: Path) -> None:
    slide = write_slide(tmp_path, 0, SyntheticConfig(size_px=1024, artefact_share=0))
    record = json.loads(slide.with_suffix(".truth.json").read_text())
    stains = np.array(record["stains"])
    density = -np.log((pixels_of(slide).reshape(-1, 3)[::7] + 1.0) / 256)
    density = density[(density.sum(1) > 0.6) & (density.max(1) < 2.5)]
    loads = density @ np.linalg.pinv(stains)
    rest = density - loads @ stains
    assert (rest**2).sum() / ((density - density.mean(0)) ** 2).sum() < 0.05
    assert spearmanr(loads[:, 0], density[:, 0]).statistic > 0.9


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_slides", 0),
        ("size_px", 1000),
        ("size_px", 16384),
        ("mpp", 0.0),
        ("seed", -1),
        ("region_um", 10.0),
        ("artefact_share", 1.5),
    ],
)
def test_a_bad_value_is_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{field} .*{value}|{field} .*: {value}"):
        SyntheticConfig(**{"n_slides": 1, field: value})  # type: ignore[arg-type]


def test_other_stains_have_other_colours_and_the_same_layout(tmp_path: Path) -> None:
    drawn = SyntheticConfig(n_slides=1, size_px=512, mpp=2.0, region_um=200, artefact_share=0.0)
    means = {}
    for stain in ("he", "ihc", "silver"):
        (path,) = write_slides(tmp_path / stain, replace(drawn, stain=stain), workers=1)
        with Slide(path) as slide:
            rgb, _ = slide.overview(32.0)
        truth = read_truth(path)
        means[stain] = rgb[truth.tissue].astype(float)
        assert np.array_equal(truth.class_map, read_truth(slide_path(tmp_path / "he", 0)).class_map)
    spread = {stain: np.ptp(pixels, axis=1).mean() for stain, pixels in means.items()}
    assert spread["he"] > 2 * spread["silver"]  # silver is grey
    red_over_blue = {stain: (p[:, 0] - p[:, 2]) for stain, p in means.items()}
    assert red_over_blue["ihc"].max() > 10 > -5 > red_over_blue["ihc"].min()  # brown, and blue


def test_a_missing_or_damaged_truth_is_refused_by_name(tmp_path: Path) -> None:
    slide = tmp_path / "synthetic_0000.tiff"
    with pytest.raises(InputError, match=r"synthetic_0000\.truth\.npy"):
        read_truth(slide)
    truth = slide.with_suffix(".truth.npy")
    truth.write_bytes(b"not an array")
    with pytest.raises(InputError, match="not a readable ground truth"):
        read_truth(slide)
    np.save(truth, np.zeros((2, 3)))
    with pytest.raises(InputError, match="not a ground truth"):
        read_truth(slide)


def test_a_slide_that_passes_classic_tiff_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eosin.data_curation.pyramid._LARGEST_FILE", 1000)
    with pytest.raises(ValueError, match="4 GiB"):
        write_slide(tmp_path, 0, SMALL)
    assert list(tmp_path.iterdir()) == []
