"""The verb `eval transfer`: heads that learn on one cohort of slides and are asked about another.

A matrix, source by target. Off its diagonal every slide of the target is test, and nothing of the
target is seen before; on it stand nested folds within the cohort. A column shares its test slides,
so what a head loses by coming from elsewhere is a paired difference. Mean pooling stands beside the
head everywhere. With ``routed`` a last row is of a small mixture of all other cohorts' heads, which
stay as they are (`heads.routed`), fitted and asked in nested folds of the target. Legend: S slides,
J inner folds.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from matplotlib.colors import LinearSegmentedColormap
from rich.console import Console
from rich.table import Table

from eosin.configs.errors import InputError
from eosin.data_curation.features import open_features
from eosin.data_curation.manifest import PREDICTIONS, write_table
from eosin.eval.bags import SlideTask, load_slides, read_bags
from eosin.eval.cross_validation import classify
from eosin.eval.folds import draw_folds
from eosin.eval.heads.aims import Classes
from eosin.eval.heads.recipe import Recipe
from eosin.eval.heads.registry import HEADS, HeadProtocol, choose_heads
from eosin.eval.heads.routed import Routed, frozen_bag
from eosin.eval.heads.training import Bag, Fitted, Member, fit_members
from eosin.eval.intervals import few_groups_note
from eosin.eval.listing import read_table
from eosin.eval.predictions import predictions_of
from eosin.eval.probe import Outcome, shares_of_runs
from eosin.eval.scoring import Scored, compare, draw, score
from eosin.launch.artefacts import SCHEMA_VERSION, stamp_of, write_json
from eosin.launch.device_names import DeviceName
from eosin.launch.pictures import HAEMATOXYLIN, INK, drawing, shortened
from eosin.launch.process import choose_device

FLOOR = "mean@1"
METRIC = "auroc"
ROUTED = "all others, routed"


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """Scores heads from every cohort on every other one."""

    features: Path
    """A feature store of `eosin embed` or bags of `eosin bags`, of all cohorts."""
    labels: Path
    """Columns slide (its slide_id), label, cohort, and maybe group (patient)."""
    out: Path
    """Folder for transfer.json, predictions.parquet and a picture a head."""
    heads: list[str] = field(default_factory=lambda: ["abmil/gated@2"])
    """Names or patterns; ``mean@1`` is always beside them."""
    folds: int = 5
    """Outer folds within a cohort, for the diagonal."""
    inner_folds: int = 4
    """Of a source: each is once what training is stopped by."""
    routed: bool = False
    """A mixture of the other cohorts' frozen heads beside each target's own."""
    seed: int = 0
    device: DeviceName = "auto"
    n_bootstrap: int = 1000

    def __post_init__(self) -> None:
        """Refuses heads that are none, and too few folds."""
        choose_heads(self.heads)
        if self.folds < 2 or self.inner_folds < 2:
            raise ValueError("folds and inner_folds must be at least 2")

    @property
    def chosen(self) -> list[str]:
        """The heads that are fitted, mean pooling first."""
        return [FLOOR, *(name for name in choose_heads(self.heads) if name != FLOOR)]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A head from one cohort on another."""

    head: str
    source: str
    target: str
    value: float
    low: float
    high: float
    lost: float = 0.0
    """Less than the target's own heads, paired; negative is worse."""
    lost_low: float = 0.0
    lost_high: float = 0.0


