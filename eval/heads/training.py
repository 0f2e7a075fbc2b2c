"""Fitting a head on bags: one bag a step, stopped on val, asked about test with whole bags.

AdamW at 1e-4 with weight decay 1e-5 and class-balanced cross-entropy, an order of bags drawn from
(seed, run, epoch). The epoch with the best AUROC on val counts (the least loss among equals), and
training ends when that has not risen for `PATIENCE` epochs. Test bags play no part. Runs differ in
their start and order; probabilities are their mean. Shapes: S slides, D features, C classes.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eosin.eval.probe import Outcome, shares_of_runs
from eosin.eval.ranking import Ranking
from eosin.launch.progress import Meter

RATE = 1e-4
WEIGHT_DECAY = 1e-5
EPOCHS = 50
PATIENCE = 10
RUNS = 3

MakeHead = Callable[[int, int], nn.Module]
"""(features, classes) to a module from (bag [N, D], cells [N, 2]) to logits [C], weights [N]."""


@dataclass(frozen=True, kw_only=True)
class Bag:
    """One slide."""

    slide_id: str
    tile_ids: Sequence[str]
    features: npt.NDArray[np.float16]
    """[N, D]"""
    cells: npt.NDArray[np.int64]
    """Column and row of each tile on the slide's grid, [N, 2], from 0."""


@dataclass(frozen=True, kw_only=True)
class BagSplits:
    """Labelled bags; test labels are not among them."""

    train: Sequence[Bag]
    train_labels: npt.NDArray[np.int64]
    val: Sequence[Bag]
    val_labels: npt.NDArray[np.int64]
    test: Sequence[Bag]


def run_head(
    make: MakeHead, splits: BagSplits, n_classes: int, seed: int, device: torch.device, name: str
) -> tuple[Outcome, list[npt.NDArray[np.float32]]]:
    """What the head says of the test bags, and the mean weights that it gives their tiles."""
    mean, deviation = _moments(splits.train)
    probabilities, weights = [], list[list[npt.NDArray[np.float32]]]()
    chosen = []
    with Meter(f"fit {name}", RUNS * EPOCHS, "epochs") as meter:
        for run in range(RUNS):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(1000 * seed + run)
                head = make(len(mean), n_classes).to(device)
                fitted = _Fitted(head, mean, deviation, device)
                chosen.append(_fit(fitted, splits, n_classes, (seed, run), meter))
            found = [fitted.ask(bag) for bag in splits.test]
            probabilities.append(np.stack([p for p, _ in found]))
            weights.append([w for _, w in found])
    stacked = np.stack(probabilities)  # [R, S, C]
    runs = stacked.argmax(axis=2).astype(np.int16)
    outcome = Outcome(
        votes=shares_of_runs(runs, n_classes),
        scores=stacked.mean(axis=0),
        probabilities=True,
        runs=runs,
        chosen={"epoch": float(np.median(chosen))},
    )
    return outcome, [np.mean(of_bag, axis=0) for of_bag in zip(*weights, strict=True)]


class _Fitted:
    """A head behind the standardisation of its training features."""

    def __init__(
        self, head: nn.Module, mean: Tensor, deviation: Tensor, device: torch.device
    ) -> None:
        self.head, self.device = head, device
        self._mean, self._deviation = mean.to(device), deviation.to(device)

    def __call__(self, bag: Bag) -> tuple[Tensor, Tensor]:
        features = torch.from_numpy(bag.features.astype(np.float32)).to(self.device)
        cells = torch.from_numpy(bag.cells).to(self.device)
        found: tuple[Tensor, Tensor] = self.head((features - self._mean) / self._deviation, cells)
        return found

    @torch.no_grad()
    def ask(self, bag: Bag) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Probabilities [C] and weights [N] of a whole bag."""
        self.head.eval()
        logits, weights = self(bag)
        return logits.softmax(dim=0).cpu().numpy(), weights.cpu().numpy()


def _moments(bags: Sequence[Bag]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every feature over the tiles of the training bags."""
    count, total, squares = 0, np.zeros(1), np.zeros(1)
    for bag in bags:
        x = bag.features.astype(np.float64)
        count, total, squares = count + len(x), total + x.sum(axis=0), squares + (x**2).sum(axis=0)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 1e-8))
    return torch.from_numpy(mean).float(), torch.from_numpy(deviation).float()


def _fit(
    fitted: _Fitted, splits: BagSplits, n_classes: int, key: tuple[int, int], meter: Meter
) -> int:
    """Trains in place, leaves the best epoch's weights, and returns that epoch (1 and up)."""
    head = fitted.head
    counts = np.bincount(splits.train_labels, minlength=n_classes)
    balance = torch.from_numpy(len(splits.train_labels) / (n_classes * np.maximum(counts, 1)))
    balance = balance.float().to(fitted.device)
    optimiser = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    best: tuple[float, float] = (-1.0, 0.0)
    best_epoch, kept = 0, copy.deepcopy(head.state_dict())
    for epoch in range(1, EPOCHS + 1):
        head.train()
        generator = np.random.Generator(np.random.Philox(key=[key[0], 1000 * key[1] + epoch]))
        for index in generator.permutation(len(splits.train)).tolist():
            logits, _ = fitted(splits.train[index])
            truth = torch.tensor([int(splits.train_labels[index])], device=logits.device)
            loss = F.cross_entropy(logits[None], truth) * balance[truth[0]]
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        score = _score(fitted, splits, n_classes)
        meter.advance(1)
        if score > best:
            best, best_epoch, kept = score, epoch, copy.deepcopy(head.state_dict())
        if epoch - best_epoch >= PATIENCE:
            meter.advance(EPOCHS - epoch)
            break
    head.load_state_dict(kept)
    return best_epoch


def _score(fitted: _Fitted, splits: BagSplits, n_classes: int) -> tuple[float, float]:
    """AUROC on val, and minus its cross-entropy."""
    found = np.stack([fitted.ask(bag)[0] for bag in splits.val])
    labels = splits.val_labels
    own = np.zeros(len(labels), np.int64)
    area = float(Ranking(found, labels, own, 1)(np.ones((1, 1)))[0])
    return area, float(np.log(np.maximum(found[np.arange(len(labels)), labels], 1e-12)).mean())
