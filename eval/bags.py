"""The verb `eval bags`: slides by their bags of features: mean pooling, and heads on bags.

A bag is all features of one slide of a feature store (`eosin embed`, `eosin bags`); several stores,
of several encoders or magnifications, stand in one table. Mean pooling takes any protocol of tiles,
with the mean of a slide's features in the place of a tile's. Splits, or nested folds, intervals and
comparisons are by patient, as for tiles.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from rich.console import Console

from eosin.configs.errors import InputError
from eosin.data_curation.bag_store import TOKENS, BagStore, side_by_side
from eosin.data_curation.features import FeatureStore, open_features
from eosin.data_curation.manifest import PREDICTIONS, make_id, write_table
from eosin.eval.attention_maps import write_attention
from eosin.eval.console import differences_table, scores_table
from eosin.eval.cross_validation import classify, classify_means
from eosin.eval.folds import Folds, draw_folds
from eosin.eval.heads.registry import HEADS, choose_heads
from eosin.eval.heads.training import Bag, BagSplits, run_head
from eosin.eval.intervals import few_groups_note
from eosin.eval.listing import read_table, refuse_duplicates
from eosin.eval.predictions import predictions_of
from eosin.eval.probe import Labelled, Outcome
from eosin.eval.protocols import DESCRIPTIONS, choose, run_protocols
from eosin.eval.report import Picture, Section, write_report
from eosin.eval.results import EncoderRecord, Results, TaskRecord, save_results
from eosin.eval.scoring import draw, score_rows
from eosin.eval.slide_view import SlideView, slides_of, view_slides
from eosin.eval.splits import SPLITS, carve_splits
from eosin.launch.artefacts import stamp_of
from eosin.launch.device_names import DeviceName
from eosin.launch.process import choose_device

MEAN = "mean+"
"""Before the name of a protocol of tiles: on the mean of a slide's features."""


@dataclass(frozen=True, kw_only=True)
class BagsConfig:
    """Scores feature stores on labelled slides."""

    features: list[Path]
    """Feature stores of `eosin embed` or bags of `eosin bags`, one an encoder or magnification;
    the first is compared with the others."""
    labels: Path
    """A table with slide (its slide_id), label, and maybe group (patient) and split."""
    out: Path
    """Folder for results.json, predictions.parquet, attention and the report."""
    name: str = ""
    """What the report calls the task; from the table when empty."""
    heads: list[str] = field(default_factory=lambda: ["usual"])
    """Names, ``usual``, or patterns such as ``abmil/*``; ``*`` is all of them."""
    pooled: list[str] = field(default_factory=lambda: ["linear/sklearn-l2@2", "prototypes/*"])
    """Protocols of tiles that are run on mean-pooled slides."""
    folds: int = 0
    """Nested cross-validation by group with so many outer folds, in the place of splits: every
    slide is test once. 0: splits."""
    inner_folds: int = 4
    """Of what is not test in an outer fold; each is once what training is stopped by, and a slide's
    verdict is the mean over them."""
    seed: int = 0
    device: DeviceName = "auto"
    n_bootstrap: int = 1000
    attention_slides: int = 4
    """Test slides whose attention is drawn."""
    tiles: Path | None = None
    """Folder of `eosin tile` that the features are of: attention is laid over its slides, with the
    heaviest tiles beside them; else tiles stand in a mosaic."""

    def __post_init__(self) -> None:
        choose_heads(self.heads)
        if self.pooled:
            choose(self.pooled)
        if self.folds == 1 or self.folds < 0 or self.inner_folds < 2:
            raise ValueError(
                f"folds={self.folds}, inner_folds={self.inner_folds}: give at least 2, or folds=0"
            )
        if not self.features:
            raise ValueError("features=[]: name feature stores of 'eosin embed'")


