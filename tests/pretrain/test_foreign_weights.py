"""Other libraries' weights in our network: equal features, every tensor accounted for."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from eosin.configs.errors import InputError
from eosin.configs.load import load_config
from eosin.data_curation.torchvision_import import import_beside_torchvision, import_timm
from eosin.data_curation.weight_facts import facts_of
from eosin.data_curation.weight_files import read_weights
from eosin.data_curation.weight_layouts import shape_of, to_our_names
from eosin.pretrain.backbone_weights import load_backbone, settings_of
from eosin.pretrain.vit import Vit, VitConfig
from eosin.pretrain.weights import WeightsConfig, show_weights

Tokens = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] → all tokens [B, P + N, D] after the final norm."""
TIMM = import_timm()
TRANSFORMERS = import_beside_torchvision("transformers")
pytestmark = pytest.mark.pitfall(11)


def drawn(model: nn.Module, seed: int = 0) -> Any:
    """The model with weights that hide nothing: no zeros, no ones, large LayerScale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            is_scale = "gamma" in name or "lambda1" in name or "norm" in name
            p.copy_(0.2 * noise + (0.8 if is_scale and p.ndim == 1 else 0))
    return model.eval()


def ours(source: Path, **overrides: object) -> Vit:
    """Our network with the settings that the source's own tensors and config ask for."""
    weights = read_weights(source)
    backbone = to_our_names(weights.tensors, "test")
    shape = shape_of(backbone.tensors)
    settings = settings_of(shape, facts_of(weights, backbone.layout, shape.width), backbone)
    given = [f"{name}={value}" for name, value in (settings | overrides).items()]
    if "image_px" not in settings and "image_px" not in overrides:
        given.append(f"image_px={4 * shape.patch_px}")
    vit = Vit(load_config(VitConfig, [], given))
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.fill_(torch.nan)
    said = load_backbone(vit, source)
    match = re.search(r"(\d+) of (\d+) tensors accounted for", said)
    assert match and match[1] == match[2] == str(len(weights.tensors)), said
    return vit.eval()


@torch.no_grad()
def assert_equal(vit: Vit, theirs: Tokens, *sizes: tuple[int, int], prefix: int) -> None:
    for size in sizes:
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
        tokens, found = theirs(images), vit([images])[0]
        torch.testing.assert_close(found.cls, tokens[:, 0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.patches, tokens[:, prefix:], atol=1e-5, rtol=1e-5)


UNI2 = {
    "img_size": 56, "patch_size": 14, "depth": 2, "num_heads": 4, "embed_dim": 48,
    "mlp_ratio": 2.66667 * 2, "init_values": 1e-5, "no_embed_class": True, "reg_tokens": 8,
    "dynamic_img_size": True, "mlp_layer": TIMM.layers.SwiGLUPacked, "act_layer": nn.SiLU,
}  # fmt: skip
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 4, "dynamic_img_size": True}
IN_TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_small_patch16_224", {**SMALL, "img_size": 64}),
    "uni": ("vit_large_patch16_224", {**SMALL, "img_size": 64, "init_values": 1e-5}),
    "uni2-h": ("vit_giant_patch14_224", UNI2),
    "virchow2": (
        "vit_huge_patch14_224",
        {**SMALL, "img_size": 56, "mlp_ratio": 5.3375, "init_values": 1e-5, "reg_tokens": 4,
         "mlp_layer": TIMM.layers.SwiGLUPacked, "act_layer": nn.SiLU},
    ),
    "h-optimus": ("vit_giant_patch14_reg4_dinov2", {**SMALL, "img_size": 56}),
    "gigapath": (
        "vit_giant_patch14_dinov2",
        {**SMALL, "img_size": 64, "patch_size": 16, "mlp_ratio": 5.33334},
    ),
    "dinov3": ("vit_small_patch16_dinov3", {**SMALL, "img_size": 64, "global_pool": "token"}),
    "dinov3-qkvb": ("vit_base_patch16_dinov3_qkvb", {**SMALL, "img_size": 64}),
    "dinov3-7b": ("vit_7b_patch16_dinov3", {**SMALL, "img_size": 64}),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_TIMM)
def test_timms_networks(name: str, tmp_path: Path) -> None:
    """As UNI, UNI2-h, Virchow2, H-optimus, GigaPath and timm's DINOv3 are published."""
    architecture, arguments = IN_TIMM[name]
    model = drawn(TIMM.create_model(architecture, pretrained=False, num_classes=0, **arguments))
    plain = {k: v for k, v in arguments.items() if k not in ("mlp_layer", "act_layer")}
    config = {"architecture": architecture, "model_args": plain}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    side = arguments["img_size"]
    patch = model.patch_embed.patch_size[0]
    vit = ours(tmp_path)
    assert_equal(
        vit, model.forward_features, (side, side), (2 * side, side + patch),
        prefix=model.num_prefix_tokens,
    )  # fmt: skip


