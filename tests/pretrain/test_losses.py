"""Every loss against its formula written out, and on the inputs that break others."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from eosin.pretrain.losses import cross_entropy, dino_pairs, ibot_loss, koleo_loss, sinkhorn_targets


def naive_sinkhorn(logits: Tensor, temperature: float, iterations: int) -> np.ndarray:
    """SwAV's algorithm on exponentials, float64, with the global maximum subtracted."""
    x = logits.double().numpy()
    q = np.exp((x - x.max()) / temperature).T  # [K, B]
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True) * q.shape[0]
        q /= q.sum(axis=0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


@pytest.mark.parametrize("temperature", [0.04, 0.07, 1.0])
def test_sinkhorn_equals_the_plain_algorithm(temperature: float) -> None:
    logits = 0.3 * torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    targets = sinkhorn_targets(logits, temperature)
    np.testing.assert_allclose(targets, naive_sinkhorn(logits, temperature, 3), atol=1e-5)
    assert torch.equal(logits, before), "the caller's tensor is left alone"


def test_sinkhorn_is_finite_on_large_logits_duplicates_and_nothing() -> None:
    for logits in (10 * torch.randn(8, 32).sign(), torch.zeros(8, 32), torch.randn(1, 32)):
        targets = sinkhorn_targets(logits, 0.04)
        assert torch.isfinite(targets).all()
        torch.testing.assert_close(targets.sum(1), torch.ones(len(logits)))
    assert sinkhorn_targets(torch.zeros(0, 32), 0.04).shape == (0, 32)


def test_cross_entropy_and_pairs_equal_loops() -> None:
    student, targets = torch.randn(3, 4, 8), torch.rand(2, 4, 8).softmax(-1)
    pairs = dino_pairs(student, targets)
    for s in range(3):
        for v in range(2):
            total = 0.0
            for b in range(4):
                scaled = (student[s, b] / 0.1).tolist()
                top = max(scaled)
                log_z = top + math.log(sum(math.exp(x - top) for x in scaled))
                total -= sum(
                    t * (x - log_z) for t, x in zip(targets[v, b].tolist(), scaled, strict=True)
                )
            assert float(pairs[s, v]) == pytest.approx(total / 4, rel=1e-5)
    torch.testing.assert_close(cross_entropy(student[0], targets[1]).mean(), pairs[0, 1])


def test_ibot_counts_each_masked_crop_alike_and_divides_by_all_crops() -> None:
    logits, targets = torch.randn(5, 8), torch.rand(5, 8).softmax(-1)
    weights = torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3])  # crops with 2 and 3 masked patches
    ce = cross_entropy(logits, targets)
    expected = (ce[:2].mean() + ce[2:].mean()) / 4  # two of four crops carry no mask
    torch.testing.assert_close(ibot_loss(logits, targets, weights, 4), expected)
    nothing = ibot_loss(torch.zeros(0, 8), torch.zeros(0, 8), torch.zeros(0), 4)
    assert float(nothing) == 0.0


def test_koleo_equals_its_formula_and_spreads() -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(x, dim=-1)
    expected = 0.0
    for i in range(6):
        nearest = min(float((unit[i] - unit[j]).norm()) for j in range(6) if j != i)
        expected -= math.log(nearest + 1e-8) / 6
    assert float(koleo_loss(x)) == pytest.approx(expected, rel=1e-5)
    assert koleo_loss(torch.eye(6)) < koleo_loss(torch.eye(6) + 5.0)


def test_koleo_is_finite_on_duplicates_one_sample_and_half_precision() -> None:
    for x in (torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 3, dtype=torch.float16)):
        x = x.clone().requires_grad_()
        loss = koleo_loss(x)
        assert torch.isfinite(loss) and loss.dtype == torch.float32
        loss.backward() if loss.requires_grad else None
        assert x.grad is None or torch.isfinite(x.grad).all()
    assert float(koleo_loss(torch.ones(1, 3))) == 0.0
