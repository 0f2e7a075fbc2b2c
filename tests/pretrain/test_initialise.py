"""Weights are drawn apart from construction, and none is forgotten."""

import pytest
import torch
from torch import nn

from eosin.pretrain.initialise import materialise
from eosin.pretrain.vit import Vit, VitConfig

CONFIG = VitConfig(width=16, depth=1, heads=2, patch_px=8, image_px=16, registers=1)


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_it_draws_what_initialise_draws(positions: str) -> None:
    config = VitConfig(**{**vars(CONFIG), "positions": positions})
    vit = materialise(lambda: Vit(config), seed=3)
    other = Vit(config)
    other.initialise(torch.Generator().manual_seed(3))
    assert {p.device.type for p in vit.parameters()} == {"cpu"}
    for (name, ours), theirs in zip(vit.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    again = materialise(lambda: Vit(config), seed=4)
    assert not torch.equal(vit.blocks[0].mlp.fc1.weight, again.blocks[0].mlp.fc1.weight)
    assert ("pos_embed" in vit.state_dict()) == (positions == "learned")


def test_nothing_is_allocated_while_it_is_built() -> None:
    devices = []

    def build() -> Vit:
        vit = Vit(CONFIG)
        devices.extend(p.device.type for p in vit.parameters())
        return vit

    materialise(build, seed=0)
    assert set(devices) == {"meta"}


class Forgetful(nn.Module):
    def __init__(self, *, counter: bool = False) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_buffer("centre", torch.zeros(2))
        if counter:
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def initialise(self, generator: torch.Generator) -> None:
        self.inner.weight.normal_(generator=generator)


def test_what_was_forgotten_is_named() -> None:
    with pytest.raises(ValueError, match=r"Forgetful.* left undefined: inner\.bias, centre$"):
        materialise(Forgetful, seed=0)
    with pytest.raises(ValueError, match=r"not floating point.*: steps"):
        materialise(lambda: Forgetful(counter=True), seed=0)
    with pytest.raises(TypeError, match="Linear has no initialise"):
        materialise(lambda: nn.Linear(2, 2), seed=0)
