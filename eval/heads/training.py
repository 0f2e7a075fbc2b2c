"""Fitting heads on bags: many at once in one pass over the data, each as if it were alone.

A member of the pass is a head with bags of its own to learn from and to be stopped by. All see the
bags in one order, drawn from (seed, epoch), in batches of whole bags; each takes a step on those of
a batch that are its own. What it draws is a function of its own seed and the step, so the company
changes nothing. The epoch that its aim finds best on its val bags counts, and a member is done when
nothing better came for a while. Test bags play no part. Legend: S slides, D features, C outputs, K
members.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eosin.eval.heads.aims import Aim, Classes
from eosin.eval.heads.head import Head, Verdict
from eosin.eval.heads.packed import Packed, pack
from eosin.eval.heads.recipe import Recipe
from eosin.eval.probe import Outcome, shares_of_runs
from eosin.launch.progress import Meter

MakeHead = Callable[[int, int], Head]
"""(features, outputs) to a head."""
Tensors = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Bag:
    """One slide."""

    slide_id: str
    tile_ids: Sequence[str]
    features: npt.NDArray[np.floating]
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


@dataclass(frozen=True, kw_only=True)
class Member:
    """One head of a pass."""

    seed: int
    """Of its weights and of all that it draws."""
    train: npt.NDArray[np.int64]
    """Rows of the bags that it learns from."""
    val: npt.NDArray[np.int64]
    """Rows of those that it is stopped by."""


class Fitted:
    """A head behind the standardisation of its own training features.

    Args:
        head: with drawn weights.
        mean: of the features, [D].
        deviation: likewise.
        device: of the head.
    """

    def __init__(self, head: Head, mean: Tensor, deviation: Tensor, device: torch.device) -> None:
        self.head, self.device = head.to(device), device
        self._mean, self._deviation = mean.to(device), deviation.to(device)
        self.epoch = 0
        """The one whose weights it has, from 1."""

    def seen(self, packed: Packed) -> Packed:
        """The bags as the head takes them."""
        features = (packed.features.to(self._mean.dtype) - self._mean) / self._deviation
        return packed._replace(features=features)

    @torch.no_grad()
    def ask(self, bag: Bag) -> tuple[Tensor, npt.NDArray[np.float32]]:
        """Outputs [C] of a whole bag; what its tiles say [N, C], or the weights that they have [N].

        What they say is there for a head whose verdict is the mean of that: its weights are equal,
        and show nothing.
        """
        self.head.eval()
        verdict: Verdict = self.head(self.seen(packed_bags([bag], self.device)))
        shown = verdict.weights if verdict.tile_outputs is None else verdict.tile_outputs
        return verdict.outputs[0].cpu(), shown.cpu().numpy()

    @torch.no_grad()
    def embedding(self, bag: Bag) -> npt.NDArray[np.float32]:
        """What the head makes of a whole bag before its last layer, [W]."""
        self.head.eval()
        verdict: Verdict = self.head(self.seen(packed_bags([bag], self.device)))
        found: npt.NDArray[np.float32] = verdict.embedding[0].cpu().numpy()
        return found


def run_head(
    make: MakeHead,
    splits: BagSplits,
    n_classes: int,
    seed: int,
    device: torch.device,
    name: str,
    recipe: Recipe | None = None,
) -> tuple[Outcome, list[npt.NDArray[np.float32]]]:
    """What the head says of the test bags, and the map of each, as `map_of` makes it."""
    recipe = recipe or Recipe()
    bags = [*splits.train, *splits.val]
    labels = np.concatenate([splits.train_labels, splits.val_labels])
    rows = np.arange(len(bags))
    train, val = rows[: len(splits.train)], rows[len(splits.train) :]
    members = [Member(seed=1000 * seed + run, train=train, val=val) for run in range(recipe.runs)]
    aim = Classes(labels, n_classes)
    fitted = fit_members(make, bags, aim, members, recipe, seed, device, name)
    probabilities, weights = [], list[list[npt.NDArray[np.float32]]]()
    for member in fitted:
        found = [member.ask(bag) for bag in splits.test]
        probabilities.append(torch.stack([said for said, _ in found]).softmax(dim=1).numpy())
        weights.append([w for _, w in found])
    stacked = np.stack(probabilities)  # [R, S, C]
    runs = stacked.argmax(axis=2).astype(np.int16)
    outcome = Outcome(
        votes=shares_of_runs(runs, n_classes),
        scores=stacked.mean(axis=0),
        probabilities=True,
        runs=runs,
        chosen={"epoch": float(np.median([member.epoch for member in fitted]))},
    )
    return outcome, [map_of(of_bag) for of_bag in zip(*weights, strict=True)]


def map_of(shown: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    """The mean over heads of what `Fitted.ask` shows of one bag.

    Returns:
        Weights [N], which sum to 1; or probabilities of classes by what each tile says, [N, C].
    """
    mean = np.mean(shown, axis=0)
    if mean.ndim == 2:
        raised = np.exp(mean - mean.max(axis=1, keepdims=True))
        mean = raised / raised.sum(axis=1, keepdims=True)
    found: npt.NDArray[np.float32] = mean.astype(np.float32)
    return found


def fit_members(
    make: MakeHead,
    bags: Sequence[Bag],
    aim: Aim,
    members: Sequence[Member],
    recipe: Recipe,
    seed: int,
    device: torch.device,
    name: str = "heads",
) -> list[Fitted]:
    """Fits all members in one pass over the bags.

    Args:
        make: of a head.
        bags: that any member learns from or is stopped by.
        aim: of the bags; a member sees what is known of its own rows alone.
        members: K of them.
        recipe: of all.
        seed: of the order of bags.
        device: of the heads.
        name: for the progress.

    Returns:
        Each member with the weights of its best epoch.
    """
    pupils = [_Pupil(make, bags, aim, member, recipe, device) for member in members]
    with Meter(f"fit {name}", recipe.epochs, "epochs") as meter:
        for epoch in range(1, recipe.epochs + 1):
            going = [pupil for pupil in pupils if not pupil.done]
            if not going:
                meter.advance(recipe.epochs + 1 - epoch)
                break
            for number, rows in enumerate(batches_of(bags, recipe, seed, epoch)):
                read = {row: tensors_of(bags[row], device) for row in rows.tolist()}
                for pupil in going:
                    pupil.learn(rows, read, epoch, number)
            for pupil in going:
                pupil.judge(epoch)
            meter.advance(1)
    return [pupil.best() for pupil in pupils]


def batches_of(
    bags: Sequence[Bag], recipe: Recipe, seed: int, epoch: int
) -> Iterator[npt.NDArray[np.int64]]:
    """The rows of each batch of an epoch: a function of (seed, epoch) and the bags' sizes."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    batch: list[int] = []
    tiles = 0
    for row in generator.permutation(len(bags)).tolist():
        size = len(bags[row].features)
        if batch and (len(batch) == recipe.bags_a_step or tiles + size > recipe.tiles_a_step):
            yield np.array(batch)
            batch, tiles = [], 0
        batch.append(row)
        tiles += size
    if batch:
        yield np.array(batch)