def evaluate_transfer(config: TransferConfig) -> None:
    """Fits every cohort's heads, asks them about all, and writes the matrix.

    Raises:
        InputError: the store or the table cannot be used, a group is in two cohorts, or a class is
            missing from one.
    """
    console, notices = Console(), Console(stderr=True)
    device = choose_device(config.device)
    task, cohorts = _load(config)
    names = sorted(set(cohorts.tolist()))
    bags = read_bags(open_features(config.features), task.slide_ids, config.features)
    cells: list[Cell] = []
    tables: list[pa.Table] = []
    for head in config.chosen:
        sources = _fit_sources(config, task, cohorts, names, bags, head, device)
        for target in names:
            rows = np.flatnonzero(cohorts == target)
            groups = [task.groups[row] for row in rows.tolist()]
            for note in few_groups_note(len(set(groups))) if head == FLOOR else ():
                notices.print(f"note: {target}: {note}", highlight=False, markup=False)
            labels, own = task.labels[rows], [bags[row] for row in rows.tolist()]
            draws = draw(labels, groups, len(task.classes), config.n_bootstrap, config.seed)
            outcomes = {
                source: _ask(fitted, own, len(task.classes))
                for source, fitted in sources.items()
                if source != target
            }
            folds = draw_folds(
                labels, groups, config.folds, config.inner_folds, config.seed,
                f"{config.labels}, cohort {target}",
            )  # fmt: skip
            outcomes[target], _ = classify(
                HEADS[head], own, labels, len(task.classes), folds, config.seed, device,
                f"{head} within {target}",
            )  # fmt: skip
            if config.routed:
                others = [of for name, own in sources.items() if name != target for of in own]
                outcomes[ROUTED], _ = classify(
                    _mixture(own, others), [frozen_bag(bag, others) for bag in own], labels,
                    len(task.classes), folds, config.seed, device, f"{head} routed to {target}",
                )  # fmt: skip
            scored = {
                source: _metric(score(source, head, outcome, draws))
                for source, outcome in outcomes.items()
            }
            cells += [_cell(head, target, of, scored[target]) for of in scored.values()]
            ids = [task.slide_ids[row] for row in rows.tolist()]
            tables += [
                predictions_of(f"from {source}", head, outcome, ids, groups, labels)
                for source, outcome in outcomes.items()
            ]
    write_table(pa.concat_tables(tables), config.out / "predictions.parquet", PREDICTIONS)
    write_json(config.out / "transfer.json", _record(config, task, names, cohorts, cells))
    for head in config.chosen:
        path = config.out / f"transfer_{head.replace('/', '_').replace('@', '_')}.png"
        shown = [*names, ROUTED] if config.routed else names
        draw_matrix(path, shown, names, [cell for cell in cells if cell.head == head], head)
        console.print(_table(shown, names, [cell for cell in cells if cell.head == head], head))
    console.print(f"results: {config.out / 'transfer.json'}", highlight=False, soft_wrap=True)


def _mixture(bags: list[Bag], heads: list[Fitted]) -> HeadProtocol:
    """The mixture of frozen heads as a head of its own."""
    width, dim = len(heads[0].embedding(bags[0])), bags[0].features.shape[1]
    return HeadProtocol(
        make=lambda _, n_outputs: Routed(width + dim, n_outputs, len(heads), width),
        what=f"{len(heads)} frozen heads of other cohorts, routed by the slide's mean",
        recipe=Recipe(rate=5e-4),
    )


def _load(config: TransferConfig) -> tuple[SlideTask, npt.NDArray[np.str_]]:
    table = read_table(config.labels, ("slide", "label", "cohort"), ("group",)).sort_by("slide")
    cohorts = np.asarray(table["cohort"].to_pylist())
    task = load_slides(config.labels, config.seed, config.folds, config.inner_folds)
    task = replace(task, folds=None)
    names = sorted(set(cohorts.tolist()))
    if len(names) < 2:
        raise InputError(f"{config.labels}: one cohort alone, '{names[0]}': there is none to go to")
    home: dict[str, str] = {}
    for group, cohort in zip(task.groups, cohorts.tolist(), strict=True):
        if home.setdefault(group, cohort) != cohort:
            raise InputError(
                f"{config.labels}: group '{group}' is in {home[group]} and in {cohort}; a group "
                "must not be in two cohorts"
            )
    for name in names:
        absent = np.setdiff1d(np.arange(len(task.classes)), task.labels[cohorts == name])
        if len(absent):
            raise InputError(
                f"{config.labels}: cohort '{name}' has no slide of '{task.classes[absent[0]]}'"
            )
    return task, cohorts


def _fit_sources(
    config: TransferConfig,
    task: SlideTask,
    cohorts: npt.NDArray[np.str_],
    names: list[str],
    bags: list[Bag],
    head: str,
    device: torch.device,
) -> dict[str, list[Fitted]]:
    """J heads of each cohort, all of them fitted in one pass over the bags."""
    members: list[Member] = []
    for name in names:
        rows = np.flatnonzero(cohorts == name)
        groups = [task.groups[row] for row in rows.tolist()]
        where = f"{config.labels}, cohort {name}"
        parts = draw_folds(task.labels[rows], groups, config.inner_folds, 2, config.seed, where)
        for number in range(config.inner_folds):
            stops = parts.outer == number
            members.append(
                Member(seed=1000 * config.seed + number, train=rows[~stops], val=rows[stops])
            )
    aim = Classes(task.labels, len(task.classes))
    fitted = fit_members(
        HEADS[head].make, bags, aim, members, HEADS[head].recipe, config.seed, device,
        f"{head} on every cohort",
    )  # fmt: skip
    j = config.inner_folds
    return {name: fitted[at * j : (at + 1) * j] for at, name in enumerate(names)}


