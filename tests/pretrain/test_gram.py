"""Gram anchoring: loops over pairs, the calendar of refreshes, and resampled grids."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eosin.pretrain.gram import GramConfig, gram_active, gram_loss, gram_refresh_due


def patches(crops: int, n: int, width: int, seed: int) -> Tensor:
    return torch.randn(crops, n, width, generator=torch.Generator().manual_seed(seed))


def naive(student: Tensor, teacher: Tensor, config: GramConfig, masks: Tensor) -> Tensor:
    """Every pair of patches in a loop."""
    wanted = {"all": torch.ones_like(masks), "masked": masks, "unmasked": ~masks}[config.tokens]
    units = [
        [(c, n) for n in range(student.shape[1]) if wanted[c, n]] for c in range(student.shape[0])
    ]
    if config.level == "batch":
        units = [[token for unit in units for token in unit]]
    means = []
    for unit in filter(None, units):
        total = torch.zeros(())
        for a, b in itertools.product(unit, unit):
            cosines = [torch.cosine_similarity(x[a], x[b], dim=0) for x in (student, teacher)]
            if config.remove_negative:
                cosines = [c.clamp(min=0) for c in cosines]
            total = total + (cosines[0] - cosines[1]) ** 2
        means.append(total / len(unit) ** 2)
    return torch.stack(means).mean()


@pytest.mark.parametrize("level", ["image", "batch"])
@pytest.mark.parametrize("tokens", ["all", "masked", "unmasked"])
@pytest.mark.parametrize("remove", [False, True])
@pytest.mark.parametrize("width", [3, 40])  # fewer, and more channels than patches
def test_loss_and_gradient_equal_loops(level: str, tokens: str, remove: bool, width: int) -> None:
    config = GramConfig(level=level, tokens=tokens, remove_negative=remove)  # type: ignore[arg-type]
    student = patches(3, 5, width, 0).requires_grad_()
    teacher = patches(3, 5, width, 1)
    masks = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    loss, expected = gram_loss(student, teacher, config, masks), naive(
        student, teacher, config, masks
    )  # fmt: skip
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(x, student)[0] for x in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("width", [8, 64])
def test_close_to_its_teacher_nothing_is_lost_to_rounding(width: int) -> None:
    teacher = patches(2, 32, width, 0)
    student = teacher + 1e-4 * patches(2, 32, width, 1)
    units = [torch.nn.functional.normalize(x.double(), dim=-1) for x in (student, teacher)]
    exact = (units[0] @ units[0].mT - units[1] @ units[1].mT).square().mean()
    assert gram_loss(student, teacher, GramConfig()).item() == pytest.approx(exact.item(), rel=1e-2)
    assert gram_loss(teacher, teacher, GramConfig()).item() == 0.0


def test_turning_all_features_costs_nothing() -> None:
    teacher = patches(2, 20, 6, 0)
    turn, _ = torch.linalg.qr(patches(1, 6, 6, 1)[0])
    for level in ("image", "batch"):
        config = GramConfig(level=level)  # type: ignore[arg-type]
        assert abs(gram_loss(3 * teacher @ turn, teacher, config).item()) < 1e-6
        assert gram_loss(patches(2, 20, 6, 2), teacher, config).item() > 0.05


def test_finite_on_zeros_duplicates_nothing_masked_and_half_precision() -> None:
    for value, dtype in itertools.product((0.0, 1.0, 3e4), (torch.float16, torch.float32)):
        for tokens, width in itertools.product(("all", "masked"), (2, 8)):
            config = GramConfig(tokens=tokens)  # type: ignore[arg-type]
            student = torch.full((2, 4, width), value, dtype=dtype).requires_grad_()
            masks = torch.zeros(2, 4, dtype=torch.bool)
            loss = gram_loss(student, patches(2, 4, width, 0), config, masks)
            loss.backward()
            assert torch.isfinite(loss) and loss.dtype == torch.float32
            assert student.grad is not None and torch.isfinite(student.grad).all()
            assert tokens == "all" or loss.item() == 0.0


def test_autocast_changes_nothing_and_the_teacher_gets_no_gradient() -> None:
    student, teacher = patches(2, 9, 16, 0), patches(2, 9, 16, 1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        inside = gram_loss(student, teacher, GramConfig())
    assert torch.equal(inside, gram_loss(student, teacher, GramConfig()))
    assert not inside.requires_grad


def test_copies_are_taken_at_the_start_and_a_number_of_times_after() -> None:
    config = GramConfig(weight=2.0, start=100, refresh_every=30, max_refreshes=2)
    due = [step for step in range(400) if gram_refresh_due(step, config)]
    assert due == [100, 130, 160]
    assert [gram_active(step, config) for step in (99, 100, 399)] == [False, True, True]
    once = GramConfig(weight=2.0, max_refreshes=0)
    assert [step for step in range(40_000) if gram_refresh_due(step, once)] == [0]
    frozen = GramConfig(weight=2.0, teacher="frozen", frozen_from=Path("encoder"))
    for config in (frozen, GramConfig(start=100, refresh_every=30)):
        assert not any(gram_refresh_due(step, config) for step in range(400))
    assert gram_active(0, frozen) and not gram_active(0, GramConfig())


def test_config_refuses_what_has_no_meaning() -> None:
    for bad in (
        {"weight": -1.0},
        {"weight": math.inf},
        {"start": -1},
        {"refresh_every": 0},
        {"max_refreshes": -1},
        {"teacher": "frozen"},
        {"frozen_from": Path("encoder")},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
            GramConfig(**bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs masks"):
        gram_loss(patches(1, 2, 3, 0), patches(1, 2, 3, 1), GramConfig(tokens="masked"))
