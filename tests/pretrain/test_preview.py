"""The preview sheet: a picture of the crops that training would see."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eosin.configs.errors import EosinError
from eosin.data_curation.shard_reader import ShardReader
from eosin.data_curation.shards import ShardConfig, shard
from eosin.launch.cli import main
from eosin.pretrain.augment import AugmentConfig
from eosin.pretrain.batch import Crops
from eosin.pretrain.loader import LoaderConfig, batches
from eosin.pretrain.preview import describe, first_tiles, preview
from eosin.pretrain.steps import BatchPlan
from eosin.pretrain.views import draw_views

AUGMENT = AugmentConfig(global_px=32, local_px=16, n_local=2)
PLAN = BatchPlan(augment=AUGMENT, batch_size=3, seed=1, patch_px=8)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiles")
    rng = np.random.default_rng(0)
    for number in range(6):
        image = rng.integers(0, 256, (50, 42 + number, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{number}.png")
    out = folder.parent / f"{folder.name}-shards"
    shard(ShardConfig(images=folder, out=out, workers=1))
    return out


def test_a_sheet_has_a_row_a_tile_and_the_same_bytes_each_time(
    shards: Path, tmp_path: Path
) -> None:
    reader = ShardReader(shards)
    for name, n in (("two", 2), ("again", 2), ("three", 3)):
        preview(reader, PLAN, tmp_path / f"{name}.png", n)
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    with Image.open(tmp_path / "two.png") as two, Image.open(tmp_path / "three.png") as three:
        assert two.width == three.width
        assert two.height < three.height
        assert two.height > 250
    assert len(list(tmp_path.iterdir())) == 3


def test_a_sheet_without_local_crops_is_drawn(shards: Path, tmp_path: Path) -> None:
    plan = replace(PLAN, augment=replace(AUGMENT, n_local=0))
    preview(ShardReader(shards), plan, tmp_path / "sheet.png", 1)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width < sheet.height * 3


def test_the_crops_shown_are_the_first_that_training_takes(shards: Path) -> None:
    reader = ShardReader(shards)
    shown = first_tiles(reader, PLAN, 6)
    for batch in batches(reader, PLAN, LoaderConfig(), first_step=0, last_step=2):
        assert isinstance(batch.images, Crops)
        for sample in range(3):
            row = shown[3 * batch.step + sample]
            assert np.array_equal(row.tile, reader.image(int(batch.rows[sample])))
            taken = [*batch.images.global_crops[:, sample], *batch.images.local_crops[:, sample]]
            assert all(np.array_equal(a, b.numpy()) for a, b in zip(row.crops, taken, strict=True))


def test_what_was_drawn_stands_beneath() -> None:
    config = AugmentConfig(hed=1, jitter=1, grey=0, first_global_blur=1, flip=1, turn=1)
    view = draw_views(config, 0, [0], [0], [(256, 256)]).at(0, 0, 224)
    first, factors, shifts, last = describe(view, 0.5).split("\n")
    shrunk = (view.width_px * view.height_px) ** 0.5 / 224
    assert first.startswith(f"{0.5 * shrunk:.2f} µm/px · flip · {90 * view.quarter_turns}°")
    assert f"blur {view.blur_sigma_px:.1f}" in first
    assert factors == "HED × " + " ".join(f"{factor:.2f}" for factor in view.hed_factor)
    assert shifts == "HED " + " ".join(f"{shift:+.2f}" for shift in view.hed_shift)
    assert last.startswith(f"b{view.brightness:.2f} c{view.contrast:.2f} s{view.saturation:.2f}")
    assert describe(view._replace(grey=True, jitter=False), float("nan")).endswith("\ngrey")


def test_preview_true_draws_and_trains_nothing(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = [
        *("pretrain", f"shards={shards}", f"out={out}", "preview=true", "batch_size=2"),
        "model={width: 32, depth: 2, heads: 2, patch_px: 8, image_px: 32}",
        "augment={global_px: 32, local_px: 16, n_local: 2}",
    ]
    assert main(arguments) == 0
    assert [path.name for path in out.iterdir()] == ["preview.png"]
    assert str(out / "preview.png") in capsys.readouterr().out


def test_shards_of_nothing_but_damage_are_one_clear_line(shards: Path, tmp_path: Path) -> None:
    for path in shards.iterdir():
        if path.is_file():
            data = path.read_bytes()
            if path.suffix == ".tar":
                data = bytes(len(data))
            (tmp_path / path.name).write_bytes(data)
    with pytest.raises(EosinError, match=r"no tile can be shown: .*checksum"):
        preview(ShardReader(tmp_path), PLAN, tmp_path / "sheet.png")
