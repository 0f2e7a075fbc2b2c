"""Published encoders in forms that are not timm's, on small imitations of a download.

Midnight, Phikon-v2 and Hibou against transformers; GenBio-PathFM against its forward pass, written
out here.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from eosin.configs.errors import InputError
from eosin.data_curation.converted_encoders import CONVERTED
from eosin.data_curation.encoder import load_encoder
from eosin.data_curation.torchvision_import import import_beside_torchvision

pytest.importorskip("tokenizers")  # comes with transformers
transformers = import_beside_torchvision("transformers")
CPU = torch.device("cpu")
TILES = np.random.default_rng(0).integers(0, 256, (3, 256, 256, 3), dtype=np.uint8)
IN_TRANSFORMERS = ["midnight-12k", "phikon-v2", "hibou-b", "hibou-l"]


def download(folder: Path, name: str) -> Any:
    """What the hub would give for a smaller network of the same kind; and the network."""
    kind = "Dinov2WithRegisters" if name.startswith("hibou") else "Dinov2"
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=224,
        use_swiglu_ffn=name == "midnight-12k", layerscale_value=1e-5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model.eval()


def pixels(name: str, resample: Image.Resampling) -> Tensor:
    """The tiles as a model card prepares them, [3, 3, 224, 224]."""
    small = [Image.fromarray(tile).resize((224, 224), resample) for tile in TILES]
    found = torch.tensor(np.stack([np.asarray(s) for s in small])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in CONVERTED[name].normalisation)
    return (found - mean) / std


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_features_are_those_of_the_library_by_hand(tmp_path: Path, name: str) -> None:
    model, prefix = download(tmp_path, name), 5 if name.startswith("hibou") else 1
    encoder = load_encoder(f"published:{name}:{tmp_path}", CPU)
    known = CONVERTED[name]
    assert (encoder.pooling, encoder.dim) == (known.pooling, 24 * (1 + (name == "midnight-12k")))
    assert (encoder.mean, encoder.std) == known.normalisation
    with torch.no_grad():
        tokens = model(pixels(name, Image.Resampling.BICUBIC)).last_hidden_state
    expected = {"cls": tokens[:, 0], "mean": tokens[:, prefix:].mean(dim=1)}
    expected["clsmean"] = torch.cat([expected["cls"], expected["mean"]], dim=1)
    np.testing.assert_allclose(encoder.embed(TILES), expected[known.pooling], rtol=1e-4, atol=1e-4)
    mean_encoder = load_encoder(f"published:{name}:{tmp_path}@mean", CPU)
    np.testing.assert_allclose(mean_encoder.embed(TILES), expected["mean"], rtol=1e-4, atol=1e-4)
    assert mean_encoder.digest != encoder.digest


def genbio_state(width: int = 64, depth: int = 2) -> dict[str, Tensor]:
    """A drawn state dict as GenBio's code saves it (7f670aa): one channel, patches of 16 px."""
    generator = torch.Generator().manual_seed(0)
    hidden = -(-int(4 * width * 2 / 3) // 64) * 64

    def draw(*shape: int, about: float = 0.0) -> Tensor:
        return 0.2 * torch.randn(shape, generator=generator) + about

    found = {
        "cls_token": draw(1, 1, width), "storage_tokens": draw(1, 4, width),
        "rope_embed.periods": torch.ones(width // 4, dtype=torch.bfloat16),
        "patch_embed.proj.weight": draw(width, 1, 16, 16), "patch_embed.proj.bias": draw(width),
        "norm.weight": draw(width, about=1), "norm.bias": draw(width),
    }  # fmt: skip
    linears = {"attn.proj": (width, width), "mlp.w1": (hidden, width), "mlp.w2": (hidden, width),
               "mlp.w3": (width, hidden)}  # fmt: skip
    for i in range(depth):
        block = f"blocks.{i}."
        found[f"{block}attn.qkv.weight"] = draw(3 * width, width)
        found |= {f"{block}ls{j}.gamma": draw(width) for j in (1, 2)}
        found |= {f"{block}norm{j}.weight": draw(width, about=1) for j in (1, 2)}
        found |= {f"{block}norm{j}.bias": draw(width) for j in (1, 2)}
        found |= {f"{block}{name}.weight": draw(*shape) for name, shape in linears.items()}
        found |= {f"{block}{name}.bias": draw(shape[0]) for name, shape in linears.items()}
    return found


def genbio_tokens(state: dict[str, Tensor], channel: Tensor) -> Tensor:
    """Tokens [5 + N, D] of one channel [1, H, W]; one head of all D channels."""
    width = state["cls_token"].shape[-1]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, [width], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    patches = F.conv2d(
        channel[None], state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16
    )
    side = patches.shape[-1]
    x = torch.cat([state["cls_token"][0], state["storage_tokens"][0], patches[0].flatten(1).T])
    half = torch.bfloat16
    periods = 100.0 ** (2 * torch.arange(width // 4, dtype=half) / (width // 2))
    axis = 2.0 * (torch.arange(0.5, side, dtype=half) / side) - 1.0
    rows, columns = axis.repeat_interleave(side), axis.repeat(side)
    angles = torch.cat([2 * torch.pi * rows[:, None] / periods,
                        2 * torch.pi * columns[:, None] / periods], dim=1)  # fmt: skip
    cos, sin = angles.cos().float(), angles.sin().float()

    def turn(v: Tensor) -> Tensor:
        a, b = v[5:].chunk(2, dim=1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=1)
        return torch.cat([v[:5], turned])

    i = 0
    while f"blocks.{i}.norm1.weight" in state:
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, dim=1)
        weights = (turn(q) @ turn(k).T / width**0.5).softmax(dim=1)
        x = x + state[f"blocks.{i}.ls1.gamma"] * linear(weights @ v, f"blocks.{i}.attn.proj")
        y = norm(x, f"blocks.{i}.norm2")
        gated = F.silu(linear(y, f"blocks.{i}.mlp.w1")) * linear(y, f"blocks.{i}.mlp.w2")
        x = x + state[f"blocks.{i}.ls2.gamma"] * linear(gated, f"blocks.{i}.mlp.w3")
        i += 1
    return norm(x, "norm")


def test_genbio_runs_red_green_and_blue_one_by_one(tmp_path: Path) -> None:
    state = genbio_state()
    torch.save(state, tmp_path / "model.pth")
    encoder = load_encoder(f"published:genbio-pathfm:{tmp_path}", CPU)
    assert encoder.dim == 3 * 64 and encoder.pooling == "cls"
    images = pixels("genbio-pathfm", Image.Resampling.BILINEAR)
    tokens = torch.stack(
        [torch.cat([genbio_tokens(state, c[None]) for c in image], dim=1) for image in images]
    )
    np.testing.assert_allclose(encoder.embed(TILES), tokens[:, 0], rtol=1e-4, atol=1e-4)
    clsmean = load_encoder(f"published:genbio-pathfm:{tmp_path}@clsmean", CPU).embed(TILES)
    np.testing.assert_allclose(clsmean[:, 192:], tokens[:, 5:].mean(1), rtol=1e-4, atol=1e-4)
    assert encoder.random_twin(0).dim == encoder.dim


def test_its_twin_is_the_same_network_with_its_blocks_at_work(tmp_path: Path) -> None:
    download(tmp_path, "midnight-12k")
    encoder = load_encoder(f"published:midnight-12k:{tmp_path}", CPU)
    twin = encoder.random_twin(3)
    assert twin.dim == encoder.dim and twin.digest != encoder.digest
    np.testing.assert_array_equal(twin.embed(TILES), encoder.random_twin(3).embed(TILES))
    spread = twin.embed(TILES).std(axis=0).max()
    assert spread > 1e-3


def test_what_is_missing_or_damaged_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no download of kaiko-ai/midnight"):
        load_encoder(f"published:midnight-12k:{tmp_path / 'empty'}", CPU)
    download(tmp_path / "net", "midnight-12k")
    weights = tmp_path / "net" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["layernorm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 missing \(norm\.weight\); nothing was loaded"):
        load_encoder(f"published:midnight-12k:{tmp_path / 'net'}", CPU)
    weights.write_bytes(b"no weights")
    with pytest.raises(InputError, match="is damaged") as caught:
        load_encoder(f"published:midnight-12k:{tmp_path / 'net'}", CPU)
    assert "\n" not in str(caught.value)


def test_an_encoder_that_cannot_be_downloaded_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(InputError, match=r"histai/hibou-L cannot be had \(no network at all\)"):
        load_encoder("published:hibou-l", CPU)