def meta_dinov2(registers: int, gated: bool, chunked: bool, seed: int = 3) -> dict[str, Tensor]:
    """A drawn state dict as DINOv2's code saves it: 56 px, patch 14, width 48, two blocks."""
    generator, width, hidden = torch.Generator().manual_seed(seed), 48, 128 if gated else 192

    def draw(*shape: int, about: float = 0.0) -> Tensor:
        return 0.2 * torch.randn(shape, generator=generator) + about

    found = {
        "cls_token": draw(1, 1, width), "pos_embed": draw(1, 17, width),
        "mask_token": draw(1, width), "patch_embed.proj.weight": draw(width, 3, 14, 14),
        "patch_embed.proj.bias": draw(width), "norm.weight": draw(width, about=1),
        "norm.bias": draw(width),
    }  # fmt: skip
    if registers:
        found["register_tokens"] = draw(1, registers, width)
    up, down = ("w12", "w3") if gated else ("fc1", "fc2")
    rows = hidden * (2 if gated else 1)
    for i in range(2):
        block = f"blocks.{i}.{i}." if chunked else f"blocks.{i}."
        found |= {
            f"{block}norm1.weight": draw(width, about=1), f"{block}norm1.bias": draw(width),
            f"{block}attn.qkv.weight": draw(3 * width, width),
            f"{block}attn.qkv.bias": draw(3 * width),
            f"{block}attn.proj.weight": draw(width, width), f"{block}attn.proj.bias": draw(width),
            f"{block}ls1.gamma": draw(width, about=1), f"{block}ls2.gamma": draw(width, about=1),
            f"{block}norm2.weight": draw(width, about=1), f"{block}norm2.bias": draw(width),
            f"{block}mlp.{up}.weight": draw(rows, width), f"{block}mlp.{up}.bias": draw(rows),
            f"{block}mlp.{down}.weight": draw(width, hidden),
            f"{block}mlp.{down}.bias": draw(width),
        }  # fmt: skip
    return found


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_metas_dinov2(registers: int, gated: bool, chunked: bool, tmp_path: Path) -> None:
    """Against timm with weights that timm converts itself."""
    state = meta_dinov2(registers, gated, chunked)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in state.items()}}, tmp_path / "w.pth")
    kind = "giant" if gated else "small"
    reg = "_reg4" if registers else ""
    model = TIMM.create_model(
        f"vit_{kind}_patch14{reg}_dinov2", **{**SMALL, "num_heads": 1}, img_size=56,
        **({"mlp_ratio": 256 / 48} if gated else {}), num_classes=0,
    ).eval()  # fmt: skip
    plain = meta_dinov2(registers, gated, chunked=False)
    filtered = TIMM.models.vision_transformer.checkpoint_filter_fn(plain, model)
    model.load_state_dict(filtered, strict=True)
    vit = ours(tmp_path / "w.pth", heads=1)
    sizes = [(56, 56), (112, 70)] if registers else [(56, 56)]  # timm antialiases all
    assert_equal(vit, model.forward_features, *sizes, prefix=1 + registers)
    assert torch.equal(vit.mask_token, state["mask_token"])


def test_metas_dinov3(tmp_path: Path) -> None:
    """As its code saves it: masked biases of keys that may hold anything, periods in bf16."""
    arguments = {**SMALL, "img_size": 64, "num_heads": 1, "num_classes": 0}
    model = TIMM.create_model("vit_small_patch16_dinov3_qkvb", **arguments).eval()
    state = {}
    for name, tensor in drawn(model).state_dict().items():
        renamed = name.replace("reg_token", "storage_tokens").replace("gamma_", "ls")
        renamed = re.sub(r"\.ls(\d)$", r".ls\1.gamma", renamed)
        if name.endswith("q_bias"):
            bias = torch.cat([tensor, torch.full_like(tensor, torch.nan), tensor + 1])
            state[name.replace("q_bias", "qkv.bias")] = bias
            mask = torch.cat([torch.ones(48), torch.zeros(48), torch.ones(48)])
            state[name.replace("q_bias", "qkv.bias_mask")] = mask
        elif not name.endswith("v_bias"):
            state[renamed] = tensor
    state["rope_embed.periods"] = torch.ones(12, dtype=torch.bfloat16)
    state["mask_token"] = torch.ones(1, 48)
    filtered = TIMM.models.eva.checkpoint_filter_fn(dict(state), model)
    model.load_state_dict(filtered, strict=True)
    save_file(state, tmp_path / "dinov3.safetensors")
    vit = ours(tmp_path / "dinov3.safetensors", heads=1)
    assert vit.config.norm_eps == 1e-5
    assert_equal(vit, model.forward_features, (64, 64), (96, 48), prefix=5)


