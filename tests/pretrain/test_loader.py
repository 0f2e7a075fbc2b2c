"""Batches from shards: the same for any number of workers, from any step, with damage counted."""

import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eosin.configs.errors import ConfigError, EosinError
from eosin.data_curation.shard_reader import ShardReader
from eosin.data_curation.shards import ShardConfig, shard
from eosin.pretrain import loader as loader_module
from eosin.pretrain.augment import AugmentConfig, draw_view, render_view
from eosin.pretrain.loader import Batch, LoaderConfig, batches, normalise
from eosin.pretrain.order import epoch_order, locate

N = 10
BATCH = 4
AUGMENT = AugmentConfig(global_px=32, local_px=16, n_local=3)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of ten PNG tiles, some of odd sizes."""
    folder = tmp_path_factory.mktemp("tiles")
    rng = np.random.default_rng(0)
    for number in range(N):
        hw = (50, 42) if number % 3 == 0 else (50, 50)
        image = rng.integers(0, 256, (*hw, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{number}.png")
    shards = folder.parent / f"{folder.name}-shards"
    shard(ShardConfig(images=folder, out=shards, workers=1))
    return shards


@pytest.fixture
def shards(pristine: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    copy = tmp_path / "shards"
    copy.mkdir()
    for path in pristine.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


def read(
    shards: Path,
    first_step: int = 0,
    last_step: int = 6,
    workers: int = 0,
    max_damaged: float = 0.0,
    augment: AugmentConfig = AUGMENT,
) -> list[Batch]:
    return list(
        batches(
            shards,
            augment,
            LoaderConfig(workers=workers, max_damaged=max_damaged),
            batch_size=BATCH,
            seed=7,
            first_step=first_step,
            last_step=last_step,
        )
    )


def content(found: list[Batch]) -> list[tuple[object, ...]]:
    return [
        (
            batch.step,
            batch.global_crops.numpy().tobytes(),
            batch.local_crops.numpy().tobytes(),
            batch.rows.tolist(),
            dict(batch.damaged),
        )
        for batch in found
    ]


def damage(shards: Path, rows: list[int]) -> None:
    """Flips one byte within each of the records."""
    reader = ShardReader(shards)
    for row in rows:
        record = reader.index.slice(row, 1).to_pylist()[0]
        path = shards / record["shard"]
        data = bytearray(path.read_bytes())
        data[record["offset"] + record["size"] // 2] ^= 0xFF
        path.write_bytes(data)


def test_a_batch_holds_the_crops_of_its_places_view_by_view(pristine: Path) -> None:
    reader = ShardReader(pristine)
    batch = read(pristine)[2]  # samples 8 … 11: two of the first epoch, two of the second
    assert batch.step == 2
    assert batch.global_crops.shape == (2, BATCH, 3, 32, 32)
    assert batch.local_crops.shape == (3, BATCH, 3, 16, 16)
    epochs, positions = locate(2, BATCH, N)
    assert epochs.tolist() == [0, 0, 1, 1]
    for sample, (epoch, position) in enumerate(zip(epochs, positions, strict=True)):
        row = epoch_order(7, int(epoch), N)[position]
        assert batch.rows[sample] == row
        tile = reader.image(int(row))
        crops = [*batch.global_crops[:, sample], *batch.local_crops[:, sample]]
        for index, crop in enumerate(crops):
            view = draw_view(AUGMENT, 7, int(epoch), int(position), index, tile.shape[:2])
            assert np.array_equal(crop.permute(1, 2, 0).numpy(), render_view(tile, view))


def test_any_number_of_workers_gives_the_same_batches(pristine: Path) -> None:
    alone = content(read(pristine))
    assert content(read(pristine, workers=1)) == alone
    assert content(read(pristine, workers=2)) == alone


@pytest.mark.pitfall(20)
def test_a_later_first_step_gives_the_rest_of_the_same_batches(pristine: Path) -> None:
    whole = content(read(pristine))
    for first_step in (1, 3, 6):
        assert content(read(pristine, first_step=first_step)) == whole[first_step:]
    assert content(read(pristine, first_step=4, workers=2)) == whole[4:]


def test_each_tile_comes_once_an_epoch_though_batches_straddle_epochs(pristine: Path) -> None:
    rows = [row for batch in read(pristine, last_step=10) for row in batch.rows.tolist()]
    for epoch in range(4):
        assert sorted(rows[epoch * N : (epoch + 1) * N]) == list(range(N))


def test_no_local_crops_is_an_empty_tensor(pristine: Path) -> None:
    batch = read(pristine, last_step=1, augment=AugmentConfig(global_px=32, n_local=0))[0]
    assert batch.local_crops.shape == (0, BATCH, 3, 98, 98)


def test_the_trainers_random_numbers_are_left_alone(pristine: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    read(pristine, last_step=2, workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_fewer_tiles_than_a_batch_is_one_clear_line(pristine: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds 10 tiles, fewer than one batch of 11") as raised:
        batches(pristine, AUGMENT, LoaderConfig(), batch_size=11, seed=0, first_step=0, last_step=1)
    assert "\n" not in str(raised.value)


def test_a_damaged_record_is_replaced_by_the_next_in_the_order_and_named_once(
    shards: Path,
) -> None:
    whole = read(shards)
    order = epoch_order(7, 0, N).tolist()
    damaged_row, next_row = order[5], order[6]
    key = ShardReader(shards).index["key"][damaged_row].as_py()
    damage(shards, [damaged_row])
    found = read(shards, max_damaged=0.1)
    assert content(read(shards, max_damaged=0.1, workers=2)) == content(found)
    assert found[1].rows.tolist() == [order[4], next_row, next_row, order[7]]
    assert not torch.equal(found[1].global_crops[0, 1], found[1].global_crops[0, 2])
    reasons = [reason for batch in found for reason in batch.damaged.values()]
    assert len(reasons) == 1  # though it was met in each epoch
    assert f"'{key}'" in reasons[0]
    for ours, theirs in zip(found, whole, strict=True):
        kept = theirs.rows != damaged_row
        assert torch.equal(ours.rows[kept], theirs.rows[kept])
        assert torch.equal(ours.global_crops[:, kept], theirs.global_crops[:, kept])


@pytest.mark.parametrize("workers", [0, 1])
def test_more_damage_than_allowed_stops_the_run_after_what_was_whole(
    shards: Path, workers: int
) -> None:
    order = epoch_order(7, 0, N).tolist()
    damage(shards, [order[1], order[9]])
    stream = batches(
        shards,
        AUGMENT,
        LoaderConfig(workers=workers, max_damaged=0.1),
        batch_size=BATCH,
        seed=7,
        first_step=0,
        last_step=9,
    )
    assert [next(stream).step, next(stream).step] == [0, 1]
    with pytest.raises(EosinError, match=r"2 damaged of 10 records.*allows 1") as raised:
        next(stream)
    assert "\n" not in str(raised.value)
    assert "eosin shard verify" in str(raised.value)


def test_nothing_but_damage_ends_with_one_line(shards: Path) -> None:
    damage(shards, list(range(N)))
    with pytest.raises(EosinError, match="1 damaged of 10 records"):
        read(shards, max_damaged=0.0)


def test_a_killed_worker_ends_with_one_line(pristine: Path) -> None:
    others = {child.pid for child in multiprocessing.active_children()}
    stream = batches(
        pristine,
        AUGMENT,
        LoaderConfig(workers=1),
        batch_size=BATCH,
        seed=7,
        first_step=0,
        last_step=10_000,
    )
    next(stream)
    (worker,) = {child.pid for child in multiprocessing.active_children()} - others
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(EosinError, match="a process that makes batches died") as raised:
        list(stream)
    assert "\n" not in str(raised.value)


def test_too_little_shared_memory_is_said_before_a_worker_dies_of_it(
    pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 64_000})
    monkeypatch.setattr(loader_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"where 0 MB are free: lower"):
        read(pristine, workers=1)


def test_unfinished_shards_are_refused_at_once(shards: Path) -> None:
    (shards / "shards.json").unlink()
    with pytest.raises(EosinError, match="finished"):
        read(shards)


def test_bytes_are_normalised_as_the_formula_says() -> None:
    crops = torch.randint(0, 256, (2, 4, 3, 8, 8), dtype=torch.uint8)
    mean, std = (0.7, 0.5, 0.6), (0.2, 0.3, 0.25)
    result = normalise(crops, mean, std, torch.float32)
    for channel in range(3):
        expected = (crops[:, :, channel].double() / 255 - mean[channel]) / std[channel]
        assert (result[:, :, channel] - expected).abs().max() < 1e-5
    assert normalise(crops, mean, std, torch.bfloat16).dtype == torch.bfloat16
    assert normalise(crops[:0], mean, std, torch.float32).shape == (0, 4, 3, 8, 8)


def test_a_nonsensical_loader_value_is_refused_by_name() -> None:
    for bad in ({"workers": -1}, {"prefetch": 0}, {"max_damaged": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            LoaderConfig(**bad)  # type: ignore[arg-type]


def test_real_tiles_are_read_once_an_epoch(real_data: Path, tmp_path: Path) -> None:
    tiles = sorted((real_data / "breast_idc").rglob("*.png"))[:40]
    (tmp_path / "tiles").mkdir()
    for path in tiles:
        (tmp_path / "tiles" / path.name).write_bytes(path.read_bytes())
    shard(ShardConfig(images=tmp_path / "tiles", out=tmp_path / "shards", workers=1))
    rows = Counter(row for b in read(tmp_path / "shards", last_step=10) for row in b.rows.tolist())
    assert rows == dict.fromkeys(range(40), 1)
