"""The verb `export`: a run to an encoder folder that says where it comes from and what it is worth.

What the card says is read from records: the run's config, lines and environment, the index of its
shards, and evaluations of these very weights. What is not known there is said not to be known.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import torch

from eosin.configs.errors import ConfigError, EosinError, InputError
from eosin.data_curation.encoder import load_encoder
from eosin.data_curation.shard_reader import open_index
from eosin.eval.results import Results, load_results
from eosin.launch.artefacts import read_json
from eosin.launch.cards import card_called
from eosin.launch.metrics import read_lines
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.export import ExportConfig, read_export, write_encoder
from eosin.pretrain.other_forms import FormName

SOURCES: dict[str, tuple[str, tuple[str, ...]]] = {
    "TCGA": (r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}", ("tcga-ut", "msi", "ccrcc (train)", "HEST, in part")),
    "CPTAC": (r"\b[CG]\dL-\d{5}", ("CPTAC's own tasks",)),
    "CAMELYON": (
        r"(?i)\b(?:tumor|normal|test)_\d{3}\b|patient_\d{3}_node",
        ("pcam", "CAMELYON16/17"),
    ),
    "GTEx": (r"GTEX-[A-Z0-9]{4,5}", ()),
}
"""Public sources by the names of their slides or patients, and benchmarks made of them."""
METRIC = "balanced_accuracy"
HOST_SHARE = 1.5
"""Energy of a board, and half of it again for its share of host and cooling, as in `eosin plan`."""


@dataclass(frozen=True, kw_only=True)
class ReleaseConfig(ExportConfig):
    """A run's checkpoint to an encoder folder with a card; the teacher is what is exported."""

    licence: str = ""
    """Of the weights: an SPDX identifier such as apache-2.0. Needed to push them."""
    data: str = ""
    """What the training tiles are, in words, for the card: sites, organs, stains, consent."""
    scores: list[Path] = field(default_factory=list)
    """Folders of 'eosin eval' of this encoder, whose scores go into the card."""
    forms: list[FormName] = field(default_factory=list)
    """Further forms, each in a sub-folder: transformers, onnx."""


def release(config: ReleaseConfig) -> None:
    """Exports, with what is known of the run in the card.

    Raises:
        InputError: the folder holds no run, or scores are not of this encoder.
        EosinError: no whole checkpoint.
    """
    found = read_export(config)
    index = _index(found.run)
    sections = {
        "Data": _data(config, index),
        "Overlap with benchmarks": _overlap(index),
        "Recipe": _recipe(found.run),
        "Cost": _cost(config.run, found.run),
    }
    card = found.card(licence=config.licence, sections=sections)
    out = config.out or config.run / "encoder"
    if config.scores:
        # the scores are looked up by the digest of the folder as it is without them
        write_encoder(out, found.run.model, found.teacher, card)
        sections["Scores"] = _scores(out, config.scores)
        card = found.card(licence=config.licence, sections=sections)
    write_encoder(out, found.run.model, found.teacher, card, config.forms)
    print(f"encoder after {card.steps} steps: {out}")


def _data(config: ReleaseConfig, index: pa.Table | None) -> str:
    said = [config.data] if config.data else []
    if index is None:
        said.append("The index of its shards was not at hand when this was written.")
        return "\n\n".join(said)
    slides, groups = (_names(index, column) for column in ("slide_id", "group"))
    words = f"{index.num_rows:,} tiles of {len(groups):,} groups (patients, or slides)"
    if slides:
        words += f" and {len(slides):,} slides"
    stains = sorted(_names(index, "stain"))
    words += f"; stains: {', '.join(stains)}" if stains else "; stains are not recorded"
    said.append(words + ".")
    return "\n\n".join(said)


def _overlap(index: pa.Table | None) -> str:
    if index is None:
        return "Not known: the index of its shards was not at hand when this was written."
    names = set[str]().union(*(_names(index, column) for column in ("group", "slide_id", "key")))
    lines = []
    for source, (pattern, benchmarks) in SOURCES.items():
        hits = sum(re.search(pattern, name) is not None for name in names)
        if hits:
            made_of = f"; made of it are {', '.join(benchmarks)}" if benchmarks else ""
            lines.append(f"- **{source}**: {hits:,} names of its form{made_of}")
    if not lines:
        known = ", ".join(SOURCES)
        return f"No group, slide or key has a name as those of {known}; only names were looked at."
    lines.append("\nScores on benchmarks made of these are not of unseen slides.")
    return "\n".join(lines)


