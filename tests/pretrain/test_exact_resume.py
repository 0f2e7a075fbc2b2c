"""One global sequence of (tile, view parameters), whoever takes it: ranks, workers, stops.

The pieces of a run are put together by step and rank, and compared with what one process without
workers makes. Of each tile it is the row and all parameters of its crops that must agree.
"""

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from eosin.configs.errors import ConfigError
from eosin.data_curation.shard_reader import ShardReader
from eosin.data_curation.shards import ShardConfig, shard
from eosin.pretrain.augment import AugmentConfig, Resolution
from eosin.pretrain.batch import Batch, Tiles
from eosin.pretrain.loader import LoaderConfig, batches
from eosin.pretrain.order import MixtureConfig
from eosin.pretrain.steps import BatchPlan, Steps

N = 90
BATCH = 8
STEPS = 15  # 120 tiles: into the second epoch
AUGMENT = AugmentConfig(global_px=16, local_px=8, n_local=2, render="device", decode="full")
PLAN = BatchPlan(
    augment=AUGMENT, batch_size=BATCH, seed=11, patch_px=8, group_size=2, window_shards=3
)
MIXED = replace(PLAN, mixture=MixtureConfig(column="stain", weights={"HE": 1, "IHC": 3}))

Sequence_ = list[tuple[int, bytes]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of uneven size, of two stains: 60 of one, 30 of the other."""
    folder = tmp_path_factory.mktemp("tiles")
    rng = np.random.default_rng(0)
    lines = ["path,stain"]
    for number in range(N):
        image = rng.integers(0, 256, (20 + number % 3, 20, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{'IHC' if number % 3 == 0 else 'HE'}")
    (folder / "tiles.csv").write_text("\n".join(lines))
    out = folder.parent / f"{folder.name}-shards"
    shard(ShardConfig(images=folder / "tiles.csv", out=out, records_per_shard=13, workers=1))
    return out


def taken(made: Sequence[Batch]) -> Sequence_:
    """Row and view parameters of each tile."""
    found = []
    for batch in made:
        assert isinstance(batch.images, Tiles)
        for sample, row in enumerate(batch.rows.tolist()):
            found.append((row, batch.images.parameters[:, sample].contiguous().numpy().tobytes()))
    return found


def run(
    shards: Path, plan: BatchPlan, world: int, workers: int, first: int = 0, last: int = STEPS
) -> Sequence_:
    """Steps `first` … `last` - 1 of all ranks, put together step by step."""
    loader = LoaderConfig(workers=workers, prefetch=1 + workers % 2)
    of_ranks = [
        batches(
            ShardReader(shards),
            replace(plan, rank=rank, world=world),
            loader,
            first_step=first,
            last_step=last,
        )
        for rank in range(world)
    ]
    found = []
    for step, parts in enumerate(zip(*of_ranks, strict=True), first):
        assert [part.step for part in parts] == [step] * world
        assert all(len(part.rows) == BATCH // world for part in parts)  # no rank starves
        found += taken(parts)
    return found


@pytest.mark.pitfall(20)
@pytest.mark.parametrize("plan", [PLAN, MIXED], ids=["even", "mixture"])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_and_workers_take_one_sequence(
    shards: Path, plan: BatchPlan, world: int, workers: int
) -> None:
    if plan is MIXED and (world, workers) not in ((2, 0), (4, 1)):
        pytest.skip("the mixture goes through the same code: two layouts are enough")
    assert run(shards, plan, world, workers) == run(shards, plan, 1, 0)


@pytest.mark.pitfall(20)
@pytest.mark.slow
def test_stops_at_random_steps_with_another_world_each_time(shards: Path) -> None:
    draw = random.Random(5)
    whole = run(shards, MIXED, 1, 0)
    for _ in range(2):
        stops = [0, *sorted(draw.sample(range(1, STEPS), 4)), STEPS]
        pieces = []
        for first, last in itertools.pairwise(stops):
            world, workers = draw.choice((1, 2, 4)), draw.choice((0, 0, 1))
            pieces += run(shards, MIXED, world, workers, first, last)
        assert pieces == whole


@pytest.mark.parametrize("persistent", [False, True])
def test_a_stock_loader_twice_over_gives_the_same(shards: Path, persistent: bool) -> None:
    steps = Steps(ShardReader(shards), PLAN, read_threads=1)
    loader = DataLoader(
        steps, sampler=range(STEPS), batch_size=None, collate_fn=lambda batch: batch,
        num_workers=2, persistent_workers=persistent, multiprocessing_context="fork",
        generator=torch.Generator(),
    )  # fmt: skip
    expected = run(shards, PLAN, 1, 0)
    assert taken(list(loader)) == expected
    assert taken(list(loader)) == expected


def test_without_weights_each_tile_comes_once_an_epoch_though_batches_straddle(
    shards: Path,
) -> None:
    rows = [row for row, _ in run(shards, PLAN, 2, 0, last=3 * N // BATCH + 1)]
    assert N % BATCH  # so they straddle
    for epoch in range(3):
        assert sorted(rows[epoch * N : (epoch + 1) * N]) == list(range(N))


def test_with_weights_counts_are_within_one_of_their_target(shards: Path) -> None:
    reader = ShardReader(shards)
    is_ihc = pc.equal(reader.index.table()["stain"], "IHC").to_pylist()
    epochs = 3
    rows = [row for row, _ in run(shards, MIXED, 1, 0, last=epochs * N // BATCH + 1)]
    for epoch in range(epochs):
        seen = sum(is_ihc[row] for row in rows[epoch * N : (epoch + 1) * N])
        assert abs(seen - 0.75 * N) < 1
    counts = Counter(rows[: epochs * N])
    for row in range(N):
        share, size = (0.75, N // 3) if is_ihc[row] else (0.25, N - N // 3)
        assert abs(counts[row] - epochs * N * share / size) < 1 + epochs / size


def test_a_tile_has_new_crops_each_epoch_and_for_each_copy(shards: Path) -> None:
    parameters: dict[int, list[bytes]] = {}
    for row, drawn in run(shards, MIXED, 1, 0, last=3 * N // BATCH):
        parameters.setdefault(row, []).append(drawn)
    assert max(map(len, parameters.values())) >= 6
    assert all(len(set(drawn)) == len(drawn) for drawn in parameters.values())


def test_a_groups_masks_do_not_depend_on_the_ranks(shards: Path) -> None:
    whole = PLAN.masks_of(3).reshape(2, BATCH, -1)
    for world in (2, 4):
        parts = [
            replace(PLAN, rank=rank, world=world).masks_of(3).reshape(2, BATCH // world, -1)
            for rank in range(world)
        ]
        assert np.array_equal(np.concatenate(parts, 1), whole)


def test_without_a_group_size_the_masks_are_those_of_the_whole_step(shards: Path) -> None:
    alone = replace(PLAN, group_size=0)
    assert alone.masks_of(3).sum() == replace(PLAN, group_size=BATCH).masks_of(3).sum()
    with pytest.raises(ValueError, match="a group never spans two ranks"):
        replace(alone, world=2)


def test_other_values_in_the_column_of_a_mixture_are_other_data(
    shards: Path, tmp_path: Path
) -> None:
    """The same images with other labels: the shards are equal, and the order is not."""
    tiles = shards.with_name(shards.name.removesuffix("-shards"))
    lines = (tiles / "tiles.csv").read_text().splitlines()
    swapped = [line.replace("IHC", "?").replace("HE", "IHC").replace("?", "HE") for line in lines]
    table = tiles / "swapped.csv"
    table.write_text("\n".join(swapped))
    shard(ShardConfig(images=table, out=tmp_path / "s", records_per_shard=13, workers=1))
    here, there = ShardReader(shards), ShardReader(tmp_path / "s")
    assert here.digest == there.digest
    assert Steps(here, PLAN).digest == Steps(there, PLAN).digest == here.digest
    assert Steps(here, MIXED).digest != Steps(there, MIXED).digest


def test_a_zoom_that_a_tile_cannot_hold_is_refused_before_the_first_step(shards: Path) -> None:
    augment = replace(AUGMENT, global_zoom=(1.0, 1.3))
    with pytest.raises(ConfigError, match=r"zoom"):  # 16 px · 1.3 in 20 px, but for the ratio
        Steps(ShardReader(shards), replace(PLAN, augment=augment))
    augment = replace(augment, ratio=(1.0, 1.0), global_zoom=(1.0, 1.2))
    Steps(ShardReader(shards), replace(PLAN, augment=augment))


def test_a_group_over_two_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="a group never spans two ranks"):
        replace(PLAN, world=4, group_size=4)


def test_a_mixture_that_does_not_fit_is_one_clear_line(shards: Path) -> None:
    mixture = MixtureConfig(column="stain", weights={"HE": 1, "PAS": 1})
    with pytest.raises(ConfigError, match=r"no weight for 'IHC'.*no such value: 'PAS'"):
        Steps(ShardReader(shards), replace(PLAN, mixture=mixture))


def test_several_resolutions_come_in_their_shares_and_resume(shards: Path) -> None:
    resolutions = [
        Resolution(global_px=16, local_px=8, share=0.75),
        Resolution(global_px=32, local_px=16, share=0.25),
    ]
    augment = replace(AUGMENT, resolutions=resolutions)
    plan = replace(PLAN, augment=augment)
    made = list(batches(ShardReader(shards), plan, LoaderConfig(), first_step=0, last_step=40))
    found = [batch.images.sizes[0][1] for batch in made if isinstance(batch.images, Tiles)]
    assert Counter(found)[32] in (9, 10, 11)
    assert all(
        b.masks.shape == (2 * BATCH, (px // 8) ** 2) for b, px in zip(made, found, strict=True)
    )
    assert run(shards, plan, 2, 0, 7, 12) == run(shards, plan, 1, 0)[7 * BATCH : 12 * BATCH]
