"""Contrast over ranks against loops over pairs; patients are never their own negatives."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eosin.pretrain.slide.contrast import contrast

B, W = 12, 5


def case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (F.normalize(torch.randn(B, W, generator=generator), dim=1) for _ in range(2))
    known = torch.rand(B, generator=generator) > 0.3
    groups = torch.randint(0, 6, (B,), generator=generator)
    return queries, keys, known, groups


def by_loops(
    queries: np.ndarray, keys: np.ndarray, known: np.ndarray, groups: np.ndarray, scale: float,
    loss: str, bias: float,
) -> float:  # fmt: skip
    losses = []
    for i in range(len(queries)):
        if not known[i]:
            continue
        scores, own = [], 0
        for j in range(len(keys)):
            if j != i and (not known[j] or groups[i] == groups[j]):
                continue
            own = len(scores) if j == i else own
            scores.append(scale * float(queries[i] @ keys[j]))
        if loss == "infonce":
            losses.append(-scores[own] + math.log(sum(math.exp(s) for s in scores)))
        else:
            losses.append(sum(
                math.log1p(math.exp(-(1 if k == own else -1) * (s + bias)))
                for k, s in enumerate(scores)
            ))  # fmt: skip
    return float(np.mean(losses)) if losses else 0.0


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_loop_over_pairs(loss: str, seed: int) -> None:
    queries, keys, known, groups = case(seed)
    bias = torch.tensor([-2.0])
    got = contrast(
        queries, keys, known, groups, torch.tensor(3.0), lambda x: x, loss=loss, bias=bias
    )  # type: ignore[arg-type]
    parts = (x.double().numpy() for x in (queries, keys))
    wanted = by_loops(*parts, known.numpy(), groups.numpy(), 3.0, loss, -2.0)
    assert got.item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_ranks_together_are_one_process(ranks: int, loss: str) -> None:
    """Gathering is done here by hand; that of processes is tested in test_collectives."""
    found = []
    for count in (1, ranks):
        queries, keys, known, groups = case(1)
        weight = torch.eye(W, requires_grad=True)
        q, k = F.normalize(queries @ weight, dim=1), F.normalize(keys @ weight.T, dim=1)
        whole = {id(part): part for part in (k, known, groups)}
        size, losses = B // count, []
        for rank in range(count):
            rows = slice(rank * size, (rank + 1) * size)

            def gather(
                x: Tensor, k: Tensor = k, known: Tensor = known, groups: Tensor = groups
            ) -> Tensor:
                return {5: k, 0: groups, 1: known.to(torch.uint8)}[
                    5 if x.dim() == 2 else 1 if x.dtype == torch.uint8 else 0
                ]

            losses.append(contrast(
                q[rows], k[rows], known[rows], groups[rows], torch.tensor(4.0), gather, rank, count,
                loss=loss, bias=torch.tensor([-1.0]),  # type: ignore[arg-type]
            ))  # fmt: skip
        total = torch.stack(losses).mean()
        total.backward()
        found.append((total.detach(), weight.grad))
        assert whole
    for got, wanted in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


def test_two_slides_of_a_patient_are_never_negatives() -> None:
    queries, keys, _, _ = case(2)
    known = torch.ones(B, dtype=torch.bool)
    groups = torch.arange(B)
    groups[1] = groups[0]
    keys = keys.clone().requires_grad_()
    for loss in ("infonce", "sigmoid"):
        loss_of_first = contrast(
            queries[:1].expand(B, -1), keys, known, groups, torch.tensor(3.0), lambda x: x,
            loss=loss, bias=torch.zeros(1),  # type: ignore[arg-type]
        )  # fmt: skip
        assert loss_of_first.isfinite()
    only = torch.zeros(B, dtype=torch.bool)
    only[0] = True
    alone = torch.zeros(B, dtype=torch.int64)  # everyone is one patient
    for loss in ("infonce", "sigmoid"):
        value = contrast(
            queries, keys, known, alone, torch.tensor(3.0), lambda x: x, loss=loss,
            bias=torch.zeros(1),  # type: ignore[arg-type]
        )  # fmt: skip
        [grad] = torch.autograd.grad(value, keys)
        pull = (grad * queries).sum(dim=1)  # towards its own query alone
        assert (pull <= 1e-7).all()
        torch.testing.assert_close(
            grad - pull[:, None] * queries, torch.zeros_like(grad), atol=1e-6, rtol=0
        )


def test_nothing_known_is_nothing_lost() -> None:
    queries, keys, _, groups = case(3)
    queries.requires_grad_()
    known = torch.zeros(B, dtype=torch.bool)
    value = contrast(queries, keys, known, groups, torch.tensor(3.0), lambda x: x)
    value.backward()
    assert value == 0 and queries.grad.abs().max() == 0
