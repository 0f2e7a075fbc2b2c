from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from eosin.data_curation.folds import find_folds
from eosin.data_curation.glass import density_planes, estimate_glass
from eosin.data_curation.sections import find_sections
from eosin.data_curation.tissue import find_tissue


def pieces(*discs: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Discs (x, y, radius) on 800 × 600 pixels."""
    mask = np.zeros((600, 800), np.uint8)
    for x, y, radius in discs:
        cv2.circle(mask, (x, y), radius, 1, -1)
    return mask > 0


def test_sections_are_numbered_row_by_row_from_the_left() -> None:
    tissue = pieces((150, 160, 80), (400, 150, 70), (650, 140, 80), (200, 450, 90), (600, 460, 80))
    found = find_sections(tissue, 8.0)
    centres = ((150, 160), (400, 150), (650, 140), (200, 450), (600, 460))
    assert [found[y, x] for x, y in centres] == [1, 2, 3, 4, 5]
    assert ((found > 0) == tissue).all()


def test_near_pieces_are_one_section_and_fragments_belong_to_the_nearest() -> None:
    tissue = pieces((150, 300, 80), (250, 300, 12), (650, 300, 80), (540, 300, 8))
    found = find_sections(tissue, 8.0)
    assert found[300, 150] == found[300, 250] == 1
    assert found[300, 650] == found[300, 540] == 2


@pytest.mark.parametrize("mpp", [1.0, 8.0, 40.0])
def test_gaps_are_physical(mpp: float) -> None:
    near, far = round(200 / mpp), round(500 / mpp)  # µm of glass between them
    side = round(3000 / mpp)
    tissue = np.zeros((side, 3 * side + far + near), np.bool_)
    tissue[:, :side] = tissue[:, side + near : 2 * side + near] = True
    tissue[:, 2 * side + near + far :] = True
    found = find_sections(tissue, mpp)
    assert found.max() == 2
    assert found[0, 0] == found[0, side + near] == 1
    assert found[0, -1] == 2


def test_no_tissue_has_no_sections() -> None:
    assert not find_sections(np.zeros((40, 50), np.bool_), 8.0).any()


def test_a_band_twice_as_dense_is_a_fold_and_a_block_is_none(tmp_path: Path) -> None:
    image = np.full((400, 400, 3), (200, 140, 180), np.uint8)
    rng = np.random.default_rng(0)
    image = np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
    doubled = (image.astype(float) ** 2 / 242).astype(np.uint8)
    band, block = np.zeros((400, 400), np.uint8), np.zeros((400, 400), np.bool_)
    cv2.line(band, (60, 380), (330, 20), 1, 10)  # 40 µm wide
    block[250:350, 280:380] = True  # 400 µm
    image[(band > 0) | block] = doubled[(band > 0) | block]
    planes = density_planes(image, (242.0, 242.0, 242.0))
    found = find_folds(planes, np.ones((400, 400), np.bool_), 4.0)
    assert found[band > 0].mean() > 0.8
    assert found[block].mean() < 0.1
    assert found[(band == 0) & ~block].mean() < 0.03


def test_a_real_fold_is_found(real_data: Path) -> None:
    """A dark band runs across this picture; beside it lie pen and tissue."""
    path = real_data / "qc" / "high-nuclei-score-red-pen-level1.png"
    rgb = np.asarray(Image.open(path).convert("RGB"))
    tissue = find_tissue(rgb, (1.0, 1.0)).tissue
    found = find_folds(density_planes(rgb, estimate_glass(rgb)), tissue, 1.0)
    assert all(found[y, x] for x, y in ((50, 255), (150, 275), (250, 300), (350, 325)))
    band = np.zeros(found.shape, np.uint8)
    cv2.line(band, (0, 250), (512, 390), 1, 90)
    assert found[band == 0].mean() < 0.005
