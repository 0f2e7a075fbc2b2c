"""The verb `eval survival`: how long patients live, from bags of features, in nested folds.

Every patient is test once, by heads that never saw him; his risk is the mean over his slides and
the heads of his fold. Two figures of rank, Harrell's C and Uno's, within folds, with intervals over
patients; mean pooling stands beside every head, and differences are paired. Legend: S slides, P
patients, B resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

from eosin.configs.errors import InputError
from eosin.data_curation.features import open_features
from eosin.eval.bags import read_bags, record_of
from eosin.eval.concordance import Pairs, concordance, pairs_of, uno_weights
from eosin.eval.cross_validation import cross_validate
from eosin.eval.folds import Folds, draw_folds
from eosin.eval.heads.aims import Survival, SurvivalLoss
from eosin.eval.heads.registry import CLASSES_ALONE, HEADS, choose_heads
from eosin.eval.intervals import draw_groups, few_groups_note, interval, tail_of
from eosin.eval.listing import read_table, refuse_duplicates
from eosin.eval.results import Difference, EncoderRecord, Results, Score, TaskRecord, save_results
from eosin.eval.survival_curves import draw_curves
from eosin.launch.artefacts import replacing, stamp_of
from eosin.launch.device_names import DeviceName
from eosin.launch.process import choose_device

FLOOR = "mean@1"
"""Stands beside every other head."""
BAGS_A_STEP = 64
"""A batch is Cox's risk set."""
FIGURES = {"c_index": "Harrell's C", "uno_c": "Uno's C"}
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SurvivalConfig:
    """Scores feature stores on patients' survival."""

    features: list[Path]
    """Feature stores of `eosin embed` or bags of `eosin bags`, one an encoder or magnification."""
    table: Path
    """Columns slide (its slide_id), time, event (1: it came then; 0: lost to sight), and group
    (patient), who has one time and one event."""
    out: Path
    """Folder for results.json, predictions.parquet and curves.png."""
    name: str = ""
    heads: list[str] = field(default_factory=lambda: ["abmil/gated@2"])
    """Names or patterns; ``mean@1`` is always beside them."""
    loss: SurvivalLoss = "cox"
    """cox: log risks, Efron's ties; hazard: of intervals between quantiles of the training's
    events."""
    n_intervals: int = 4
    """Of hazards."""
    folds: int = 5
    inner_folds: int = 4
    seed: int = 0
    device: DeviceName = "auto"
    n_bootstrap: int = 1000

    def __post_init__(self) -> None:
        """Refuses heads that need classes, and numbers that are none."""
        named = [name for name in choose_heads(self.heads) if name in CLASSES_ALONE]
        if named and "*" not in self.heads:
            raise ValueError(f"heads: {named[0]} learns from classes alone; leave it out")
        if self.folds < 2 or self.inner_folds < 2 or self.n_intervals < 2:
            raise ValueError("folds, inner_folds and n_intervals must be at least 2")
        if not self.features:
            raise ValueError("features=[]: name feature stores of 'eosin embed' or 'eosin bags'")

    @property
    def chosen(self) -> list[str]:
        """The heads that are fitted, mean pooling first."""
        named = [n for n in choose_heads(self.heads) if n not in CLASSES_ALONE and n != FLOOR]
        return [FLOOR, *named]


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Slides, sorted by slide_id, and the patients that they are of."""

    slide_ids: list[str]
    groups: list[str]
    times: Floats
    """Of each slide's patient, [S]."""
    events: npt.NDArray[np.bool_]
    patients: list[str]
    """Sorted, P of them."""
    patient_of: npt.NDArray[np.int64]
    """[S]"""

    def of_patients(self, values: npt.NDArray[np.generic]) -> Floats:
        """Means of the patients' slides, [S] → [P]."""
        sums = np.bincount(self.patient_of, values.astype(np.float64), len(self.patients))
        found: Floats = sums / np.bincount(self.patient_of, minlength=len(self.patients))
        return found


