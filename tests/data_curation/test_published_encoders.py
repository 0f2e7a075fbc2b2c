"""Published encoders: their arguments give their sizes, and a download in small loads as stated."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from eosin.configs.errors import InputError
from eosin.data_curation.encoder import load_encoder
from eosin.data_curation.published_encoders import PUBLISHED
from eosin.data_curation.torchvision_import import import_timm

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_arguments_give_the_published_size(name: str) -> None:
    known = PUBLISHED[name]
    with torch.device("meta"):
        model = import_timm().create_model(
            known.architecture, pretrained=False, **known.configured, **known.all_arguments()
        )
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(known.millions, rel=2e-3)
    assert model.patch_embed.img_size == (224, 224)


def download(folder: Path, name: str, **smaller: Any) -> tuple[Path, Any]:
    """What the hub would give for a smaller network of the same kind; and the network."""
    known = PUBLISHED[name]
    folder.mkdir()
    arguments = {"embed_dim": 32, "depth": 1, "num_heads": 2, **known.configured, **smaller}
    torch.manual_seed(0)
    model = import_timm().create_model(
        known.architecture, pretrained=False, **arguments, **known.all_arguments()
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    config = {
        "architecture": known.architecture,
        "model_args": arguments,
        "num_features": 32,
        "pretrained_cfg": {  # another normalisation than the published one: it does not count
            "input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0,
            "crop_pct": 0.5, "interpolation": "bilinear", "fixed_input_size": True,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(model.state_dict()), folder / "model.safetensors", {"format": "pt"})
    return folder, model.eval()


@pytest.mark.parametrize(
    ("name", "prefix"), [("virchow", 1), ("virchow2", 5), ("h0-mini", 5), ("prov-gigapath", 1)]
)
def test_a_download_gives_what_its_card_says(tmp_path: Path, name: str, prefix: int) -> None:
    folder, model = download(tmp_path / "net", name)
    encoder = load_encoder(f"published:{name}:{folder}", CPU)
    known = PUBLISHED[name]
    assert (encoder.name, encoder.pooling) == (name, known.pooling)
    assert (encoder.mean, encoder.std) == known.normalisation
    tile = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    side = round(224 / known.crop_pct)
    resized = Image.fromarray(tile).resize((side, side), Image.Resampling.BICUBIC)
    edge = (side - 224) // 2
    cropped = resized.crop((edge, edge, edge + 224, edge + 224))
    scaled = torch.from_numpy(np.asarray(cropped).copy()).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in known.normalisation)
    with torch.inference_mode():
        tokens = model.forward_features(((scaled - mean) / std)[None])[0]
    parts = [tokens[0], tokens[prefix:].mean(0)] if known.pooling == "clsmean" else [tokens[0]]
    np.testing.assert_allclose(encoder.embed([tile])[0], torch.cat(parts).numpy(), atol=2e-5)
    twin = encoder.random_twin(1)
    assert twin.dim == encoder.dim and twin.pooling == encoder.pooling
    assert load_encoder(f"published:{name}:{folder}@cls", CPU).dim == 32


def test_what_cannot_be_had_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no published encoder 'uni3'; there are: uni, uni2-h"):
        load_encoder("published:uni3", CPU)
    with pytest.raises(InputError, match="holds no download of MahmoodLab/uni: it has no config"):
        load_encoder(f"published:uni:{tmp_path}", CPU)
    folder, _ = download(tmp_path / "net", "virchow2")
    with pytest.raises(InputError, match=r"published:uni2-h: .* cannot be had or loaded"):
        load_encoder(f"published:uni2-h:{folder}", CPU)  # another's weights
