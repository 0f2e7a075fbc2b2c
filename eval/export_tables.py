"""Scores as CSV, a row a score, and as a LaTeX table of balanced accuracy."""

import csv
import io
from collections.abc import Sequence

from eosin.eval.results import Results
from eosin.eval.tables import MAIN_METRIC

COLUMNS = (
    "task", "encoder", "kind", "pooling", "protocol", "metric", "value", "low", "high", "spread",
    "test_tiles", "test_groups",
)  # fmt: skip

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def scores_csv(results: Results) -> str:
    """Every score in one row, under `COLUMNS`."""
    kinds = {encoder.name: encoder for encoder in results.encoders}
    rows = [
        {
            "task": results.task.name,
            "encoder": kinds[s.encoder].label,
            "kind": kinds[s.encoder].kind,
            "pooling": kinds[s.encoder].pooling,
            "protocol": s.protocol,
            "metric": s.metric,
            "value": s.value,
            "low": s.low,
            "high": s.high,
            "spread": s.spread,
            "test_tiles": results.task.tiles["test"],
            "test_groups": results.task.groups["test"],
        }
        for s in results.scores
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def scores_latex(results: Results) -> str:
    """Encoders by protocols: balanced accuracy in per cent with its 95 % interval."""
    protocols = list(dict.fromkeys(s.protocol for s in results.scores))
    rows = []
    for encoder in results.encoders:
        cells = [escaped(encoder.label)]
        for protocol in protocols:
            s = results.score(encoder.name, protocol, MAIN_METRIC)
            cells.append(f"{100 * s.value:.1f} [{100 * s.low:.1f}, {100 * s.high:.1f}]")
        rows.append(cells)
    return latex_table(["encoder", *map(escaped, protocols)], rows)


def latex_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A ``tabular`` with booktabs rules, of cells that are LaTeX already."""
    lines = [
        rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
        r"\toprule",
        " & ".join(heads) + r" \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_LATEX.get(character, character) for character in text)
