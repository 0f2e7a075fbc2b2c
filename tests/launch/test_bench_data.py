"""The bench of the data path: baselines that do what they say, stages, and a whole tiny run."""

import io
import itertools
import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

from eosin.configs.errors import ConfigError, InputError
from eosin.configs.load import load_config
from eosin.launch import bench_data as subject
from eosin.launch.bench import Row
from eosin.launch.bench_data import BenchDataConfig, Held, cores_line, model_rate
from eosin.launch.bench_pipelines import PillowCrops, stream_batches, stream_records
from eosin.launch.bench_stages import STAGES, OurStages, PillowStages, without
from eosin.launch.bench_tiles import made_up_shards, made_up_tiles
from eosin.launch.cli import main
from eosin.pretrain.augment import AugmentConfig
from eosin.pretrain.batch import Inputs
from eosin.pretrain.render import render_view
from eosin.pretrain.views import draw_views

pytestmark = [
    # of webdataset, which leaves the closing of its tars to the garbage collector
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]

NEUTRAL = AugmentConfig(
    global_px=32, local_px=16, n_local=2, global_scale=(1.0, 1.0), local_scale=(1.0, 1.0),
    ratio=(1.0, 1.0), flip=0.0, turn=0.0, jitter=0.0, grey=0.0, hed=0.0, first_global_blur=0.0,
    second_global_blur=0.0, local_blur=0.0, decode="full",
)  # fmt: skip
"""The whole tile, shrunk, and nothing else."""


def make_tile(side: int = 64, seed: int = 0) -> NDArray[np.uint8]:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BILINEAR))


def encode(tile: NDArray[np.uint8]) -> bytes:
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(tile), 95, "RGB", "444"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_shards(tmp_path_factory.mktemp("made-up"), n_tiles=12, tile_px=64, seed=1)


def normalised(image: Image.Image) -> torch.Tensor:
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return torch.from_numpy(((np.asarray(image) / 255 - mean) / std).transpose(2, 0, 1).copy())


