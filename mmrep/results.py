"""The figures of a run: what its evaluations gave, and as a table."""

from __future__ import annotations

from typing import Any

Results = dict[str, dict[str, Any]]
"""Per evaluation: its ``type``, the source that it read (``data``) and its ``rows``."""


def results_markdown(results: Results) -> str:
    """The results as one Markdown table per evaluation."""
    blocks: list[str] = []
    for name, result in results.items():
        keys = [k for k in result["rows"][0] if k not in ("who", "direction")]
        head = f"| {name} | |" + "".join(f" {k} |" for k in keys) + "\n|---|---|" + "---|" * len(keys)
        lines = [
            f"| {row.get('direction', '')} | {row['who']} |" + "".join(f" {_figure(row.get(k))} |" for k in keys)
            for row in result["rows"]
        ]
        blocks.append("\n".join([head, *lines]))
    return "\n\n".join(blocks)


def _figure(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) and abs(value) < 2 else f"{value:g}"
