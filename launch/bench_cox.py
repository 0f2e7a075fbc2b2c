"""A part of `eosin bench probes`: Cox's loss against the double loop that is mostly copied.

That one fills the matrix of who is still at risk in two loops over patients, and knows no ties.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from eosin.eval.heads.survival import cox_loss

CALLS = 20
"""Of ours, which is too quick to be timed alone."""


def patients(count: int) -> tuple[Tensor, Tensor]:
    """Made-up log risks [n, 1]; times, all different, and events [n, 2]."""
    generator = np.random.default_rng(0)
    risks = torch.from_numpy(generator.normal(size=(count, 1)))
    times, events = generator.permutation(count) + 1.0, generator.random(count) < 0.6
    return risks, torch.from_numpy(np.column_stack([times, events]))


def double_loop(risks: Tensor, targets: Tensor) -> Tensor:
    """Breslow's loss by the matrix of who is at risk, filled one by one."""
    times, events = targets[:, 0].tolist(), targets[:, 1]
    at_risk = np.zeros((len(times), len(times)))
    for i in range(len(times)):
        for j in range(len(times)):
            at_risk[i, j] = times[j] >= times[i]
    theta = risks[:, 0]
    sums = (theta.exp() * torch.from_numpy(at_risk)).sum(dim=1)
    return -((theta - sums.log()) * events).sum() / events.sum()


def cox_sides(count: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """Seconds of one loss of so many patients, ours and the loop's."""
    risks, targets = patients(count)

    def ours() -> float:
        began = time.perf_counter()
        for _ in range(CALLS):
            cox_loss(risks, targets)
        return (time.perf_counter() - began) / CALLS

    def baseline() -> float:
        began = time.perf_counter()
        double_loop(risks, targets)
        return time.perf_counter() - began

    return ours, baseline
