"""The parts of the data path together: tars, slides and URLs give one training, from any stop."""

import contextlib
import io
import json
import multiprocessing
import os
import re
import shutil
import sys
import threading
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from eosin.configs.errors import ConfigError, EosinError
from eosin.configs.load import load_config, to_yaml
from eosin.data_curation.manifest import INDEX, SLIDES, read_table, write_table
from eosin.data_curation.shard_cache import CacheConfig, RemoteFolder
from eosin.data_curation.shard_marker import read_marker
from eosin.data_curation.shard_reader import ShardReader
from eosin.data_curation.shards import ShardConfig, shard
from eosin.data_curation.tiles import TileConfig, tile
from eosin.launch.cli import main
from eosin.pretrain import gradients as gradients_module
from eosin.pretrain.augment import AugmentConfig
from eosin.pretrain.batch import Batch, Crops, Tiles
from eosin.pretrain.checkpoint import list_checkpoints, read_tensors
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.loader import LoaderConfig, batches, open_shards
from eosin.pretrain.order import MixtureConfig
from eosin.pretrain.stain import StainTemplateConfig
from eosin.pretrain.steps import BatchPlan
from eosin.pretrain.train import pretrain

SIZE_PX = 64
"""Side of the tiles, and of the coded tiles of the slides."""
BATCH = 8
AUGMENT = AugmentConfig(global_px=16, local_px=8, n_local=2, render="device")
PLAN = BatchPlan(augment=AUGMENT, batch_size=BATCH, seed=3, patch_px=8, window_shards=2)
MIXED = replace(PLAN, mixture=MixtureConfig(column="slide_id", weights={"case_0": 3, "case_1": 1}))
TINY = [
    "steps=3", "batch_size=4", "threads=1", "log_every=1", "checkpoints.every=2", "device=cpu",
    "model={width: 32, depth: 2, heads: 2, patch_px: 8, image_px: 32, drop_path: 0.5}",
    "objective.head={prototypes: 32, hidden: 16, bottleneck: 8}",
    "augment={global_px: 32, local_px: 16, n_local: 2}",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def no_curves() -> Iterator[None]:
    """Drawing takes seconds, and has tests of its own."""
    stub = types.ModuleType("eosin.launch.curves")
    stub.loss_curves = lambda *_: None  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, stub.__name__, stub)
        yield


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides of glass with a disc of tissue, and ``out`` of `eosin tile`; not to change."""
    folder = tmp_path_factory.mktemp("tiled")
    (folder / "slides").mkdir()
    rng = np.random.default_rng(0)
    for number in range(2):
        image = np.full((512, 512, 3), (243, 242, 244), np.uint8)
        cv2.circle(image, (256, 256), 200, (226, 160, 195), thickness=-1)
        for x, y in rng.integers(110, 402, (400, 2)).tolist():
            cv2.circle(image, (x, y), 4, (95, 60, 140), thickness=-1)
        image = np.clip(image + rng.normal(0, 2, image.shape), 0, 255).astype(np.uint8)
        with tifffile.TiffWriter(folder / "slides" / f"case_{number}.tiff") as tiff:
            for level in (image, np.ascontiguousarray(image[::2, ::2])):
                tiff.write(
                    level, photometric="rgb", tile=(SIZE_PX, SIZE_PX), metadata=None,
                    resolution=(2e4, 2e4), resolutionunit="CENTIMETER",
                    subfiletype=int(level is not image),
                )  # fmt: skip
    tile(TileConfig(slides=folder / "slides", out=folder / "out", size_px=SIZE_PX, workers=1))
    return folder


def make_shards(tiled: Path, out: Path, pixels: str) -> Path:
    shard(
        load_config(
            ShardConfig, (),
            [f"tiles={tiled / 'out'}", f"out={out}", f"pixels={pixels}", "records_per_shard=12",
             "workers=1", "mix_slides=1"],
        )
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def tars(tiled: Path) -> Path:
    return make_shards(tiled, tiled / "tars", "copy")


@pytest.fixture(scope="module")
def places(tiled: Path) -> Path:
    return make_shards(tiled, tiled / "places", "slides")


def made(
    shards: Path, plan: BatchPlan, last_step: int, loader: LoaderConfig | None = None
) -> list[Batch]:
    reader = ShardReader(shards)
    return list(batches(reader, plan, loader or LoaderConfig(), first_step=0, last_step=last_step))


def padded(shards: Path, row: Tensor, like: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """A tile at all sizes that fit, in the corner of black."""
    with ShardReader(shards) as reader:
        for factor in (1, 2, 4):
            image = reader.image(int(row), factor)
            if len(image) <= len(like):
                yield np.pad(image, [(0, len(like) - len(image))] * 2 + [(0, 0)])


@pytest.mark.parametrize("plan", [PLAN, MIXED], ids=["even", "mixture"])
def test_tars_and_slides_give_the_same_tiles_and_draws(
    tars: Path, places: Path, plan: BatchPlan
) -> None:
    n = len(ShardReader(tars))
    steps = 2 * n // BATCH  # two epochs
    seen, heights = set(), set()
    for one, other in zip(made(tars, plan, steps), made(places, plan, steps), strict=True):
        assert one.rows.tolist() == other.rows.tolist() and not {**one.damaged, **other.damaged}
        assert isinstance(one.images, Tiles) and isinstance(other.images, Tiles)
        assert torch.equal(one.images.parameters, other.images.parameters)
        assert one.images.sizes == other.images.sizes
        assert one.images.pixels.shape == other.images.pixels.shape
        assert np.array_equal(one.masks, other.masks)
        for images, shards in ((one.images, tars), (other.images, places)):
            tile = images.pixels[0].numpy()
            assert any(np.array_equal(tile, whole) for whole in padded(shards, one.rows[0], tile))
        seen |= set(one.rows.tolist())
        heights.add(one.images.pixels.shape[1])
    assert seen == set(range(n))
    assert heights == {SIZE_PX, SIZE_PX // 2}  # some batches were decoded smaller


def jpeg_loss(pixels: NDArray[np.uint8]) -> float:
    """Mean |Δ| over a tile of an independent encoder, 4:4:4 at quality 90."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90, subsampling=0)
    return float(np.abs(np.asarray(Image.open(buffer)).astype(int) - pixels).mean())