HF = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IN_TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Dinov2": ("Dinov2", {"image_size": 56, "patch_size": 14}),
    "Dinov2, gated": ("Dinov2", {"image_size": 56, "patch_size": 14, "use_swiglu_ffn": True}),
    "Dinov2WithRegisters": ("Dinov2WithRegisters", {"image_size": 56, "patch_size": 14}),
    "DINOv3ViT": ("DINOv3ViT", {"image_size": 64, "patch_size": 16, "num_register_tokens": 4,
                                "intermediate_size": 96}),
    "DINOv3ViT, gated": ("DINOv3ViT", {"image_size": 64, "patch_size": 16, "use_gated_mlp": True,
                                       "hidden_act": "silu", "num_register_tokens": 4,
                                       "intermediate_size": 128}),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_networks_of_transformers(name: str, tmp_path: Path) -> None:
    """Saved by the library itself, at native size and at another by its convention."""
    kind, arguments = IN_TRANSFORMERS[name]
    config = getattr(TRANSFORMERS, f"{kind}Config")(**HF, **arguments)
    model = drawn(getattr(TRANSFORMERS, f"{kind}Model")(config))
    model.save_pretrained(tmp_path)
    side, patch = arguments["image_size"], arguments["patch_size"]
    registers = getattr(config, "num_register_tokens", 0) or 0

    def tokens(images: Tensor) -> Tensor:
        return model(pixel_values=images).last_hidden_state

    assert_equal(
        ours(tmp_path), tokens, (side, side), (2 * side, side + patch), prefix=1 + registers
    )


def test_a_gate_of_another_kind_is_refused(tmp_path: Path) -> None:
    config = TRANSFORMERS.DINOv3ViTConfig(
        **HF, image_size=64, patch_size=16, use_gated_mlp=True, intermediate_size=128
    )
    TRANSFORMERS.DINOv3ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="hidden_act=gelu is no feed-forward of ours"):
        ours(tmp_path)


@pytest.mark.parametrize("spelt", [("query", "dense", "weights_in"), ("q_proj", "o_proj", "fc1")])
def test_transformers_older_names_are_known(spelt: tuple[str, ...], tmp_path: Path) -> None:
    """Files on hubs carry the names of the library's version that wrote them."""
    config = TRANSFORMERS.Dinov2Config(
        **HF, image_size=56, patch_size=14, use_swiglu_ffn=spelt[2] == "weights_in"
    )
    model = drawn(TRANSFORMERS.Dinov2Model(config))
    state = {}
    for name, tensor in model.state_dict().items():
        if spelt[0] == "query":
            for new, old in (
                ("attention.q_proj", "attention.attention.query"),
                ("attention.k_proj", "attention.attention.key"),
                ("attention.v_proj", "attention.attention.value"),
                ("attention.o_proj", "attention.output.dense"),
                ("mlp.down_proj", "mlp.weights_out"),
            ):
                name = name.replace(new, old)
        state[name] = tensor
    if spelt[2] == "weights_in":
        for i in range(2):
            for kind in ("weight", "bias"):
                parts = [
                    state.pop(f"encoder.layer.{i}.mlp.{p}_proj.{kind}") for p in ("gate", "up")
                ]
                state[f"encoder.layer.{i}.mlp.weights_in.{kind}"] = torch.cat(parts)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config.to_json_string())

    def tokens(images: Tensor) -> Tensor:
        return model(pixel_values=images).last_hidden_state

    assert_equal(ours(tmp_path), tokens, (56, 56), prefix=1)


@pytest.mark.parametrize("convention", ["antialias", "offset"])
@torch.no_grad()
def test_positions_for_another_size_are_resampled_by_the_sources_convention(
    convention: str, tmp_path: Path
) -> None:
    """DINOv2's own lines, naively: by a factor with 0.1 added, or to a size with antialiasing."""
    registers = 4 if convention == "antialias" else 0
    state = meta_dinov2(registers, gated=False, chunked=False)
    save_file(state, tmp_path / "w.safetensors")
    vit = ours(tmp_path / "w.safetensors", image_px=84, heads=1)
    table = state["pos_embed"][:, 1:].reshape(1, 4, 4, 48).permute(0, 3, 1, 2)
    how: dict[str, Any] = {"size": (6, 6), "antialias": True}
    if convention == "offset":
        how = {"scale_factor": (6.1 / 4, 6.1 / 4)}
    expected = nn.functional.interpolate(table, mode="bicubic", **how)
    assert vit.pos_embed is not None
    torch.testing.assert_close(vit.pos_embed[0].T.reshape(1, 48, 6, 6), expected)


