"""The encoder folder loads in bare timm and gives our own features."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from eosin.configs.errors import EosinError, InputError
from eosin.data_curation.torchvision_import import import_beside_torchvision, import_timm
from eosin.pretrain.export import ExportConfig, export, write_encoder
from eosin.pretrain.golden import golden_tile, prepare
from eosin.pretrain.model_card import EncoderCard
from eosin.pretrain.other_forms import FormName
from eosin.pretrain.positions import RopeConfig
from eosin.pretrain.vit import Vit, VitConfig

CONFIGS = Path(__file__).parents[2] / "configs"
CARD = EncoderCard(
    steps=10, tiles_seen=640, index_digest="abc", mpp=0.5, mean=(0.7, 0.6, 0.7), std=(0.2, 0.2, 0.2)
)  # fmt: skip


def exported(folder: Path, forms: Sequence[FormName] = (), **changes: object) -> Vit:
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
    write_encoder(folder, config, vit.state_dict(), CARD, forms)
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
    golden = load_file(tmp_path / "encoder" / "golden" / "features.safetensors")
    with Image.open(tmp_path / "encoder" / "golden" / "tile.png") as tile:
        assert np.array_equal(np.asarray(tile), golden_tile(32)) and tile.size == (44, 40)
        seen = transform(tile.convert("RGB"))
    assert torch.equal(seen, golden["input"])  # resized, cropped and normalised: to the bit
    tokens = model.forward_features(seen[None])
    torch.testing.assert_close(model(seen[None])[0], golden["cls"], atol=1e-5, rtol=1e-5)
    patches = tokens[0, model.num_prefix_tokens :]
    torch.testing.assert_close(patches.mean(dim=0), golden["mean"], atol=1e-5, rtol=1e-5)
    drift = json.loads((tmp_path / "encoder" / "config.json").read_text())["eosin"]["golden_drift"]
    assert 0.999 < drift["bf16"]["cosine"] <= 1 and drift["fp16"]["largest"] < 0.01


@pytest.mark.parametrize("size", [(32, 32), (50, 37), (37, 91), (64, 48), (20, 33)])
def test_our_own_preparation_is_timms_to_the_bit(size: tuple[int, int]) -> None:
    tile = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    mean, std = (0.7, 0.6, 0.7), (0.2, 0.21, 0.22)
    transform = import_timm().data.create_transform(
        input_size=(3, 32, 32), interpolation="bicubic", mean=mean, std=std, crop_pct=1.0
    )
    assert torch.equal(prepare(tile, 32, mean, std), transform(Image.fromarray(tile)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"registers": 0},
        {"ffn": "swiglu"},
        {"positions": "rope"},
        {"positions": "rope", "ffn": "swiglu", "rope": RopeConfig(base=30)},
        {"positions": "rope", "norm_eps": 1e-5, "registers": 1},
    ],
)
@torch.no_grad()
def test_transformers_loads_its_form_with_equal_features(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    vit = exported(tmp_path / "encoder", forms=["transformers"], **changes)
    library = import_beside_torchvision("transformers")
    folder = tmp_path / "encoder" / "transformers"
    model, report = library.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for size in ((32, 32), (48, 24)):
        images = torch.randn(2, 3, *size)
        tokens, ours = model.eval()(pixel_values=images).last_hidden_state, vit([images])[0]
        torch.testing.assert_close(tokens[:, 0], ours.cls, atol=1e-5, rtol=1e-5)
        patches = tokens[:, vit.config.prefix :]
        torch.testing.assert_close(patches, ours.patches, atol=1e-5, rtol=1e-5)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == list(CARD.mean) and processor["size"]["shortest_edge"] == 32


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"ffn": "swiglu"}, marks=pytest.mark.slow),
        pytest.param({"positions": "rope"}, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_onnx_runs_any_batch_with_equal_features(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    vit = exported(tmp_path / "encoder", forms=["onnx"], **changes)
    session = runtime.InferenceSession(
        str(tmp_path / "encoder" / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        [features] = session.run(["features"], {"images": images.numpy()})
        torch.testing.assert_close(
            torch.from_numpy(features), vit([images])[0].cls, atol=1e-4, rtol=1e-4
        )


SIZES = [
    pytest.param(name, marks=() if name in ("tiny", "small") else pytest.mark.slow)
    for name in ("tiny", "small", "base", "large", "huge", "giant")
]


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_every_size_is_equal_in_every_form(tmp_path: Path, size: str) -> None:
    """At its own width and feed-forward, one block deep, 28 px: timm, transformers, ONNX."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    shape = yaml.safe_load((CONFIGS / "size" / f"{size}.yaml").read_text())["model"]
    changes = {**shape, "depth": 1, "patch_px": 14, "image_px": 28, "registers": 4}
    vit = exported(tmp_path / "encoder", forms=["transformers", "onnx"], **changes)
    images = torch.randn(2, 3, 28, 28)
    ours = vit([images])[0].cls
    timm = import_timm()
    model = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
    torch.testing.assert_close(model(images), ours, atol=1e-5, rtol=1e-5)
    library = import_beside_torchvision("transformers")
    theirs = library.AutoModel.from_pretrained(tmp_path / "encoder" / "transformers").eval()
    found = theirs(pixel_values=images).last_hidden_state[:, 0]
    torch.testing.assert_close(found, ours, atol=1e-5, rtol=1e-5)
    session = runtime.InferenceSession(
        str(tmp_path / "encoder" / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    [features] = session.run(["features"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(features), ours, atol=1e-4, rtol=1e-4)


def test_every_file_has_its_checksum_and_the_bytes_are_stable(tmp_path: Path) -> None:
    exported(tmp_path / "a")
    exported(tmp_path / "b")
    sums = dict(
        reversed(line.split("  "))
        for line in (tmp_path / "a" / "SHA256SUMS").read_text().splitlines()
    )
    there = {str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert set(sums) == there - {"SHA256SUMS"}
    # timm 1.0.20 takes the first by name, and fails where there are several
    assert [p.name for p in (tmp_path / "a").glob("*.safetensors")] == ["model.safetensors"]
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