def evaluate_survival(config: SurvivalConfig) -> None:
    """Fits, scores, and writes results, predictions and curves.

    Raises:
        InputError: a store or the table cannot be used.
    """
    console, notices = Console(), Console(stderr=True)
    device = choose_device(config.device)
    cohort = load_cohort(config.table)
    strata = cohort.events.astype(np.int64)
    folds = draw_folds(
        strata, cohort.groups, config.folds, config.inner_folds, config.seed, str(config.table)
    )
    for note in few_groups_note(len(cohort.patients)):
        notices.print(f"note: {note}", highlight=False, markup=False)
    aim = Survival(cohort.times, cohort.events, config.loss, config.n_intervals)
    events = cohort.of_patients(cohort.events) > 0.5
    weights = draw_groups(events.astype(np.int64), config.n_bootstrap, config.seed)
    scorer = _Scorer(cohort, folds, weights, tail_of(events.astype(np.int64)))
    encoders = list[EncoderRecord]()
    for path in config.features:
        store = open_features(path)
        encoders.append(record_of(path, store, encoders))
        bags = read_bags(store, cohort.slide_ids, path)
        for name in config.chosen:
            recipe = replace(HEADS[name].recipe, bags_a_step=BAGS_A_STEP, rate=5e-4)
            head = replace(HEADS[name], recipe=recipe)
            outputs, _, epochs = cross_validate(
                head, bags, aim, folds, config.seed, device, f"{name} on {encoders[-1].name}"
            )
            said = torch.from_numpy(outputs)  # [S, J, C]
            risks = aim.risks(said.flatten(0, 1)).view(said.shape[:2]).mean(dim=1).numpy()
            scorer.add(encoders[-1].name, name, cohort.of_patients(risks), float(np.median(epochs)))
    results = _results(config, cohort, folds, encoders, scorer)
    config.out.mkdir(parents=True, exist_ok=True)
    with replacing(config.out / "predictions.parquet") as partial:
        pq.write_table(scorer.predictions(), partial, compression="zstd")
    save_results(results, config.out / "results.json")
    times = cohort.of_patients(cohort.times)
    draw_curves(config.out / "curves.png", times, events, scorer.fold, scorer.risks)
    console.print(_table(results))
    console.print(f"results: {config.out / 'results.json'}", highlight=False, soft_wrap=True)


def load_cohort(path: Path) -> Cohort:
    """Slides with their patients' times and events.

    Raises:
        InputError: a column is missing or no number, or a patient has two times.
    """
    table = read_table(path, ("slide", "time", "event", "group")).sort_by("slide")
    columns = {name: table[name].to_pylist() for name in table.column_names}
    refuse_duplicates(columns["slide"], path)
    times, events = (_numbers(columns[name], name, path) for name in ("time", "event"))
    if (times < 0).any() or not np.isin(events, (0, 1)).all():
        raise InputError(f"{path}: time must be at least 0, and event 0 or 1")
    groups = columns["group"]
    patients, patient_of = np.unique(np.asarray(groups), return_inverse=True)
    for name, values in (("time", times), ("event", events)):
        lowest, highest = np.full(len(patients), np.inf), np.full(len(patients), -np.inf)
        np.minimum.at(lowest, patient_of, values)
        np.maximum.at(highest, patient_of, values)
        if (lowest < highest).any():
            who = patients[int(np.flatnonzero(lowest < highest)[0])]
            raise InputError(f"{path}: group '{who}' has more than one {name}: a patient has one")
    if not events.any():
        raise InputError(f"{path}: no event came, so nothing can be learnt of when")
    return Cohort(
        slide_ids=columns["slide"],
        groups=groups,
        times=times,
        events=events > 0,
        patients=patients.tolist(),
        patient_of=patient_of.astype(np.int64),
    )


def _numbers(texts: Sequence[str], name: str, path: Path) -> Floats:
    try:
        found = np.array([float(text) for text in texts])
    except ValueError as error:
        raise InputError(f"{path}: column '{name}' holds something that is no number") from error
    if not np.isfinite(found).all():
        raise InputError(f"{path}: column '{name}' is not finite everywhere")
    return found


