"""The report: what was found, in one HTML file that needs no network, no script and no other file.

It holds no clock, host or path, so equal results and pictures give equal bytes.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from io import BytesIO
from pathlib import Path

import pyarrow as pa
from jinja2 import Environment, StrictUndefined
from PIL import Image, UnidentifiedImageError

from eosin.configs.errors import InputError
from eosin.eval.figures import confusion, confusion_counts, score_bars
from eosin.eval.intervals import FEW_GROUPS
from eosin.eval.results import Results
from eosin.eval.tables import (
    difference_bands,
    metric_bands,
    metrics_in_words,
    protocol_groups,
    protocol_in_words,
    score_bands,
)
from eosin.eval.verdict import Verdict, reach_verdict
from eosin.launch.artefacts import write_text

MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg"}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG or JPEG file, embedded as it is."""

    path: Path
    caption: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report between the scores and the provenance."""

    title: str
    text: str
    """Plain text; an empty line ends a paragraph."""
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Embedded:
    """A picture as it stands in the page."""

    source: str
    """``data:`` address."""
    width_px: int
    """In CSS pixels, as the height."""
    height_px: int
    caption: str


@dataclass(frozen=True)
class Part:
    """A titled part of the page."""

    anchor: str
    title: str
    paragraphs: list[str]
    pictures: list[Embedded]


def write_report(
    path: Path,
    results: Results,
    predictions: pa.Table | None,
    sections: Sequence[Section] = (),
    title: str = "What this encoder is worth",
    command: str = "",
) -> None:
    """Writes the report to `path` and the pictures that it draws to ``figures/`` beside it.

    Args:
        path: the HTML file.
        results: every score.
        predictions: one row a test tile, encoder and protocol, with the columns ``encoder``,
            ``protocol``, ``label`` and ``prediction`` (indices into the task's classes); None
            leaves the confusion matrices out.
        sections: what else there is to see, in order.
        title: the heading.
        command: how to make the results again; left out when empty.

    Raises:
        InputError: a picture of a section is neither PNG nor JPEG.
        OSError: a picture cannot be read, or the report cannot be written.
    """
    parts = [_part(index, section) for index, section in enumerate(sections)]
    verdict = reach_verdict(results)
    protocols = list(dict.fromkeys(score.protocol for score in results.scores))
    page = _environment().from_string(_template())
    write_text(
        path,
        page.render(
            title=title,
            results=results,
            verdict=verdict,
            few_groups=FEW_GROUPS,
            tables=[
                (
                    [protocol_in_words(protocol) for protocol in group],
                    [*score_bands(results, group), *difference_bands(results, group)],
                )
                for group in protocol_groups(results)
            ],
            chart=_score_chart(results, path.parent / "figures"),
            splits=_splits(results),
            confusions=_confusions(predictions, results, verdict, path.parent / "figures"),
            parts=parts,
            metrics=[(name, "") for name in metrics_in_words(results).values()],
            metric_bands=metric_bands(results, protocols),
            command=command,
            version=metadata.version("eosin"),
        ),
    )


def _environment() -> Environment:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["thousands"] = lambda number: f"{number:,}"
    return environment


def _template() -> str:
    return resources.files("eosin.eval").joinpath("report.html.j2").read_text(encoding="utf-8")


def _splits(results: Results) -> list[tuple[str, int, int]]:
    """Name, tiles and groups of each split, in the order in which they are used."""
    known = [split for split in ("train", "val", "test") if split in results.task.tiles]
    names = known + sorted(results.task.tiles.keys() - set(known))
    return [(name, results.task.tiles[name], results.task.groups.get(name, 0)) for name in names]


def _score_chart(results: Results, folder: Path) -> Embedded:
    path = folder / "scores.png"
    score_bars(results, path)
    caption = "Balanced accuracy on the test split: point, 95 % interval, and chance (dashed)."
    return _embed(Picture(path=path, caption=caption))


def _confusions(
    predictions: pa.Table | None, results: Results, verdict: Verdict, folder: Path
) -> list[Embedded]:
    """The confusion matrices of the main encoder and of its random twin."""
    if predictions is None:
        return []
    labels = {encoder.name: encoder.label for encoder in results.encoders}
    shown = {"confusion": verdict.encoder.name}
    if verdict.twin is not None:
        shown["confusion_random"] = verdict.twin
    pictures = []
    for stem, name in shown.items():
        if confusion_counts(predictions, len(results.task.classes), name, verdict.protocol).any():
            path = folder / f"{stem}.png"
            confusion(predictions, results, name, verdict.protocol, path)
            caption = f"{labels[name]}: per cent of each class's test {results.task.unit}."
            pictures.append(_embed(Picture(path=path, caption=caption)))
    return pictures


def _part(index: int, section: Section) -> Part:
    paragraphs = [p for block in section.text.split("\n\n") if (p := " ".join(block.split()))]
    pictures = [_embed(picture) for picture in section.pictures]
    return Part(f"part-{index + 1}", section.title, paragraphs, pictures)


def _embed(picture: Picture) -> Embedded:
    content = picture.path.read_bytes()
    try:
        with Image.open(BytesIO(content)) as image:
            media_type = MEDIA_TYPES.get(image.format or "")
            width, height = image.size
            dpi = float(image.info.get("dpi", (96.0, 96.0))[0])
    except UnidentifiedImageError:
        media_type, width, height, dpi = None, 0, 0, 96.0
    if media_type is None:
        raise InputError(f"{picture.path} is no PNG or JPEG; a report embeds only these")
    # A picture drawn for a dense screen says so; a scanner's resolution is not meant for the page.
    scale = dpi / 96 if 96 < dpi <= 300 else 1.0
    source = f"data:{media_type};base64,{base64.b64encode(content).decode()}"
    return Embedded(source, round(width / scale), round(height / scale), picture.caption)
