"""Scores as CSV, a row a score, and as a LaTeX table of balanced accuracy."""

import csv
import io
from collections.abc import Sequence

from eosin.eval.results import Results, Score
from eosin.eval.tables import MAIN_METRIC, MOST_COLUMNS

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
    """Balanced accuracy in per cent with its 95 % interval: encoders by protocols.

    With many protocols these stand in the rows, as no page is so wide.
    """
    protocols = list(dict.fromkeys(s.protocol for s in results.scores))
    labels = [escaped(encoder.label) for encoder in results.encoders]
    names = list(map(escaped, protocols))
    cells = [
        [_in_per_cent(results.score(encoder.name, p, MAIN_METRIC)) for p in protocols]
        for encoder in results.encoders
    ]
    if len(protocols) <= MOST_COLUMNS:
        rows = [[label, *row] for label, row in zip(labels, cells, strict=True)]
        return latex_table(["encoder", *names], rows)
    rows = [[name, *column] for name, *column in zip(names, *cells, strict=True)]
    return latex_table(["protocol", *labels], rows)


def _in_per_cent(s: Score) -> str:
    return f"{100 * s.value:.1f} [{100 * s.low:.1f}, {100 * s.high:.1f}]"


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
