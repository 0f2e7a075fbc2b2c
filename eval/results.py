"""What an evaluation found, as typed records and as ``results.json``.

There is no clock, host or path in it: the same inputs give the same bytes.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eosin.configs.errors import InputError
from eosin.eval.confounding import Confounding
from eosin.eval.label_free import LabelFree
from eosin.eval.leakage import Leakage
from eosin.eval.metrics import LOWER_IS_BETTER
from eosin.eval.shortcut import Shortcut
from eosin.launch.artefacts import SCHEMA_VERSION, read_json, write_json


@dataclass(frozen=True, kw_only=True)
class TaskRecord:
    """The labelled tiles that everything was scored on."""

    name: str
    classes: list[str]
    """Class names, sorted; predictions are indices into this list."""
    tiles: dict[str, int]
    """Tiles per split (train, val, test)."""
    groups: dict[str, int]
    """Groups (patients, slides) per split; no group is in two."""
    digest: str
    """XXH3-128 of the table of labels and the bytes of the tiles."""
    dataset: str = ""
    """Of `datasets`, where it is a public one in its owner's layout."""
    unit: str = "tiles"
    """What `tiles` counts: ``tiles`` or ``slides``."""


@dataclass(frozen=True, kw_only=True)
class EncoderRecord:
    """One row of the table: an encoder, its random-weights twin, or a colour floor."""

    name: str
    """Unique within the results; also the name of its files."""
    label: str
    """How a reader of the table should call it."""
    kind: str
    """``encoder``, ``random`` (same network, random weights) or ``floor``."""
    pooling: str
    dim: int
    digest: str
    """XXH3-128 of weights, preprocessing and pooling."""
    step: int | None = None
    """Of training, where it is one of several checkpoints of a run."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one encoder under one protocol, with its 95 % interval."""

    encoder: str
    protocol: str
    """Name and version, e.g. ``knn/uni20@1``."""
    metric: str
    """Of `metrics`: ``balanced_accuracy`` (the table's), ``auroc``, ``ece``, …"""
    value: float
    low: float
    high: float
    """95 % interval of a bootstrap over the groups of the test split."""
    spread: float | None = None
    """Standard deviation over seeds or episodes, no part of the interval; None: no runs."""
    chosen: dict[str, float] = field(default_factory=dict)
    """Hyper-parameters chosen on the validation split; empty where there are none."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """``encoder`` minus ``baseline``, paired: both resampled with the same groups."""

    encoder: str
    baseline: str
    protocol: str
    metric: str
    value: float
    low: float
    high: float

    @property
    def better(self) -> bool:
        """Better by more than the interval: the paired interval lies on the better side of zero."""
        return self.high < 0 if self.metric in LOWER_IS_BETTER else self.low > 0


@dataclass(frozen=True, kw_only=True)
class ConditionScore:
    """A score of test tiles that look otherwise; the probe was fitted on plain ones."""

    encoder: str
    protocol: str
    condition: str
    metric: str
    value: float
    low: float
    high: float
    change: float
    """From plain tiles, paired; negative is worse."""
    change_low: float
    change_high: float


@dataclass(frozen=True, kw_only=True)
class ConditionRange:
    """The best less the worst score over plain tiles and all conditions, on shared resamples."""

    encoder: str
    protocol: str
    metric: str
    value: float
    low: float
    high: float
    conditions: int
    """How many, plain included."""


@dataclass(frozen=True, kw_only=True)
class Insight:
    """What is said of one encoder beside its scores."""

    label_free: LabelFree
    """Of all tiles of the task."""
    leakage: Leakage | None = None
    """Of groups; None where no group has two tiles."""
    confounding: Confounding | None = None
    """None where the task names no confounder."""
    shortcut: Shortcut | None = None
    """None there, too, or where no two classes come from two origins often enough."""
    cosines: dict[str, float] = field(default_factory=dict)
    """Condition → mean cosine of a test tile's features before and after."""
    lidar: float | None = None
    """Of test tiles, with the transforms as their views; None with fewer than two transforms."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything in ``results.json``."""

    task: TaskRecord
    encoders: list[EncoderRecord]
    scores: list[Score]
    differences: list[Difference]
    bootstrap_draws: int
    seed: int
    protocols: dict[str, str] = field(default_factory=dict)
    """Name of each protocol → one line that says exactly what it does."""
    insights: dict[str, Insight] = field(default_factory=dict)
    """By encoder."""
    conditions: list[ConditionScore] = field(default_factory=list)
    ranges: list[ConditionRange] = field(default_factory=list)

    def score(self, encoder: str, protocol: str, metric: str = "balanced_accuracy") -> Score:
        """The score of that encoder, protocol and metric; KeyError when there is none."""
        for score in self.scores:
            if (score.encoder, score.protocol, score.metric) == (encoder, protocol, metric):
                return score
        raise KeyError((encoder, protocol, metric))


HEADLINES = 6
"""Protocols that are charted at most."""


def headline_protocols(results: Results) -> list[str]:
    """The protocols that are charted: one of each kind, before the others of that kind."""
    protocols = list(dict.fromkeys(score.protocol for score in results.scores))
    first: dict[str, str] = {}
    for protocol in protocols:
        first.setdefault(protocol.partition("/")[0], protocol)
    rest = [p for p in protocols if p not in first.values()]
    chosen = [*first.values(), *rest][:HEADLINES]
    return [p for p in protocols if p in chosen]


def save_results(results: Results, path: Path) -> None:
    """Writes ``results.json`` atomically."""
    write_json(path, {"schema_version": SCHEMA_VERSION, **asdict(results)})


def load_results(path: Path) -> Results:
    """Reads ``results.json``.

    Raises:
        InputError: the file is missing, of a newer version, or not what `save_results` writes.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; 'eosin eval' writes it")
    try:
        value: dict[str, Any] = read_json(path)
        version = value.pop("schema_version")
        if version > SCHEMA_VERSION:
            raise InputError(f"{path} was written by a newer eosin (schema_version {version})")
        return Results(
            task=TaskRecord(**value["task"]),
            encoders=[EncoderRecord(**record) for record in value["encoders"]],
            scores=[Score(**record) for record in value["scores"]],
            differences=[Difference(**record) for record in value["differences"]],
            bootstrap_draws=value["bootstrap_draws"],
            seed=value["seed"],
            protocols=value["protocols"],
            insights={k: _insight(v) for k, v in value.get("insights", {}).items()},
            conditions=[ConditionScore(**record) for record in value.get("conditions", [])],
            ranges=[ConditionRange(**record) for record in value.get("ranges", [])],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a results file of eosin: {error}") from error


def _insight(value: dict[str, Any]) -> Insight:
    return Insight(
        label_free=LabelFree(**value["label_free"]),
        leakage=None if value["leakage"] is None else Leakage(**value["leakage"]),
        confounding=None if value["confounding"] is None else Confounding(**value["confounding"]),
        shortcut=None if value["shortcut"] is None else Shortcut(**value["shortcut"]),
        cosines=value["cosines"],
        lidar=value["lidar"],
    )
