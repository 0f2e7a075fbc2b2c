"""Published encoders in transformers' form, on small imitations of a download."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from eosin.configs.errors import InputError
from eosin.data_curation.encoder import load_encoder
from eosin.data_curation.torchvision_import import import_beside_torchvision

pytest.importorskip("tokenizers")  # comes with transformers
transformers = import_beside_torchvision("transformers")
CPU = torch.device("cpu")
TILES = np.random.default_rng(0).integers(0, 256, (3, 256, 256, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=224,
        use_swiglu_ffn=True, layerscale_value=1e-5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Dinov2Model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "download")
    return tmp_path / "download"


@pytest.mark.parametrize(
    ("name", "pooling", "mean", "std"),
    [
        ("midnight-12k", "clsmean", [0.5] * 3, [0.5] * 3),
        ("phikon-v2", "cls", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ],
)
def test_features_are_those_of_the_library_by_hand(
    folder: Path, name: str, pooling: str, mean: list[float], std: list[float]
) -> None:
    encoder = load_encoder(f"published:{name}:{folder}", CPU)
    assert (encoder.pooling, encoder.dim) == (pooling, 48 if pooling == "clsmean" else 24)
    model = transformers.Dinov2Model.from_pretrained(folder).eval()
    small = [Image.fromarray(t).resize((224, 224), Image.Resampling.BICUBIC) for t in TILES]
    pixels = torch.tensor(np.stack([np.asarray(s) for s in small])).permute(0, 3, 1, 2) / 255
    pixels = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        tokens = model(pixels).last_hidden_state
    expected = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(dim=1)}
    expected["clsmean"] = torch.cat([expected["cls"], expected["mean"]], dim=1)
    np.testing.assert_allclose(encoder.embed(TILES), expected[pooling], rtol=1e-4, atol=1e-4)
    mean_encoder = load_encoder(f"published:{name}:{folder}@mean", CPU)
    np.testing.assert_allclose(mean_encoder.embed(TILES), expected["mean"], rtol=1e-4, atol=1e-4)
    assert mean_encoder.digest != encoder.digest


def test_its_twin_is_the_same_network_with_its_blocks_at_work(folder: Path) -> None:
    encoder = load_encoder(f"published:midnight-12k:{folder}", CPU)
    twin = encoder.random_twin(3)
    assert twin.dim == encoder.dim and twin.digest != encoder.digest
    np.testing.assert_array_equal(twin.embed(TILES), encoder.random_twin(3).embed(TILES))
    spread = twin.embed(TILES).std(axis=0).max()
    assert spread > 1e-3


def test_what_is_missing_or_damaged_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no download of kaiko-ai/midnight"):
        load_encoder(f"published:midnight-12k:{tmp_path}", CPU)
    with pytest.raises(InputError, match="pools by cls, mean, clsmean, not 'native'"):
        load_encoder(f"published:midnight-12k:{folder}@native", CPU)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["layernorm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match="1 tensors are missing or too many, such as layernorm"):
        load_encoder(f"published:midnight-12k:{folder}", CPU)
    weights.write_bytes(b"no weights")
    with pytest.raises(InputError, match="cannot be had or loaded") as caught:
        load_encoder(f"published:midnight-12k:{folder}", CPU)
    assert "\n" not in str(caught.value)