@dataclass(frozen=True, kw_only=True)
class SlideTask:
    """Labelled slides, sorted by slide_id."""

    slide_ids: list[str]
    classes: list[str]
    labels: npt.NDArray[np.int64]
    groups: list[str]
    splits: npt.NDArray[np.str_]
    notes: tuple[str, ...]
    folds: Folds | None = None
    """With cross-validation; every slide is test then."""

    def record(self, name: str) -> TaskRecord:
        """As ``results.json`` has it; slides stand where tiles stand elsewhere."""
        groups = np.asarray(self.groups)
        return TaskRecord(
            name=name,
            classes=self.classes,
            tiles={s: int((self.splits == s).sum()) for s in SPLITS},
            groups={s: len(set(groups[self.splits == s])) for s in SPLITS},
            digest=stamp_of(
                slides=self.slide_ids,
                labels=self.labels.tolist(),
                groups=self.groups,
                splits=self.splits.tolist(),
                **({} if self.folds is None else {"folds": self.folds.inner.tolist()}),
            ),
            unit="slides",
        )


def evaluate_bags(config: BagsConfig) -> None:
    """Scores everything and writes results, predictions, attention and the report.

    Raises:
        InputError: a store or the table cannot be used.
    """
    console, notices = Console(), Console(stderr=True)
    device = choose_device(config.device)
    task = load_slides(config.labels, config.seed, config.folds, config.inner_folds)
    name = config.name or config.labels.stem
    record = task.record(name)
    notes = [*task.notes, *few_groups_note(record.groups["test"])]
    for note in notes:
        notices.print(f"note: {note}", highlight=False, markup=False)
    test = task.splits == "test"
    draws = draw(
        task.labels[test], np.asarray(task.groups)[test].tolist(), len(task.classes),
        config.n_bootstrap, config.seed,
    )  # fmt: skip
    encoders, outcomes = list[EncoderRecord](), dict[str, dict[str, Outcome]]()
    pictures: list[Picture] = []
    for path in config.features:
        store = open_features(path)
        encoder = record_of(path, store, encoders)
        bags = read_bags(store, task.slide_ids, path)
        encoders.append(encoder)
        outcomes[encoder.name], attention = _run(config, task, bags, encoder.name, device)
        chosen = [bag for bag, is_test in zip(bags, test, strict=True) if is_test]
        views = _views(config, chosen)
        for head, weights in attention.items():
            pictures += write_attention(
                chosen, weights, config.out, f"{encoder.name}-{make_id(head)}",
                config.attention_slides, f"{encoder.label}, {head}", views,
            )  # fmt: skip
    scores, differences = score_rows(outcomes, draws)
    results = Results(
        task=record,
        encoders=encoders,
        scores=scores,
        differences=differences,
        bootstrap_draws=config.n_bootstrap,
        seed=config.seed,
        protocols={protocol: _describe(protocol) for protocol in outcomes[encoders[0].name]},
    )
    rows = np.flatnonzero(test).tolist()
    predictions = pa.concat_tables(
        predictions_of(
            e.name, protocol, outcome, [task.slide_ids[i] for i in rows],
            [task.groups[i] for i in rows], task.labels[test],
        )
        for e in encoders
        for protocol, outcome in outcomes[e.name].items()
    )  # fmt: skip
    write_table(predictions, config.out / "predictions.parquet", PREDICTIONS)
    save_results(results, config.out / "results.json")
    console.print(scores_table(results))
    if results.differences:
        console.print(differences_table(results))
    sections = [
        Section(
            title="Attention",
            text="Tiles of test slides at their places, by the rank of their weights: on a slide "
            "the brighter, in a mosaic the darker, the more of the verdict rests on a tile. "
            "Attention says where a head looked, not what it saw. Heads whose verdict is the mean "
            "of what every tile says (mean, additive) show how much a tile speaks for the slide's "
            "likeliest class.",
            pictures=tuple(pictures),
        )
    ]
    write_report(
        config.out / "report.html", results, predictions, sections if pictures else (),
        title="What these features are worth on slides",
    )  # fmt: skip
    console.print(f"report: {config.out / 'report.html'}", highlight=False, soft_wrap=True)


