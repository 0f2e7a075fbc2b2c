"""`eosin bench probes`: the parts of an evaluation against the code that is usually run for them.

The baselines are what a harness does today: scikit-learn's logistic regression once for each C,
few-shot episodes in a loop that centres, normalises and measures every distance an episode (UNI's
loop, written anew), one brute-force pass of scikit-learn's neighbours, a loop that draws groups and
calls scikit-learn's metrics, and Cox's loss in a double loop. Where a baseline is a loop of equal
rounds, some of them are timed and the rest is multiplied out. Both sides have the same threads.
"""

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.special import logsumexp
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    f1_score,
    roc_auc_score,
)
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from eosin.eval import fewshot, knn
from eosin.eval.intervals import draw_groups, stratify
from eosin.eval.linear import STEEPEST, SWEEP_GRID, TOLERANCE
from eosin.eval.logistic import fit_logistic
from eosin.eval.metrics import balanced_accuracy, confusion_of_runs, metrics_of
from eosin.eval.neighbours import centred
from eosin.eval.probe import Labelled, Outcome, normalise, one_hot
from eosin.eval.protocols import choose, run_protocols
from eosin.launch.artefacts import write_text
from eosin.launch.bench import Row, less_is_better, report
from eosin.launch.bench_cox import cox_sides
from eosin.launch.device_names import DeviceName
from eosin.launch.process import choose_device

