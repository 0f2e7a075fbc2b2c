"""`eosin embed`: the features of the tiles themselves, whoever computes them, whatever kills it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from ranks import ranks_of

import eosin.data_curation.embed_tiles as module
from eosin.configs.errors import InputError, TooManyFailedError
from eosin.data_curation.embed_config import EmbedConfig
from eosin.data_curation.embed_tiles import embed, plan
from eosin.data_curation.encoder import load_encoder
from eosin.data_curation.features import open_features
from eosin.data_curation.manifest import FEATURES_FAILED, SELECTION, TILES, read_table
from eosin.data_curation.selection import SelectConfig, write_selection
from eosin.data_curation.shards import ShardConfig, shard
from eosin.data_curation.stain_texture import stain_texture
from eosin.data_curation.tiles import TileConfig, tile
from eosin.launch.cli import main

BUILTIN = "builtin:stain-texture"


@pytest.fixture(scope="module")
def tiled(
    tmp_path_factory: pytest.TempPathFactory,
    write_slide: Callable[..., Path],
    tissue_pixels: NDArray[np.uint8],
) -> Path:
    """A folder with three ``slides`` and their ``tiles``; not to be changed."""
    folder = tmp_path_factory.mktemp("tiled")
    for number in range(3):
        pixels = np.roll(tissue_pixels, 9 * number, axis=1)
        levels = [pixels, np.ascontiguousarray(pixels[::2, ::2])]
        write_slide(folder / "slides" / f"case{number}.tiff", levels)
    tile(
        TileConfig(
            slides=folder / "slides",
            out=folder / "tiles",
            mpp=1.0,
            size_px=32,
            step_px=16,
            workers=1,
        )
    )
    return folder


def config_of(tiled: Path, out: Path, **keys: object) -> EmbedConfig:
    settings = {"encoder": BUILTIN, "tiles": tiled / "tiles", "threads": 2, **keys}
    return EmbedConfig(out=out, **settings)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_timm_folder(folder: Path) -> Path:
    """A small timm network with random weights, as timm itself saves one."""
    from eosin.data_curation.torchvision_import import import_timm

    timm = import_timm()
    from timm.models import save_for_hf

    torch.manual_seed(0)
    model_args = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **model_args)
    model.pretrained_cfg.update(input_size=(3, 32, 32), num_classes=0, crop_pct=1.0)
    save_for_hf(model, str(folder), model_args=model_args, safe_serialization=True)
    return folder


def test_features_are_those_of_the_pixels_in_the_order_of_the_tiles(
    tiled: Path, tmp_path: Path
) -> None:
    embed(config_of(tiled, tmp_path / "out"))
    store = open_features(tmp_path / "out")
    tiles = read_table(tiled / "tiles" / "tiles.parquet", TILES).to_pylist()
    tiles = [row for row in tiles if row["status"] == "ok"]
    assert store.rows["tile_id"].to_pylist() == [row["tile_id"] for row in tiles]
    assert store.rows["level0_x"].to_pylist() == [row["level0_x"] for row in tiles]
    assert len(tiles) > 600
    for row in range(0, len(tiles), 97):
        place = tiles[row]
        with openslide.OpenSlide(tiled / "slides" / f"{place['slide_id']}.tiff") as slide:
            corner = (int(place["level0_x"]), int(place["level0_y"]))
            pixels = np.asarray(slide.read_region(corner, 0, (32, 32)).convert("RGB"))
        np.testing.assert_allclose(store.features[row], stain_texture(pixels), rtol=1e-3, atol=1e-3)


def test_bags_are_slices_slide_by_slide(tiled: Path, tmp_path: Path) -> None:
    embed(config_of(tiled, tmp_path / "out"))
    store = open_features(tmp_path / "out")
    offsets = np.load(tmp_path / "out" / "offsets.npy", allow_pickle=False)
    assert offsets.dtype == np.int64 and np.array_equal(offsets, store.offsets)
    slides = np.array(store.rows["slide_id"].to_pylist())
    bags = dict(store.bags())
    assert list(bags) == ["case0", "case1", "case2"]
    for slide, features in bags.items():
        assert np.array_equal(features, store.features[slides == slide])


def test_a_network_of_timm_gives_what_it_gives_alone(tiled: Path, tmp_path: Path) -> None:
    folder = str(write_timm_folder(tmp_path / "encoder"))
    embed(config_of(tiled, tmp_path / "out", encoder=folder, device="cpu", batch_size=7))
    store = open_features(tmp_path / "out")
    encoder = load_encoder(folder, torch.device("cpu"))
    tiles = read_table(tiled / "tiles" / "tiles.parquet", TILES).to_pylist()
    first = next(row for row in tiles if row["status"] == "ok")
    with openslide.OpenSlide(tiled / "slides" / "case0.tiff") as slide:
        corner = (int(first["level0_x"]), int(first["level0_y"]))
        pixels = np.asarray(slide.read_region(corner, 0, (32, 32)).convert("RGB"))
    np.testing.assert_allclose(store.features[0], encoder.embed([pixels])[0], rtol=2e-3, atol=2e-3)
    assert store.meta["encoder_digest"] == encoder.digest


def test_any_number_of_processes_and_threads_gives_the_same_bytes(
    tiled: Path, tmp_path: Path
) -> None:
    embed(config_of(tiled, tmp_path / "alone", threads=1))
    arguments = ["-m", "eosin.launch.cli", "embed", f"tiles={tiled / 'tiles'}", "device=cpu"]
    arguments += [f"encoder={BUILTIN}", f"out={tmp_path / 'two'}", "threads=2"]
    with ranks_of(2, arguments, tmp_path / "log") as two:
        for rank in two:
            assert rank.process.wait(120) == 0, rank.log.read_text()
    assert contents(tmp_path / "two") == contents(tmp_path / "alone")


def test_a_killed_command_goes_on_to_the_same_bytes(tiled: Path, tmp_path: Path) -> None:
    embed(config_of(tiled, tmp_path / "whole"))
    command = [sys.executable, "-m", "eosin.launch.cli", "embed", f"tiles={tiled / 'tiles'}"]
    command += [f"encoder={BUILTIN}", f"out={tmp_path / 'out'}", "threads=1"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    parts = tmp_path / "out" / ".parts"
    while process.poll() is None and not list(parts.glob("*.safetensors")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    begun = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.safetensors")}
    assert begun and not (tmp_path / "out" / "meta.json").exists()
    embed(config_of(tiled, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_second_call_reads_nothing_and_another_encoder_reads_all(
    tiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiled, tmp_path / "out")
    embed(config)
    before = contents(config.out)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_compute", lambda *_: pytest.fail("computed again"))
        embed(config)
    assert contents(config.out) == before
    embed(config_of(tiled, config.out, encoder="builtin:mean-colour"))
    assert open_features(config.out).features.shape[1] == 3


def test_a_selection_is_obeyed(tiled: Path, tmp_path: Path) -> None:
    chosen = tmp_path / "selection.parquet"
    write_selection(tiled / "tiles" / "tiles.parquet", chosen, SelectConfig(max_tiles_per_slide=5))
    embed(config_of(tiled, tmp_path / "out", selection=chosen))
    ids = open_features(tmp_path / "out").rows["tile_id"].to_pylist()
    assert ids == read_table(chosen, SELECTION)["tile_id"].to_pylist() and len(ids) == 15


def test_tiles_that_cannot_be_read_are_named_and_have_no_row(
    tiled: Path, tmp_path: Path, break_tiles: Callable[..., None]
) -> None:
    shutil.copytree(tiled / "slides", tmp_path / "slides")
    tile(
        TileConfig(
            slides=tmp_path / "slides", out=tmp_path / "tiles", mpp=1.0, size_px=32, workers=1
        )
    )
    break_tiles(tmp_path / "slides" / "case1.tiff", count=24)
    config = config_of(tmp_path, tmp_path / "out")
    with pytest.raises(TooManyFailedError, match=r"case1\.tiff"):
        embed(config)
    failed = read_table(config.out / "failed.parquet", FEATURES_FAILED).to_pylist()
    tiles = read_table(tmp_path / "tiles" / "tiles.parquet", TILES).to_pylist()
    ok = [row["tile_id"] for row in tiles if row["status"] == "ok"]
    kept = open_features(config.out).rows["tile_id"].to_pylist()
    lost = [row["tile_id"] for row in failed]
    assert sorted(kept + lost) == sorted(ok) and 0 < len(lost) < 60
    assert all(name.startswith("case1_") for name in lost)
    embed(config_of(tmp_path, config.out, max_failed=1.0))  # nothing is computed again


def test_images_and_shards_give_the_features_of_their_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(5):
        pixels = rng.integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"t{number}.png")
    (tmp_path / "images" / "t5.png").write_bytes(b"no image")
    embed(
        EmbedConfig(images=tmp_path / "images", encoder=BUILTIN, out=tmp_path / "a", max_failed=0.5)
    )
    store = open_features(tmp_path / "a")
    assert store.rows["tile_id"].to_pylist() == [f"t{number}" for number in range(5)]
    assert store.offsets is None and not (tmp_path / "a" / "offsets.npy").exists()
    with pytest.raises(InputError, match="slide by slide"):
        next(store.bags())
    (failed,) = read_table(tmp_path / "a" / "failed.parquet", FEATURES_FAILED).to_pylist()
    assert failed["tile_id"] == "t5" and failed["source"].endswith("t5.png")
    for number in range(5):
        with Image.open(tmp_path / "images" / f"t{number}.png") as image:
            expected = stain_texture(np.asarray(image))
        np.testing.assert_allclose(store.features[number], expected, rtol=1e-3, atol=1e-3)
    (tmp_path / "images" / "t5.png").unlink()
    shard(ShardConfig(images=tmp_path / "images", out=tmp_path / "shards", workers=1))
    embed(EmbedConfig(shards=str(tmp_path / "shards"), encoder=BUILTIN, out=tmp_path / "b"))
    again = open_features(tmp_path / "b")
    order = np.argsort(again.rows["tile_id"].to_pylist())
    assert np.array_equal(again.features[order], store.features)


def test_a_dry_run_counts_and_writes_nothing(tiled: Path, tmp_path: Path) -> None:
    said = plan(config_of(tiled, tmp_path / "out"))
    assert "GB" in said and "tiles/s" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (["images=."], "encoder is missing"),
        (["encoder=builtin:nose", "images=IMAGES"], "stain-texture"),
        (["encoder=builtin:stain-texture"], "one of tiles, images and shards"),
        (["encoder=builtin:stain-texture", "images=IMAGES", "selection=x"], "selection"),
        (["encoder=builtin:stain-texture", "tiles=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    keys: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    keys = [key.replace("IMAGES", str(tmp_path)) for key in keys]
    assert main(["embed", *keys, f"out={tmp_path / 'out'}"]) == 2
    assert named in capsys.readouterr().err