def _views(config: BagsConfig, bags: list[Bag]) -> list[SlideView]:
    """The first test slides that the folder of tiles knows.

    Raises:
        InputError: the folder of tiles is not what the features are of.
    """
    if config.tiles is None:
        return []
    known = slides_of(config.tiles)
    drawn = [bag for bag in bags if bag.slide_id in known][: config.attention_slides]
    if not drawn:
        raise InputError(f"{config.tiles} knows none of the test slides; give tiles= of theirs")
    views = view_slides(config.tiles, [bag.slide_id for bag in drawn])
    for bag, view in zip(drawn, views, strict=True):
        lost = [tile_id for tile_id in bag.tile_ids if tile_id not in view.places]
        if lost:
            raise InputError(f"{config.tiles} knows no tile '{lost[0]}' of {bag.slide_id}")
    return views


def _describe(protocol: str) -> str:
    if protocol in HEADS:
        return HEADS[protocol].description
    return "on the mean of a slide's features: " + DESCRIPTIONS[protocol.removeprefix(MEAN)]


def load_slides(path: Path, seed: int, folds: int = 0, inner_folds: int = 0) -> SlideTask:
    """Labelled slides of a table, with splits or folds that no group crosses.

    Raises:
        InputError: a column is missing, a slide is named twice, splits or folds cannot be had, or
            splits are given where folds are asked for.
    """
    table = read_table(path, ("slide", "label"), ("group", "split")).sort_by("slide")
    columns = {name: table[name].to_pylist() for name in table.column_names}
    slide_ids = columns["slide"]
    refuse_duplicates(slide_ids, path)
    classes = sorted(set(columns["label"]))
    if len(classes) < 2:
        raise InputError(f"{path}: only one class, '{classes[0]}'; a head needs two")
    labels = np.searchsorted(classes, columns["label"]).astype(np.int64)
    groups = columns.get("group", slide_ids)
    drawn = None
    if folds:
        if "split" in columns:
            raise InputError(f"{path} gives splits, and folds={folds} draws its own: leave one out")
        drawn = draw_folds(labels, groups, folds, inner_folds, seed, str(path))
        splits = np.full(len(labels), "test")
        notes = [f"every slide is test once, in {folds} folds of groups, {inner_folds} within each"]
    else:
        splits, notes = carve_splits(labels, groups, columns.get("split"), classes, seed, str(path))
    if "group" not in columns:
        notes.insert(0, "no groups are given, so each slide is its own: patients may leak")
    return SlideTask(
        slide_ids=slide_ids,
        classes=classes,
        labels=labels,
        groups=groups,
        splits=splits,
        notes=tuple(notes),
        folds=drawn,
    )


def read_bags(store: FeatureStore, slide_ids: list[str], path: Path) -> list[Bag]:
    """The bags of some slides, in their order; features stay mapped until they are used.

    Raises:
        InputError: a slide is not in the store, or its tiles have no places or share one.
    """
    places = {}
    start = 0
    for slide_id, features in store.bags():
        places[slide_id] = (start, start + len(features))
        start += len(features)
    missing = [slide_id for slide_id in slide_ids if slide_id not in places]
    if missing:
        raise InputError(
            f"{path} has no features of {len(missing)} labelled slides, such as {missing[0]}"
        )
    x, y = (store.rows[name].to_numpy() for name in ("level0_x", "level0_y"))
    tile_ids = store.rows["tile_id"].to_pylist()
    tokens = BagStore(path) if (path / TOKENS).is_file() else None
    bags = []
    for slide_id in slide_ids:
        rows = slice(*places[slide_id])
        if tokens is not None:
            cells = side_by_side(*tokens.cells(slide_id))
        else:
            cells = grid_cells(np.stack([x[rows], y[rows]], axis=1), f"{path}: {slide_id}")
        bags.append(
            Bag(
                slide_id=slide_id,
                tile_ids=tile_ids[rows],
                features=store.features[rows],
                cells=cells,
            )
        )
    return bags


