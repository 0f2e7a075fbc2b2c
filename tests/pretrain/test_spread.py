"""The spread of features: formulas in loops, the sign, and the inputs that break others."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eosin.pretrain.spread import SpreadConfig, koleo_loss, spread_loss

CONVENTIONS = [
    SpreadConfig(kind="kde", include_self=own, reduction=reduction, density=density)  # type: ignore[arg-type]
    for own, reduction, density in itertools.product(
        (False, True), ("mean_of_logs", "log_of_mean"), ("mean", "sum")
    )
]
KOLEO = SpreadConfig()


def rows(count: int = 6, width: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def cosine(a: Tensor, b: Tensor) -> float:
    dot = sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
    return dot / math.sqrt(sum(x * x for x in a.tolist()) * sum(x * x for x in b.tolist()))


def naive_koleo(x: Tensor) -> float:
    unit = x / x.norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(len(x)):
        nearest = min(float((unit[i] - unit[j]).norm()) for j in range(len(x)) if j != i)
        total -= math.log(nearest + 1e-8) / len(x)
    return total


def naive_kde(x: Tensor, c: SpreadConfig) -> float:
    densities = []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if c.include_self or j != i]
        terms = [math.exp(c.kappa * cosine(x[i], x[j])) for j in others]
        densities.append(sum(terms) / (len(terms) if c.density == "mean" else 1))
    if c.reduction == "log_of_mean":
        return math.log(sum(densities) / len(densities))
    return sum(math.log(d) for d in densities) / len(densities)


@pytest.mark.pitfall(5)
def test_koleo_equals_its_formula() -> None:
    assert float(koleo_loss(rows())) == pytest.approx(naive_koleo(rows()), rel=1e-5)


@pytest.mark.pitfall(6)
@pytest.mark.parametrize("config", CONVENTIONS)
def test_kde_equals_its_formula_in_every_convention(config: SpreadConfig) -> None:
    assert float(spread_loss(rows(), config, 6)) == pytest.approx(naive_kde(rows(), config), 1e-5)


@pytest.mark.pitfall(5, 6)
@pytest.mark.parametrize("config", [KOLEO, *CONVENTIONS])
def test_gradients_are_the_slopes_of_the_formulas(config: SpreadConfig) -> None:
    x, step = rows().requires_grad_(), 1e-5
    spread_loss(x, config, 6).backward()
    exact, slopes = x.detach().double(), torch.zeros(6, 5, dtype=torch.float64)
    for i, j in itertools.product(range(6), range(5)):
        around = []
        for sign in (1, -1):
            moved = exact.clone()
            moved[i, j] += sign * step
            around.append(naive_koleo(moved) if config is KOLEO else naive_kde(moved, config))
        slopes[i, j] = (around[0] - around[1]) / (2 * step)
    assert x.grad is not None and slopes.abs().max() > 0.01
    torch.testing.assert_close(x.grad.double(), slopes, rtol=1e-4, atol=1e-5)


def test_log_of_mean_is_wang_and_isolas_uniformity() -> None:
    t, unit = 2.0, torch.nn.functional.normalize(rows(), dim=1)
    uniformity = (-t * torch.pdist(unit).square()).exp().mean().log()  # eq. 2, pairs i < j
    config = SpreadConfig(kind="kde", kappa=2 * t, reduction="log_of_mean")
    torch.testing.assert_close(spread_loss(rows(), config, 6) - 2 * t, uniformity)


@pytest.mark.pitfall(6)
@pytest.mark.parametrize("config", [KOLEO, *CONVENTIONS])
def test_collapse_costs_more_and_near_duplicates_are_pushed_apart(config: SpreadConfig) -> None:
    orthogonal, collapsed = torch.eye(6), torch.ones(6, 6)
    assert spread_loss(collapsed, config, 6) > spread_loss(orthogonal, config, 6) + 0.5
    x = torch.eye(6)
    x[1] = x[0] + 0.01 * rows(1, 6)[0]
    x.requires_grad_()
    spread_loss(x, config, 6).backward()
    assert x.grad is not None
    step = 1e-3 / x.grad.norm()
    moved = x.detach() - step * x.grad
    assert cosine(moved[0], moved[1]) < cosine(x.detach()[0], x.detach()[1]) - 1e-6


@pytest.mark.pitfall(5)
@pytest.mark.parametrize("config", [KOLEO, CONVENTIONS[0], CONVENTIONS[-1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 3), (1, 3), (2, 1)])
def test_finite_on_duplicates_one_sample_zeros_and_half_precision(
    config: SpreadConfig, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    for value in (0.0, 1.0, 3e4):
        x = torch.full(shape, value, dtype=dtype).requires_grad_()
        loss = spread_loss(x, config, len(x))
        loss.backward()
        assert torch.isfinite(loss) and loss.dtype == torch.float32
        assert x.grad is not None and torch.isfinite(x.grad).all()
        if len(x) == 1:
            assert loss.item() == 0.0


@settings(max_examples=80, deadline=None)
@given(
    st.integers(2, 6), st.integers(1, 5), st.integers(0, 10**6), st.floats(-30, 30), st.booleans()
)
def test_length_of_the_rows_does_not_matter_and_nothing_overflows(
    count: int, width: int, seed: int, exponent: float, near: bool
) -> None:
    x = rows(count, width, seed)
    if near:
        x = x[:1] + 1e-7 * x  # almost one point
    for config in (KOLEO, CONVENTIONS[0]):
        scaled = (x * 10.0**exponent).requires_grad_()
        loss = spread_loss(scaled, config, count)
        loss.backward()
        assert torch.isfinite(loss)
        assert scaled.grad is not None and torch.isfinite(scaled.grad).all()
        if exponent > -6 and config.kind == "kde":
            torch.testing.assert_close(loss.detach(), spread_loss(x, config, count))


@pytest.mark.pitfall(5)
@pytest.mark.parametrize("kind", ["koleo", "kde"])
def test_groups_are_averaged_and_do_not_see_each_other(kind: str) -> None:
    config = SpreadConfig(kind=kind, over="group")  # type: ignore[arg-type]
    x = rows(12).requires_grad_()
    whole = spread_loss(x, config, 4)
    parts = torch.stack([spread_loss(g, config, 4) for g in x.split(4)])
    torch.testing.assert_close(whole, parts.mean())
    (grad,) = torch.autograd.grad(parts[1], x)
    assert grad[4:8].abs().max() > 0 and grad[:4].abs().max() == grad[8:].abs().max() == 0
    with pytest.raises(ValueError, match="group_size=5"):
        spread_loss(x, config, 5)


@pytest.mark.pitfall(5)
@pytest.mark.parametrize("config", [KOLEO, *CONVENTIONS[:1]])
def test_autocast_changes_nothing(config: SpreadConfig) -> None:
    x = rows(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = spread_loss(x, config, 8)
    assert torch.equal(inside, spread_loss(x, config, 8))


def test_config_refuses_a_reward_for_collapse() -> None:
    for bad in ({"weight": -0.1}, {"weight": math.nan}, {"kappa": 0.0}, {"kappa": 100.0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
            SpreadConfig(**bad)  # type: ignore[arg-type]
