"""Parameter groups by name; AdamW and clipping against plain arithmetic; steps left out."""

import pytest
import torch
from torch import Tensor, nn

from eosin.pretrain.attention import sdpa_attention
from eosin.pretrain.heads import HeadConfig, PrototypeHead
from eosin.pretrain.jepa import JepaConfig, Predictor
from eosin.pretrain.optim import (
    OptimConfig,
    build_optimizer,
    clip_gradients,
    group_key,
    set_rates,
    step_unless_bad,
)
from eosin.pretrain.vit import Vit, VitConfig

NAN = float("nan")


def student() -> nn.ModuleDict:
    """Every kind of part that a student may have, one block deep."""
    head = HeadConfig(prototypes=8, hidden=8, bottleneck=4)
    network = nn.ModuleDict(
        {
            "backbone": Vit(
                VitConfig(width=16, depth=1, heads=1, patch_px=8, image_px=16, registers=2),
                sdpa_attention,
            ),
            "head": PrototypeHead(16, head),
            "patch_head": PrototypeHead(16, head),
            "predictor": Predictor(JepaConfig(depth=1, width=16, heads=1), 16),
        }
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=generator)
    return network


def draw_gradients(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, moments and step counts, copied."""
    state = optimizer.state_dict()["state"]
    moments = {f"{i}.{k}": v.clone() for i, s in state.items() for k, v in s.items()}
    return moments | {name: p.detach().clone() for name, p in network.named_parameters()}


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    changed = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not changed, changed


# layer_decay ½ in a network of one block; the patch embedding has 0.2 of its layer's
LR_FACTORS = {
    "backbone.cls_token": 0.25,
    "backbone.reg_token": 0.25,
    "backbone.mask_token": 0.25,
    "backbone.pos_embed": 0.25,
    "backbone.patch_embed.": 0.05,
    "backbone.blocks.0.": 0.5,
    "backbone.norm.": 1.0,
    "head.": 1.0,
    "patch_head.": 1.0,
    "predictor.": 1.0,
}
NO_DECAY = {
    "backbone.patch_embed.proj.bias",
    *(f"backbone.blocks.0.norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
    *(f"backbone.blocks.0.{part}.bias" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    *(f"backbone.blocks.0.ls{i}.gamma" for i in (1, 2)),
    "backbone.norm.weight",
    "backbone.norm.bias",
    *(f"{head}.mlp.{i}.bias" for head in ("head", "patch_head") for i in (0, 2, 4)),
}
LAST = {
    f"{head}.last_{kind}" for head in ("head", "patch_head") for kind in ("gain", "layer.weight")
}


@pytest.mark.pitfall(13, 14)
def test_every_parameter_has_dinov2s_rate_decay_and_freeze() -> None:
    network = student()
    names = {id(p): name for name, p in network.named_parameters()}
    optimizer = build_optimizer(network, 1, OptimConfig(layer_decay=0.5))
    set_rates(optimizer, 2.0, 0.1, freeze_last=True)
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in seen
            seen.add(name)
            (factor,) = (f for prefix, f in LR_FACTORS.items() if name.startswith(prefix))
            assert group["lr"] == pytest.approx(0.0 if name in LAST else 2.0 * factor), name
            if not name.startswith("predictor."):
                assert group["weight_decay"] == (0.0 if name in NO_DECAY else 0.1), name
    assert seen == set(names.values())
    assert seen >= NO_DECAY | LAST  # the tables name parameters that there are
    set_rates(optimizer, 2.0, 0.1, freeze_last=False)
    last = [g for g in optimizer.param_groups if g["key"].last_layer]
    assert [g["lr"] for g in last] == [2.0] and last[0]["weight_decay"] == 0.1


@pytest.mark.pitfall(14)
@pytest.mark.parametrize(
    ("name", "factor", "decays"),
    [
        ("backbone.blocks.0.attn.qkv.weight", 0.9**12, True),
        ("backbone.blocks.11.norm1.weight", 0.9, False),
        ("backbone.pos_embed", 0.9**13, True),
        ("backbone.patch_embed.proj.weight", 0.2 * 0.9**13, True),
        ("backbone.blocks.3.attn.q_norm.weight", 0.9**9, False),
        ("predictor.blocks.0.norm1.weight", 1.0, False),
        ("predictor.blocks.0.mlp.fc1.weight", 1.0, True),
        ("predictor.out.bias", 1.0, False),
    ],
)
def test_layers_of_a_deep_network(name: str, factor: float, decays: bool) -> None:
    key = group_key(name, 12, OptimConfig())
    assert key.lr_factor == pytest.approx(factor) and key.decays == decays
    assert not key.last_layer


@pytest.mark.pitfall(14)
def test_the_last_layer_moves_after_its_share_of_steps() -> None:
    config = OptimConfig(freeze_last_layer=0.25)
    frozen = [config.last_layer_frozen(step, 10) for step in range(10)]
    assert frozen == [True] * 3 + [False] * 7
    assert not OptimConfig(freeze_last_layer=0.0).last_layer_frozen(0, 10)

    network = student()
    optimizer = build_optimizer(network, 1, OptimConfig())
    before = tensors(network, optimizer)
    draw_gradients(network, 1)
    set_rates(optimizer, 0.1, 0.05, freeze_last=True)
    optimizer.step()
    moved = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, _ in network.named_parameters()} - LAST


def test_three_steps_are_those_of_the_adamw_paper() -> None:
    config = OptimConfig(betas=(0.8, 0.95), eps=1e-3, layer_decay=0.5)
    network = student()
    optimizer = build_optimizer(network, 1, config)
    name = "backbone.blocks.0.attn.qkv.weight"
    weight = network.get_parameter(name)
    p, m, v = weight.detach().double(), torch.zeros(()).double(), torch.zeros(()).double()
    for t, (lr, decay) in enumerate([(0.1, 0.04), (0.2, 0.05), (0.05, 0.1)], start=1):
        draw_gradients(network, t)
        set_rates(optimizer, lr, decay, freeze_last=False)
        assert weight.grad is not None
        g, rate = weight.grad.double(), 0.5 * lr
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g.square()  # arXiv 1711.05101, algorithm 2
        update = m / (1 - 0.8**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-3)
        p = p - rate * (update + decay * p)
        torch.testing.assert_close(weight.detach(), p.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.pitfall(16)
@pytest.mark.parametrize("mode", ["module", "global"])
def test_clipping_bounds_each_module_or_all(mode: str) -> None:
    parts = [nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(1, 1)]
    parts[0].weight.grad, parts[0].bias.grad = torch.full((2, 3), 4.0), torch.full((2,), 2.0)
    parts[1].weight.grad = torch.full((2, 2), 0.1)  # no gradient of its bias, none in the last
    norms = clip_gradients(parts, 3.0, "module" if mode == "module" else "global")
    expected = [(6 * 16 + 2 * 4) ** 0.5, 0.2, 0.0]
    torch.testing.assert_close(norms, torch.tensor(expected))
    total = sum(n * n for n in expected) ** 0.5
    large, small = (3 / expected[0], 1.0) if mode == "module" else (3 / total, 3 / total)
    torch.testing.assert_close(parts[0].weight.grad, torch.full((2, 3), 4.0 * large))
    torch.testing.assert_close(parts[0].bias.grad, torch.full((2,), 2.0 * large))
    torch.testing.assert_close(parts[1].weight.grad, torch.full((2, 2), 0.1 * small))
    if mode == "module":
        assert torch.equal(parts[1].weight.grad, torch.full((2, 2), 0.1))  # not a bit


@pytest.mark.pitfall(16)
def test_clipping_per_module_is_torchs() -> None:
    ours, theirs = student(), student()
    draw_gradients(ours, 3)
    draw_gradients(theirs, 3)
    norms = clip_gradients(ours.values(), 1.5)
    expected = [nn.utils.clip_grad_norm_(list(m.parameters()), 1.5) for m in theirs.values()]
    torch.testing.assert_close(norms, torch.stack(expected))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.pitfall(21)
@pytest.mark.parametrize("kind", ["fused", "loop"])
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_a_bad_step_touches_no_weight_moment_or_step_count(kind: str, value: float) -> None:
    network = student()
    optimizer: torch.optim.Optimizer = build_optimizer(network, 1, OptimConfig())
    if kind == "loop":
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=False, foreach=False)
    else:
        set_rates(optimizer, 0.1, 0.05, freeze_last=False)
    for seed in (1, 2):
        draw_gradients(network, seed)
        step_unless_bad(optimizer, torch.tensor(0.0))
    before = tensors(network, optimizer)
    draw_gradients(network, 3)
    gradient = network.get_parameter("head.mlp.0.weight").grad
    assert gradient is not None
    gradient[0, 0] = value
    norms = clip_gradients(network.values(), 3.0)
    bad = (~norms.isfinite()).any().float()
    assert bad == 1
    step_unless_bad(optimizer, bad)
    assert_same_bits(tensors(network, optimizer), before)

    draw_gradients(network, 4)  # and the next good one goes through
    clip_gradients(network.values(), 3.0)
    step_unless_bad(optimizer, torch.tensor(0.0))
    after = tensors(network, optimizer)
    assert all(not torch.equal(after[name], before[name]) for name in after)


def test_a_good_step_under_the_guard_is_the_same_to_the_bit_and_repeats() -> None:
    results = []
    for guarded in (True, False, True):
        network = student()
        optimizer = build_optimizer(network, 1, OptimConfig())
        for seed in range(3):
            set_rates(optimizer, 0.1, 0.05, freeze_last=False)
            draw_gradients(network, seed)
            if guarded:
                step_unless_bad(optimizer, torch.tensor(0.0))
            else:
                optimizer.step()
        results.append(tensors(network, optimizer))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must lie in"),
        ({"eps": 0.0}, "eps=0.0 must be positive"),
        ({"clip_norm": 0.0}, "clip_norm=0.0 must be positive"),
        ({"layer_decay": -1.0}, "layer_decay=-1.0 must not be negative"),
        ({"freeze_last_layer": 1.5}, "freeze_last_layer=1.5 is a share"),
    ],
)
def test_values_that_adamw_cannot_take_are_refused(values: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OptimConfig(**values)  # type: ignore[arg-type]
