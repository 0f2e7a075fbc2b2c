"""Cox and discrete hazards against loops, and against scikit-survival's fit."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from eosin.eval.heads.survival import (
    cox_loss,
    cut_times,
    hazard_loss,
    interval_of,
    risk_of_hazards,
)


def patients(n: int, seed: int, ties: bool = True) -> tuple[Tensor, Tensor]:
    """Log risks [n, 1]; times, many of them equal, and events [n, 2]."""
    generator = np.random.default_rng(seed)
    time_of = generator.exponential(10, n)
    if ties:
        time_of = np.ceil(time_of)
    event = generator.random(n) < 0.6
    risk = torch.from_numpy(generator.normal(size=(n, 1)))
    return risk, torch.from_numpy(np.column_stack([time_of, event]))


def efron_in_loops(risk: npt.NDArray[np.float64], targets: npt.NDArray[np.float64]) -> float:
    total, events = 0.0, 0
    for at in np.unique(targets[:, 0]):
        tied = [i for i in range(len(risk)) if targets[i, 0] == at and targets[i, 1]]
        alive = [i for i in range(len(risk)) if targets[i, 0] >= at]
        for place in range(len(tied)):
            below = sum(np.exp(risk[i]) for i in alive)
            below -= place / len(tied) * sum(np.exp(risk[i]) for i in tied)
            total += np.log(below)
        total -= sum(risk[i] for i in tied)
        events += len(tied)
    return total / events


@pytest.mark.parametrize("ties", [True, False])
def test_cox_is_efrons_formula_in_loops(ties: bool) -> None:
    for seed in range(5):
        risk, targets = patients(60, seed, ties)
        expected = efron_in_loops(risk[:, 0].numpy(), targets.numpy())
        assert float(cox_loss(risk, targets)) == pytest.approx(expected, abs=1e-6)
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(cox_loss(risk[order], targets[order]), cox_loss(risk, targets))
        shifted = cox_loss(risk + 500, targets)  # no overflow, and only differences count
        torch.testing.assert_close(shifted, cox_loss(risk, targets), atol=1e-6, rtol=0)
    assert float(cox_loss(risk[:1], targets[:1])) == 0
    none = targets.clone()
    none[:, 1] = 0
    assert float(cox_loss(risk, none)) == 0


@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_coxs_gradient_is_zero_where_scikit_survival_ends(ties: str) -> None:
    linear_model = pytest.importorskip("sksurv.linear_model")
    generator = np.random.default_rng(1)
    x = generator.normal(size=(200, 2))
    time_of = np.ceil(generator.exponential(np.exp(-x @ [0.7, -0.4]) * 6))
    event = generator.random(200) < 0.7
    y = np.array(list(zip(event, time_of, strict=True)), dtype=[("event", "?"), ("time", "f8")])
    fitted = linear_model.CoxPHSurvivalAnalysis(ties=ties, tol=1e-12).fit(x, y)
    beta = torch.tensor(fitted.coef_, requires_grad=True)
    targets = torch.from_numpy(np.column_stack([time_of, event]))
    cox_loss((torch.from_numpy(x) @ beta)[:, None], targets).backward()
    assert beta.grad is not None
    if ties == "efron":
        assert beta.grad.abs().max() < 1e-6
    else:  # the other way with ties ends elsewhere, so the test can tell them apart
        assert beta.grad.abs().max() > 1e-4


def test_coxs_gradient_is_that_of_differences() -> None:
    risk, targets = patients(12, 3)
    risk.requires_grad_()
    assert torch.autograd.gradcheck(lambda r: cox_loss(r, targets), (risk,))


def test_hazards_are_their_likelihood_in_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    interval = torch.randint(0, 4, (40,), generator=generator)
    event = torch.randint(0, 2, (40,), generator=generator)
    h = outputs.sigmoid()
    terms, more = [], []
    for i in range(40):
        y = int(interval[i])
        survived = torch.cat([torch.ones(1, dtype=torch.float64), (1 - h[i]).cumprod(0)])
        if event[i]:
            terms.append(-(survived[y] * h[i, y]).log())
            more.append(terms[-1] / 2)
        else:
            terms.append(-survived[y + 1].log())
            more.append(torch.zeros((), dtype=torch.float64))
    targets = torch.stack([interval, event], dim=1)
    mean, extra = torch.stack(terms).mean(), torch.stack(more).mean()
    torch.testing.assert_close(hazard_loss(outputs, targets), mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(hazard_loss(outputs, targets, 0.5), mean + extra)
    # sure hazards stay finite, in fp32 too
    sure = torch.full((2, 4), 90.0)
    assert hazard_loss(sure, torch.tensor([[0, 1], [3, 0]])).isfinite()


def test_risk_rises_with_hazards_and_reversed_it_ranks_the_other_way() -> None:
    outputs = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    risk = risk_of_hazards(outputs)
    assert (risk_of_hazards(outputs + 0.1) > risk).all()
    expected = -(1 - outputs.sigmoid()).cumprod(1).sum(1)
    torch.testing.assert_close(risk, expected, atol=1e-5, rtol=1e-5)
    metrics = pytest.importorskip("sksurv.metrics")
    generator = np.random.default_rng(0)
    event, time_of = generator.random(50) < 0.7, generator.exponential(5, 50)
    forward, back = (
        metrics.concordance_index_censored(event, time_of, sign * risk.numpy())[0]
        for sign in (1, -1)
    )
    assert forward == pytest.approx(1 - back)


def test_time_is_cut_at_events_alone() -> None:
    generator = np.random.default_rng(0)
    times, events = generator.exponential(5, 200), generator.random(200) < 0.5
    cuts = cut_times(times, events, 4)
    counts = np.bincount(interval_of(times[events], cuts), minlength=4)
    assert counts.min() >= events.sum() // 4 - 1
    assert interval_of(np.array([0.0, cuts[0], 1e9]), cuts).tolist() == [0, 0, 3]
    np.testing.assert_array_equal(
        cuts, cut_times(np.where(events, times, times * 9), events, 4)
    )  # those who were lost to sight move no cut
    with pytest.raises(ValueError, match="too few for 4 intervals"):
        cut_times(np.ones(10), np.ones(10, np.bool_), 4)
    with pytest.raises(ValueError, match="0 events"):
        cut_times(times, np.zeros(200, np.bool_), 4)