def test_the_baseline_is_pillow_and_gives_normalised_floats() -> None:
    data = encode(make_tile())
    picture = Image.open(io.BytesIO(data))
    crops = PillowCrops(replace(NEUTRAL, flip=1.0))
    big, small = crops.batch([data, data, data])
    assert big.shape == (6, 3, 32, 32) and small.shape == (6, 3, 16, 16)
    assert big.dtype == small.dtype == torch.float32
    for batch, side in ((big, 32), (small, 16)):
        mirrored = picture.resize((side, side), Image.Resampling.BICUBIC)
        expected = normalised(mirrored.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        for crop in batch:
            torch.testing.assert_close(crop.double(), expected, atol=1e-5, rtol=0)


def test_the_batch_is_view_major() -> None:
    tiles = [encode(make_tile(seed=seed)) for seed in range(2)]
    big, _ = PillowCrops(NEUTRAL).batch(tiles)
    torch.testing.assert_close(big[0], big[2])  # the first tile's first and second view
    assert not torch.allclose(big[0], big[1])


def test_the_baseline_blurs_and_greys_as_often_as_it_says() -> None:
    strong = replace(
        NEUTRAL, first_global_blur=0.0, second_global_blur=0.9, local_blur=0.5, grey=0.2,
        jitter=0.8, brightness=0.4, blur_sigma_px=(1.0, 2.0), n_local=1,
    )  # fmt: skip
    crops = PillowCrops(strong)
    tile = Image.fromarray(make_tile())
    before = crops.crop(tile)
    draws, blurred, changed, grey = 400, np.zeros(3), 0, 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(draws):
            after = crops.blur(before)
            blurred += [a.tobytes() != b.tobytes() for a, b in zip(after, before, strict=True)]
            coloured = np.asarray(crops.colour(before[:1] * 3)[0]).astype(int)
            is_grey = bool((np.ptp(coloured, axis=2) == 0).all())
            grey += is_grey
            changed += not is_grey and bool((coloured != np.asarray(before[0])).any())
    np.testing.assert_allclose(blurred / draws, [0.0, 0.9, 0.5], atol=0.08)
    assert grey / draws == pytest.approx(0.2, abs=0.06)
    assert changed / (draws - grey) == pytest.approx(0.8, abs=0.06)


def test_the_colours_of_the_baseline_are_torchvisions_own() -> None:
    augment = replace(NEUTRAL, jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    crops = PillowCrops(augment)
    jitter = import_module("torchvision.transforms").ColorJitter(0.4, 0.4, 0.2, 0.1)
    picture = Image.fromarray(make_tile(32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        ours = np.asarray(crops.colour([picture] * augment.n_views)[0])
        torch.manual_seed(3)
        torch.rand(1)  # whether it is applied
        np.testing.assert_array_equal(ours, np.asarray(jitter(picture)))


def test_made_up_tiles_are_stained_and_the_same_again() -> None:
    tiles = list(made_up_tiles(5, 256, seed=2))
    again = list(itertools.islice(made_up_tiles(12, 256, seed=2), 5))
    assert [tile.shape for tile in tiles] == [(256, 256, 3)] * 5
    assert all((a == b).all() for a, b in zip(tiles, again, strict=True))
    sizes = [len(simplejpeg.encode_jpeg(np.ascontiguousarray(t), 90, "RGB", "444")) for t in tiles]
    assert 12_000 < np.median(sizes) < 45_000  # a real H&E tile takes about 25 kB
    mean = np.mean([tile.mean(axis=(0, 1)) for tile in tiles], axis=0)
    assert mean[1] < mean[0] and mean[1] < mean[2] < 240  # pink to purple, and no glass


def test_webdataset_streams_every_record_again_and_again(shards: Path) -> None:
    written = {path.read_bytes() for path in (shards.parent / "tiles").iterdir()}
    stream = stream_records(shards)
    first, second = (list(itertools.islice(stream, 12)) for _ in range(2))
    assert set(first) == set(second) == written and len(written) == 12


def test_webdatasets_batches_are_crops_of_the_tiles(shards: Path) -> None:
    crops = PillowCrops(NEUTRAL)
    pictures = [Image.open(path) for path in (shards.parent / "tiles").iterdir()]
    expected = {
        normalised(p.resize((16, 16), Image.Resampling.BICUBIC)).float().numpy().round(3).tobytes()
        for p in pictures
    }
    big, small = next(stream_batches(shards, crops, 12))
    assert big.shape == (24, 3, 32, 32) and small.shape == (24, 3, 16, 16)
    assert {crop.numpy().round(3).tobytes() for crop in small} == expected


TINY = [
    "augment.global_px=32", "augment.local_px=16", "augment.n_local=2", "batch_size=4",
    "n_tiles=8", "tile_px=64", "device=cpu", "repeats=1", "seconds=0.001", "model.width=32",
    "model.depth=2", "model.heads=2", "model.patch_px=8", "objective.head.prototypes=64",
]  # fmt: skip
KINDS = [
    "crops", "crops stain", "decode", "decode pillow", "read", "loader", "loader device",
    "crops device",
]  # fmt: skip


def tiny(*more: str) -> BenchDataConfig:
    return load_config(BenchDataConfig, [], [*TINY, *more])


def test_both_sides_make_the_same_crops_of_a_tile(shards: Path) -> None:
    config = replace(tiny(), augment=NEUTRAL)
    held = Held(config, shards)
    batch = subject.Steps(held.reader, held.batch_plan(config.unstained))[0]
    assert isinstance(batch, subject.Batch)
    first = [held.reader.read(row) for row in batch.rows.tolist()]
    theirs = PillowCrops(NEUTRAL).batch(first)
    inputs = Inputs(torch.device("cpu"), subject.IMAGENET_MEAN, subject.IMAGENET_STD)
    for ours, stacked in zip(inputs(batch.images), theirs, strict=True):
        assert ours.flatten(0, 1).shape == stacked.shape
        levels = (ours.flatten(0, 1) - stacked).abs() * 255 * 0.226
        assert levels.mean() < 0.5 and levels.max() < 4  # two decoders, two bicubic kernels


def test_the_stages_are_those_of_a_whole_crop() -> None:
    augment = tiny().augment
    tiles = [make_tile(seed=seed) for seed in range(3)]
    device = torch.device("cpu")
    ours = OurStages(tiles, augment, seed=5, device=device)
    assert list(ours.seconds()) == list(STAGES)
    views = draw_views(augment, 5, [0] * 3, range(3), [(64, 64)] * 3)
    collated = ours._collate()
    for v, side in enumerate(augment.sizes_px):
        group, at = (collated[0], v) if v < 2 else (collated[1], v - 2)
        for b, tile in enumerate(tiles):
            crop = render_view(tile, views.at(b, v, side))
            np.testing.assert_array_equal(group[at, b].numpy(), crop)
    plain = without(views, "hed", "jitter", "grey", "blur_sigma_px", "stain", "solarize")
    assert not plain.hed.any() and (plain.x_px == views.x_px).all() and views.jitter.any()
    theirs = PillowStages([Image.fromarray(tile) for tile in tiles], augment, device)
    seconds = theirs.seconds()
    assert list(seconds) == list(STAGES) and min(seconds.values()) > 0


def test_the_rows_read_in_the_order_of_training(shards: Path) -> None:
    held = Held(tiny("n_tiles=12"), shards)
    order = list(itertools.islice(held.training_order(), 24))
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12)) and order[:12] != order[12:]
    assert held.encoded == [held.reader.read(row) for row in order[:12]]
    assert held.side_px == 64


def test_cores_are_the_rate_of_the_training_over_that_of_a_core() -> None:
    rates = {"crops": (300.0, 30.0), "crops stain": (250.0, 25.0), "loader device": (1250.0, 900.0)}
    rows = {kind: Row(kind, "tiles/s", a, b, a / b) for kind, (a, b) in rates.items()}
    line = cores_line(BenchDataConfig(tiles_per_s=2500.0), rows)
    assert line == (
        "ViT-S/14 on one H100 at 2,500 tiles/s takes these cores: 10 with crops in workers, 2 with "
        "crops on the device, 100 with Pillow and torchvision"
    )
    # by hand: 2·256 + 8·49 tokens of which each takes 6 FLOP a weight, the teacher's 2 more
    weights, tokens = 12 * 12 * 384**2, 2 * 257 + 8 * 50
    least = 6 * weights * tokens + 2 * weights * 2 * 257
    derived = model_rate(BenchDataConfig(model=replace(BenchDataConfig().model, drop_path=0.0)))
    assert 0.5 < derived / (0.4 * 989e12 / least) < 0.95  # the rest: attention and heads
    assert model_rate(BenchDataConfig(mfu=0.2)) == pytest.approx(model_rate(BenchDataConfig()) / 2)


def test_the_verb_reports_every_row_and_the_cores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "data.json"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        subject.bench_data(tiny(f"json={file}"))
        after = torch.rand(1)
        torch.manual_seed(7)
        assert torch.rand(1) == after  # the baseline's draws are its own
    rows = json.loads(file.read_text())
    tile, views = "64px", "2x32+2x16"
    cropped = ("crops", "crops stain", "loader", "crops device")
    names = [f"{kind} {tile}" + (f" {views}" if kind in cropped else "") for kind in KINDS]
    names += [f"stage {stage} {tile} {views}" for stage in STAGES]
    assert [row["name"] for row in rows] == names
    assert all(row["unit"] == "tiles/s" and row["ours"] > 0 < row["baseline"] for row in rows)
    shown = capsys.readouterr().out.splitlines()
    assert "processor time" in "".join(shown) and shown[-1].startswith("ViT-D32/8 on one H100 at ")


def test_shards_that_exist_are_read_and_others_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subject.bench_data(tiny(f"shards={shards}", "augment.hed=0"))
    assert "crops stain" not in capsys.readouterr().out  # nothing to show there
    with pytest.raises(InputError, match="holds 12 tiles, fewer than n_tiles=13"):
        Held(tiny("n_tiles=13"), shards)
    Image.fromarray(make_tile()).save(tmp_path / "0.png")
    out = tmp_path / "png"
    assert main(["shard", f"images={tmp_path}", f"out={out}", "workers=1"]) == 0
    with pytest.raises(InputError, match="other tiles than JPEGs"):
        Held(tiny("n_tiles=1", "batch_size=1"), out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["repeats=0"], "repeats=0 must be at least 1"),
        (["batch_size=9"], "n_tiles=8 is less than batch_size=9"),
        (["tile_px=4096"], "tile_px=4096 must lie in 1 to"),
        (["seconds=0"], "seconds=0.0 must be above 0"),
        (["mfu=1.5"], "mfu=1.5 must lie in"),
        (["gpu=H1"], "gpu=H1 is not one of"),
        (["augment.global_zoom=[1,2]"], "global_zoom: the baseline has none"),
        (["augment.local_px=17"], "local_px=17 is not a multiple"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny(*arguments)


def test_a_dry_run_says_what_would_be_done() -> None:
    said = subject.plan(tiny())
    assert "2x32+2x16 of 8 made-up tiles of 64 px" in said and "1 times at least 0.001 s" in said
    assert "the tiles of here" in subject.plan(tiny("shards=here"))
