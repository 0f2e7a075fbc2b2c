"""The preview sheet: a picture of the crops that training would see."""

from pathlib import Path

import numpy as np
from PIL import Image

from eosin.pretrain.augment import AugmentConfig
from eosin.pretrain.preview import preview_sheet


def test_a_sheet_has_a_row_a_tile_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tiles = [rng.integers(0, 256, (*hw, 3), dtype=np.uint8) for hw in ((64, 64), (50, 42), (9, 9))]
    config = AugmentConfig(global_px=56, local_px=28, n_local=2)
    for name, n in (("two", 2), ("again", 2), ("three", 3)):
        preview_sheet(tiles, config, 1, tmp_path / f"{name}.png", n)
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    with Image.open(tmp_path / "two.png") as two, Image.open(tmp_path / "three.png") as three:
        assert two.width == three.width
        assert two.height < three.height
        assert two.height > 250
    assert len(list(tmp_path.iterdir())) == 3


def test_a_sheet_of_one_tile_without_local_crops_is_drawn(tmp_path: Path) -> None:
    tile = np.full((32, 32, 3), 200, np.uint8)
    preview_sheet([tile], AugmentConfig(n_local=0), 0, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width < sheet.height * 3
