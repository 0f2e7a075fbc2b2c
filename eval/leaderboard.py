"""The verb `eval leaderboard`: many evaluations as one table of encoders by tasks.

A column is a task, an entry the balanced accuracy under one protocol with its 95 % interval. A task
on which a floor lies within the interval of the best encoder is marked and left out of means, and a
mean is only of tasks that all its rivals have as well.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined
from rich.console import Console
from rich.table import Table

from eosin.configs.errors import InputError
from eosin.eval.discrimination import is_discriminative
from eosin.eval.export_tables import escaped, latex_table
from eosin.eval.figures import KINDS
from eosin.eval.published_scores import PUBLISHED_SCORES
from eosin.eval.results import EncoderRecord, Results, Score, load_results
from eosin.eval.tables import MAIN_METRIC
from eosin.launch.artefacts import write_text


@dataclass(frozen=True, kw_only=True)
class LeaderboardConfig:
    """Merges evaluations of any encoders and tasks."""

    results: list[Path]
    """Folders that `eosin eval` wrote, or results.json files."""
    protocol: str = "knn/uni20@1"
    out: Path
    """Folder for leaderboard.html, .csv and .tex."""


@dataclass(frozen=True)
class Line:
    """One encoder on all tasks."""

    encoder: EncoderRecord
    scores: dict[str, Score]
    """By digest of the task."""
    mean: float | None
    """Over the tasks that tell encoders apart; None where it lacks one of them."""


@dataclass(frozen=True)
class Board:
    """The table."""

    protocol: str
    tasks: dict[str, str]
    """Digest → name, marked where the task does not tell encoders from floors."""
    counted: list[str]
    """Digests of the tasks in the mean."""
    lines: list[Line]
    """The best mean first within a kind."""
    published: list[tuple[str, str, str]]
    """Dataset, source and figures in words."""


def make_leaderboard(config: LeaderboardConfig) -> Board:
    """Merges, shows and writes.

    Raises:
        InputError: a folder is none of `eosin eval`, or none has the protocol.
    """
    files = [path / "results.json" if path.is_dir() else path for path in config.results]
    board = merge([load_results(file) for file in files], config.protocol)
    Console().print(_terminal(board))
    write_text(config.out / "leaderboard.csv", _csv(board))
    write_text(config.out / "leaderboard.tex", _latex(board))
    write_text(config.out / "leaderboard.html", _html(board))
    print(f"leaderboard: {config.out / 'leaderboard.html'}")
    return board


def merge(results: Sequence[Results], protocol: str) -> Board:
    """One board of all results under a protocol; an encoder is known by its digest."""
    by_task: dict[str, list[Results]] = {}
    for r in results:
        if protocol in r.protocols:
            by_task.setdefault(r.task.digest, []).append(r)
    if not by_task:
        known = sorted({p for r in results for p in r.protocols})
        raise InputError(f"no evaluation has protocol={protocol}; there are {', '.join(known)}")
    names: dict[str, str] = {}
    counted = []
    for digest, of_task in by_task.items():
        name = of_task[0].task.name
        if is_discriminative(of_task)[protocol]:
            counted.append(digest)
        else:
            name += " (a floor is as good)"
        names[digest] = name
    encoders = {e.digest: e for r in results for e in r.encoders}
    lines = []
    for digest, encoder in encoders.items():
        scores = {
            task: r.score(e.name, protocol, MAIN_METRIC)
            for task, of_task in by_task.items()
            for r in of_task
            for e in r.encoders
            if e.digest == digest
        }
        whole = [scores[task].value for task in counted if task in scores]
        complete = counted and len(whole) == len(counted)
        mean = float(np.mean(whole)) if complete else None
        if scores:
            lines.append(Line(encoder, scores, mean))
    order = list(KINDS)
    lines.sort(key=lambda x: (order.index(x.encoder.kind), x.mean is None, -(x.mean or 0.0)))
    published = [
        (dataset, p.source, ", ".join(f"{n} {v:.3f}" for n, v in p.scores.items()))
        for dataset in dict.fromkeys(r.task.dataset for r in results)
        for p in PUBLISHED_SCORES.get(dataset, [])
    ]
    return Board(protocol, names, counted, lines, published)


def _cells(line: Line, board: Board) -> list[str]:
    cells = []
    for task in board.tasks:
        s = line.scores.get(task)
        cells.append("–" if s is None else f"{s.value:.3f} [{s.low:.3f}, {s.high:.3f}]")
    return [*cells, "–" if line.mean is None else f"{line.mean:.3f}"]


def _heads(board: Board) -> list[str]:
    return ["encoder", *board.tasks.values(), f"mean of {len(board.counted)}"]


def _terminal(board: Board) -> Table:
    table = Table(title=f"balanced accuracy, {board.protocol} [95 % interval over groups]")
    for index, head in enumerate(_heads(board)):
        table.add_column(head, justify="right" if index else "left")
    for line in board.lines:
        cells = [cell.replace("[", "\\[") for cell in _cells(line, board)]
        table.add_row(line.encoder.label, *cells)
    return table


def _csv(board: Board) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["encoder", "kind", "task", "protocol", "value", "low", "high", "in_mean"])
    for line in board.lines:
        for task, s in line.scores.items():
            writer.writerow(
                [
                    line.encoder.label, line.encoder.kind, board.tasks[task], board.protocol,
                    s.value, s.low, s.high, task in board.counted,
                ]
            )  # fmt: skip
    return text.getvalue()


def _latex(board: Board) -> str:
    rows = [[escaped(line.encoder.label), *_cells(line, board)] for line in board.lines]
    return latex_table(list(map(escaped, _heads(board))), rows)


_PAGE = """<!doctype html> <html lang="en"><head><meta charset="utf-8"><title>eosin:
leaderboard</title> <style> body { font: 16px/1.5 system-ui, sans-serif; color: #26222f; margin:
40px; } table { border-collapse: collapse; font-size: 14px; } th, td { text-align: left; padding:
6px 20px 6px 0; border-bottom: 1px solid #e3e0e8; } td { font-variant-numeric: tabular-nums;
white-space: nowrap; } small, p { color: #6a6674; } .scroll { overflow-x: auto; } dt { font-weight:
600; margin-top: 12px; } </style></head><body> <h1>Leaderboard</h1> <p>Balanced accuracy under {{
board.protocol }}, 95 % intervals over groups. The mean is of the {{ board.counted | length }} tasks
on which no floor lies within the interval of the best encoder.</p> <div
class="scroll"><table><thead><tr>{% for head in heads %}<th>{{ head }}</th>{% endfor %}</tr></thead>
<tbody>{% for line, cells in lines %}<tr><th>{{ line.encoder.label }}<br> <small>{{
line.encoder.kind }}, {{ line.encoder.dim }} features</small></th> {% for cell in cells %}<td>{{
cell }}</td>{% endfor %}</tr>{% endfor %}</tbody></table></div> {% if board.published
%}<h2>Published by others</h2> <p>Under their own protocols: what to expect, not a
comparison.</p><dl> {% for dataset, source, figures in board.published %} <dt>{{ dataset }}
<small>{{ source }}</small></dt><dd>{{ figures }}</dd> {% endfor %}</dl>{% endif %} </body></html>
"""


def _html(board: Board) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    lines = [(line, _cells(line, board)) for line in board.lines]
    return environment.from_string(_PAGE).render(board=board, heads=_heads(board), lines=lines)
