"""What slide encoders, vision-language and generative models take at their boundary, from ours.

Each test does in a few lines what the consumer's loader does with a file or an encoder, and holds
what it gets against tiles that are embedded one by one.
"""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from eosin.data_curation.embed_config import EmbedOptions
from eosin.data_curation.encoder import NetworkEncoder, load_encoder
from eosin.data_curation.encoder_interface import embed_grid
from eosin.data_curation.extract import ExtractConfig, extract
from eosin.data_curation.slide import Slide
from eosin.data_curation.tiles import TileOptions

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder(
    tmp_path_factory: pytest.TempPathFactory, write_encoder_folder: Callable[..., Path]
) -> Path:
    return write_encoder_folder(tmp_path_factory.mktemp("encoder") / "net", depth=3)


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory,
    write_slide: Callable[..., Path],
    tissue_pixels: NDArray[np.uint8],
    encoder: Path,
) -> tuple[Path, Path]:
    """The slide, at 0.5 µm/px, and the folder with its features at 1 µm/px."""
    folder = tmp_path_factory.mktemp("slides")
    write_slide(folder / "a.tiff", [tissue_pixels], mpp=(0.5, 0.5))
    extract(
        ExtractConfig(
            slides=folder / "a.tiff", encoder=f"{encoder}@clsmean", out=folder / "out",
            tile=TileOptions(mpp=1.0, size_px=64, workers=1),
            embed=EmbedOptions(device="cpu", batch_size=4, threads=1),
        )
    )  # fmt: skip
    return folder / "a.tiff", folder / "out"


@pytest.fixture(scope="module")
def net(encoder: Path) -> NetworkEncoder:
    found = load_encoder(str(encoder), CPU)
    assert isinstance(found, NetworkEncoder)
    return found


def read(folder: Path) -> tuple[torch.Tensor, torch.Tensor, dict[str, float], NDArray[np.int32]]:
    with h5py.File(folder / "h5" / "a.h5", "r") as file:
        features, coords = (
            torch.from_numpy(file["features"][:]),
            torch.from_numpy(file["coords"][:]),
        )
        return features, coords, dict(file["coords"].attrs), file["contour_index"][:]


def test_titan_and_care_lay_tiles_on_a_grid(files: tuple[Path, Path]) -> None:
    """[1, N, D], int64 [1, N, 2], and the footprint on level 0: no two tiles in one cell."""
    features, coords, attributes, _ = read(files[1])
    side = int(attributes["patch_size_level0"])
    batch, places = features[None], coords[None]
    assert places.dtype == torch.int64 and batch.shape[1] == places.shape[1]
    cells = (places[0] - places[0].amin(0)) // side
    assert len(torch.unique(cells, dim=0)) == len(cells)
    remainder = (places[0] - places[0].amin(0)) % side
    assert not remainder.any()


def test_gigapath_wants_corners_at_the_tiles_own_scale(files: tuple[Path, Path]) -> None:
    _, coords, attributes, _ = read(files[1])
    scaled = coords.double() * attributes["level0_mpp"] / attributes["mpp"]
    index = (scaled // 64)[:, 0] * 1000 + (scaled // 64)[:, 1] + 1
    assert len(index.unique()) == len(coords)


def test_exaone_reads_the_piece_of_tissue_of_each_tile(files: tuple[Path, Path]) -> None:
    features, _, _, contours = read(files[1])
    assert contours.shape == (len(features),) and contours.min() == 0
    same = contours[:, None] == contours  # attention within a fragment
    assert same.diagonal().all()


def test_prism_reads_class_token_and_mean_of_patches_side_by_side(
    files: tuple[Path, Path], net: NetworkEncoder
) -> None:
    features, coords, _, _ = read(files[1])
    with Slide(files[0]) as slide:
        tile = slide.read_tile(*coords[0].tolist(), 64, 1.0)
    tokens = net.tokens(net.transform(Image.fromarray(tile))[None])
    torch.testing.assert_close(features[:1], tokens.cls_patch_mean, atol=2e-2, rtol=2e-3)
    assert features.shape[1] == 2 * tokens.cls.shape[1]


def test_report_writers_read_one_tensor_a_slide(files: tuple[Path, Path], tmp_path: Path) -> None:
    """HistGen: a .pt of [N, D]; WSI-LLaVA: 576 tokens, averaged adaptively."""
    features, *_ = read(files[1])
    torch.save(features, tmp_path / "a.pt")
    again = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.testing.assert_close(again, features)
    tokens = F.adaptive_avg_pool1d(features.T[None], 576)[0].T
    assert tokens.shape == (576, features.shape[1]) and bool(tokens.isfinite().all())


def test_llava_takes_the_patches_of_the_last_block_but_one(net: NetworkEncoder) -> None:
    """[B, N, D] without the class token, of layer -2, the same in any batch."""
    tiles = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    images = torch.stack([net.transform(Image.fromarray(tile)) for tile in tiles])
    tokens = net.tokens(images, layers=[-2])
    selected = tokens.layers[0].flatten(1, 2)
    grid = tokens.patch_tokens.shape[1] * tokens.patch_tokens.shape[2]
    assert selected.shape == (3, grid, tokens.cls.shape[1])
    alone = net.tokens(images[1:2], layers=[-2]).layers[0].flatten(1, 2)
    torch.testing.assert_close(alone, selected[1:2], atol=1e-5, rtol=1e-5)


def test_an_attentional_pooler_takes_patches_before_pooling(net: NetworkEncoder) -> None:
    """CONCH and its like: queries over patch tokens; and CytoSyn's grid as an alignment target."""
    tile = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    tokens = net.tokens(net.transform(Image.fromarray(tile))[None])
    patches = tokens.patch_tokens.flatten(1, 2)
    pooler = torch.nn.MultiheadAttention(patches.shape[2], 2, batch_first=True)
    pooled, _ = pooler(torch.zeros(1, 4, patches.shape[2]), patches, patches)
    assert pooled.shape == (1, 4, patches.shape[2])
    pooled.sum().backward()  # the pooler is trained, the encoder is not
    assert pooler.in_proj_weight.grad is not None
    rows, columns = tokens.patch_tokens.shape[1:3]
    assert rows == columns and tokens.patch_mean.shape == tokens.cls.shape


def test_pixcell_is_conditioned_on_sixteen_parts_of_a_region(
    net: NetworkEncoder, tmp_path: Path
) -> None:
    """[16, D] in float16, row by row, beside an image of 4 × 4 parts."""
    region = np.random.default_rng(2).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    found = embed_grid(net, region, 4, 4).astype(np.float16)
    np.save(tmp_path / "a_uni.npy", found)
    again = np.load(tmp_path / "a_uni.npy", allow_pickle=False)
    assert again.shape == (16, net.dim) and np.isfinite(again).all()
    part = region[64:128, 192:256]  # second row, last column
    np.testing.assert_allclose(again[7], net.embed([part])[0], atol=2e-3, rtol=2e-3)
