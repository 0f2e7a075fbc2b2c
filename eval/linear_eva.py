"""eva's linear probe, ``linear/eva-adamw@1``: AdamW with early stopping, five seeds side by side.

One linear layer on features as they are; AdamW at 3e-4 (torch's weight decay 0.01), batches of
256, 12,500 steps at most; after every pass over train its balanced accuracy on val is taken, and it
stops when that has not risen for a fifth of the passes that the steps allow. The best checkpoint
counts (kaiko-ai/eva 73b61a7, ``configs/vision/pathology/offline/classification``). Two things are
not eva's: where a task has no test split, eva reports the very split that it stopped on, and this
does not; and two classes have two outputs instead of one.

The seeds train side by side, each as it would alone: its start and its order of tiles are drawn
from (seed, run). Shapes: R runs, B tiles a batch.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from eosin.eval.metrics import balanced_accuracy, grouped_confusion
from eosin.eval.probe import Family, Labelled, Outcome, one_hot

PROTOCOL = "linear/eva-adamw@1"
RUNS = 5
RATE = 3e-4
BATCH = 256
STEPS = 12_500
PATIENCE = 0.2
"""Share of the passes after which a run stops that has not become better."""


def run(
    labelled: Labelled,
    test_features: npt.NDArray[np.float32],
    n_classes: int,
    seed: int,
    wanted: Sequence[str],
) -> dict[str, Outcome]:
    """Mean probabilities of the runs, votes as shares of runs, and the runs' own predictions."""
    device = labelled.device
    train, val = labelled.only(~labelled.is_val), labelled.only(labelled.is_val)
    x, y = torch.from_numpy(train.features).to(device), torch.from_numpy(train.labels).to(device)
    x_val = torch.from_numpy(val.features).to(device)
    generators = [np.random.Generator(np.random.Philox(key=[seed, i])) for i in range(RUNS)]
    weight, bias = _start(generators, x.shape[1], n_classes, device)
    optimiser = torch.optim.AdamW([weight, bias], lr=RATE)
    passes = max(1, round(STEPS / -(-len(x) // BATCH)))
    best = _Best(weight, bias, PATIENCE * passes)
    for _ in range(passes):
        orders = np.stack([generator.permutation(len(x)) for generator in generators])
        for rows in torch.from_numpy(orders).to(device).split(BATCH, dim=1):  # [R, B]
            logits = torch.baddbmm(bias[:, None], x[rows], weight)  # [R, B, C]
            # the sum over runs of each run's mean: no run's gradient depends on the others
            loss = F.cross_entropy(logits.flatten(0, 1), y[rows].flatten(), reduction="sum")
            optimiser.zero_grad()
            (loss / rows.shape[1]).backward()
            optimiser.step()
        with torch.no_grad():
            on_val = torch.baddbmm(bias[:, None], x_val.expand(RUNS, -1, -1), weight).argmax(2)
        best.note(_scores(on_val.cpu().numpy(), val.labels, n_classes))
        if best.stopped.all():
            break
    x_test = torch.from_numpy(test_features).to(device)
    with torch.no_grad():
        logits = torch.baddbmm(best.bias[:, None], x_test.expand(RUNS, -1, -1), best.weight)
        probabilities = torch.softmax(logits, dim=2).cpu().numpy()  # [R, N, C]
    predictions = probabilities.argmax(axis=2)
    votes = np.stack([one_hot(p, n_classes) for p in predictions]).mean(axis=0)
    return {
        PROTOCOL: Outcome(
            votes=votes,
            scores=probabilities.mean(axis=0),
            probabilities=True,
            runs=predictions.astype(np.int16),
            chosen={"passes": float(np.median(best.at))},
        )
    }


class _Best:
    """Of each run, the layer that did best on val before the run stopped."""

    def __init__(self, weight: Tensor, bias: Tensor, patience: float) -> None:
        self._now, self._patience = (weight, bias), patience
        self.weight, self.bias = weight.detach().clone(), bias.detach().clone()
        self._scores = np.full(len(weight), -1.0)
        self.at = np.zeros(len(weight), np.int64)
        """The pass at which each was best, 1 and up."""
        self.stopped = np.zeros(len(weight), np.bool_)
        self._passes = 0

    def note(self, scores: npt.NDArray[np.float64]) -> None:
        """Takes the layers of the runs that are better than before, [R]."""
        self._passes += 1
        better = (scores > self._scores) & ~self.stopped
        self._scores = np.where(better, scores, self._scores)
        self.at[better] = self._passes
        self.stopped |= self._passes - self.at > self._patience
        rows = torch.from_numpy(np.flatnonzero(better))
        for kept, now in zip((self.weight, self.bias), self._now, strict=True):
            kept[rows] = now.detach()[rows]


def _start(
    generators: Sequence[np.random.Generator], dim: int, n_classes: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Weights [R, D, C] and biases [R, C] as torch starts a linear layer: uniform in ±1/√D."""
    bound = dim**-0.5
    weight = np.stack([g.uniform(-bound, bound, (dim, n_classes)) for g in generators])
    bias = np.stack([g.uniform(-bound, bound, n_classes) for g in generators])
    made = [torch.from_numpy(v.astype(np.float32)).to(device) for v in (weight, bias)]
    return made[0].requires_grad_(), made[1].requires_grad_()


def _scores(
    predictions: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], n_classes: int
) -> npt.NDArray[np.float64]:
    """Balanced accuracy of each run's predictions [R, N]."""
    runs, n = predictions.shape
    votes = one_hot(predictions.ravel(), n_classes)
    which = np.repeat(np.arange(runs), n)
    return balanced_accuracy(grouped_confusion(np.tile(labels, runs), votes, which, runs))


FAMILY = Family(
    protocols={
        PROTOCOL: "eva's probe: AdamW at 3e-4, batches of 256, at most 12,500 steps, stopped by "
        "balanced accuracy on val; mean of 5 seeds"
    },
    run=run,
)
