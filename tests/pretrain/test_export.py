"""The encoder folder loads in bare timm and gives our own features."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from eosin.configs.errors import EosinError, InputError
from eosin.data_curation.torchvision_import import import_timm
from eosin.pretrain.export import EncoderCard, ExportConfig, export, golden_tile, write_encoder
from eosin.pretrain.positions import RopeConfig
from eosin.pretrain.vit import Vit, VitConfig

CARD = EncoderCard(
    steps=10, tiles_seen=640, index_digest="abc", mpp=0.5, mean=(0.7, 0.6, 0.7), std=(0.2, 0.2, 0.2)
)  # fmt: skip


def exported(folder: Path, **changes: object) -> Vit:
    config = VitConfig(
        **{  # type: ignore[arg-type]
            "width": 48, "depth": 2, "heads": 3, "patch_px": 8, "image_px": 32, "registers": 2,
            "layer_scale": 0.5, **changes,
        }
    )  # fmt: skip
    vit = Vit(config)
    generator = torch.Generator().manual_seed(0)
    vit.initialise(generator)
    with torch.no_grad():  # so that no parameter is at a value that hides it
        for parameter in vit.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    write_encoder(folder, config, vit.state_dict(), CARD)
    return vit.eval()


@pytest.mark.pitfall(11)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"registers": 0},
        {"ffn": "swiglu"},
        {"width": 100, "heads": 5, "ffn": "swiglu"},
        {"positions": "rope"},
        {"positions": "rope", "ffn": "swiglu", "registers": 8, "rope": RopeConfig(base=30)},
        {"positions": "rope", "registers": 0, "width": 100, "heads": 5, "swiglu_multiple": 64},
        {"positions": "rope", "norm_eps": 1e-5},
        {"positions": "rope", "norm_eps": 1e-5, "ffn": "swiglu", "rope": RopeConfig(base=30)},
    ],
)
@torch.no_grad()
def test_bare_timm_loads_it_with_equal_features(tmp_path: Path, changes: dict[str, object]) -> None:
    vit = exported(tmp_path / "encoder", **changes)
    timm = import_timm()
    model = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
    for size in ((32, 32), (48, 24)):
        images = torch.randn(2, 3, *size)
        ours = vit([images])[0]
        torch.testing.assert_close(model(images), ours.cls, atol=1e-5, rtol=1e-5)
        tokens = model.forward_features(images)[:, model.num_prefix_tokens :]
        torch.testing.assert_close(tokens, ours.patches, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_positions_that_timm_would_resample_in_another_way_are_exported_for_one_size(
    tmp_path: Path,
) -> None:
    vit = exported(tmp_path / "encoder", interpolation="offset")
    timm = import_timm()
    model = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), vit([images])[0].cls, atol=1e-5, rtol=1e-5)
    with pytest.raises(AssertionError, match="Input height"):
        model(torch.randn(1, 3, 48, 48))
    assert "32 px and no other" in (tmp_path / "encoder" / "README.md").read_text()


@torch.no_grad()
def test_the_golden_tile_gives_the_golden_features_through_timms_own_transform(
    tmp_path: Path,
) -> None:
    exported(tmp_path / "encoder")
    timm = import_timm()
    model = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(model)
    assert tuple(data["input_size"]) == (3, 32, 32) and tuple(data["mean"]) == CARD.mean
    transform = timm.data.create_transform(**data, is_training=False)
    with Image.open(tmp_path / "encoder" / "golden.png") as tile:
        assert np.array_equal(np.asarray(tile), golden_tile(32))
        features = model(transform(tile.convert("RGB"))[None])[0]
    golden = load_file(tmp_path / "encoder" / "golden.safetensors")["cls"]
    torch.testing.assert_close(features, golden, atol=1e-5, rtol=1e-5)


def test_every_file_has_its_checksum_and_the_bytes_are_stable(tmp_path: Path) -> None:
    exported(tmp_path / "a")
    exported(tmp_path / "b")
    sums = dict(
        reversed(line.split("  "))
        for line in (tmp_path / "a" / "SHA256SUMS").read_text().splitlines()
    )
    assert set(sums) == {p.name for p in (tmp_path / "a").iterdir()} - {"SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256((tmp_path / "a" / name).read_bytes()).hexdigest() == digest
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["eosin"]["mpp"] == 0.5 and config["num_classes"] == 0


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        export(ExportConfig(run=tmp_path))
    (tmp_path / "config.yaml").write_text("shards: s\nout: o\n")
    with pytest.raises(EosinError, match="no whole checkpoint"):
        export(ExportConfig(run=tmp_path))