def _recipe(run: PretrainConfig) -> str:
    o = run.objective
    terms = [f"DINO {o.dino:g}"] if o.dino else []
    terms += [f"iBOT {o.ibot:g}"] if o.ibot else []
    terms += [f"patch regression {o.jepa.weight:g}"] if o.jepa.weight else []
    terms += [f"{o.spread.kind} {o.spread.weight:g}"] if o.spread.weight else []
    terms += [f"Gram {o.gram.weight:g}"] if o.gram.weight else []
    a = run.augment
    start = "drawn weights"
    if run.start.weights is not None:
        start = f"weights of {run.start.weights.name}"
    elif run.start.run is not None:
        start = f"the run {run.start.run.name}"
    teacher = "its own moving average"
    if run.teacher.runs:
        teacher = f"frozen: {', '.join(folder.name for folder in run.teacher.runs)}"
    return "\n".join(
        [
            f"- {' + '.join(terms)}; teacher: {teacher}; from {start}",
            f"- {run.steps:,} steps of {run.batch_size:,} tiles, peak rate {run.optim.lr.peak:g}",
            f"- crops {a.n_global} × {a.global_px} px and {a.n_local} × {a.local_px} px, HED "
            f"jitter {a.hed:g}, brightness {a.brightness:g}, contrast {a.contrast:g}, saturation "
            f"{a.saturation:g}, hue {a.hue:g}",
            f"- normalisation of crops: mean {list(run.mean)}, std {list(run.std)}",
        ]
    )


def _cost(folder: Path, run: PretrainConfig) -> str:
    lines = read_lines(folder / "metrics.jsonl")
    rates = [line["tiles_per_s"] for line in lines if line.get("tiles_per_s")]
    if not rates:
        return "Not recorded."
    seconds, before = 0.0, 0
    for line in lines:
        if line.get("tiles_per_s"):
            seconds += (line["step"] - before) * run.batch_size / line["tiles_per_s"]
            before = line["step"]
    path = folder / "environment.json"
    environment = read_json(path) if path.is_file() else {}
    ranks, device = int(environment.get("ranks", 1)), str(environment.get("device", ""))
    hours = seconds / 3600 * ranks
    said = f"{hours:.3g} device-hours of training on {ranks} × {device or 'a device not recorded'}"
    try:
        card = card_called(device)
    except ConfigError:
        return said + "; its energy cannot be estimated."
    kwh = hours * card.watts * HOST_SHARE / 1000
    return (
        f"{said}; about {kwh:.3g} kWh (estimated from {card.watts:g} W of a board or core and half "
        "of it again for host and cooling, not measured). Waiting, probes and earlier attempts are "
        "not in it."
    )


def _scores(encoder: Path, folders: Sequence[Path]) -> str:
    cpu = torch.device("cpu")
    digests = {
        load_encoder(str(encoder), cpu, pooling).digest: pooling
        for pooling in ("cls", "mean", "clsmean")
    }
    tables = []
    for folder in folders:
        results = load_results(folder / "results.json")
        names = {e.name: digests[e.digest] for e in results.encoders if e.digest in digests}
        if not names:
            raise InputError(
                f"{folder} holds no scores of these weights: evaluate {encoder}, or the run's own "
                "encoder of this step, and export again"
            )
        tables.append(_table(results, names))
    return "\n\n".join(tables)


def _table(results: Results, names: dict[str, str]) -> str:
    task = results.task
    shown = [e for e in results.encoders if e.name in names or e.kind != "encoder"]
    protocols = list(dict.fromkeys(s.protocol for s in results.scores))
    found = {(s.encoder, s.protocol): s for s in results.scores if s.metric == METRIC}
    lines = [
        f"**{task.name}**: balanced accuracy of {len(task.classes)} classes on "
        f"{task.tiles['test']} {task.unit} of {task.groups['test']} groups, 95 % intervals over "
        "groups.",
        "",
        "| protocol | " + " | ".join(e.label for e in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for protocol in protocols:
        cells = []
        for encoder in shown:
            score = found.get((encoder.name, protocol))
            cells.append(
                "" if score is None else f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"
            )
        lines.append(f"| `{protocol}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _names(index: pa.Table, column: str) -> set[str]:
    return {str(value) for value in index[column].unique().to_pylist() if value}


def _index(run: PretrainConfig) -> pa.Table | None:
    """The index of the run's shards, where it is at hand."""
    try:
        return open_index(Path(run.shards))
    except (EosinError, OSError):
        return None
