"""Logistic regressions that differ in their L2 penalty alone, solved together.

The objective is scikit-learn's, ``C · Σ cross-entropy + ½‖W‖²`` with a free bias (with two classes:
of one output, the logit), for K values of C. All K share the products with the features, so a round
of the solver is two products of a matrix [N, D] with one [D, K · M] where a loop makes 2 K thin
ones.

Few rounds are needed because the features are first centred and turned into the eigenvectors of
their Gram matrix (the penalty does not change under either). There the curvature of every problem
is close to the diagonal ``κ λ + 1 / (C N)``: λ the eigenvalues, κ how far the predictions are from
saturated, which is read off each problem's last step. L-BFGS (Nocedal and Wright 2006, algorithm
7.4) starts from the inverse of that diagonal. Problems advance side by side, each with its own
history and step length, and leave when they are solved; larger C start from the solutions of
smaller ones.

Legend: N tiles, D features, M classes, K penalties, H remembered steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eosin.configs.errors import InputError

HISTORY = 8
TOGETHER = 15
"""Penalties that are solved side by side; the next so many start from the last of these."""
MOST_ROUNDS = 1000
ROWS = 4096
"""Tiles whose logits are held at a time: they stay in the cache."""
DOUBLE_BELOW = 30_000_000
"""Up to so many numbers (N · D) are computed with in float64."""
_SUFFICIENT = 1e-4
"""Share of the promised decrease that a step must bring (Armijo)."""


@dataclass(frozen=True, kw_only=True)
class Logistic:
    """Fitted models, one a penalty."""

    weights: npt.NDArray[np.float64]
    """[K, M, D]; of two classes, half the logit's and minus that."""
    biases: npt.NDArray[np.float64]
    """[K, M]; they sum to zero."""
    objectives: npt.NDArray[np.float64]
    """[K]: ``C · Σ cross-entropy + ½‖W‖²`` of each."""
    rounds: npt.NDArray[np.int64]
    """[K]: evaluations of the objective that each took."""

    def probabilities(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Of each class, [K, N, M], for features [N, D]."""
        logits = np.einsum("nd,kmd->knm", features.astype(np.float64), self.weights, optimize=True)
        logits += self.biases[:, None]
        logits -= logits.max(axis=2, keepdims=True)
        shares = np.exp(logits)
        total: npt.NDArray[np.float64] = shares / shares.sum(axis=2, keepdims=True)
        return total


def fit_logistic(
    features: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    n_classes: int,
    penalties: Sequence[float],
    *,
    tolerance: float = 1e-8,
    steepest: float = 0.0,
    device: torch.device | None = None,
) -> Logistic:
    """Fits one model for each C.

    Args:
        features: [N, D].
        labels: [N], indices of classes.
        n_classes: M.
        penalties: values of C, ascending; the smaller, the stronger.
        tolerance: a problem is solved when a step promises less than this share of its objective,
        steepest: or when no slope of the mean objective is larger, which is scikit-learn's ``tol``.
        device: where to compute; None: the CPU.

    Raises:
        InputError: a feature is not finite.
    """
    if not np.isfinite(features).all():
        raise InputError("the features hold values that are not finite; the encoder is broken")
    if list(penalties) != sorted(penalties):
        raise ValueError(f"penalties={list(penalties)} must ascend")
    # Two outputs ±u / 2 pay half of what scikit-learn's single one u does.
    halves = 2 if n_classes == 2 else 1
    problem = _Problem(features, labels, n_classes, device or torch.device("cpu"))
    start = torch.zeros(1, n_classes, problem.dim + 1, dtype=problem.dtype, device=problem.device)
    solutions, found, rounds = [], [], []
    for first in range(0, len(penalties), TOGETHER):
        some = [c / halves for c in penalties[first : first + TOGETHER]]
        solved, ends, took = _solve(
            problem, some, start.expand(len(some), -1, -1), tolerance, steepest
        )
        start = solved[-1:]
        solutions.append(solved)
        found.append(ends)
        rounds.append(took)
    weights, biases = problem.as_given(torch.cat(solutions))
    means = torch.cat(found).cpu().numpy()
    return Logistic(
        weights=weights,
        biases=biases,
        objectives=means * np.asarray(penalties) * len(labels),  # times halves, over halves
        rounds=torch.cat(rounds).cpu().numpy(),
    )


class _Problem:
    """The features in their eigenvectors, and the objective there."""

    def __init__(
        self,
        features: npt.NDArray[np.float32],
        labels: npt.NDArray[np.int64],
        n_classes: int,
        device: torch.device,
    ) -> None:
        double = features.size <= DOUBLE_BELOW
        self.dtype, self.device = torch.float64 if double else torch.float32, device
        given = torch.from_numpy(np.ascontiguousarray(features)).to(device, self.dtype)
        self._mean = given.mean(dim=0, dtype=torch.float64)
        given = given - self._mean.to(self.dtype)
        curvature, self._vectors = torch.linalg.eigh((given.T @ given / len(given)).double())
        self.curvature = curvature.clamp(min=0).to(self.dtype)  # [D]
        self.rows = given @ self._vectors.to(self.dtype)  # [N, D]
        self.labels = torch.from_numpy(labels).to(device)
        self.n_classes, self.dim = n_classes, features.shape[1]

    def evaluate(self, models: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy + ½ strength ‖W‖² [K], in float64, and its gradient, [K, M, D + 1].

        Args:
            models: weights and, last, bias, [K, M, D + 1].
            strength: 1 / (C N), [K].
        """
        n_models, n_classes, _ = models.shape
        flat = models.flatten(0, 1)  # [K M, D + 1]
        weights, biases = flat[:, :-1].T.contiguous(), flat[:, -1]
        loss = torch.zeros(n_models, dtype=torch.float64, device=self.device)
        slope = torch.zeros_like(flat)
        for rows, labels in zip(self.rows.split(ROWS), self.labels.split(ROWS), strict=True):
            logits = torch.addmm(biases, rows, weights).view(-1, n_models, n_classes)
            own = labels[:, None, None].expand(-1, n_models, 1)
            # Against the tile's own class: what the others add to 1 keeps its precision when it is
            # small, as logits and probabilities near 1 would not.
            logits -= logits.gather(2, own)
            logits.scatter_(2, own, -torch.inf)
            top = logits.amax(dim=2, keepdim=True).clamp(min=0)
            others = logits.sub_(top).exp_()  # [n, K, M]
            total = others.sum(dim=2, keepdim=True)
            cross_entropy = top + torch.log1p(total + torch.expm1(-top))
            loss += cross_entropy.squeeze(2).sum(dim=0, dtype=torch.float64)
            whole = total + torch.exp(-top)
            others /= whole
            others.scatter_(2, own, -total / whole)
            surplus = others.flatten(1)  # [n, K M]
            slope[:, :-1].addmm_(surplus.T, rows)
            slope[:, -1] += surplus.sum(dim=0)
        gradient = slope.view_as(models) / len(self.rows)
        gradient[..., :-1] += strength[:, None, None] * models[..., :-1]
        penalty = models[..., :-1].double().square().sum(dim=(1, 2)) * strength / 2
        return loss / len(self.rows) + penalty, gradient

    def steepness(self, slopes: Tensor) -> Tensor:
        """The largest slope by a weight or bias of the features as given, but centred, [K]."""
        turned = slopes[..., :-1] @ self._vectors.T.to(self.dtype)
        return torch.maximum(turned.abs().amax(dim=(1, 2)), slopes[..., -1].abs().amax(dim=1))

    def as_given(self, models: Tensor) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Weights [K, M, D] and biases [K, M] for features that are neither centred nor turned."""
        weights = models[..., :-1].double() @ self._vectors.T
        biases = models[..., -1].double() - weights @ self._mean
        biases -= biases.mean(dim=1, keepdim=True)
        return weights.cpu().numpy(), biases.cpu().numpy()


def _solve(
    problem: _Problem, penalties: Sequence[float], start: Tensor, tolerance: float, steepest: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Models [K, M, D + 1], their values [K] as `_Problem.evaluate` has them, and rounds [K]."""
    n_models = len(penalties)
    strength = 1 / (torch.tensor(penalties, dtype=torch.float64) * len(problem.rows))
    strength = strength.to(problem.device, problem.dtype)
    descent = _Descent(problem, start, strength)
    solved, values = torch.empty_like(descent.models), torch.empty_like(descent.values)
    rounds = torch.full((n_models,), MOST_ROUNDS, device=problem.device)
    places = torch.arange(n_models, device=problem.device)
    for taken in range(1, MOST_ROUNDS + 1):
        done = descent.advance(tolerance, steepest)
        if taken == MOST_ROUNDS:
            done = torch.ones_like(done)
        if done.any():
            solved[places[done]], values[places[done]] = descent.models[done], descent.values[done]
            rounds[places[done]] = taken
            places = places[~done]
            descent.keep(~done)
        if not len(places):
            break
    return solved, values, rounds


class _Descent:
    """K problems on their way: where each stands, where it heads, and what it remembers."""

    def __init__(self, problem: _Problem, start: Tensor, strength: Tensor) -> None:
        self._problem, self.strength = problem, strength
        self.models = start.clone()  # [K, M, D + 1]
        self.values, self.slopes = problem.evaluate(self.models, strength)
        n_models, n_classes, width = start.shape
        # of steps and of changes of the gradient, the oldest first; zeros where there is none yet
        self.steps = start.new_zeros(n_models, HISTORY, n_classes * width)
        self.changes = torch.zeros_like(self.steps)
        self.saturation = start.new_full((n_models,), 1 / n_classes)
        self.lengths = start.new_ones(n_models)
        self.failures = torch.zeros(n_models, dtype=torch.int64, device=start.device)
        self.directions = self._directions()

    def keep(self, these: Tensor) -> None:
        """Drops the problems that are solved."""
        for name in ("models", "values", "slopes", "steps", "changes", "saturation", "lengths",
                     "failures", "directions", "strength"):  # fmt: skip
            setattr(self, name, getattr(self, name)[these])

    def advance(self, tolerance: float, steepest: float) -> Tensor:
        """One evaluation of every problem; which of them are solved, [K]."""
        promised = -(self.slopes * self.directions).sum(dim=(1, 2)).double()
        # Half of it is what the quadratic model expects to win; below the noise nothing is won.
        noise = 8 * torch.finfo(self.models.dtype).eps * self.values
        solved = promised / 2 <= tolerance * self.values
        trial = self.models + self.lengths[:, None, None] * self.directions
        values, slopes = self._problem.evaluate(trial, self.strength)
        lengths = self.lengths.double()
        better = values <= self.values - _SUFFICIENT * lengths * promised + noise
        self._remember(better, trial - self.models, slopes - self.slopes)
        # Where it was not: to the bottom of the parabola through both values and the slope.
        bend = 2 * (values - self.values + lengths * promised)
        shorter = (lengths.square() * promised / bend).clamp(0.1 * lengths, 0.5 * lengths)
        self.lengths = torch.where(better, 1.0, shorter).to(self.lengths.dtype)
        self.failures = torch.where(better, 0, self.failures + 1)
        self.models = torch.where(better[:, None, None], trial, self.models)
        self.slopes = torch.where(better[:, None, None], slopes, self.slopes)
        self.values = torch.where(better, values, self.values)
        turned = self._directions()
        self.directions = torch.where(better[:, None, None], turned, self.directions)
        flat = self._problem.steepness(self.slopes) <= steepest
        return solved | flat | (self.failures >= 10)

    def _remember(self, where: Tensor, steps: Tensor, changes: Tensor) -> None:
        curved = (steps * changes).sum(dim=(1, 2))  # [K]
        where = where & (curved > 0)
        squares = steps[..., :-1].square()  # [K, M, D]
        weighted = (squares * self._problem.curvature).sum(dim=(1, 2))
        weighted += steps[..., -1].square().sum(dim=1)
        seen = (curved - self.strength * squares.sum(dim=(1, 2))) / weighted
        self.saturation = torch.where(where & (seen > 0), seen, self.saturation)
        for kept, new in ((self.steps, steps), (self.changes, changes)):
            moved = torch.cat([kept[:, 1:], new.flatten(1)[:, None]], dim=1)
            kept.copy_(torch.where(where[:, None, None], moved, kept))

    def _directions(self) -> Tensor:
        """Where each heads, [K, M, D + 1]: down the slope, by what is known of the curvature."""
        gradient = self.slopes.flatten(1)  # [K, P]
        products = (self.steps * self.changes).sum(dim=2)  # [K, H]
        inverse = torch.where(products > 0, 1 / products, 0.0)
        shares = []
        for age in reversed(range(HISTORY)):
            share = inverse[:, age] * (self.steps[:, age] * gradient).sum(dim=1)
            gradient = gradient - share[:, None] * self.changes[:, age]
            shares.append(share)
        diagonal = self.saturation[:, None] * self._problem.curvature + self.strength[:, None]
        heading = gradient.view_as(self.slopes).clone()
        heading[..., :-1] /= diagonal[:, None]
        heading[..., -1] /= self.saturation[:, None]
        heading = heading.flatten(1)
        for age, share in enumerate(reversed(shares)):
            back = inverse[:, age] * (self.changes[:, age] * heading).sum(dim=1)
            heading = heading + (share - back)[:, None] * self.steps[:, age]
        return -heading.view_as(self.slopes)
