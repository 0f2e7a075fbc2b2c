"""`export verify` finds what differs, and says at which stage."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from eosin.configs.errors import EosinError, InputError
from eosin.pretrain.export import CHECKSUMS, write_encoder
from eosin.pretrain.model_card import EncoderCard
from eosin.pretrain.verify_encoder import VerifyEncoderConfig, check_encoder, verify_encoder
from eosin.pretrain.vit import Vit, VitConfig

CARD = EncoderCard(
    steps=10, tiles_seen=640, index_digest="abc", mpp=0.5, mean=(0.7, 0.6, 0.7), std=(0.2, 0.2, 0.2)
)  # fmt: skip


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    config = VitConfig(
        width=48, depth=2, heads=3, patch_px=8, image_px=32, registers=2, layer_scale=0.5
    )
    vit = Vit(config)
    generator = torch.Generator().manual_seed(0)
    vit.initialise(generator)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    write_encoder(tmp_path / "encoder", config, vit.state_dict(), CARD)
    return tmp_path / "encoder"


def sign(folder: Path) -> None:
    """Checksums of what is there, as someone who changed it on purpose would write."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n"
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != CHECKSUMS
    ]
    (folder / CHECKSUMS).write_text("".join(lines))


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    sign(folder)


def wrong(folder: Path) -> dict[str, str]:
    return {f.stage: f.words for f in check_encoder(folder) if not f.fine}


def test_a_whole_folder_passes_every_check(
    encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verify_encoder(VerifyEncoderConfig(encoder=encoder))
    said = capsys.readouterr().out
    for stage in ("files", "versions", "loading", "preprocessing", "features", "pooling", "bf16"):
        assert f"ok      {stage}: " in said
    assert "DIFFERS" not in said


def test_a_flipped_bit_is_found_and_its_file_named(encoder: Path) -> None:
    weights = encoder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 64
    weights.write_bytes(data)
    assert "model.safetensors" in wrong(encoder)["files"]
    sign(encoder)
    assert set(wrong(encoder)) >= {"features"}  # even when the checksums were written anew


def test_a_changed_mean_is_found_as_that(encoder: Path) -> None:
    edit(encoder, lambda c: c["pretrained_cfg"].update(mean=[0.485, 0.456, 0.406]))
    found = wrong(encoder)
    assert set(found) == {"preprocessing"} and "mean or std differ" in found["preprocessing"]


@pytest.mark.parametrize(
    "change", [{"interpolation": "bilinear"}, {"crop_pct": 0.875}, {"crop_mode": "squash"}]
)
def test_another_way_of_resizing_is_found_as_that(change: dict[str, Any], encoder: Path) -> None:
    edit(encoder, lambda c: c["pretrained_cfg"].update(change))
    found = wrong(encoder)
    assert set(found) == {"preprocessing"} and "resizing or cropping" in found["preprocessing"]


@pytest.mark.parametrize(
    ("pool", "words"),
    [("avg", "gives 'mean', and 'cls' was written"), ("", r"something else \(\[19, 48\]\)")],
)
def test_another_pooling_is_found_as_that(pool: str, words: str, encoder: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["model_args"].update(global_pool=pool, fc_norm=False)

    edit(encoder, change)
    found = wrong(encoder)
    assert set(found) == {"pooling"} and re.search(words, found["pooling"])


def test_a_pooling_that_is_only_claimed_is_found(encoder: Path) -> None:
    edit(encoder, lambda c: c["eosin"].update(pooling="mean"))
    assert wrong(encoder) == {"pooling": "the network gives 'cls', and 'mean' was written"}


def test_other_weights_and_other_shapes_are_found(encoder: Path) -> None:
    tensors = load_file(encoder / "model.safetensors")
    tensors["blocks.0.mlp.fc1.bias"][0] += 0.5
    save_file(tensors, encoder / "model.safetensors", metadata={"format": "pt"})
    sign(encoder)
    assert "other weights" in wrong(encoder)["features"]
    del tensors["norm.bias"]
    save_file(tensors, encoder / "model.safetensors", metadata={"format": "pt"})
    sign(encoder)
    assert "timm does not load it" in wrong(encoder)["loading"]


def test_a_missing_file_a_damaged_picture_and_no_encoder(encoder: Path, tmp_path: Path) -> None:
    (encoder / "README.md").unlink()
    with pytest.raises(EosinError, match="1 checks differ: files"):
        verify_encoder(VerifyEncoderConfig(encoder=encoder))
    Image.new("RGB", (40, 40)).save(encoder / "golden" / "tile.png")
    sign(encoder)
    assert "preprocessing" in wrong(encoder)
    (encoder / "golden" / "tile.png").write_bytes(b"no picture")
    assert "cannot be read" in wrong(encoder)["golden"]
    with pytest.raises(InputError, match="holds no encoder of eosin"):
        verify_encoder(VerifyEncoderConfig(encoder=tmp_path))
