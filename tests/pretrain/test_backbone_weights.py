"""An encoder folder back into the network: whole, or refused with nothing loaded."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eosin.configs.errors import InputError
from eosin.pretrain.backbone_weights import load_backbone
from eosin.pretrain.export import write_encoder
from eosin.pretrain.model_card import EncoderCard
from eosin.pretrain.vit import Vit, VitConfig

CARD = EncoderCard(
    steps=1, tiles_seen=4, index_digest="abc", mpp=0.5, mean=(0.7, 0.6, 0.7), std=(0.2, 0.2, 0.2)
)  # fmt: skip


def drawn(seed: int, **changes: object) -> Vit:
    sizes = {"width": 32, "depth": 2, "heads": 2, "patch_px": 8, "image_px": 32, "registers": 2}
    vit = Vit(VitConfig(**{**sizes, **changes}))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.normal_(generator=generator)
    return vit


def state(vit: Vit) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in vit.state_dict().items()}


@pytest.mark.pitfall(11)
@pytest.mark.parametrize("changes", [{}, {"ffn": "swiglu", "registers": 0}, {"positions": "rope"}])
def test_every_tensor_comes_back_but_the_mask_token(
    changes: dict[str, object], tmp_path: Path
) -> None:
    theirs, vit = drawn(0, **changes), drawn(1, **changes)
    write_encoder(tmp_path / "encoder", theirs.config, theirs.state_dict(), CARD)
    before, saved = state(vit), state(theirs)
    load_backbone(vit, tmp_path / "encoder")
    for name, tensor in vit.state_dict().items():
        assert torch.equal(tensor, (before if name == "mask_token" else saved)[name]), name


@pytest.mark.pitfall(11)
@pytest.mark.parametrize("what", ["missing", "unexpected", "of another shape"])
def test_one_tensor_that_does_not_fit_is_named_and_nothing_is_loaded(
    what: str, tmp_path: Path
) -> None:
    theirs, vit = drawn(0), drawn(1)
    write_encoder(tmp_path, theirs.config, theirs.state_dict(), CARD)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "blocks.1.mlp.fc2.weight"
    if what == "unexpected":
        tensors["blocks.2.norm1.weight"] = torch.ones(32)
    elif what == "of another shape":
        tensors[name] = tensors[name][:1].clone()
    else:
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    before = state(vit)
    with pytest.raises(InputError, match=rf"1 {what} \(blocks\."):
        load_backbone(vit, tmp_path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in vit.state_dict().items())
    with pytest.raises(InputError, match="nowhere does not exist; give a file of weights"):
        load_backbone(vit, tmp_path / "nowhere")
