"""Batches from shards: the same for any number of workers, from any step, with damage counted."""

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eosin.configs.errors import ConfigError, EosinError
from eosin.data_curation.shard_reader import ShardReader
from eosin.data_curation.shards import ShardConfig, shard
from eosin.pretrain import loader as loader_module
from eosin.pretrain.augment import AugmentConfig
from eosin.pretrain.batch import Batch, Crops, Tiles, normalise, normalise_interleaved
from eosin.pretrain.loader import LoaderConfig, batches
from eosin.pretrain.masking import MaskConfig, draw_masks
from eosin.pretrain.order import locate
from eosin.pretrain.render import render_view
from eosin.pretrain.steps import BatchPlan, Steps
from eosin.pretrain.views import draw_views

N = 10
BATCH = 4
AUGMENT = AugmentConfig(global_px=32, local_px=16, n_local=3)
PLAN = BatchPlan(augment=AUGMENT, batch_size=BATCH, seed=7, patch_px=8)


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


def stream(
    shards: Path,
    first_step: int = 0,
    last_step: int = 6,
    workers: int = 0,
    max_damaged: float = 0.0,
    plan: BatchPlan = PLAN,
) -> Iterator[Batch]:
    loader = LoaderConfig(workers=workers, max_damaged=max_damaged)
    return batches(ShardReader(shards), plan, loader, first_step=first_step, last_step=last_step)


def read(
    shards: Path,
    first_step: int = 0,
    last_step: int = 6,
    workers: int = 0,
    max_damaged: float = 0.0,
    plan: BatchPlan = PLAN,
) -> list[Batch]:
    return list(stream(shards, first_step, last_step, workers, max_damaged, plan))


def crops_of(batch: Batch) -> Crops:
    assert isinstance(batch.images, Crops)
    return batch.images


def epoch_rows(shards: Path, epoch: int = 0) -> list[int]:
    """The rows of an epoch in their order."""
    return Steps(ShardReader(shards), PLAN).rows_at(epoch, np.arange(N)).tolist()


def content(found: list[Batch]) -> list[tuple[object, ...]]:
    return [
        (
            batch.step,
            *(part.numpy().tobytes() for part in batch.images[:2]),
            batch.masks.tobytes(),
            batch.rows.tolist(),
            dict(batch.damaged),
        )
        for batch in found
    ]


