"""Features per slide, read back as others' code reads them."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from eosin.configs.errors import InputError
from eosin.data_curation.bag_store import BagStore
from eosin.data_curation.embed_config import EmbedOptions
from eosin.data_curation.encoder import NetworkEncoder, load_encoder
from eosin.data_curation.encoder_interface import embed_grid
from eosin.data_curation.extract import ExtractConfig, extract, plan
from eosin.data_curation.import_bags import BagsConfig, make_bags
from eosin.data_curation.manifest import TILES, read_table
from eosin.data_curation.slide import Slide
from eosin.data_curation.tiles import TileOptions
from eosin.launch.artefacts import read_json

CPU = torch.device("cpu")
EMBED = EmbedOptions(device="cpu", batch_size=4, threads=1)


@pytest.fixture(scope="module")
def slides(
    tmp_path_factory: pytest.TempPathFactory,
    write_slide: Callable[..., Path],
    tissue_pixels: NDArray[np.uint8],
) -> Path:
    """Two slides at 0.5 µm/px."""
    folder = tmp_path_factory.mktemp("slides")
    write_slide(folder / "a.tiff", [tissue_pixels], mpp=(0.5, 0.5))
    write_slide(folder / "b.tiff", [tissue_pixels[:, ::-1].copy()], mpp=(0.5, 0.5))
    return folder


@pytest.fixture(scope="module")
def encoder(
    tmp_path_factory: pytest.TempPathFactory, write_encoder_folder: Callable[..., Path]
) -> Path:
    return write_encoder_folder(tmp_path_factory.mktemp("encoder") / "net", depth=2)


@pytest.fixture(scope="module")
def done(slides: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both slides in every layout."""
    pytest.importorskip("zarr")
    out = tmp_path_factory.mktemp("done")
    layouts = ["h5", "stamp", "atlaspatch", "slide2vec", "parquet", "zarr", "bags"]
    extract(config_of(slides, str(encoder), out, layouts=layouts))
    return out


def config_of(slides: Path, encoder: str, out: Path, **options: Any) -> ExtractConfig:
    tile = TileOptions(mpp=1.0, size_px=64, workers=1)
    return ExtractConfig(slides=slides, encoder=encoder, out=out, tile=tile, embed=EMBED, **options)


def test_h5_is_read_as_clam_and_trident_read_it(slides: Path, encoder: Path, done: Path) -> None:
    # CLAM, dataset_modules/dataset_h5.py and models: features and coords, from numpy to torch
    with h5py.File(done / "h5" / "a.h5", "r") as file:
        features, coords = torch.from_numpy(file["features"][:]), file["coords"][:]
        attributes = dict(file["coords"].attrs)
        name = file["features"].attrs["encoder"]
    assert features.dtype == torch.float32 and coords.dtype == np.int64
    assert torch.nn.Linear(features.shape[1], 2)(features).shape == (len(coords), 2)
    # TRIDENT: geometry by the attributes of coords
    assert attributes["patch_size"] == 64 and attributes["patch_size_level0"] == 128
    assert attributes["level0_magnification"] == 20 and attributes["target_magnification"] == 10
    assert attributes["overlap"] == 0 and attributes["level0_width"] == 512
    assert (attributes["patch_level"], list(attributes["downsample"])) == (0, [2.0, 2.0])
    net = load_encoder(str(encoder), CPU)
    assert (name, attributes["pooling"]) == (net.name, net.pooling)
    assert attributes["encoder_digest"] == net.digest
    with Slide(slides / "a.tiff") as slide:
        for (x, y), row in zip(coords.tolist(), features.numpy(), strict=True):
            tile = slide.read_tile(x, y, 64, 1.0)
            np.testing.assert_allclose(row, net.embed([tile])[0], atol=2e-2, rtol=2e-3)
    cells = read_table(done / "tiles" / "tiles.parquet", TILES).to_pylist()
    kept = [c for c in cells if c["slide_id"] == "a" and c["status"] == "ok"]
    assert len(kept) == len(coords)


