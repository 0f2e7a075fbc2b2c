"""An encoder in other forms, beside timm's: a folder for transformers, and ONNX."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from eosin.configs.errors import ConfigError, EosinError
from eosin.data_curation.torchvision_import import import_timm
from eosin.launch.artefacts import write_text
from eosin.pretrain.model_card import EncoderCard
from eosin.pretrain.tensor_files import save_tensors
from eosin.pretrain.vit import VitConfig

FormName: TypeAlias = Literal["transformers", "onnx"]
ONNX_OPSET = 18


def write_transformers(
    folder: Path, model: VitConfig, state: Mapping[str, Tensor], card: EncoderCard
) -> None:
    """Writes what `transformers.AutoModel.from_pretrained` and its image processor load.

    Learned positions go into ``Dinov2WithRegisters`` (which resamples with antialiasing, as we do),
    rotary ones into ``DINOv3ViT``.

    Args:
        folder: of this form.
        model: shape of the network.
        state: its tensors in our names, without additions.
        card: preprocessing.

    Raises:
        ConfigError: there is no such network in transformers.
    """
    rope = model.positions == "rope"
    folder.mkdir(parents=True)
    config = _dinov3_config(model) if rope else _dinov2_config(model)
    tensors = _their_names(model, state, rope)
    write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
    write_text(
        folder / "preprocessor_config.json", json.dumps(_processor(model, card), indent=1) + "\n"
    )
    save_tensors(folder / "model.safetensors", tensors, format="pt")


def write_onnx(folder: Path, encoder: Path, image_px: int) -> None:
    """Writes ``model.onnx``: images [batch, 3, s, s] → CLS features [batch, D], batch dynamic.

    Args:
        folder: of this form.
        encoder: the encoder's folder in timm's form.
        image_px: s.

    Raises:
        EosinError: torch cannot export it here.
    """
    folder.mkdir(parents=True)
    model = import_timm().create_model(f"local-dir:{encoder}", pretrained=True).eval()
    images = torch.zeros(2, 3, image_px, image_px)
    try:
        with warnings.catch_warnings():  # of torch, about itself
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model, (images,), dynamo=True, opset_version=ONNX_OPSET, verbose=False,
                input_names=["images"], output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
        assert program is not None
        program.save(str(folder / "model.onnx"), external_data=False)
    except ImportError as error:
        raise EosinError(f"ONNX needs onnxscript: pip install 'eosin[onnx]' ({error})") from error
    except Exception as error:  # the exporter raises by operator, and at length
        reason = " ".join(str(error).split())[:200]
        raise EosinError(f"torch cannot export this network to ONNX: {reason}") from error


def _dinov2_config(model: VitConfig) -> dict[str, Any]:
    gated = model.ffn == "swiglu"
    theirs = (int(int(model.width * model.mlp_ratio) * 2 / 3) + 7) // 8 * 8
    ratio: float = model.mlp_ratio
    if gated and theirs != model.hidden:
        raise ConfigError(
            f"transformers has no gated feed-forward of {model.hidden} channels for width "
            f"{model.width}: with mlp_ratio={model.mlp_ratio} it makes {theirs}"
        )
    if not gated:
        ratio = model.hidden / model.width
        if int(model.width * ratio) != model.hidden:
            raise ConfigError(f"transformers has no feed-forward of {model.hidden} channels")
    return {
        "architectures": ["Dinov2WithRegistersModel"],
        "model_type": "dinov2_with_registers",
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "use_swiglu_ffn": gated,
        "hidden_act": "gelu",
        "image_size": model.image_px,
        "patch_size": model.patch_px,
        "num_channels": 3,
        "num_register_tokens": model.registers,
        "layer_norm_eps": model.norm_eps,
        "layerscale_value": 1.0,
        "qkv_bias": True,
        "drop_path_rate": 0.0,
        "torch_dtype": "float32",
    }


def _dinov3_config(model: VitConfig) -> dict[str, Any]:
    gated = model.ffn == "swiglu"
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "hidden_size": model.width,
        "intermediate_size": model.hidden,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        "image_size": model.image_px,
        "patch_size": model.patch_px,
        "num_channels": 3,
        "num_register_tokens": model.registers,
        "layer_norm_eps": model.norm_eps,
        "layerscale_value": 1.0,
        "rope_theta": float(model.rope.base),
        "query_bias": True,
        "key_bias": True,
        "value_bias": True,
        "proj_bias": True,
        "mlp_bias": True,
        "pos_embed_jitter": None,
        "pos_embed_rescale": None,
        "pos_embed_shift": None,
        "drop_path_rate": 0.0,
        "torch_dtype": "float32",
    }


def _processor(model: VitConfig, card: EncoderCard) -> dict[str, Any]:
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": model.image_px},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": model.image_px, "width": model.image_px},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(card.mean),
        "image_std": list(card.std),
    }


def _their_names(model: VitConfig, state: Mapping[str, Tensor], rope: bool) -> dict[str, Tensor]:
    """Our tensors under transformers' names: attention in three parts, gates apart (DINOv3)."""
    width, gated = model.width, model.ffn == "swiglu"
    layer, patch = ("layer.{}.", "") if rope else ("encoder.layer.{}.", "projection.")
    found = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.mask_token": state["mask_token"].reshape(1, 1, width) if rope
        else state["mask_token"],
        "embeddings.register_tokens": state["reg_token"],
        f"embeddings.patch_embeddings.{patch}weight": state["patch_embed.proj.weight"],
        f"embeddings.patch_embeddings.{patch}bias": state["patch_embed.proj.bias"],
    }  # fmt: skip
    norm = "norm" if rope else "layernorm"
    found |= {f"{norm}.{kind}": state[f"norm.{kind}"] for kind in ("weight", "bias")}
    if not rope:
        none = torch.zeros(1, 1, width)  # CLS has no position of its own
        found["embeddings.position_embeddings"] = torch.cat([none, state["pos_embed"]], dim=1)
    attention = "attention.{}_proj" if rope else "attention.attention.{}"
    names = ("q", "k", "v") if rope else ("query", "key", "value")
    projection = "attention.o_proj" if rope else "attention.output.dense"
    for i in range(model.depth):
        ours, theirs = f"blocks.{i}.", layer.format(i)
        for kind in ("weight", "bias"):
            parts = state[f"{ours}attn.qkv.{kind}"].chunk(3)
            for name, part in zip(names, parts, strict=True):
                found[f"{theirs}{attention.format(name)}.{kind}"] = part.clone()
            found[f"{theirs}{projection}.{kind}"] = state[f"{ours}attn.proj.{kind}"]
            found |= {f"{theirs}norm{j}.{kind}": state[f"{ours}norm{j}.{kind}"] for j in (1, 2)}
            fc1, fc2 = state[f"{ours}mlp.fc1.{kind}"], state[f"{ours}mlp.fc2.{kind}"]
            if rope and gated:
                gate, up = fc1.chunk(2)
                found[f"{theirs}mlp.gate_proj.{kind}"] = gate.clone()
                found[f"{theirs}mlp.up_proj.{kind}"] = up.clone()
                found[f"{theirs}mlp.down_proj.{kind}"] = fc2
            else:
                up_name, down_name = ("up_proj", "down_proj") if rope else ("fc1", "fc2")
                if gated:
                    up_name, down_name = "weights_in", "weights_out"
                found[f"{theirs}mlp.{up_name}.{kind}"] = fc1
                found[f"{theirs}mlp.{down_name}.{kind}"] = fc2
        for j in (1, 2):
            found[f"{theirs}layer_scale{j}.lambda1"] = state[f"{ours}ls{j}.gamma"]
    return {name: tensor.float() for name, tensor in found.items()}
