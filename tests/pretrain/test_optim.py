"""Schedules as golden values; parameter groups by name; clipping per module."""

import math

import pytest
import torch
from torch import nn

from eosin.pretrain.attention import sdpa_attention
from eosin.pretrain.distill import Network, ObjectiveConfig
from eosin.pretrain.heads import HeadConfig
from eosin.pretrain.optim import (
    GroupKey,
    OptimConfig,
    build_optimizer,
    clip_gradients,
    group_key,
    set_rates,
)
from eosin.pretrain.schedules import Schedule
from eosin.pretrain.vit import VitConfig


def test_schedule_warms_up_linearly_and_ends_on_a_cosine() -> None:
    schedule = Schedule(start=0.0, peak=1.0, end=0.1, warmup=0.1)
    values = [schedule.at(step, 100) for step in (0, 5, 10, 55, 100, 1000)]
    assert values == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1, 0.1])
    constant = Schedule(start=0.04, peak=0.07, end=0.0, warmup=0.3, shape="constant")
    assert [constant.at(s, 10) for s in (0, 3, 9)] == pytest.approx([0.04, 0.07, 0.07])
    momentum = Schedule(start=0.992, peak=0.992, end=1.0)
    assert momentum.at(25, 100) == pytest.approx(1.0 - 0.008 * 0.5 * (1 + math.cos(math.pi * 0.25)))


def test_a_warmup_that_is_no_share_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup=10"):
        Schedule(peak=1.0, end=0.0, warmup=10)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("backbone.cls_token", GroupKey(0.9**13, True, False)),
        ("backbone.pos_embed", GroupKey(0.9**13, True, False)),
        ("backbone.patch_embed.proj.weight", GroupKey(0.2 * 0.9**13, True, False)),
        ("backbone.patch_embed.proj.bias", GroupKey(0.2 * 0.9**13, False, False)),
        ("backbone.blocks.0.attn.qkv.weight", GroupKey(0.9**12, True, False)),
        ("backbone.blocks.11.norm1.weight", GroupKey(0.9, False, False)),
        ("backbone.blocks.11.ls1.gamma", GroupKey(0.9, False, False)),
        ("backbone.norm.weight", GroupKey(1.0, False, False)),
        ("head.mlp.0.weight", GroupKey(1.0, True, False)),
        ("head.last_layer.weight", GroupKey(1.0, True, True)),
        ("head.last_gain", GroupKey(1.0, True, True)),
    ],
)
def test_parameter_groups_are_dinov2s(name: str, expected: GroupKey) -> None:
    key = group_key(name, 12, OptimConfig())
    assert (key.decays, key.last_layer) == (expected.decays, expected.last_layer)
    assert key.lr_factor == pytest.approx(expected.lr_factor)


def test_every_parameter_is_in_one_group_and_the_last_layer_freezes() -> None:
    network = Network(
        VitConfig(width=16, depth=1, heads=1, patch_px=8, image_px=16),
        ObjectiveConfig(head=HeadConfig(prototypes=8, hidden=8, bottleneck=4)),
        sdpa_attention,
    )
    network.initialise(0)
    optimizer = build_optimizer(network, 1, OptimConfig())
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters())
    set_rates(optimizer, 0.1, 0.05, freeze_last=True)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if ".last_" not in k}


def test_clipping_is_per_module() -> None:
    big, small = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    big.weight.grad, small.weight.grad = torch.full((2, 2), 10.0), torch.full((2, 2), 0.1)
    norms = clip_gradients([big, small], 3.0)
    torch.testing.assert_close(norms, torch.tensor([20.0, 0.2]))
    assert float(big.weight.grad.norm()) == pytest.approx(3.0, rel=1e-4)
    assert torch.equal(small.weight.grad, torch.full((2, 2), 0.1))