def grid_cells(places: npt.NDArray[np.float64], where: str) -> npt.NDArray[np.int64]:
    """Column and row of each tile [N, 2], from 0, on the grid of the smallest step between tiles.

    Raises:
        InputError: a place is missing, or two tiles share a cell.
    """
    if not np.isfinite(places).all():
        raise InputError(f"{where} has tiles without a place; embed them from slides")
    steps = [np.diff(np.unique(places[:, axis])) for axis in (0, 1)]
    steps_of = [float(s[s > 0.5].min()) for s in steps if (s > 0.5).any()]
    step = min(steps_of, default=1.0)
    cells: npt.NDArray[np.int64] = np.round((places - places.min(axis=0)) / step).astype(np.int64)
    if len(np.unique(cells, axis=0)) < len(cells):
        raise InputError(f"{where} has two tiles in one place: is it embedded twice?")
    return cells


def record_of(path: Path, store: FeatureStore, before: list[EncoderRecord]) -> EncoderRecord:
    """What results say of a store, under a name that no other one has."""
    label = path.resolve().name
    if any(encoder.label == label for encoder in before):
        label = f"{path.resolve().parent.name}/{label}"
    return EncoderRecord(
        name=make_id(label),
        label=label,
        kind="encoder",
        pooling=str(store.meta.get("pooling", "none")),
        dim=store.features.shape[1],
        digest=stamp_of(encoder=store.meta.get("encoder_digest"), store=store.meta.get("stamp")),
    )


def _run(
    config: BagsConfig, task: SlideTask, bags: list[Bag], name: str, device: torch.device
) -> tuple[dict[str, Outcome], dict[str, list[npt.NDArray[np.float32]]]]:
    """Outcomes by protocol, and the attention of heads on test bags."""
    if task.folds is not None:
        return _run_folds(config, task, task.folds, bags, name, device)
    test, val = task.splits == "test", task.splits == "val"
    known = ~test
    outcomes: dict[str, Outcome] = {}
    if config.pooled:
        means = _means(bags)
        labelled = Labelled(
            features=means[known], labels=task.labels[known], is_val=val[known], device=device
        )
        ran = run_protocols(
            choose(config.pooled), labelled, means[test], len(task.classes), config.seed
        )
        outcomes |= {MEAN + protocol: outcome for protocol, outcome, _ in ran}

    def of(split: npt.NDArray[np.bool_]) -> list[Bag]:
        return [bag for bag, is_in in zip(bags, split, strict=True) if is_in]

    splits = BagSplits(
        train=of(task.splits == "train"),
        train_labels=task.labels[task.splits == "train"],
        val=of(val),
        val_labels=task.labels[val],
        test=of(test),
    )
    attention = {}
    for head in choose_heads(config.heads):
        outcomes[head], attention[head] = run_head(
            HEADS[head].make, splits, len(task.classes), config.seed, device, f"{head} on {name}",
            HEADS[head].recipe,
        )  # fmt: skip
    return outcomes, attention


def _run_folds(
    config: BagsConfig,
    task: SlideTask,
    folds: Folds,
    bags: list[Bag],
    name: str,
    device: torch.device,
) -> tuple[dict[str, Outcome], dict[str, list[npt.NDArray[np.float32]]]]:
    """As `_run`, of all slides."""
    n_classes = len(task.classes)
    outcomes: dict[str, Outcome] = {}
    if config.pooled:
        ran = classify_means(
            choose(config.pooled), _means(bags), task.labels, n_classes, folds, config.seed, device
        )
        outcomes |= {MEAN + protocol: outcome for protocol, outcome in ran.items()}
    attention = {}
    for head in choose_heads(config.heads):
        outcomes[head], attention[head] = classify(
            HEADS[head], bags, task.labels, n_classes, folds, config.seed, device,
            f"{head} on {name}",
        )  # fmt: skip
    return outcomes, attention


def _means(bags: list[Bag]) -> npt.NDArray[np.float32]:
    return np.stack([bag.features.astype(np.float32).mean(axis=0) for bag in bags])