class _Pupil:
    """A member while it learns."""

    def __init__(
        self,
        make: MakeHead,
        bags: Sequence[Bag],
        aim: Aim,
        member: Member,
        recipe: Recipe,
        device: torch.device,
    ) -> None:
        self._bags, self._recipe, self._member = bags, recipe, member
        self._aim = aim.of(member.train)
        mean, deviation = moments([bags[row] for row in member.train.tolist()])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(member.seed)
            head = make(len(mean), aim.n_outputs)
        self._fitted = Fitted(head, mean, deviation, device)
        self._criterion = self._aim.criterion(device)
        self._optimiser = torch.optim.AdamW(
            (p for p in head.parameters() if p.requires_grad),
            lr=recipe.rate,
            weight_decay=recipe.weight_decay,
        )
        self._mine = np.zeros(len(bags), np.bool_)
        self._mine[member.train] = True
        self._kept = copy.deepcopy(head.state_dict())
        self._best: tuple[float, float] = (-np.inf, 0.0)
        self._best_epoch, self.done = 0, False

    def learn(
        self, rows: npt.NDArray[np.int64], read: Mapping[int, Tensors], epoch: int, number: int
    ) -> None:
        """One step on those of a batch's bags that are its own; all members share what was read."""
        rows = rows[self._mine[rows]]
        if not len(rows):
            return
        head, device = self._fitted.head, self._fitted.device
        head.train()
        head.progress = (epoch - 1) / max(self._recipe.epochs - 1, 1)
        head.reseed((self._member.seed * 1000 + epoch) * 10_000 + number)
        packed = pack([read[row] for row in rows.tolist()])
        targets = self._aim.targets(rows).to(device)
        loss = head.training_loss(self._fitted.seen(packed), targets, self._criterion)
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()
        head.after_step()

    def judge(self, epoch: int) -> None:
        """Keeps the weights where they are the best on val, and ends where that was long ago."""
        score = self._score()
        if score > self._best:
            self._best, self._best_epoch = score, epoch
            self._kept = copy.deepcopy(self._fitted.head.state_dict())
        self.done = epoch - self._best_epoch >= self._recipe.patience

    def best(self) -> Fitted:
        """With the weights of its best epoch."""
        self._fitted.head.load_state_dict(self._kept)
        self._fitted.epoch = self._best_epoch
        return self._fitted

    def _score(self) -> tuple[float, float]:
        """What the aim thinks of the outputs on val."""
        val = self._member.val
        outputs = torch.stack([self._fitted.ask(self._bags[row])[0] for row in val.tolist()])
        return self._aim.judge(outputs, val)


def packed_bags(bags: Sequence[Bag], device: torch.device) -> Packed:
    """Bags as one batch on a device, fp32."""
    return pack([tensors_of(bag, device) for bag in bags])


def tensors_of(bag: Bag, device: torch.device) -> Tensors:
    """A bag's features [N, D], fp32, and cells [N, 2] on a device."""
    features = torch.from_numpy(bag.features.astype(np.float32)).to(device)
    return features, torch.from_numpy(bag.cells).to(device)


def moments(bags: Sequence[Bag]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every feature over the tiles of some bags."""
    count, total, squares = 0, np.zeros(1), np.zeros(1)
    for bag in bags:
        x = bag.features.astype(np.float64)
        count, total, squares = count + len(x), total + x.sum(axis=0), squares + (x**2).sum(axis=0)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 1e-8))
    return torch.from_numpy(mean).float(), torch.from_numpy(deviation).float()
