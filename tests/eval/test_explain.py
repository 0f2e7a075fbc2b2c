"""What an encoder sees: components against scikit-learn, attention against timm, pictures of a
slide."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from sklearn.decomposition import PCA

from eosin.configs.errors import InputError
from eosin.data_curation.embed_config import EmbedOptions
from eosin.data_curation.encoder import NetworkEncoder, load_encoder
from eosin.data_curation.extract import ExtractConfig, extract
from eosin.data_curation.tiles import TileOptions
from eosin.eval.explain import ExplainConfig, explain
from eosin.eval.token_maps import TokenColours, class_attention
from eosin.pretrain.export import write_encoder
from eosin.pretrain.model_card import EncoderCard
from eosin.pretrain.vit import Vit, VitConfig

CPU = torch.device("cpu")


def test_colours_are_the_first_three_components() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.gamma(2, size=(6, 4, 4, 20)).astype(np.float32) * np.arange(20, 0, -1)
    colours = TokenColours.fit(tokens)(tokens).reshape(-1, 3).astype(float)
    expected = PCA(3, svd_solver="full").fit_transform(tokens.reshape(-1, 20).astype(float))
    for ours, theirs in zip(colours.T, expected.T, strict=True):
        inside = (ours > 0) & (ours < 255)
        assert abs(np.corrcoef(ours[inside], theirs[inside])[0, 1]) > 0.999
    assert colours.min() == 0 and colours.max() == 255


@pytest.mark.parametrize(
    "changes", [{}, {"positions": "rope"}, {"positions": "rope", "norm_eps": 1e-5}]
)
@torch.no_grad()
def test_attention_is_what_the_last_block_computes(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Its weights times the values, projected, are the block's own output for the class token."""
    config = VitConfig(
        width=48, depth=2, heads=3, patch_px=8, image_px=32, registers=2, layer_scale=0.5, **changes
    )
    vit = Vit(config)
    generator = torch.Generator().manual_seed(0)
    vit.initialise(generator)
    for parameter in vit.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    card = EncoderCard(steps=1, tiles_seen=1, index_digest="", mpp=0.5, mean=(0.5, 0.5, 0.5),
                       std=(0.5, 0.5, 0.5))  # fmt: skip
    write_encoder(tmp_path / "net", config, vit.state_dict(), card)
    encoder = load_encoder(str(tmp_path / "net"), CPU)
    assert isinstance(encoder, NetworkEncoder)
    tiles = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    attention = encoder.network.blocks[-1].attn
    seen: dict[str, Any] = {}
    hook = attention.register_forward_hook(
        lambda module, given, named, out: seen.update(x=given[0], out=out), with_kwargs=True
    )
    found = class_attention(encoder, list(tiles))
    hook.remove()
    assert found.shape == (2, 4, 4) and (found.sum(axis=(1, 2)) < 1).all()
    # brute force: which weights of patches explain the output, given those of the other tokens
    from eosin.eval import token_maps

    kept: dict[str, Any] = {}
    original = token_maps._weights
    try:
        token_maps._weights = lambda *a: kept.setdefault("w", original(*a))  # type: ignore[assignment]
        class_attention(encoder, list(tiles))
    finally:
        token_maps._weights = original
    qkv = attention.qkv(seen["x"])
    value = qkv.unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)[2]
    mixed = (kept["w"] @ value).transpose(1, 2).flatten(2)
    norm = getattr(attention, "norm", torch.nn.Identity())
    torch.testing.assert_close(attention.proj(norm(mixed)), seen["out"], atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def extracted(
    tmp_path_factory: pytest.TempPathFactory, write_encoder_folder: Callable[..., Path]
) -> tuple[Path, Path]:
    """A slide with two kinds of tissue, its tiles and features; and the encoder."""
    tmp_path = tmp_path_factory.mktemp("extracted")
    generator = np.random.default_rng(0)
    pixels = np.full((1024, 1024, 3), 245, np.uint8)
    pixels[:512, :] = (170, 90, 150)
    pixels[512:, :512] = (90, 60, 140)
    noise = generator.integers(0, 50, (1024, 1024, 3), dtype=np.uint8)
    tifffile.imwrite(
        tmp_path / "s.tiff", np.where(pixels < 240, pixels + noise, pixels), photometric="rgb",
        tile=(256, 256), resolution=(20_000, 20_000), resolutionunit="CENTIMETER",
    )  # fmt: skip
    encoder = write_encoder_folder(tmp_path / "net")
    extract(
        ExtractConfig(
            slides=tmp_path / "s.tiff", encoder=str(encoder), out=tmp_path / "x",
            tile=TileOptions(mpp=1.0, size_px=64, workers=1), embed=EmbedOptions(device="cpu"),
        )
    )  # fmt: skip
    return tmp_path / "x", encoder


def test_a_slide_is_drawn_twice_alike(extracted: tuple[Path, Path], tmp_path: Path) -> None:
    folder, encoder = extracted
    made = []
    for out in ("a", "b"):
        explain(
            ExplainConfig(
                encoder=str(encoder), tiles=folder / "tiles", out=tmp_path / out, device="cpu",
                features=folder / "store", at=[[100.0, 100.0], [100.0, 700.0]],
            )
        )  # fmt: skip
        made.append({p.name: p.read_bytes() for p in (tmp_path / out).iterdir()})
    assert made[0] == made[1]
    assert set(made[0]) == {"components.png", "attention.png", "nearest.png"}
    with Image.open(tmp_path / "a" / "components.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    right = pixels[:, pixels.shape[1] // 2 :]
    coloured = np.ptp(right, axis=2) > 30
    assert 0.3 < coloured.mean() < 0.9  # tissue has colours, glass none


def test_what_cannot_be_explained_is_one_line(extracted: tuple[Path, Path], tmp_path: Path) -> None:
    folder, encoder = extracted
    options: dict[str, Any] = {"tiles": folder / "tiles", "out": tmp_path / "o", "device": "cpu"}
    for changes, words in (
        ({"slide": "other"}, "knows no slide 'other', but s"),
        ({"at": [[900.0, 900.0]]}, "no tile of tissue of s lies there"),
        ({"encoder": "builtin:mean-colour"}, "no patch tokens to look at"),
    ):
        with pytest.raises(InputError, match=words):
            explain(ExplainConfig(**{"encoder": str(encoder), **options, **changes}))
