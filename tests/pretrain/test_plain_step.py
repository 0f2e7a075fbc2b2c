"""The plain baseline computes what the product computes: losses, gradients and whole steps."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eosin.pretrain.attention import sdpa_attention
from eosin.pretrain.distill import Distiller, StepRates
from eosin.pretrain.heads import HeadConfig
from eosin.pretrain.network import ObjectiveConfig
from eosin.pretrain.optim import OptimConfig, build_optimizer, clip_gradients, set_rates
from eosin.pretrain.plain_step import PlainDistiller, PlainDropPath, clip
from eosin.pretrain.prototype_kernels import choose_kernels
from eosin.pretrain.schedules import Schedule
from eosin.pretrain.spread import SpreadConfig
from eosin.pretrain.vit import VitConfig

SHAPE = {"width": 32, "depth": 2, "heads": 2, "patch_px": 8, "image_px": 32, "layer_scale": 0.5}
HEAD = HeadConfig(prototypes=24, hidden=16, bottleneck=8)
BATCH, TEMPERATURE = 4, 0.06

CASES = {
    "shared head, registers": ({"registers": 2}, {}),
    "own patch head, swiglu": (
        {"ffn": "swiglu", "registers": 0},
        {"patch_head": HeadConfig(prototypes=20, hidden=16, bottleneck=8, last_layer="plain")},
    ),
    "rotary, spread over groups": (
        {"positions": "rope"},
        {"spread": SpreadConfig(over="group"), "local_weight": 0.5},
    ),
    "masked patches alone": ({"interpolation": "offset"}, {"dino": 0.0}),
    "cls alone": ({}, {"ibot": 0.0, "spread": SpreadConfig(weight=0.0)}),
}


def pair(case: str) -> tuple[Distiller, PlainDistiller]:
    """The product and the baseline with the same weights, and a teacher of its own."""
    model_changes, objective_changes = CASES[case]
    model = VitConfig(**SHAPE, **model_changes)
    objective = ObjectiveConfig(head=HEAD, **objective_changes)
    kernels = choose_kernels("auto", torch.device("cpu"), torch.float32)
    ours = Distiller(model, objective, sdpa_attention, kernels, 2, seed=0)
    with torch.no_grad():
        for parameter in ours.parameters():  # gammas, biases and the teacher too
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    plain = PlainDistiller(model, objective, group_size=2)
    plain.student.load_state_dict(ours.student.state_dict())  # strict
    plain.teacher.load_state_dict(ours.teacher.state_dict())
    return ours, plain


def inputs(n_local: int, seed: int = 0) -> tuple[Tensor, Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    masks = np.zeros((2 * BATCH, 16), dtype=bool)
    masks[1, :4], masks[6, 3:9] = True, True
    return (
        torch.randn(2, BATCH, 3, 32, 32, generator=generator),
        torch.randn(n_local, BATCH, 3, 16, 16, generator=generator),
        masks,
    )


def without_key_bias(name: str, value: Tensor) -> Tensor:
    """Key biases have no gradient but rounding noise, which AdamW blows up."""
    if not name.endswith("attn.qkv.bias"):
        return value
    query, _, values = value.chunk(3)
    return torch.cat([query, values])


def assert_same(ours: nn.Module, plain: nn.Module, what: str = "") -> None:
    theirs = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        got, expected = parameter, theirs[name]
        if what == "grad":
            if parameter.grad is None or expected.grad is None:
                assert parameter.grad is expected.grad is None, name
                continue
            got, expected = parameter.grad, expected.grad
        got, expected = without_key_bias(name, got), without_key_bias(name, expected)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5, msg=f"{name}: {got}")


@pytest.mark.parametrize("n_local", [0, 3])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_products(case: str, n_local: int) -> None:
    torch.manual_seed(0)
    ours, plain = pair(case)
    crops = inputs(n_local)
    losses, _ = ours(*crops, StepRates(TEMPERATURE))
    expected = plain(*crops, TEMPERATURE)
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(losses, name), value, atol=1e-5, rtol=1e-5, msg=name)
    losses.total.backward()
    expected.total.backward()
    assert_same(ours.student, plain.student, "grad")


@pytest.mark.parametrize("mode", ["module", "global"])
def test_three_whole_steps_give_the_same_networks(mode: str) -> None:
    torch.manual_seed(0)
    ours, plain = pair("shared head, registers")
    constant = Schedule(peak=1e-3, end=1e-3, shape="constant")
    config = OptimConfig(lr=constant, clip=mode, clip_norm=0.2)
    optimizers = [build_optimizer(m.student, 2, config) for m in (ours, plain)]
    before = [p.detach().clone() for p in ours.parameters()]
    for step in range(3):
        crops = inputs(3, seed=step)
        for optimizer in optimizers:
            optimizer.zero_grad()
            set_rates(optimizer, 1e-3, 0.1, freeze_last=step == 0)
        losses, outputs = ours(*crops, StepRates(TEMPERATURE))
        losses.total.backward()
        norms = clip_gradients(ours.student.children(), config.clip_norm, config.clip)
        assert norms.max() > config.clip_norm  # so that the clipping is part of what is compared
        optimizers[0].step()
        ours.update_teacher(outputs, 0.9)

        plain(*crops, TEMPERATURE).total.backward()
        clip(plain.student, config)
        optimizers[1].step()
        plain.update_teacher(0.9)
    assert_same(ours.student, plain.student)
    assert_same(ours.teacher, plain.teacher)
    assert all(not torch.equal(p, b) for p, b in zip(ours.parameters(), before, strict=True))


def test_drop_path_zeroes_whole_branches_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = PlainDropPath(0.3)
    out = drop(torch.ones(20_000, 2, 3))
    per_sample = out.flatten(1)
    assert torch.equal(per_sample.amin(dim=1), per_sample.amax(dim=1))
    assert per_sample[:, 0].unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    assert out.mean() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(drop.eval()(out), out)


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": "centre"},
        {"spread": SpreadConfig(kind="kde")},
    ],
)
def test_an_objective_without_a_plain_form_is_refused_by_name(changes: dict[str, object]) -> None:
    objective = ObjectiveConfig(head=HEAD, **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no objective\.(targets=centre|spread\.kind=kde)"):
        PlainDistiller(VitConfig(**SHAPE), objective, group_size=2)
