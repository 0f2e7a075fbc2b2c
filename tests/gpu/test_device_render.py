"""On a GPU: crops are those of the CPU and of the workers, and nothing waits for the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from eosin.pretrain.augment import AugmentConfig
from eosin.pretrain.device_render import DeviceRenderer
from eosin.pretrain.packed_views import pack_views
from eosin.pretrain.render import render_view
from eosin.pretrain.stain import StainTemplateConfig
from eosin.pretrain.views import Views, draw_views

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

CONFIG = AugmentConfig(
    stain=StainTemplateConfig(probability=0.5), second_global_solarize=0.5, n_local=4
)
SIZES = [(2, CONFIG.global_px), (4, CONFIG.local_px)]


@contextmanager
def refuse_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def batch(count: int, epoch: int = 0) -> tuple[Tensor, NDArray[np.int32], Views, Tensor]:
    """Coloured fields of several sizes in one tensor, their sizes, and their views."""
    rng = np.random.default_rng(epoch)
    hw = np.full((count, 2), 256, np.int32)
    hw[::3] = 200, 250
    pixels = rng.integers(0, 256, (count, 256, 256, 3), dtype=np.uint8)  # rubbish beside the tiles
    for place, (height, width) in zip(pixels, hw.tolist(), strict=True):
        field = ndimage.zoom(rng.uniform(0, 280, (8, 8, 3)), (32, 32, 1), order=1)
        field += rng.normal(0, 8, field.shape)
        place[:height, :width] = np.clip(field, 0, 255)[:height, :width].astype(np.uint8)
    views = draw_views(CONFIG, 3, np.full(count, epoch), np.arange(count), hw)
    return torch.from_numpy(pixels), hw, views, pack_views(views, np.ones(count, np.int32), hw)


def apart(ours: list[Tensor], theirs: list[Tensor]) -> NDArray[np.int64]:
    """Differences of all pixels of all crops, in levels."""
    pairs = zip(ours, theirs, strict=True)
    return np.concatenate([(a.cpu().int() - b.cpu().int()).abs().numpy().ravel() for a, b in pairs])


def test_crops_are_those_of_the_cpu_and_of_the_workers() -> None:
    tiles, hw, views, packed = batch(6)
    crops = DeviceRenderer(torch.device("cuda"))(tiles, packed, SIZES)
    assert all(crop.is_cuda for crop in crops)
    from_cpu = apart(crops, DeviceRenderer(torch.device("cpu"))(tiles, packed, SIZES))
    assert from_cpu.mean() <= 0.2
    assert np.mean(from_cpu > 8) <= 0.001
    off = []
    for v, crop in enumerate(crop for group in crops for crop in group):
        for b, (height, width) in enumerate(hw.tolist()):
            tile = tiles[b, :height, :width].numpy()
            expected = render_view(tile, views.at(b, v, crop.shape[-1]))
            off.append(np.abs(crop[b].permute(1, 2, 0).cpu().numpy().astype(int) - expected))
    assert np.mean([crop.mean() for crop in off]) <= 0.3
    assert max(np.mean(crop > 8) for crop in off) <= 0.01


def test_crops_hardly_depend_on_the_batch() -> None:
    tiles, _, _, packed = batch(7)
    renderer = DeviceRenderer(torch.device("cuda"))
    together = renderer(tiles, packed, SIZES)
    again = renderer(tiles, packed, SIZES)
    assert all(map(torch.equal, together, again))
    for b in (0, 4):
        alone = renderer(tiles[b : b + 1], packed[:, b : b + 1].contiguous(), SIZES)
        assert apart(alone, [crops[:, b : b + 1] for crops in together]).mean() <= 0.01


# torch hides these of its own compiler only where warnings are shown
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch._inductor.*")
@pytest.mark.parametrize("backend", [None, "inductor"])
def test_nothing_waits_and_nothing_is_compiled_again(backend: str | None) -> None:
    renderer = DeviceRenderer(torch.device("cuda"), backend=backend)
    batches = [batch(5, epoch) for epoch in range(3)]
    eager = DeviceRenderer(torch.device("cuda"))
    dynamo: Any = torch._dynamo
    graphs = []
    for tiles, _, _, packed in batches:
        expected = eager(tiles, packed, SIZES)
        with torch.autocast("cuda", torch.bfloat16):
            if not graphs:
                renderer(tiles, packed, SIZES)  # compiles, and loads the libraries
            with refuse_waiting():
                crops = renderer(tiles, packed, SIZES)
        graphs.append(dynamo.utils.counters["stats"]["unique_graphs"])
        differences = apart(crops, expected)
        assert differences.mean() <= 0.05
        assert np.mean(differences > 8) <= 0.001
    assert len(set(graphs)) == 1