def _ask(fitted: list[Fitted], bags: list[Bag], n_classes: int) -> Outcome:
    """What the heads of a source say of a target's slides."""
    said = [torch.stack([member.ask(bag)[0] for bag in bags]) for member in fitted]
    probabilities = torch.stack(said).softmax(dim=2).numpy()  # [J, S, C]
    runs = probabilities.argmax(axis=2).astype(np.int16)
    return Outcome(
        votes=shares_of_runs(runs, n_classes),
        scores=probabilities.mean(axis=0),
        probabilities=True,
        runs=runs,
        chosen={"epoch": float(np.median([member.epoch for member in fitted]))},
    )


def _metric(scored: list[Scored]) -> Scored:
    return next(of for of in scored if of.score.metric == METRIC)


def _cell(head: str, target: str, scored: Scored, own: Scored) -> Cell:
    found = scored.score
    lost = compare(scored, own)
    return Cell(
        head=head, source=found.encoder, target=target, value=found.value, low=found.low,
        high=found.high, lost=lost.value, lost_low=lost.low, lost_high=lost.high,
    )  # fmt: skip


def _record(
    config: TransferConfig,
    task: SlideTask,
    names: list[str],
    cohorts: npt.NDArray[np.str_],
    cells: list[Cell],
) -> dict[str, Any]:
    groups = np.asarray(task.groups)
    return {
        "schema_version": SCHEMA_VERSION,
        "metric": METRIC,
        "classes": task.classes,
        "cohorts": {
            name: {"slides": int((cohorts == name).sum()),
                   "groups": len(set(groups[cohorts == name]))}
            for name in names
        },
        "digest": stamp_of(
            slides=task.slide_ids, labels=task.labels.tolist(), groups=task.groups,
            cohorts=cohorts.tolist(), features=str(config.features.name),
        ),
        "seed": config.seed,
        "bootstrap_draws": config.n_bootstrap,
        "heads": {name: HEADS[name].description for name in config.chosen},
        "cells": [asdict(cell) for cell in cells],
    }  # fmt: skip


def draw_matrix(
    path: Path, sources: list[str], names: list[str], cells: list[Cell], head: str
) -> None:
    """Draws a head's matrix: AUROC with its interval, source by target."""
    with drawing(path, 190 * len(names) + 420, 190 * len(sources) + 260) as figure:
        figure.set_layout_engine("constrained")
        axes = figure.subplots()
        values = np.full((len(sources), len(names)), np.nan)
        for cell in cells:
            row, column = sources.index(cell.source), names.index(cell.target)
            values[row, column] = cell.value
            ink = "white" if cell.value > 0.8 else INK
            text = f"{cell.value:.3f}\n[{cell.low:.3f}, {cell.high:.3f}]"
            axes.text(column, row, text, color=ink, ha="center", va="center", fontsize=8)
        shades = LinearSegmentedColormap.from_list("haematoxylin", ["#f7f6fa", HAEMATOXYLIN])
        axes.imshow(values, cmap=shades, vmin=0.5, vmax=1)
        labels = [shortened(name, 20) for name in names]
        axes.set_xticks(range(len(names)), labels, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(sources)), [shortened(name, 20) for name in sources])
        axes.tick_params(length=0, labelcolor=INK)
        axes.set(xlabel="asked about", ylabel="learnt on")
        axes.set_title(f"{head}: AUROC; nested folds on the diagonal", loc="left")
        axes.spines[:].set_visible(False)


def _table(sources: list[str], names: list[str], cells: list[Cell], head: str) -> Table:
    table = Table(title=f"{head}: AUROC, learnt on a row and asked about a column [95 %]")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    found = {(cell.source, cell.target): cell for cell in cells}
    for source in sources:
        texts = []
        for target in names:
            cell = found[source, target]
            text = f"{cell.value:.3f} \\[{cell.low:.3f}, {cell.high:.3f}]"
            if source != target:
                text += f"\n{cell.lost:+.3f} \\[{cell.lost_low:+.3f}, {cell.lost_high:+.3f}]"
            texts.append(text)
        table.add_row(source, *texts)
    table.caption = "second lines: less the column's own heads, paired"
    return table