SHOTS = 16
VOTES = [knn.Vote(k, most) for k in knn.THUNDER_KS for most in (0, max(knn.THUNDER_KS))]
"""Eight k, each as a majority and weighted."""

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class BenchProbesConfig:
    """Probes on made-up features: overlapping classes, a spectrum that falls off."""

    tiles: int = 100_000
    """Of train and val; a tenth of them is val."""
    queries: int = 7_000
    dim: int = 1024
    classes: int = 9
    groups: int = 60
    """Of the queries."""
    repeats: int = 3
    """Runs of each side but the sweep's, in turn; figures are medians."""
    sweep_repeats: int = 1
    """Runs of each side of the sweep: scikit-learn's takes minutes."""
    loop_rounds: int = 10
    """Episodes and resamples of the baselines' loops that are timed."""
    suite: list[str] = field(default_factory=lambda: ["*"])
    """Protocols whose seconds are told at the end; [] for none."""
    threads: int = 2
    """Of each side."""
    device: DeviceName = "cpu"
    """Of ours; the baselines stay on the CPU."""
    json: Path | None = None
    """Where the rows are written, too; ``--json FILE`` is the same."""

    def __post_init__(self) -> None:
        for name in ("tiles", "queries", "dim", "groups", "repeats", "sweep_repeats", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.classes < 2:
            raise ValueError(f"classes={self.classes} must be at least 2")
        if self.suite:
            choose(self.suite)


@dataclass(frozen=True)
class Tiles:
    """Made-up features with their labels."""

    labelled: Labelled
    queries: Floats
    labels: Indices
    """Of the queries."""
    groups: Indices
    """Likewise."""
    config: BenchProbesConfig


def bench_probes(config: BenchProbesConfig) -> None:
    """Times both sides of each part, then the suite, and reports."""
    torch.set_num_threads(config.threads)
    tiles = made_up(config)
    with threadpool_limits(config.threads):
        rows = [
            *_sweep(tiles),
            _in_turn("fewshot 1,000 episodes of 16", *fewshot_sides(tiles), config.repeats),
            _in_turn("knn eight k, both votes", *knn_sides(tiles), config.repeats),
            _in_turn("bootstrap 1,000 of five metrics", *bootstrap_sides(tiles), config.repeats),
            _in_turn("cox loss of 512 patients", *cox_sides(512), config.repeats),
        ]
        title = (
            f"probes on {config.tiles:,} × {config.dim} in {config.classes} classes, "
            f"{config.queries:,} queries, {tiles.labelled.device.type}, {config.threads} threads"
        )
        report(title, rows, config.json)
        if config.suite:
            _suite(tiles)


def made_up(config: BenchProbesConfig, seed: int = 0) -> Tiles:
    """Classes that overlap, in a space whose axes are turned and fall off as features' do."""
    generator = np.random.default_rng(seed)
    spectrum = (4 * np.arange(1, config.dim + 1) ** -0.5).astype(np.float32)
    turned = np.linalg.qr(generator.standard_normal((config.dim, config.dim)))[0]
    centres = 0.9 * generator.standard_normal((config.classes, config.dim), np.float32)
    n = config.tiles + config.queries
    labels = generator.integers(0, config.classes, n)
    features = generator.standard_normal((n, config.dim), np.float32)
    clear = generator.random(n) > 0.03  # the others are of no class, whatever their label
    features += centres[labels] * clear[:, None]
    features = (features * spectrum) @ turned.astype(np.float32)
    known = slice(0, config.tiles)
    return Tiles(
        labelled=Labelled(
            features=features[known],
            labels=labels[known],
            is_val=np.arange(config.tiles) % 10 == 0,
            device=choose_device(config.device),
        ),
        queries=features[config.tiles :],
        labels=labels[config.tiles :],
        groups=generator.integers(0, config.groups, config.queries),
        config=config,
    )


def _in_turn(
    name: str, ours: Callable[[], float], baseline: Callable[[], float], repeats: int
) -> Row:
    """A row of seconds: what the first returns, against what the second does."""
    pairs = [(ours(), baseline()) for _ in range(repeats)]
    return less_is_better(name, "s", median(a for a, _ in pairs), median(b for _, b in pairs))


def _sweep(tiles: Tiles) -> list[Row]:
    """Seconds, and the worst objective of ours relative to scikit-learn's."""
    known, n_classes = tiles.labelled, tiles.config.classes
    ours_s, theirs_s = list[float](), list[float]()
    for _ in range(tiles.config.sweep_repeats):
        with _timed(ours_s):
            models = fit_logistic(
                known.features, known.labels, n_classes, SWEEP_GRID,
                tolerance=TOLERANCE, steepest=STEEPEST, device=known.device,
            )  # fmt: skip
        with _timed(theirs_s), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            theirs = [
                LogisticRegression(C=c, max_iter=1000, tol=1e-4).fit(known.features, known.labels)
                for c in SWEEP_GRID
            ]
    # of one output where there are two classes, as `objective` wants them
    coefficients = [_both(m.coef_) for m in theirs]
    intercepts = [_both(m.intercept_[:, None])[:, 0] for m in theirs]
    objectives = [
        objective(known, c, weights, biases) / objective(known, c, coefficient, intercept)
        for c, weights, biases, coefficient, intercept in zip(
            SWEEP_GRID, models.weights, models.biases, coefficients, intercepts, strict=True
        )
    ]
    return [
        less_is_better("sweep 45 values of C", "s", median(ours_s), median(theirs_s)),
        less_is_better("sweep objective, the worst of 45", "rel.", max(objectives), 1.0),
        less_is_better("sweep objective, median of 45", "rel.", median(objectives), 1.0),
    ]


def _both(of_one: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([-of_one / 2, of_one / 2]) if len(of_one) == 1 else of_one


def objective(
    known: Labelled, c: float, weights: NDArray[np.float64], biases: NDArray[np.float64]
) -> float:
    """``C · Σ cross-entropy + ½‖W‖²`` in float64; of two classes, ½ of the logit's weights."""
    logits = known.features.astype(np.float64) @ weights.T + biases
    losses = logsumexp(logits, axis=1) - logits[np.arange(len(logits)), known.labels]
    doubled = 2 if len(weights) == 2 else 1
    return float(doubled * (weights**2).sum() / 2 + c * losses.sum())


def fewshot_sides(tiles: Tiles) -> tuple[Callable[[], float], Callable[[], float]]:
    """Ours, and UNI's loop as published: seconds for all episodes and their balanced accuracies."""
    known, n_classes = tiles.labelled, tiles.config.classes

    def ours() -> float:
        began = time.perf_counter()
        runs = fewshot.episodes(known, tiles.queries, n_classes, SHOTS, 0)
        balanced_accuracy(confusion_of_runs(runs, tiles.labels, n_classes))
        return time.perf_counter() - began

    def baseline() -> float:
        members = [np.flatnonzero(known.labels == label) for label in range(n_classes)]
        supports = fewshot.draw_supports(members, SHOTS, 0)[: tiles.config.loop_rounds]
        queries = torch.from_numpy(tiles.queries)
        began = time.perf_counter()
        for support in supports:
            naive_episode(torch.from_numpy(known.features[support]), queries, tiles.labels)
        return (time.perf_counter() - began) / len(supports) * fewshot.EPISODES

    return ours, baseline


def naive_episode(support: torch.Tensor, queries: torch.Tensor, labels: Indices) -> Indices:
    """One episode by way of every distance [Q, C, D]: what it predicts for each query."""
    mean = support.mean(dim=(0, 1))
    prototypes = F.normalize(support - mean, dim=-1).mean(dim=1)  # [C, D]
    moved = F.normalize(queries - mean, dim=-1)
    distances = (moved[:, None] - prototypes[None]).square().sum(dim=-1).sqrt()
    predictions: Indices = distances.argmin(dim=1).numpy()
    balanced_accuracy_score(labels, predictions)
    return predictions


def knn_sides(tiles: Tiles) -> tuple[Callable[[], float], Callable[[], float]]:
    """Ours with all votes, and scikit-learn's neighbours alone, without any vote."""
    known, n_classes = tiles.labelled, tiles.config.classes

    def ours() -> float:
        began = time.perf_counter()
        references, queries = centred(known.features, tiles.queries)
        knn.count_votes(queries, references, known.labels, n_classes, VOTES, known.device)
        return time.perf_counter() - began

    def baseline() -> float:
        began = time.perf_counter()
        references, queries = (normalise(x) for x in centred(known.features, tiles.queries))
        search = NearestNeighbors(n_neighbors=max(knn.THUNDER_KS), algorithm="brute")
        search.fit(references).kneighbors(queries)
        return time.perf_counter() - began

    return ours, baseline


def bootstrap_sides(tiles: Tiles) -> tuple[Callable[[], float], Callable[[], float]]:
    """1,000 resamples of groups: ours, and a loop over scikit-learn's five metrics."""
    n_classes, n_groups = tiles.config.classes, tiles.config.groups
    generator = np.random.default_rng(1)
    logits = generator.normal(size=(len(tiles.labels), n_classes))
    logits += 2 * np.eye(n_classes)[tiles.labels]
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    predictions = scores.argmax(axis=1)
    outcome = Outcome(votes=one_hot(predictions, n_classes), scores=scores.astype(np.float32))

    def ours() -> float:
        began = time.perf_counter()
        strata = stratify(tiles.labels, tiles.groups, n_groups, n_classes)
        weights = draw_groups(strata, 1000, 0)
        for metric in metrics_of(outcome, tiles.labels, tiles.groups, n_groups).values():
            metric(weights)
        return time.perf_counter() - began

    def baseline() -> float:
        members = [np.flatnonzero(tiles.groups == group) for group in range(n_groups)]
        began = time.perf_counter()
        for _ in range(tiles.config.loop_rounds):
            drawn = generator.integers(0, n_groups, n_groups)
            rows = np.concatenate([members[group] for group in drawn])
            labels, guesses = tiles.labels[rows], predictions[rows]
            accuracy_score(labels, guesses)
            balanced_accuracy_score(labels, guesses)
            f1_score(labels, guesses, average="macro")
            cohen_kappa_score(labels, guesses)
            among = scores[rows, 1] if n_classes == 2 else scores[rows]
            roc_auc_score(labels, among, multi_class="ovr", labels=range(n_classes))
        return (time.perf_counter() - began) / tiles.config.loop_rounds * 1000

    return ours, baseline


def _suite(tiles: Tiles) -> None:
    """Tells the seconds of every protocol, which have no baseline."""
    config, seconds = tiles.config, {}
    names = choose(config.suite)
    for name, _, took in run_protocols(names, tiles.labelled, tiles.queries, config.classes, 0):
        seconds[name] = took
        print(f"protocol {name:<28} {took:8.1f} s", flush=True)
    print(f"all {len(seconds)} protocols {sum(seconds.values()):.0f} s")
    if config.json is not None:
        file = config.json.with_suffix(".suite.json")
        write_text(file, json.dumps({k: round(v, 2) for k, v in seconds.items()}, indent=1) + "\n")


@contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - began)