class _Scorer:
    """Risks of patients to figures, all by the same resamples.

    Args:
        cohort: the patients.
        folds: of slides.
        weights: of patients, [B, P].
        tail: of intervals.
    """

    def __init__(self, cohort: Cohort, folds: Folds, weights: Floats, tail: float) -> None:
        self._cohort, self._weights, self._tail = cohort, weights, tail
        self._times = cohort.of_patients(cohort.times)
        self._events = cohort.of_patients(cohort.events) > 0.5
        self.fold = np.round(cohort.of_patients(folds.outer)).astype(np.int64)
        self._uno = np.zeros(len(self._times))
        for number in range(len(folds.inner)):
            test = self.fold == number
            self._uno[test] = uno_weights(
                self._times[test], self._times[~test], self._events[~test]
            )
        self.risks: dict[tuple[str, str], Floats] = {}
        self.scores: list[Score] = []
        self._resamples: dict[tuple[str, str, str], Floats] = {}

    def add(self, encoder: str, head: str, risks: Floats, epoch: float) -> None:
        """Scores one head on one encoder."""
        self.risks[encoder, head] = risks
        ones = np.ones((1, len(risks)))
        for metric, weights in (("c_index", None), ("uno_c", self._uno)):
            pairs: list[Pairs] = pairs_of(self._times, self._events, risks, self.fold, weights)
            drawn = concordance(pairs, self._weights)
            low, high = interval(drawn, self._tail)
            value = float(concordance(pairs, ones)[0])
            self._resamples[encoder, head, metric] = drawn
            self.scores.append(
                Score(encoder=encoder, protocol=head, metric=metric, value=value, low=low,
                      high=high, chosen={"epoch": epoch})
            )  # fmt: skip

    def differences(self, encoders: Sequence[EncoderRecord]) -> list[Difference]:
        """The first encoder less each other, head by head, paired."""
        values = {(s.encoder, s.protocol, s.metric): s.value for s in self.scores}
        first, found = encoders[0].name, []
        for (name, head, metric), theirs in self._resamples.items():
            if name == first:
                continue
            low, high = interval(self._resamples[first, head, metric] - theirs, self._tail)
            value = values[first, head, metric] - values[name, head, metric]
            found.append(
                Difference(encoder=first, baseline=name, protocol=head, metric=metric, value=value,
                           low=low, high=high)
            )  # fmt: skip
        return found

    def over_floor(self, encoder: str, head: str) -> tuple[float, float, float]:
        """A head's C less that of mean pooling on the same features, paired."""
        own, floor = (self._resamples[encoder, h, "c_index"] for h in (head, FLOOR))
        values = {(s.encoder, s.protocol, s.metric): s.value for s in self.scores}
        value = values[encoder, head, "c_index"] - values[encoder, FLOOR, "c_index"]
        return value, *interval(own - floor, self._tail)

    def predictions(self) -> pa.Table:
        """One row a patient, encoder and head."""
        n = len(self._times)
        return pa.concat_tables(
            pa.table(
                {
                    "encoder": [encoder] * n, "head": [head] * n, "group": self._cohort.patients,
                    "time": self._times, "event": self._events, "fold": self.fold, "risk": risks,
                }
            )
            for (encoder, head), risks in self.risks.items()
        )  # fmt: skip


def _results(
    config: SurvivalConfig,
    cohort: Cohort,
    folds: Folds,
    encoders: list[EncoderRecord],
    scorer: _Scorer,
) -> Results:
    described = {}
    for head in config.chosen:
        what = f"{HEADS[head].what}; {config.loss}, AdamW 5e-4, {BAGS_A_STEP} bags a step, stopped "
        what += "by the loss on an inner fold"
        if head != FLOOR:
            over = [scorer.over_floor(e.name, head) for e in encoders]
            what += "; C over mean pooling " + ", ".join(
                f"{value:+.3f} [{low:+.3f}, {high:+.3f}]" for value, low, high in over
            )
        described[head] = what
    return Results(
        task=TaskRecord(
            name=config.name or config.table.stem,
            classes=["survival"],
            tiles={"train": 0, "val": 0, "test": len(cohort.slide_ids)},
            groups={"train": 0, "val": 0, "test": len(cohort.patients)},
            digest=stamp_of(
                slides=cohort.slide_ids, groups=cohort.groups, times=cohort.times.tolist(),
                events=cohort.events.tolist(), folds=folds.inner.tolist(),
            ),
            unit="slides",
        ),
        encoders=encoders,
        scores=scorer.scores,
        differences=scorer.differences(encoders),
        bootstrap_draws=config.n_bootstrap,
        seed=config.seed,
        protocols=described,
    )  # fmt: skip


def _table(results: Results) -> Table:
    table = Table(
        title=f"{results.task.name}: {results.task.groups['test']} patients, each test once "
        "[95 % interval over patients]"
    )
    for column in ("encoder", "head", *FIGURES.values()):
        table.add_column(column)
    for encoder in results.encoders:
        for head in results.protocols:
            found = [results.score(encoder.name, head, metric) for metric in FIGURES]
            cells = [f"{s.value:.3f} \\[{s.low:.3f}, {s.high:.3f}]" for s in found]
            table.add_row(encoder.label, head, *cells)
    for head, what in results.protocols.items():
        if "over mean pooling" in what:
            table.caption = f"{table.caption or ''}{head}: {what.split('; ')[-1]}\n"
    return table