def damage(shards: Path, rows: list[int]) -> None:
    """Flips one byte within each of the records."""
    reader = ShardReader(shards)
    for row in rows:
        record = reader.index.table().slice(row, 1).to_pylist()[0]
        path = shards / record["shard"]
        data = bytearray(path.read_bytes())
        data[record["offset"] + record["size"] // 2] ^= 0xFF
        path.write_bytes(data)


def test_a_batch_holds_the_crops_of_its_places_view_by_view(pristine: Path) -> None:
    reader = ShardReader(pristine)
    batch = read(pristine)[2]  # samples 8 … 11: two of the first epoch, two of the second
    assert batch.step == 2
    crops = crops_of(batch)
    assert crops.global_crops.shape == (2, BATCH, 32, 32, 3)
    assert crops.local_crops.shape == (3, BATCH, 16, 16, 3)
    epochs, positions = locate(2, BATCH, N)
    assert epochs.tolist() == [0, 0, 1, 1]
    for sample, (epoch, position) in enumerate(zip(epochs, positions, strict=True)):
        assert batch.rows[sample] == epoch_rows(pristine, int(epoch))[position]
        tile = reader.image(int(batch.rows[sample]))
        drawn = draw_views(AUGMENT, 7, [epoch], [position], [tile.shape[:2]])
        found = [*crops.global_crops[:, sample], *crops.local_crops[:, sample]]
        for index, (crop, size_px) in enumerate(zip(found, AUGMENT.sizes_px, strict=True)):
            assert np.array_equal(crop.numpy(), render_view(tile, drawn.at(0, index, size_px)))


def test_the_masks_of_a_step_come_with_it(pristine: Path) -> None:
    for batch in read(pristine, last_step=3):
        expected = draw_masks(
            MaskConfig(),
            seed=7,
            step=batch.step,
            groups=range(1),
            group_size=BATCH,
            views=2,
            grid=(4, 4),
        )
        assert np.array_equal(batch.masks, expected)


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
    plan = replace(PLAN, augment=AugmentConfig(global_px=32, n_local=0))
    batch = read(pristine, last_step=1, plan=plan)[0]
    assert crops_of(batch).local_crops.shape == (0, BATCH, 98, 98, 3)


def test_decoded_tiles_come_with_what_to_cut_from_them(pristine: Path) -> None:
    reader = ShardReader(pristine)
    plan = replace(PLAN, augment=replace(AUGMENT, render="device"))
    alone = read(pristine, plan=plan)
    assert content(read(pristine, plan=plan, workers=2)) == content(alone)
    for batch in alone:
        assert isinstance(batch.images, Tiles)
        assert batch.images.sizes == ((2, 32), (3, 16))
        for pixels, row in zip(batch.images.pixels.numpy(), batch.rows.tolist(), strict=True):
            tile = reader.image(row)
            assert np.array_equal(pixels[: tile.shape[0], : tile.shape[1]], tile)


@pytest.mark.parametrize("render", ["worker", "device"])
def test_a_stand_in_of_another_size_is_cut_at_its_own(shards: Path, render: str) -> None:
    reader, order = ShardReader(shards), epoch_rows(shards)
    hw = reader.index.hw(np.array(order))
    place = next(p for p in range(N // 2) if (hw[p] != hw[p + N // 2]).any())
    damage(shards, [order[place]])
    plan = replace(PLAN, augment=replace(AUGMENT, render=render), batch_size=1)
    batch = read(shards, place, place + 1, max_damaged=0.1, plan=plan)[0]
    assert batch.rows.tolist() == [order[place + N // 2]] and list(batch.damaged) == [order[place]]
    tile = reader.image(order[place + N // 2])
    if isinstance(batch.images, Tiles):
        assert np.array_equal(batch.images.pixels[0].numpy()[: len(tile), : tile.shape[1]], tile)
        return
    drawn = draw_views(AUGMENT, 7, [0], [place], [tile.shape[:2]])
    crop = render_view(tile, drawn.at(0, 0, 32))
    assert np.array_equal(crops_of(batch).global_crops[0, 0].numpy(), crop)


def test_the_trainers_random_numbers_are_left_alone(pristine: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    read(pristine, last_step=2, workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_fewer_tiles_than_a_batch_is_one_clear_line(pristine: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds 10 tiles, fewer than one batch of 11") as raised:
        stream(pristine, plan=replace(PLAN, batch_size=11))
    assert "\n" not in str(raised.value)


def test_a_damaged_record_is_replaced_by_one_half_an_epoch_on_and_named_once(
    shards: Path,
) -> None:
    whole = read(shards)
    order = epoch_rows(shards)
    damaged_row, other_row = order[5], order[0]
    key = ShardReader(shards).index.key(damaged_row)
    damage(shards, [damaged_row])
    found = read(shards, max_damaged=0.1)
    assert content(read(shards, max_damaged=0.1, workers=2)) == content(found)
    assert found[1].rows.tolist() == [order[4], other_row, order[6], order[7]]
    there = order.index(other_row)
    own, stands_in = (crops_of(found[n // BATCH]).global_crops[0, n % BATCH] for n in (there, 5))
    assert not torch.equal(own, stands_in)  # other crops than at its own place
    reasons = [reason for batch in found for reason in batch.damaged.values()]
    assert len(reasons) == 1  # though it was met in each epoch
    assert f"'{key}'" in reasons[0]
    for ours, theirs in zip(found, whole, strict=True):
        kept = theirs.rows != damaged_row
        assert torch.equal(ours.rows[kept], theirs.rows[kept])
        pairs = zip(crops_of(ours), crops_of(theirs), strict=True)
        assert all(torch.equal(a[:, kept], b[:, kept]) for a, b in pairs)


@pytest.mark.parametrize("workers", [0, 1])
def test_more_damage_than_allowed_stops_the_run_after_what_was_whole(
    shards: Path, workers: int
) -> None:
    order = epoch_rows(shards)
    damage(shards, [order[1], order[9]])
    found = stream(shards, last_step=9, workers=workers, max_damaged=0.1)
    assert [next(found).step, next(found).step] == [0, 1]
    with pytest.raises(EosinError, match=r"2 damaged of 10 records.*allows 1") as raised:
        next(found)
    assert "\n" not in str(raised.value)
    assert "eosin shard verify" in str(raised.value)


def test_nothing_but_damage_ends_with_one_line(shards: Path) -> None:
    damage(shards, list(range(N)))
    with pytest.raises(EosinError, match="1 damaged of 10 records"):
        read(shards, max_damaged=0.0)


def test_a_killed_worker_ends_with_one_line(pristine: Path) -> None:
    others = {child.pid for child in multiprocessing.active_children()}
    found = stream(pristine, last_step=10_000, workers=1)
    next(found)
    (worker,) = {child.pid for child in multiprocessing.active_children()} - others
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(EosinError, match="a process that makes batches died") as raised:
        list(found)
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
    planes = torch.randint(0, 256, (2, 4, 3, 8, 6), dtype=torch.uint8)
    mean, std = (0.7, 0.5, 0.6), (0.2, 0.3, 0.25)
    result = normalise(planes, mean, std)
    pixels = planes.permute(0, 1, 3, 4, 2).contiguous()
    interleaved = normalise_interleaved(pixels, mean, std)
    assert interleaved.shape == result.shape and result.dtype == interleaved.dtype == torch.float32
    for channel in range(3):
        expected = (planes[:, :, channel].double() / 255 - mean[channel]) / std[channel]
        assert (result[:, :, channel] - expected).abs().max() < 1e-5
        assert (interleaved[:, :, channel] - expected).abs().max() < 1e-5
    assert normalise(planes[:0], mean, std).shape == (0, 4, 3, 8, 6)
    assert normalise_interleaved(pixels[:0], mean, std).shape == (0, 4, 3, 8, 6)


def test_a_nonsensical_loader_value_is_refused_by_name() -> None:
    bad_values = (("workers", -1), ("prefetch", 0), ("max_damaged", 1.0), ("read_threads", -1))
    for bad in ({name: value} for name, value in (*bad_values, ("cache_gb", 0), ("max_open", 0))):
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