@torch.no_grad()
def test_a_patch_of_another_size_sees_a_resized_tile_alike(tmp_path: Path) -> None:
    """FlexiViT's property: a larger kernel on a tile made larger gives the same tokens."""
    save_file(meta_dinov2(0, gated=False, chunked=False), tmp_path / "w.safetensors")
    small = ours(tmp_path / "w.safetensors", heads=1)
    large = ours(tmp_path / "w.safetensors", heads=1, patch_px=28, image_px=112)
    tile = torch.randn(1, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    larger = nn.functional.interpolate(tile, size=(28, 28), mode="bicubic", antialias=True)
    torch.testing.assert_close(
        large.patch_embed(larger), small.patch_embed(tile), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("layout", ["timm", "DINOv2", "transformers"])
@pytest.mark.parametrize("what", ["missing", "unexpected", "of another shape"])
def test_a_tensor_that_does_not_fit_is_refused_by_name(
    layout: str, what: str, tmp_path: Path
) -> None:
    if layout == "timm":
        state = TIMM.create_model("vit_small_patch16_224", **SMALL, num_classes=0).state_dict()
        name, ours_is = "blocks.1.mlp.fc2.weight", "blocks.1.mlp.fc2.weight"
    elif layout == "DINOv2":
        state = meta_dinov2(4, gated=True, chunked=True)
        name, ours_is = "blocks.1.1.mlp.w3.weight", "blocks.1.mlp.fc2.weight"
    else:
        config = TRANSFORMERS.Dinov2Config(**HF, image_size=56, patch_size=14)
        state = TRANSFORMERS.Dinov2Model(config).state_dict()
        name = "encoder.layer.1.mlp.down_proj.weight"
        name = name if name in state else "encoder.layer.1.mlp.fc2.weight"
        ours_is = "blocks.1.mlp.fc2.weight"
    state = {k: v.clone().contiguous() for k, v in state.items()}
    if what == "missing":
        del state[name]
    elif what == "unexpected":
        ours_is = "adapter.weight"
        state[ours_is] = torch.ones(3)
    else:
        state[name] = state[name][:1].clone()
    with pytest.raises(InputError, match=rf"1 {what} \({re.escape(ours_is)}\)"):
        to_our_names(state, "file")


def test_another_network_is_refused_with_the_settings_that_differ(tmp_path: Path) -> None:
    save_file(meta_dinov2(4, gated=False, chunked=False), tmp_path / "w.safetensors")
    vit = Vit(VitConfig(width=96, depth=2, heads=3, image_px=56, registers=2))
    with pytest.raises(InputError, match="width=48 there and 96 here, registers=4 there and 2"):
        load_backbone(vit, tmp_path / "w.safetensors")


def test_what_runs_code_or_is_no_weights_is_refused(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"cls_token": Evil()}))
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"a": torch.nn.Linear(2, 2)}, tmp_path / "module.pt")
    torch.save({"a": torch.ones(2), "b": 3}, tmp_path / "odd.pt")
    (tmp_path / "short.safetensors").write_bytes(b"\x08")
    (tmp_path / "w.onnx").write_bytes(b"")
    for name, index in {"cut": '{"weight_map": {"a', "list": "[]", "none_in_it": "{}",
                        "far": '{"weight_map": {"a": "../b.safetensors"}}'}.items():  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors.index.json").write_text(index)
    for name, said in {
        "evil.pth": "cannot be read as tensors alone",
        "text.pth": "cannot be read as tensors alone",
        "module.pt": "cannot be read as tensors alone",
        "odd.pt": "'b' is no tensor",
        "short.safetensors": "is damaged",
        "w.onnx": "weights are files that end in",
        "none": "does not exist",
        "cut": "model.safetensors.index.json is no JSON",
        "list": "holds a list, not an object of names",
        "none_in_it": "has no weight_map",
        "far": "which is not in its folder",
    }.items():
        with pytest.raises(InputError, match=said) as caught:
            read_weights(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "resnet.pth")
    with pytest.raises(InputError, match=r"its tensors \(conv1.weight\) are in no layout"):
        to_our_names(read_weights(tmp_path / "resnet.pth").tensors, "resnet.pth")


@pytest.mark.parametrize("gated", [False, True])
def test_the_verb_prints_settings_that_take_the_weights(
    gated: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(meta_dinov2(4, gated, chunked=True), tmp_path / "w.safetensors")
    show_weights(WeightsConfig(source=tmp_path / "w.safetensors"))
    said = capsys.readouterr().out
    assert "tensors accounted for (DINOv2 with registers)" in said and "learned at 56 px" in said
    given = [word.removeprefix("model.") for word in said.split() if word.startswith("model.")]
    load_backbone(Vit(load_config(VitConfig, [], given)), tmp_path / "w.safetensors")
