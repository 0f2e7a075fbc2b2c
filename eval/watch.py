"""Live probes: a training's encoder is scored while it trains, on the validation split alone.

kNN and few-shot by the protocols of `eosin eval`, learnt from train and scored on val, and two
figures that need no labels; one line of ``probes.jsonl`` each time. In the trainer's process they
take at most `max_share` of its time: the first probe finds out how many tiles that affords, later
ones take the same tiles, and one that would take longer is left out.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F

from eosin.configs.errors import ConfigError
from eosin.eval import fewshot, knn
from eosin.eval.metrics import balanced_accuracy, confusion_matrix
from eosin.eval.probe import Labelled
from eosin.eval.probe_tiles import ProbeTiles, order_tiles
from eosin.eval.tasks import TaskConfig, load_task
from eosin.eval.teacher_features import Embedded, TeacherFeatures
from eosin.launch.artefacts import stamp_of
from eosin.launch.metrics import JsonLines, read_lines
from eosin.launch.process import World
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.diagnostics import rankme
from eosin.pretrain.model_card import EncoderCard
from eosin.pretrain.vit import Vit

EMBEDDING_SHARE = 0.6
"""Of what the first probe may take, the part in which it embeds; the rest is for scoring."""

FADING = 0.8
"""What a slow probe counts less at each later one, in the guess of how long the next takes."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """How a training is scored while it runs."""

    tiles: Path | None = None
    """A labelled set as `eosin eval task.tiles=…` takes it; its test split is not touched. null: no
    probes."""
    every: int = 0
    """Steps between two probes, a multiple of checkpoint_every; 0: at every checkpoint."""
    where: Literal["trainer", "job"] = "trainer"
    """In the trainer's process between two steps, or only exported there, to `exports/` of the run
    folder, for an `eosin watch` beside it."""
    max_share: float = 0.02
    """Share of the training's time that probes, or exports for them, may take."""
    max_tiles: int = 0
    """Tiles at most; 0: all that `max_share` affords. In a job of its own: all."""
    pooling: Literal["cls", "mean", "clsmean"] = "cls"
    """Class token, mean of the patch tokens, or both."""
    batch_size: int = 64
    """Tiles a forward pass, of each rank."""
    seed: int = 0
    """Of carved splits, the choice of tiles and few-shot episodes."""

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        if not 0 < self.max_share <= 1:
            raise ValueError(f"max_share={self.max_share} must be above 0 and at most 1")
        for name, least in (("every", 0), ("max_tiles", 0), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")

    @property
    def is_on(self) -> bool:
        """Whether a training has anything to do for probes."""
        return self.tiles is not None or self.where == "job"


@dataclass(frozen=True, kw_only=True)
class ProbeScores:
    """What one probe finds."""

    score: float
    """What the best checkpoint is chosen by, to be maximised: `knn`."""
    knn: float
    """Balanced accuracy of ``knn/uni20@1`` on val, with train as references."""
    fewshot: float
    """Balanced accuracy of ``fewshot/simpleshot@1``, likewise."""
    rankme: float
    """Effective rank of the features."""
    feature_std: float
    """Mean standard deviation of the unit-length features, times sqrt(D); healthy: 1."""


def load_tiles(config: ProbeConfig) -> ProbeTiles:
    """The labelled tiles in their order.

    Raises:
        InputError: they cannot be scored on honestly.
    """
    if config.tiles is None:
        raise ConfigError("probe.tiles is not given: name a labelled set of tiles")
    task = load_task(TaskConfig(tiles=config.tiles), config.seed)
    return order_tiles(task, config.seed, config.max_tiles)


def set_digest(tiles: ProbeTiles, config: ProbeConfig) -> str:
    """What scores must share to be compared, but for the number of tiles."""
    return stamp_of(tiles=tiles.digest, pooling=config.pooling, seed=config.seed)


def score_features(features: npt.NDArray[np.float32], tiles: ProbeTiles, seed: int) -> ProbeScores:
    """Scores features [n, D] of the first n tiles; zeros where they are not all finite.

    Features are rounded to float16 as the evaluation's cache has them, so that scores are the same.
    """
    n = len(features)
    with np.errstate(over="ignore"):
        half = features.astype(np.float16).astype(np.float32)
    if not np.isfinite(half).all():
        print("warning: the features of a probe are not finite: it scores 0")
        return ProbeScores(score=0.0, knn=0.0, fewshot=0.0, rankme=0.0, feature_std=0.0)
    labels, is_val = tiles.labels[:n], tiles.is_val[:n]
    labelled = Labelled(
        features=half[~is_val], labels=labels[~is_val], is_val=np.zeros(n, np.bool_)[~is_val]
    )
    values = []
    for protocol in (knn, fewshot):
        outcome = protocol.probe(labelled, half[is_val], tiles.n_classes, seed)
        values.append(float(balanced_accuracy(confusion_matrix(labels[is_val], outcome.votes))))
    whole = torch.from_numpy(features)
    spread = F.normalize(whole, dim=1).std(dim=0).mean() * features.shape[1] ** 0.5
    return ProbeScores(
        score=values[0],
        knn=values[0],
        fewshot=values[1],
        rankme=float(rankme(whole)),
        feature_std=float(spread),
    )


def probe_line(
    scores: ProbeScores, tiles: int, digest: str, seconds: float, share: float | None
) -> dict[str, Any]:
    """A line of ``probes.jsonl`` without its step."""
    figures = {"split": "val", **asdict(scores), "tiles": tiles, "set": digest}
    times = {"seconds": round(seconds, 3)}
    return figures | times | ({} if share is None else {"share": round(share, 5)})


class Budget:
    """The share of a training's time that may be spent beside it."""

    def __init__(self, max_share: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_share, self._clock, self._began = max_share, clock, clock()
        self.spent = 0.0
        """Seconds."""

    def left(self) -> float:
        """Seconds that may be spent now."""
        return self._max_share * self._trained() - self.spent

    def share(self) -> float:
        """What was spent, as a share of the time of the training itself."""
        return self.spent / max(self._trained(), 1e-9)

    def spend(self, began: float) -> float:
        """Books the time since `began`, by the budget's clock; seconds."""
        seconds = self._clock() - began
        self.spent += seconds
        return seconds

    def now(self) -> float:
        """The budget's clock."""
        return self._clock()

    def _trained(self) -> float:
        return self._clock() - self._began - self.spent


class Due:
    """Which steps are probed: every so manyth, and the last."""

    def __init__(self, config: ProbeConfig, training: PretrainConfig) -> None:
        self._every, self._last = config.every or training.checkpoints.every, training.steps

    def __call__(self, step: int) -> bool:
        """Whether this one is."""
        return step % self._every == 0 or step == self._last


def agreed(number: int, world: World) -> int:
    """Rank 0's number, on every rank."""
    if world.host is None:
        return number
    value = torch.tensor([number])
    dist.broadcast(value, src=0, group=world.host)
    return int(value)


class TrainerProbe:
    """Scores the teacher in the trainer's process; the ranks share the tiles. See `LiveProbe`.

    Args:
        config: of the probes.
        training: what is scored.
        world: its ranks.
        device: of this rank.
        dtype: of its products of matrices, in which features are computed too.
        first_step: see `StartProbe`.
        clock: seconds.

    Raises:
        ConfigError: the run was scored on other tiles before.
        InputError: the tiles cannot be scored on honestly.
    """

    def __init__(
        self,
        config: ProbeConfig,
        training: PretrainConfig,
        world: World,
        device: torch.device,
        dtype: torch.dtype,
        first_step: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._world, self._due = config, world, Due(config, training)
        self._tiles = load_tiles(config)
        self._digest = set_digest(self._tiles, config)
        self._features = TeacherFeatures(
            training.model, config.pooling, config.batch_size, world, device, dtype
        )
        self._lines: JsonLines | None = None
        before = read_lines(training.out / "probes.jsonl", first_step)
        self._n, self._seconds = self._resume(before, training.out)
        if world.leads:
            self._lines = JsonLines(training.out / "probes.jsonl", first_step)
        self._skipped = False
        self._budget = Budget(config.max_share, clock)  # last: its clock starts here

    def __call__(self, teacher: Vit, card: EncoderCard) -> None:
        """Scores it where a probe is due and there is time for one."""
        if not self._due(card.steps):
            return
        began, left = self._budget.now(), self._budget.left()
        if card.steps == 0:  # what a training starts from is worth its time, once
            left = math.inf
        if not agreed(int(left >= self._seconds and left > 0), self._world):
            self._skip(card.steps)
            self._budget.spend(began)
            return
        tiles = self._tiles.images[: self._n or len(self._tiles)]
        deadline = began + left * (1.0 if self._n else EMBEDDING_SHARE)
        embedded = self._features(
            teacher,
            card,
            tiles,
            lambda: bool(agreed(int(self._budget.now() < deadline), self._world)),
        )
        n = self._n or self._tiles.first(embedded.count)
        if embedded.count < n or n == 0:  # given up: not even the least number of tiles
            wanted = (n or int(self._tiles.ends[0])) / max(embedded.count, 1)
            self._seconds = self._budget.spend(began) * wanted / EMBEDDING_SHARE
            self._skip(card.steps)
            return
        self._n = n
        self._record(card.steps, embedded, began)

    def _record(self, step: int, embedded: Embedded, began: float) -> None:
        """Scores on rank 0, which has the features, and writes the line."""
        scores = None
        if embedded.features is not None:
            scores = score_features(embedded.features[: self._n], self._tiles, self._config.seed)
        took = self._budget.spend(began)
        self._seconds = max(took, FADING * self._seconds)
        if self._lines is None or scores is None:
            return
        share = self._budget.share()
        self._lines.write(step, probe_line(scores, self._n, self._digest, took, share))
        print(
            f"probe at step {step}: kNN {scores.knn:.3f}, few-shot {scores.fewshot:.3f}, RankMe "
            f"{scores.rankme:.1f} on {self._n} tiles in {took:.1f} s ({share:.1%} of the "
            "time so far)"
        )

    def _skip(self, step: int) -> None:
        if self._world.leads and not self._skipped:
            print(
                f"no probe at step {step}: within probe.max_share={self._config.max_share} there "
                "is no time for one; later steps are probed where there is (said once; give a "
                "larger probe.every, a smaller probe.max_tiles, or probe.where=job)"
            )
        self._skipped = True

    def _resume(self, before: list[dict[str, Any]], folder: Path) -> tuple[int, float]:
        """The number of tiles of the run's probes, 0 where there was none, and what one takes."""
        if not before:
            return 0, 0.0
        last = before[-1]
        if last["set"] != self._digest:
            raise ConfigError(
                f"{folder / 'probes.jsonl'} holds scores on other tiles, pooling or seed than "
                f"probe.tiles={self._config.tiles}: they cannot be compared; give the same, or "
                "move the file away"
            )
        return int(last["tiles"]), float(last["seconds"])
