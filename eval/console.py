"""The results as tables for a terminal."""

from rich.table import Table

from eosin.eval.results import Results, headline_protocols
from eosin.eval.tables import MAIN_METRIC

MOST_COLUMNS = 4
"""Protocols stand in columns up to so many, and in rows beyond."""


def scores_table(results: Results) -> Table:
    """Encoders and protocols: balanced accuracy with its 95 % interval."""
    labels = {encoder.name: encoder.label for encoder in results.encoders}
    cells = {
        (s.encoder, s.protocol): f"{s.value:.3f}\n\\[{s.low:.3f}, {s.high:.3f}]"
        for s in results.scores
        if s.metric == MAIN_METRIC
    }
    title = f"{results.task.name}: balanced accuracy [95 % interval over groups]"
    return _table(title, "encoder", labels, _protocols(results), cells)


def differences_table(results: Results) -> Table:
    """What the encoder adds to each other row, paired, and whether the interval is above zero."""
    labels = {encoder.name: encoder.label for encoder in results.encoders[1:]}
    cells = {}
    for d in results.differences:
        if d.metric == MAIN_METRIC:
            verdict = "yes" if d.better else "no"
            cells[d.baseline, d.protocol] = (
                f"{verdict} {d.value:+.3f}\n\\[{d.low:+.3f}, {d.high:+.3f}]"
            )
    title = f"{results.encoders[0].label} minus …: better by more than the interval?"
    return _table(title, "baseline", labels, _protocols(results), cells)


def _table(
    title: str,
    corner: str,
    labels: dict[str, str],
    protocols: list[str],
    cells: dict[tuple[str, str], str],
) -> Table:
    """Cells by (encoder, protocol), with the protocols across or down."""
    across = len(protocols) <= MOST_COLUMNS
    table = Table(title=title)
    table.add_column(corner if across else "protocol")
    heads = [p.replace("/", "/\n") for p in protocols] if across else list(labels.values())
    for head in heads:
        table.add_column(head, justify="right")
    if across:
        for name, label in labels.items():
            table.add_row(label, *(cells.get((name, p), "–") for p in protocols))
    else:
        for protocol in protocols:
            found = (cells.get((name, protocol), "–") for name in labels)
            table.add_row(protocol, *(cell.replace("\n", " ") for cell in found))
    return table


def _protocols(results: Results) -> list[str]:
    return list(dict.fromkeys(score.protocol for score in results.scores))


def insight_lines(results: Results) -> list[str]:
    """What is said of encoders beside their scores, a line each; a collapse is a warning."""
    lines = []
    for encoder in results.encoders:
        insight = results.insights.get(encoder.name)
        if insight is None or encoder.kind == "floor":
            continue
        free = insight.label_free
        parts = [f"RankMe {free.rankme:.1f} of {encoder.dim}, mean cosine {free.mean_cosine:.2f}"]
        if insight.leakage is not None:
            parts.append(f"tiles of one group {insight.leakage.enrichment:.1f}× as near as chance")
        if insight.confounding is not None:
            c = insight.confounding
            parts.append(
                f"robustness index {c.ri:.3f} [{c.low:.3f}, {c.high:.3f}] on {c.support:.0%} of "
                f"tiles (k = {c.k})"
            )
        lines.append(f"{encoder.label}: {'; '.join(parts)}")
        if free.collapsed and encoder.kind == "encoder":
            lines.append(f"warning: {encoder.label} has collapsed: it tells hardly any tiles apart")
    for found in results.ranges:
        label = next(e.label for e in results.encoders if e.name == found.encoder)
        if found.metric == MAIN_METRIC and found.protocol in headline_protocols(results):
            lines.append(
                f"{label}, {found.protocol}: range over {found.conditions} conditions "
                f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
            )
    return lines