@pytest.mark.parametrize("decode", ["full", "scaled"])
def test_crops_of_tars_and_slides_differ_by_jpeg_alone(
    tars: Path, places: Path, decode: str
) -> None:
    with ShardReader(tars) as copies, ShardReader(places) as slides:
        for row in (0, 40, 80):
            pixels = slides.image(row)
            loss = np.abs(copies.image(row).astype(int) - pixels).mean()
            assert 0 < loss < 1.1 * jpeg_loss(pixels)
    plan = replace(PLAN, augment=replace(AUGMENT, render="worker", decode=decode))
    loader = LoaderConfig(workers=1, prefetch=1)
    for one, other in zip(made(tars, plan, 6), made(places, plan, 6, loader), strict=True):
        assert isinstance(one.images, Crops) and isinstance(other.images, Crops)
        for crops, likewise in zip(one.images, other.images, strict=True):
            delta = (crops.float() - likewise.float()).abs()
            assert 0 < delta.mean() < 1  # level; measured 0.4 to 0.6
            assert delta.max() < 25  # measured 13
            strangers = (crops.float() - likewise.float().roll(1, 1)).abs().mean()
            assert strangers > 10


def test_a_region_that_broke_after_indexing_is_told_once_and_replaced(
    tiled: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    for name in ("slides", "out"):
        shutil.copytree(tiled / name, own / name)
    table = read_table(own / "out" / "slides.parquet", SLIDES)
    paths = pa.array([path.replace(str(tiled), str(own)) for path in table["path"].to_pylist()])
    at = table.column_names.index("path")
    write_table(table.set_column(at, "path", paths), own / "out" / "slides.parquet", SLIDES)
    shards = make_shards(own, tmp_path / "shards", "slides")
    n = len(ShardReader(shards))
    steps = n // BATCH  # the first epoch
    assert n % BATCH == 0
    order = [row for batch in made(shards, PLAN, steps) for row in batch.rows.tolist()]
    assert sorted(order) == list(range(n))

    path = own / "slides" / "case_1.tiff"
    before = path.stat()
    with tifffile.TiffFile(path, mode="r+") as tiff:  # rows of coded tiles from y = 320 on
        tag = tiff.pages.first.tags["TileOffsets"]
        kept = tag.value[: 5 * 8]
        tag.overwrite([*kept, *[before.st_size + 10_000] * (len(tag.value) - len(kept))])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    index = read_table(shards / "index.parquet", INDEX).to_pylist()
    broken = {
        number for number, row in enumerate(index)
        if row["slide_id"] == "case_1" and row["level0_y"] + SIZE_PX > 320
    }  # fmt: skip
    assert 8 < len(broken) < 40
    expected = []
    for place, row in enumerate(order):  # what stands in is looked for from half an epoch further
        others = (order[(place + n // 2 + more) % n] for more in range(n))
        expected.append(next(o for o in others if o not in broken) if row in broken else row)
    budget = LoaderConfig(max_damaged=(len(broken) + 0.5) / n)
    found = made(shards, PLAN, steps, budget)
    assert [row for batch in found for row in batch.rows.tolist()] == expected
    told = [item for batch in found for item in batch.damaged.items()]
    assert sorted(row for row, _ in told) == sorted(broken)
    assert all(
        f"record '{index[row]['key']}'" in reason and "case_1.tiff: not decodable" in reason
        for row, reason in told
    )
    with pytest.raises(EosinError, match=rf"{len(broken)} damaged of {n} records.*max_damaged"):
        made(shards, PLAN, steps, replace(budget, max_damaged=(len(broken) - 0.5) / n))


def arguments(shards: Path | str, out: Path, *overrides: str) -> list[str]:
    return [f"shards={shards}", f"out={out}", *TINY, *overrides]


def config_for(shards: Path | str, out: Path, *overrides: str) -> PretrainConfig:
    return load_config(PretrainConfig, (), arguments(shards, out, *overrides))


def weights(run: Path) -> dict[str, Tensor]:
    return read_tensors(list_checkpoints(run / "checkpoints")[0], "model.")


def assert_same_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


RUN = ["steps=16", "checkpoints.every=4"]


@pytest.fixture(scope="module")
def from_folder(tars: Path) -> dict[str, Tensor]:
    """What a run from the folder learns."""
    pretrain(config_for(tars, tars.parent / "run", *RUN))
    return weights(tars.parent / "run")


def bytes_in(cache: Path) -> int:
    """Of the shards in a cache, those that are being fetched included."""
    total = 0
    for path in cache.glob("*"):
        if ".tar" in path.name:
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


class Watch(threading.Thread):
    """Looks at the size of a cache all the time."""

    def __init__(self, cache: Path) -> None:
        super().__init__(daemon=True)
        self.cache, self.largest, self.ended = cache, 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.001):
            self.largest = max(self.largest, bytes_in(self.cache))

    def end(self) -> int:
        self.ended.set()
        self.join()
        return self.largest


def cache_of(tars: Path, folder: Path, shards: float) -> tuple[list[str], float]:
    """Overrides for a cache that holds so many shards, and its size in bytes."""
    size = max(path.stat().st_size for path in tars.glob("*.tar")) * shards
    return [f"loader.cache={folder}", f"loader.cache_gb={size / 1e9}"], size


def test_a_run_from_a_url_is_that_from_the_folder_in_a_bounded_cache(
    tars: Path, from_folder: dict[str, Tensor], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    overrides, bound = cache_of(tars, cache, 3.1)
    sizes = [path.stat().st_size for path in tars.glob("*.tar")]
    assert bound < sum(sizes) / 2
    watch = Watch(cache)
    watch.start()
    argv = arguments(f"file://{tars}", tmp_path / "url", *RUN, *overrides)
    assert main(["pretrain", *argv, "loader.workers=2"]) == 0
    assert max(sizes) < watch.end() <= bound + max(sizes)
    assert_same_weights(weights(tmp_path / "url"), from_folder)

    shards = read_marker(tars)["shards"]
    name_of = {cache / f"{described['xxh3_128']}.tar": name for name, described in shards.items()}
    kept = list(cache.glob("*.tar"))
    assert 1 <= len(kept) <= 4  # the four threads may all fetch at once
    loader = config_for(tars, tmp_path, *overrides).loader
    with open_shards(f"file://{tars}", loader) as reader, ShardReader(tars) as local:
        for path in kept:
            path.write_bytes(path.read_bytes()[:-5000])
            first = reader.index.row(reader.index.names.index(name_of[path]), 0)
            assert reader.read(first) == local.read(first)
            assert path.read_bytes() == (tars / name_of[path]).read_bytes()


def test_shards_that_are_fetched_at_once_count_each_other(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    _, bound = cache_of(tars, cache, 4.1)
    store = RemoteFolder(f"file://{tars}", CacheConfig(folder=cache, max_gb=bound / 1e9))
    names = sorted(store.marker["shards"])
    for name in names[:4]:
        os.close(store.open(name))
    together = threading.Barrier(3, timeout=30)
    real = type(store._files).open
    largest = []

    def open_together(self: object, path: str, *args: object, **options: object) -> object:
        together.wait()  # all have made room
        largest.append(bytes_in(cache))
        together.wait()
        return real(self, path, *args, **options)

    monkeypatch.setattr(type(store._files), "open", open_together)
    threads = [
        threading.Thread(target=lambda name=name: os.close(store.open(name)))  # type: ignore[misc]
        for name in names[4:7]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bound * 3 / 4 < max(*largest, bytes_in(cache)) <= bound


def test_a_source_that_vanishes_ends_the_run_in_one_line_until_it_is_back(
    tars: Path,
    from_folder: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, away = tmp_path / "source", tmp_path / "away"
    shutil.copytree(tars, source)
    overrides, _ = cache_of(tars, tmp_path / "cache", 1.1)
    argv = ["pretrain", *arguments(f"file://{source}", tmp_path / "run", *RUN, *overrides)]
    argv += ["loader.workers=2", "loader.prefetch=1", "loader.max_open=1"]
    real = gradients_module.forward

    def forward(config, model, batch, *rest):  # type: ignore[no-untyped-def]
        if batch.step == 4:
            source.rename(away)
        return real(config, model, batch, *rest)

    monkeypatch.setattr(gradients_module, "forward", forward)
    assert main(argv) == 2
    assert not multiprocessing.active_children()
    said = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"eosin: file://{source}/\d+\.tar is missing", said[-1])
    assert not any("Traceback" in line for line in said)
    monkeypatch.setattr(gradients_module, "forward", real)
    assert main(argv) == 2
    said = capsys.readouterr().err.splitlines()
    missing = f"{source}/shards.json does not exist: no finished shards are there"
    assert said == [f"eosin: file://{missing}"]
    away.rename(source)
    assert main([*argv[:-3], "loader.workers=0"]) == 0
    assert_same_weights(weights(tmp_path / "run"), from_folder)


@pytest.mark.parametrize("changes", [
    ["augment.resolutions=[{global_px: 32, local_px: 16, share: 1}, "
     "{global_px: 48, local_px: 24, share: 1}]"],
    ["augment.global_zoom=[0.5,1.5]", "augment.local_zoom=[0.5,2]", "augment.mpp=0.5"],
    ["augment.stain={probability: 1.0}", "mixture={column: slide_id, power: 0.5}"],
], ids=["resolutions", "zoom", "stain"])  # fmt: skip
def test_what_the_device_renders_trains_and_resumes_bit_for_bit(
    changes: list[str], tars: Path, tmp_path: Path
) -> None:
    config = config_for(tars, tmp_path / "run", "augment.render=device", *changes)
    pretrain(config)
    whole, logged = weights(tmp_path / "run"), tmp_path / "run" / "metrics.jsonl"
    losses = [json.loads(line)["loss"] for line in logged.read_text().splitlines()]
    assert len(losses) == 3 and np.isfinite(losses).all()
    newest, earlier = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert earlier.name.endswith("2")
    shutil.rmtree(newest)
    (tmp_path / "run" / "done.json").unlink()
    pretrain(config)
    assert_same_weights(whole, weights(tmp_path / "run"))
    pretrain(config_for(tars, tmp_path / "other", "augment.render=device"))
    other = weights(tmp_path / "other")
    assert not all(torch.equal(whole[name], other[name]) for name in whole)


def test_fitted_stains_go_into_a_run_and_a_plan_shows_the_mixture(
    tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted = tmp_path / "x.yaml"
    assert main(["stain", f"shards={tars}", f"out={fitted}"]) == 0
    argv = ["pretrain", "--config", str(fitted), *arguments(tars, tmp_path / "run")]
    assert main(argv) == 0
    used = load_config(PretrainConfig, [tmp_path / "run" / "config.yaml"])
    wanted = load_config(PretrainConfig, [fitted], arguments(tars, tmp_path))
    assert used.augment.stain == wanted.augment.stain != StainTemplateConfig()
    assert used.augment.stain.probability == 0.5
    capsys.readouterr()
    mixture = "mixture={column: slide_id, weights: {case_0: 3, case_1: 1}}"
    assert main([*argv, mixture, "--dry-run"]) == 0
    lines = capsys.readouterr().out.replace("'", "").splitlines()
    assert "slide_id=case_0: 44 records, 75.0% of the tiles, each 1.50 times an epoch" in lines
    assert "slide_id=case_1: 44 records, 25.0% of the tiles, each 0.50 times an epoch" in lines
    assert main([*argv, "mixture={column: mpp, weights: {'0.5': 1}}", "--dry-run"]) == 0
    assert "all records have mpp='0.5': the mixture changes nothing" in capsys.readouterr().out


NUMBERS = "{column: mpp, weights: {0.25: 1, 0.5: 3}}"


def test_values_that_look_like_numbers_need_quotes(tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text(f"mixture: {NUMBERS}\n")
    quoted = NUMBERS.replace("0.25", "'0.25'").replace("0.5:", "'0.5':")
    (tmp_path / "quoted.yaml").write_text(f"mixture: {quoted}\n")
    argv = arguments("shards", tmp_path)
    words = r"mixture\.weights\.0\.25: .*: write it in quotes, as in \{'0\.25': 1\}"
    with pytest.raises(ConfigError, match=words):
        load_config(PretrainConfig, (), [*argv, f"mixture={NUMBERS}"])
    with pytest.raises(ConfigError, match=rf"plain\.yaml, {words}"):
        load_config(PretrainConfig, [tmp_path / "plain.yaml"], argv)
    (tmp_path / "null.yaml").write_text("mixture: {column: organ, weights: {null: 1}}\n")
    with pytest.raises(ConfigError, match=r"null\.yaml .*NoneType.*: write it in quotes"):
        load_config(PretrainConfig, [tmp_path / "null.yaml"], argv)
    one = load_config(PretrainConfig, (), [*argv, f"mixture={quoted}"])
    other = load_config(PretrainConfig, [tmp_path / "quoted.yaml"], argv)
    assert one == other and one.mixture.weights == {"0.25": 1.0, "0.5": 3.0}
    (tmp_path / "again.yaml").write_text(to_yaml(one))
    assert load_config(PretrainConfig, [tmp_path / "again.yaml"]) == one