def test_parquet_and_zarr_hold_the_same(done: Path) -> None:
    zarr = pytest.importorskip("zarr")
    with h5py.File(done / "h5" / "b.h5", "r") as file:
        features, coords = file["features"][:], file["coords"][:]
    table = pq.read_table(done / "parquet" / "b.parquet")
    np.testing.assert_array_equal(np.stack(table["features"].to_numpy()), features)
    np.testing.assert_array_equal(np.stack([table["x"], table["y"]], axis=1), coords)
    assert table.schema.metadata[b"pooling"] == b"cls"
    group = zarr.open_group(str(done / "zarr" / "b.zarr"), mode="r")
    np.testing.assert_array_equal(group["features"][:], features)
    np.testing.assert_array_equal(group["coords"][:], coords)
    assert group.attrs["tile_ids"] == table["tile_id"].to_pylist()


def test_stamp_reads_micrometres(done: Path) -> None:
    """As its modeling/data.py does: feats, coords in um, and the tile's size at the root."""
    with (
        h5py.File(done / "stamp" / "a.h5", "r") as file,
        h5py.File(done / "h5" / "a.h5", "r") as other,
    ):
        assert file.attrs["unit"] == "um" and file.attrs["tile_size_um"] == 64.0
        assert file.attrs["tile_size_px"] == 64 and file.attrs["feat_type"] == "tile"
        np.testing.assert_array_equal(file["feats"][:], other["features"][:])
        np.testing.assert_allclose(file["coords"][:], other["coords"][:] * 0.5, atol=0.26)
        steps = np.diff(np.unique(file["coords"][:, 0]))
        np.testing.assert_allclose(steps / 64.0, np.round(steps / 64.0), atol=1e-6)


def test_atlaspatch_reads_its_slides(slides: Path, encoder: Path, done: Path) -> None:
    """As the example of its README reads them, and with the attributes that its code asks for."""
    import openslide
    from PIL import Image

    with h5py.File(done / "atlaspatch" / "patches" / "a.h5", "r") as file:
        coords, [name] = file["coords"][...], list(file["features"])
        features, size = file[f"features/{name}"][...], int(file.attrs["patch_size"])
        wanted = ("patch_size_level0", "target_magnification", "num_patches")
        assert [int(file.attrs[key]) for key in wanted] == [128, 10, len(coords)]
        assert file.attrs["level0_magnification"] == 20 and file.attrs["overlap"] == 0
    assert coords.dtype == np.int32 and coords.shape[1] == 5 and features.dtype == np.float32
    net = load_encoder(str(encoder), CPU)
    with openslide.OpenSlide(slides / "a.tiff") as slide:
        for (x, y, width, height, level), row in zip(coords.tolist(), features, strict=True):
            region = slide.read_region((x, y), level, (width, height)).convert("RGB")
            tile = np.asarray(region.resize((size, size), Image.Resampling.BILINEAR))
            np.testing.assert_allclose(row, net.embed([tile])[0], atol=0.1)  # resampled otherwise
    with h5py.File(done / "h5" / "a.h5", "r") as other:
        np.testing.assert_array_equal(features, other["features"][:])
        np.testing.assert_array_equal(coords[:, :2], other["coords"][:])


def test_slide2vec_reads_its_arrays(done: Path) -> None:
    """As its artifacts.py reads features, and hs2p the tiles, before and since its version 3."""
    folder = done / "slide2vec"
    meta = read_json(folder / "tile_embeddings" / "a.meta.json")
    with np.load(folder / "tile_embeddings" / "a.npz", allow_pickle=False) as file:
        features = file["features"]
    with np.load(folder / meta["coordinates_npz_path"], allow_pickle=False) as file:
        tiles = {name: file[name] for name in file.files}
    assert (meta["num_tiles"], meta["feature_dim"]) == features.shape
    assert meta["feature_dtype"] == "fp32" and meta["artifact_type"] == "tile_embeddings"
    assert (meta["tile_size_lv0"], meta["requested_tile_size_px"]) == (128, 64)
    assert meta["requested_spacing_um"] == 1.0
    np.testing.assert_array_equal(tiles["coordinates"], np.stack([tiles["x"], tiles["y"]], 1))
    np.testing.assert_array_equal(tiles["tile_index"], np.arange(len(features)))
    with h5py.File(done / "h5" / "a.h5", "r") as other:
        np.testing.assert_array_equal(features, other["features"][:])
        np.testing.assert_array_equal(tiles["coordinates"], other["coords"][:])
    cells = read_table(done / "tiles" / "tiles.parquet", TILES).to_pylist()
    tissue = {(c["level0_x"], c["level0_y"]): c["tissue_fraction"] for c in cells
              if c["slide_id"] == "a"}  # fmt: skip
    found = [tissue[float(x), float(y)] for x, y in tiles["coordinates"].tolist()]
    np.testing.assert_allclose(tiles["tissue_fractions"], found, atol=1e-6)


