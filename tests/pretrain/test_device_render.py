"""Crops rendered on the device against those of a worker: the same, and whatever the batch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

from eosin.pretrain import device_render
from eosin.pretrain.augment import AugmentConfig
from eosin.pretrain.device_render import DeviceRenderer
from eosin.pretrain.packed_views import PARAMETERS, pack_views
from eosin.pretrain.render import render_view
from eosin.pretrain.stain import StainTemplateConfig
from eosin.pretrain.views import Views, draw_views

CPU = torch.device("cpu")
HALF = [torch.float32, torch.float16]  # what other devices and what GPUs multiply in
NOTHING: dict[str, Any] = {
    **dict.fromkeys(("flip", "turn", "jitter", "grey", "hed"), 0),
    **dict.fromkeys(("second_global_blur", "local_blur"), 0),
}
EVERYTHING: dict[str, Any] = {
    "stain": StainTemplateConfig(probability=0.5),
    "second_global_solarize": 0.5,
}
OPERATIONS: dict[str, dict[str, Any]] = {
    "resize": NOTHING,
    "orientation": {**NOTHING, "flip": 0.5, "turn": 0.75},
    "template": {**NOTHING, "stain": StainTemplateConfig(probability=1)},
    "hed": {**NOTHING, "hed": 1, "hed_factor": 0.3, "hed_shift": 0.2},
    "jitter": {**NOTHING, "jitter": 1, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4},
    "hue": {**NOTHING, "jitter": 1, "hue": 0.5},
    "grey": {**NOTHING, "grey": 1},
    "blur": {**NOTHING, "local_blur": 1, "first_global_blur": 1, "blur_sigma_px": (0.05, 2.0)},
    "solarize": {**NOTHING, "second_global_solarize": 1},
    "dinov2": {},
    "everything": EVERYTHING,
}


def tissue(height_px: int, width_px: int, seed: int) -> NDArray[np.uint8]:
    """Smooth patches of pink and violet with fine texture on them, and some glass."""
    rng = np.random.default_rng(seed)
    fields = (rng.standard_normal((height_px, width_px)) for _ in range(3))
    eosin, nuclei, fine = (
        ndimage.gaussian_filter(field, sigma) * sigma
        for field, sigma in zip(fields, (12, 3, 0.7), strict=True)
    )
    amounts = np.stack([np.maximum(nuclei + 0.3 * fine, 0), np.maximum(eosin, 0) + 0.05], -1)
    density = amounts @ np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
    return np.clip(255 * np.exp(-density), 0, 255).astype(np.uint8)


TILES = [tissue(96, 96, 0), tissue(80, 96, 1), tissue(96, 61, 2), tissue(50, 42, 3)]


def padded(tiles: list[NDArray[np.uint8]]) -> tuple[Tensor, NDArray[np.int32]]:
    """Tiles of several sizes in one tensor, over rubbish, and their sizes."""
    hw = np.array([tile.shape[:2] for tile in tiles], np.int32)
    room = np.random.default_rng(9).integers(0, 256, (len(tiles), *hw.max(0), 3), dtype=np.uint8)
    for place, tile in zip(room, tiles, strict=True):
        place[: tile.shape[0], : tile.shape[1]] = tile
    return torch.from_numpy(room), hw


def drawn(
    config: AugmentConfig, tiles: list[NDArray[np.uint8]], factor: int = 1, epoch: int = 0
) -> tuple[Views, Tensor]:
    """Views of tiles that were decoded at 1/factor, for the device too."""
    hw = np.array([tile.shape[:2] for tile in tiles], np.int32)
    count = len(tiles)
    views = draw_views(config, 5, np.full(count, epoch), np.arange(count), hw * factor)
    return views, pack_views(views, np.full(count, factor, np.int32), hw)


def sizes_of(config: AugmentConfig) -> list[tuple[int, int]]:
    return [(config.n_global, config.global_px), (config.n_local, config.local_px)]


def differences(
    config: AugmentConfig,
    tiles: list[NDArray[np.uint8]],
    crops: list[Tensor],
    views: Views,
    factor: int = 1,
) -> Iterator[NDArray[np.int64]]:
    """Of each crop, from the worker's, in levels."""
    every = [(group, crop) for group in crops for crop in group]  # crop: [B, 3, S, S]
    assert len(every) == config.n_views
    for v, (group, crop) in enumerate(every):
        for b, tile in enumerate(tiles):
            expected = render_view(tile, views.at(b, v, group.shape[-1]), factor)
            yield np.abs(crop[b].permute(1, 2, 0).numpy().astype(np.int64) - expected)


