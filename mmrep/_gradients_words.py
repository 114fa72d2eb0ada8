"""The report of ``mmrep check gradients``, for the terminal."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table as Grid

from mmrep._gradients_table import Row, Table

if TYPE_CHECKING:
    from mmrep.gradients import Report


def report_text(report: Report) -> str:
    """Tables, causes, notes, and a last line that says it all."""
    shares = " + ".join(map(str, report.shares))
    blocks = [
        f"One process with {sum(report.shares)} samples against {report.processes} with {shares} "
        f"({report.wrapper}): values of losses, norms of gradients."
    ]
    blocks += [_grid(table, report.processes) for table in report.tables]
    worst = {row.term: f" (most in {row.worst})" for row in report.tables[-1].rows if row.worst}
    for cause, terms in report.causes.items():
        blocks.append("\n".join([cause, *(f"  {term}{worst.get(term, '')}" for term in terms)]))
    blocks += report.notes
    differ = sum(not row.agrees for table in report.tables for row in table.rows)
    total = sum(len(table.rows) for table in report.tables)
    blocks.append(f"All {total} terms agree." if report.agree else f"{differ} of {total} terms differ.")
    return "\n\n".join(blocks)


def _grid(table: Table, processes: int) -> str:
    out = io.StringIO()
    grid = Grid(title=table.title, title_justify="left", title_style="bold")
    for head in ("term", "one", f"{processes} processes", "error", "ratio", "cosine", ""):
        grid.add_column(head, justify="left" if head in ("term", "") else "right", no_wrap=True)
    for row in table.rows:
        grid.add_row(*_cells(row))
    Console(file=out, width=130).print(grid)
    return out.getvalue().rstrip()


def _cells(row: Row) -> tuple[str, ...]:
    verdict = "agree" if row.agrees else "NO GRADIENT" if row.missing else "DIFFERS"
    cosine = "" if row.cosine is None else _figure(row.cosine)
    return row.term, f"{row.one:.6g}", f"{row.many:.6g}", f"{row.error:.1e}", _figure(row.ratio), cosine, verdict


def _figure(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else ""