def test_bags_hold_the_same_and_so_do_bags_of_its_files(done: Path, tmp_path: Path) -> None:
    store = BagStore(done / "bags")
    cells = read_table(done / "tiles" / "tiles.parquet", TILES).to_pylist()
    tiles = {cell["tile_id"]: cell for cell in cells}
    for slide_id in ("a", "b"):
        bag = store.read(slide_id)
        with h5py.File(done / "h5" / f"{slide_id}.h5", "r") as file:
            rows = {tuple(xy): row for xy, row in zip(file["coords"][:].tolist(),
                                                     file["features"][:], strict=True)}  # fmt: skip
        assert len(bag) == len(rows)
        for i, tile_id in enumerate(bag.tile_ids):
            np.testing.assert_array_equal(bag.features[i], rows[tuple(bag.corner_px[i].round())])
            tile = tiles[tile_id]
            assert bag.cells[i].tolist() == [tile["column"], tile["row"]]
            assert bag.section[i] == (tile["section"] or 0)
            assert bag.centre_um[i, 0] == tile["level0_x"] * 0.5 + 32
    for layout in ("h5", "stamp", "atlaspatch", "slide2vec"):
        make_bags(BagsConfig(files=done / layout, out=tmp_path / layout))
        again = BagStore(tmp_path / layout)
        assert again.slide_ids == store.slide_ids
        np.testing.assert_array_equal(again.store.features, store.store.features)
        centres = np.concatenate([again.centres(s) for s in again.slide_ids])
        expected = np.concatenate([store.centres(s) for s in store.slide_ids])
        np.testing.assert_allclose(centres, expected, atol=0.3)  # of corners in whole pixels


def test_patch_tokens_stand_under_a_key_of_their_own(
    slides: Path, encoder: Path, done: Path, tmp_path: Path
) -> None:
    options = {"encoder": f"{encoder}@tokens", "embed": EMBED}
    extract(ExtractConfig(tiles=done / "tiles", out=tmp_path / "t", **options))
    with h5py.File(tmp_path / "t" / "h5" / "a.h5", "r") as file:
        features, tokens, coords = (file[k][:] for k in ("features", "patch_tokens", "coords"))
    with h5py.File(done / "h5" / "a.h5", "r") as file:
        np.testing.assert_array_equal(features, file["features"][:])
    net = load_encoder(str(encoder), CPU)
    assert isinstance(net, NetworkEncoder)
    with Slide(slides / "a.tiff") as slide:
        grid = net.patch_tokens([slide.read_tile(*coords[0].tolist(), 64, 1.0)])[0]
    assert tokens.shape == (len(coords), *grid.shape)
    np.testing.assert_allclose(tokens[0], grid, atol=2e-2, rtol=2e-3)


def test_a_plan_says_what_is_left(slides: Path, encoder: Path, done: Path, tmp_path: Path) -> None:
    config = config_of(slides, str(encoder), tmp_path)
    assert "then features by" in plan(config) and not (tmp_path / "tiles").exists()
    config = config_of(slides, str(encoder), done)
    assert "features each" in plan(config) and "a file a slide in h5" in plan(config)


