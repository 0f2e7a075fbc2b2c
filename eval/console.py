"""The results as tables for a terminal."""

from rich.table import Table

from eosin.eval.results import Results
from eosin.eval.tables import MAIN_METRIC


def scores_table(results: Results) -> Table:
    """Encoders × protocols: balanced accuracy with its 95 % interval."""
    table = Table(title=f"{results.task.name}: balanced accuracy [95 % interval over groups]")
    protocols = _protocols(results)
    table.add_column("encoder")
    for protocol in protocols:
        table.add_column(protocol.replace("/", "/\n"), justify="right")
    for encoder in results.encoders:
        cells = []
        for protocol in protocols:
            found = results.score(encoder.name, protocol, MAIN_METRIC)
            cells.append(f"{found.value:.3f}\n\\[{found.low:.3f}, {found.high:.3f}]")
        table.add_row(encoder.label, *cells)
    return table


def differences_table(results: Results) -> Table:
    """What the encoder adds to each other row, paired, and whether the interval is above zero."""
    labels = {encoder.name: encoder.label for encoder in results.encoders}
    table = Table(title=f"{results.encoders[0].label} minus …: better by more than the interval?")
    protocols = _protocols(results)
    table.add_column("baseline")
    for protocol in protocols:
        table.add_column(protocol.replace("/", "/\n"), justify="right")
    rows: dict[str, list[str]] = {}
    for found in results.differences:
        if found.metric == MAIN_METRIC:
            verdict = "yes" if found.better else "no"
            cell = f"{verdict} {found.value:+.3f}\n\\[{found.low:+.3f}, {found.high:+.3f}]"
            rows.setdefault(found.baseline, []).append(cell)
    for baseline, cells in rows.items():
        table.add_row(labels[baseline], *cells)
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
        if found.metric == MAIN_METRIC:
            lines.append(
                f"{label}, {found.protocol}: range over {found.conditions} conditions "
                f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
            )
    return lines