def assert_alike(
    config: AugmentConfig,
    tiles: list[NDArray[np.uint8]],
    factor: int = 1,
    dtype: torch.dtype = torch.float32,
    mean: float = 0.15,
) -> None:
    """Mean difference over all crops, and in no crop four times it nor many pixels far off."""
    views, packed = drawn(config, tiles, factor)
    crops = DeviceRenderer(CPU, dtype=dtype)(padded(tiles)[0], packed, sizes_of(config))
    apart = list(differences(config, tiles, crops, views, factor))
    assert np.mean([crop.mean() for crop in apart]) <= mean
    assert max(crop.mean() for crop in apart) <= 4 * mean
    assert max(np.mean(crop > 8) for crop in apart) <= 0.001


@pytest.mark.parametrize("dtype", HALF, ids=["fp32", "fp16"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_crops_are_the_workers(operation: str, dtype: torch.dtype) -> None:
    config = AugmentConfig(global_px=56, local_px=28, n_local=6, **OPERATIONS[operation])
    assert_alike(config, TILES, dtype=dtype)


@pytest.mark.parametrize("factor", [2, 4])
def test_crops_of_tiles_decoded_smaller_are_the_workers(factor: int) -> None:
    assert_alike(AugmentConfig(global_px=42, local_px=28, n_local=3, **EVERYTHING), TILES, factor)


def test_crops_of_real_tiles_are_the_workers(real_data: Path) -> None:
    paths = sorted((real_data / "lung3").rglob("*.jp*g"))[::400]
    paths += sorted((real_data / "breast_idc").rglob("*.png"))[:2]  # 50 × 50
    tiles = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    assert len({tile.shape for tile in tiles}) > 1
    assert_alike(AugmentConfig(n_local=4, **EVERYTHING), tiles, dtype=torch.float16)


@pytest.mark.parametrize("hw", [(1, 1), (3, 200), (200, 3), (7, 7)])
def test_tiles_of_any_size_give_the_workers_crops(hw: tuple[int, int]) -> None:
    tiles = [np.random.default_rng(1).integers(0, 256, (*hw, 3), dtype=np.uint8)]
    # A crop of one colour is off by a level or not as a whole.
    assert_alike(AugmentConfig(global_px=40, local_px=3, n_local=8), tiles, mean=0.25)


@pytest.mark.parametrize(("source_px", "size_px"), [(40, 98), (96, 96), (130, 98), (480, 96)])
@pytest.mark.parametrize("kind", ["noise", "checkerboard"])
def test_resampling_is_pillows(kind: str, source_px: int, size_px: int) -> None:
    image = np.random.default_rng(2).integers(0, 256, (source_px, source_px, 3), dtype=np.uint8)
    if kind == "checkerboard":
        image[:] = (np.indices((source_px, source_px)).sum(0) // 2 % 2 * 255)[..., None]
    theirs = Image.fromarray(image).resize((size_px, size_px), Image.Resampling.BICUBIC)
    config = AugmentConfig(
        global_px=size_px, n_local=0, global_scale=(1, 1), ratio=(1, 1), **NOTHING
    )
    (crops,) = DeviceRenderer(CPU)(
        torch.from_numpy(image)[None], drawn(config, [image])[1], [(2, size_px)]
    )
    apart = np.abs(crops[0, 0].permute(1, 2, 0).numpy().astype(int) - np.asarray(theirs))
    assert apart.max() <= 2
    assert apart.mean() < 0.1


def test_a_view_that_changes_nothing_is_the_tile() -> None:
    config = AugmentConfig(global_px=96, n_local=0, global_scale=(1, 1), ratio=(1, 1), **NOTHING)
    views, _ = drawn(config, TILES[:1])
    # Asked for, but neutral: every operation runs.
    views = views._replace(
        **{name: np.ones((1, 2), bool) for name in ("hed", "jitter")},
        hed_factor=np.ones((1, 2, 3), np.float32),
        hed_shift=np.zeros((1, 2, 3), np.float32),
        **{name: np.ones((1, 2), np.float32) for name in ("brightness", "contrast", "saturation")},
        hue_turns=np.zeros((1, 2), np.float32),
    )
    packed = pack_views(views, np.ones(1, np.int32), np.full((1, 2), 96, np.int32))
    (crops,) = DeviceRenderer(CPU)(torch.from_numpy(TILES[0])[None], packed, [(2, 96)])
    assert np.array_equal(crops[0, 0].permute(1, 2, 0).numpy(), TILES[0])
    assert torch.equal(crops[0], crops[1])


@pytest.mark.parametrize("dtype", HALF, ids=["fp32", "fp16"])
def test_a_tile_gives_the_same_bytes_alone_and_in_any_batch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AugmentConfig(global_px=56, local_px=28, n_local=4, **EVERYTHING)
    sizes = sizes_of(config)
    tiles, _ = padded(TILES)
    _, packed = drawn(config, TILES)
    renderer = DeviceRenderer(CPU, dtype=dtype)
    together = renderer(tiles, packed, sizes)
    assert all(map(torch.equal, together, renderer(tiles, packed, sizes)))
    backwards = renderer(tiles.flip(0), packed.flip(1), sizes)
    wider = renderer(torch.nn.functional.pad(tiles, (0, 0, 0, 40, 0, 70)), packed, sizes)
    monkeypatch.setattr(device_render, "WORK_BYTES", 12 * 128 * 128 * 3)  # in parts of 3 and 1
    for crops, reversed_, padded_, parts in zip(
        together, backwards, wider, renderer(tiles, packed, sizes), strict=True
    ):
        assert torch.equal(crops, reversed_.flip(1))
        assert torch.equal(crops, padded_)
        assert torch.equal(crops, parts)
    for b, tile in enumerate(TILES):
        alone = renderer(torch.from_numpy(tile)[None], packed[:, b : b + 1].contiguous(), sizes)
        for crops, single in zip(together, alone, strict=True):
            assert torch.equal(crops[:, b], single[:, 0])


def test_what_no_view_asks_for_is_left_out_without_a_change() -> None:
    """A group in which nothing is asked for, beside one where all is, in place of the other."""
    quiet, loud = (
        AugmentConfig(global_px=40, n_local=0, **changed) for changed in (NOTHING, EVERYTHING)
    )
    tiles, _ = padded(TILES)
    packed = torch.cat([drawn(quiet, TILES)[1], drawn(loud, TILES)[1]])
    renderer = DeviceRenderer(CPU)
    *apart, none = renderer(tiles, packed, [(2, 40), (2, 40), (0, 28)])
    (together,) = renderer(tiles, packed, [(4, 40)])
    assert torch.equal(torch.cat(apart), together)
    assert none.shape == (0, len(TILES), 3, 28, 28)


def test_flips_and_turns_are_numpys() -> None:
    config = AugmentConfig(global_px=48, n_local=0, **{**NOTHING, "jitter": 1.0})
    tile = TILES[0]
    views, packed = drawn(config, [tile])
    (plain,) = DeviceRenderer(CPU)(torch.from_numpy(tile)[None], packed, [(2, 48)])
    for flip in (False, True):
        for turns in range(4):
            changed = views._replace(
                flip=np.full((1, 2), flip), quarter_turns=np.full((1, 2), turns, np.uint8)
            )
            packed = pack_views(changed, np.ones(1, np.int32), np.array([tile.shape[:2]], np.int32))
            (turned,) = DeviceRenderer(CPU)(torch.from_numpy(tile)[None], packed, [(2, 48)])
            for crop, before in zip(turned[:, 0].numpy(), plain[:, 0].numpy(), strict=True):
                flipped = before[..., ::-1] if flip else before  # [3, S, S]
                assert np.array_equal(crop, np.rot90(flipped, turns, axes=(1, 2)))


@pytest.mark.slow  # the compiler traces for seconds
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler
def test_a_view_is_traced_to_one_graph_and_gives_the_same() -> None:
    config = AugmentConfig(global_px=24, n_local=0, **EVERYTHING)
    tiles, _ = padded(TILES[:2])
    _, packed = drawn(config, TILES[:2])
    dynamo: Any = torch._dynamo
    dynamo.reset()
    dynamo.utils.counters.clear()
    compiled, eager = DeviceRenderer(CPU, backend="eager"), DeviceRenderer(CPU)
    for shown in (tiles, tiles.flip(0)):
        got, expected = (some(shown, packed, [(2, 24)]) for some in (compiled, eager))
        assert torch.equal(got[0], expected[0])
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    dynamo.reset()


def test_crops_are_made_apart_from_autocast_and_gradients() -> None:
    config = AugmentConfig(global_px=24, n_local=0, **EVERYTHING)
    tiles, _ = padded(TILES)
    _, packed = drawn(config, TILES)
    renderer = DeviceRenderer(CPU)
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = renderer(tiles, packed, [(2, 24)])
    assert torch.equal(inside, renderer(tiles, packed, [(2, 24)])[0])


def test_what_does_not_fit_is_refused() -> None:
    tiles = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="uint8"):
        DeviceRenderer(CPU)(tiles.float(), torch.zeros(2, 2, PARAMETERS), [(2, 4)])
    with pytest.raises(ValueError, match="parameters must be of shape"):
        DeviceRenderer(CPU)(tiles, torch.zeros(2, 2, PARAMETERS), [(2, 4), (1, 4)])