def test_half_precision_and_tiles_that_are_there_already(
    encoder: Path, done: Path, tmp_path: Path
) -> None:
    options = {"encoder": str(encoder), "embed": EMBED, "dtype": "float16"}
    extract(ExtractConfig(tiles=done / "tiles", out=tmp_path, **options))
    with h5py.File(tmp_path / "h5" / "a.h5", "r") as file:
        half = file["features"][:]
        assert file["coords"].attrs["overlap"] == 0
    with h5py.File(done / "h5" / "a.h5", "r") as file:
        np.testing.assert_array_equal(half.astype(np.float32), file["features"][:])
    assert half.dtype == np.float16


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / "h5").glob("*.h5"))}


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_to_the_same_bytes(
    slides: Path, encoder: Path, tmp_path: Path
) -> None:
    extract(config_of(slides, str(encoder), tmp_path / "whole"))
    command = [
        sys.executable, "-m", "eosin.launch.cli", "extract", f"slides={slides}",
        f"encoder={encoder}", f"out={tmp_path / 'killed'}", "tile.mpp=1.0", "tile.size_px=64",
        "tile.workers=1", "embed.device=cpu", "embed.batch_size=4", "embed.threads=1",
    ]  # fmt: skip
    store = tmp_path / "killed" / "store"
    for reached in (tmp_path / "killed" / "tiles" / "tiles.parquet", store / "features.npy"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and not reached.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "(0 files written now)" in again.stdout
    (tmp_path / "killed" / "h5" / "a.h5").unlink()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_what_cannot_be_extracted_is_one_line(slides: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give slides, or tiles"):
        ExtractConfig(encoder="x", out=tmp_path)
    with pytest.raises(InputError, match="no encoder"):
        extract(config_of(slides, str(tmp_path / "none"), tmp_path / "out"))
    assert not (tmp_path / "out" / "tiles").exists()  # said before the slides are tiled


def test_three_lines_of_python(encoder: Path) -> None:
    """load_encoder, encoder.transform, encoder(images); and all tokens by name."""
    from PIL import Image

    net = load_encoder(str(encoder), CPU)
    assert isinstance(net, NetworkEncoder)
    tiles = np.random.default_rng(0).integers(0, 256, (2, 80, 70, 3), dtype=np.uint8)
    images = torch.stack([net.transform(Image.fromarray(tile)) for tile in tiles])
    np.testing.assert_array_equal(net(images).numpy(), net.embed(tiles))
    found = net.tokens(images, layers=[-2, -1])
    torch.testing.assert_close(found.cls, net(images))
    grid = torch.from_numpy(net.patch_tokens(tiles))
    torch.testing.assert_close(found.patch_tokens, grid)
    torch.testing.assert_close(found.patch_mean, grid.flatten(1, 2).mean(1))
    torch.testing.assert_close(found.layers[1], grid)
    assert found.layers[0].shape == grid.shape and not torch.equal(found.layers[0], grid)
    assert found.cls_patch_mean.shape == (2, 2 * found.cls.shape[1])


def test_a_region_is_embedded_part_by_part(encoder: Path) -> None:
    net = load_encoder(str(encoder), CPU)
    region = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    found = embed_grid(net, region, rows=3, columns=2)
    for row in range(3):
        for column in range(2):
            part = region[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
            expected = net.embed([part])[0]
            np.testing.assert_allclose(found[2 * row + column], expected, atol=1e-5)
    with pytest.raises(ValueError, match="no 5 × 2 equal parts"):
        embed_grid(net, region, rows=5, columns=2)


def test_class_tokens_of_the_last_four_blocks(
    tmp_path: Path, write_encoder_folder: Callable[..., Path]
) -> None:
    folder = write_encoder_folder(tmp_path / "net", depth=5)
    tiles = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    four, last = load_encoder(f"{folder}@cls4", CPU), load_encoder(f"{folder}@cls", CPU)
    features = four.embed(tiles)
    assert features.shape[1] == 4 * last.dim == four.dim
    np.testing.assert_allclose(features[:, -last.dim :], last.embed(tiles), atol=1e-5)
