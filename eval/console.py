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
