"""The parts of an evaluation's report beside the scores, as far as there is something to show."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from eosin.eval import few_labels, fewshot, retrieval
from eosin.eval.charts import (
    Curve,
    condition_changes,
    feature_map_2d,
    reliability,
    score_curves,
)
from eosin.eval.figures import find_score
from eosin.eval.gallery import confused_tiles, found_tiles, principal_points
from eosin.eval.probe import Outcome
from eosin.eval.published_scores import PUBLISHED_SCORES
from eosin.eval.report import Picture, Section
from eosin.eval.results import Results, headline_protocols
from eosin.eval.tables import MAIN_METRIC
from eosin.eval.tasks import Task

MOST_POINTS = 5000

Features = npt.NDArray[np.float32]


def report_sections(
    task: Task,
    results: Results,
    outcomes: dict[str, Outcome],
    features: Features,
    folder: Path,
    device: torch.device,
) -> list[Section]:
    """What there is to see.

    Args:
        task: that was scored.
        results: of all encoders.
        outcomes: of the main encoder, by protocol.
        features: of the main encoder, all tiles [N, D].
        folder: for the pictures.
        device: where to compute.
    """
    main = results.encoders[0].label
    return [
        *_training(results, folder),
        *_curves(results, folder),
        *_confused(task, outcomes, main, folder),
        *_reliability(task, outcomes, main, folder),
        *_retrieval(task, outcomes, features, main, folder, device),
        *_feature_maps(task, features, main, folder),
        *_conditions(results, folder),
        *_insights(results),
        *_published(results),
    ]


def _training(results: Results, folder: Path) -> Iterator[Section]:
    steps = sorted((e.step, e) for e in results.encoders if e.step is not None)
    pictures = []
    for index, protocol in enumerate(headline_protocols(results) if len(steps) > 1 else []):
        found = [(float(step), find_score(results, e.name, protocol)) for step, e in steps]
        points = [(step, score) for step, score in found if score is not None]
        run = replace(steps[0][1], label=steps[0][1].label.rpartition(", step")[0])
        path = folder / f"training_{index + 1}.png"
        curve = Curve(run, [step for step, _ in points], [score for _, score in points])
        score_curves([curve], "step", 1 / len(results.task.classes), path)
        pictures.append(Picture(path=path, caption=protocol))
    if pictures:
        yield Section(
            title="Over training",
            text="Checkpoints of the run on the same test tiles. Take none for the best because of "
            "its place here: what is chosen on test tiles can no longer be scored on them.",
            pictures=tuple(pictures),
        )


def _curves(results: Results, folder: Path) -> Iterator[Section]:
    chance = 1 / len(results.task.classes)
    for name, title, axis, protocols, text in (
        (
            "few_shot", "Few shots", "tiles a class",
            {s: fewshot.protocol_of(s) for s in sorted(fewshot.SHOTS)},
            "Nearest prototype from so many tiles a class; mean of 1,000 episodes. Bands: 95 % "
            "intervals over the groups of the test split, not the spread of episodes, which stands "
            "in the results.",
        ),
        (
            "few_labels", "Few labels", "per cent of the labels",
            {p: few_labels.protocol_of(p) for p in few_labels.SHARES},
            "A linear probe on a share of the labelled tiles; mean of five draws.",
        ),
    ):  # fmt: skip
        curves = []
        for encoder in results.encoders:
            found = [(p, find_score(results, encoder.name, n)) for p, n in protocols.items()]
            points = [(float(place), score) for place, score in found if score is not None]
            if len(points) > 1:
                curves.append(Curve(encoder, [p for p, _ in points], [s for _, s in points]))
        if curves:
            path = folder / f"{name}.png"
            score_curves(curves, axis, chance, path)
            yield Section(
                title=title, text=text, pictures=(Picture(path=path, caption="Dashed: chance."),)
            )


def _confused(
    task: Task, outcomes: dict[str, Outcome], main: str, folder: Path
) -> Iterator[Section]:
    protocol = next(
        (p for p in outcomes if p.startswith(("linear/", "knn/"))), next(iter(outcomes))
    )
    path = folder / "confused.png"
    if confused_tiles(task, outcomes[protocol], path):
        yield Section(
            title="What is confused",
            text=f"Test tiles that {main} gets wrong under {protocol}, the most frequent pairs of "
            "classes first: true class → what was said.",
            pictures=(Picture(path=path, caption="At most ten a pair, evenly over the test set."),),
        )


def _reliability(
    task: Task, outcomes: dict[str, Outcome], main: str, folder: Path
) -> Iterator[Section]:
    labels = task.labels[task.splits == "test"]
    shown = {
        protocol: outcome.scores
        for protocol, outcome in outcomes.items()
        if outcome.probabilities and outcome.scores is not None and protocol.startswith("linear/")
    }
    pictures = []
    for index, (protocol, scores) in enumerate(shown.items()):
        path = folder / f"reliability_{index + 1}.png"
        reliability(scores.astype(np.float64), labels, path)
        pictures.append(Picture(path=path, caption=protocol))
    if pictures:
        yield Section(
            title="Reliability",
            text=f"How often {main} is right where the probe is so sure. On the dashed line, "
            "probabilities mean what they say; below it, the probe is too sure.",
            pictures=tuple(pictures),
        )


def _retrieval(
    task: Task,
    outcomes: dict[str, Outcome],
    features: Features,
    main: str,
    folder: Path,
    device: torch.device,
) -> Iterator[Section]:
    if retrieval.PROTOCOL not in outcomes:
        return
    path = folder / "retrieval.png"
    told = found_tiles(task, features, path, device)
    right = sum(answer == asked for asked, answers in told for answer in answers)
    whole = sum(len(answers) for _, answers in told)
    lines = ", ".join(f"{a.count(asked)} of {len(a)}" for asked, a in told)
    yield Section(
        title="What is found alike",
        text=f"Test tiles (left) and their nearest of train and val by {main}: {right} of {whole} "
        f"answers here are of the class that was asked for.\n\nRight answers by line: {lines}.",
        pictures=(Picture(path=path, caption="First of each line: the tile that asks."),),
    )


def _feature_maps(task: Task, features: Features, main: str, folder: Path) -> Iterator[Section]:
    rows = np.unique(np.linspace(0, len(features) - 1, MOST_POINTS).round().astype(int))
    points, explained = principal_points(features[rows])
    panels = {"by class": [task.classes[task.labels[row]] for row in rows]}
    if len(set(task.groups)) < len(task.groups):
        panels["by group"] = [task.groups[row] for row in rows]
    path = folder / "features.png"
    feature_map_2d(points, panels, path, explained)
    yield Section(
        title="Features",
        text=f"All tiles as {main} sees them, by their first two principal components. Where the "
        "colours of groups keep together and those of classes do not, it sorts by slide or patient "
        "rather than by tissue.",
        pictures=(Picture(path=path, caption="Colours of groups come round again after twelve."),),
    )


def _conditions(results: Results, folder: Path) -> Iterator[Section]:
    if not results.conditions:
        return
    path = folder / "conditions.png"
    labels = {encoder.name: encoder.label for encoder in results.encoders}
    charted = headline_protocols(results)
    condition_changes(
        [c for c in results.conditions if c.metric == MAIN_METRIC and c.protocol in charted],
        labels,
        path,
    )
    ranges = "; ".join(
        f"{labels[r.encoder]}, {r.protocol}: {r.value:.3f} [{r.low:.3f}, {r.high:.3f}]"
        for r in results.ranges
        if r.metric == MAIN_METRIC and r.protocol in charted
    )
    cosines = "; ".join(
        f"{labels[name]}: " + ", ".join(f"{c} {value:.3f}" for c, value in insight.cosines.items())
        for name, insight in results.insights.items()
        if insight.cosines
    )
    yield Section(
        title="Under other conditions",
        text="Probes fitted on plain tiles, asked about test tiles that look otherwise; 95 % "
        f"intervals of the paired change.\n\nBest less worst, plain included: {ranges}.\n\nMean "
        f"cosine of a tile's features before and after: {cosines}.",
        pictures=(Picture(path=path, caption="Left of the line: worse than on plain tiles."),),
    )


def _insights(results: Results) -> Iterator[Section]:
    lines = []
    for encoder in results.encoders:
        insight = results.insights.get(encoder.name)
        if insight is None:
            continue
        free = insight.label_free
        alpha = "–" if free.alpha is None else f"{free.alpha:.2f}"
        line = (
            f"{encoder.label}: RankMe {free.rankme:.1f} of {encoder.dim}, α {alpha}, mean cosine "
            f"{free.mean_cosine:.3f}, uniformity {free.uniformity:.2f}"
        )
        if insight.lidar is not None:
            line += f", LiDAR {insight.lidar:.1f}"
        if insight.leakage is not None:
            leak = insight.leakage
            line += f"; groups: neighbours {leak.enrichment:.2f}× chance, {leak.explained:.1%} of "
            line += "the variance"
            if leak.probe is not None:
                line += f", named right {leak.probe:.1%} (chance {leak.probe_chance:.1%})"
        if insight.confounding is not None:
            c = insight.confounding
            line += (
                f"; origin: robustness index {c.ri:.3f} [{c.low:.3f}, {c.high:.3f}] at k = {c.k}, "
                f"support {c.support:.0%}, MaRI {c.mari:.3f}"
            )
            if c.croma is not None:
                line += f", CRoMa {c.croma:+.3f} (lowest tenth {c.croma_tail:+.3f})"
        if insight.shortcut is not None:
            line += f"; average performance drop {insight.shortcut.apd:+.3f}"
        lines.append(line + ".")
    if lines:
        yield Section(title="Without labels", text="\n\n".join(lines))


def _published(results: Results) -> Iterator[Section]:
    found = PUBLISHED_SCORES.get(results.task.dataset, [])
    if found:
        lines = [
            f"{p.source}: " + ", ".join(f"{name} {value:.3f}" for name, value in p.scores.items())
            for p in found
        ]
        yield Section(
            title="Published by others",
            text="Balanced accuracy on this dataset under others' protocols: what to expect, not a "
            "comparison.\n\n" + "\n\n".join(lines) + ".",
        )
