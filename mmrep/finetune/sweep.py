"""Every point between a model and its fine-tuned successor, measured by the evaluations of a run, and drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrep.finetune.merge import interpolate
from mmrep.model import Model
from mmrep.report.charts import Chart, Line, line_chart, telling
from mmrep.report.thumbnails import clean
from mmrep.results import Results
from mmrep.run import Run

ALPHAS = tuple(step / 10 for step in range(11))


@dataclass(frozen=True)
class Point:
    """One interpolation and what it reaches: ``alpha`` 0 is the start and 1 the tuned model."""

    alpha: float
    results: Results


def sweep(
    run: Run,
    start: Model,
    tuned: Model | None = None,
    *,
    alphas: Sequence[float] = ALPHAS,
    evaluations: Sequence[str] | None = None,
) -> list[Point]:
    """Evaluate ``(1 - alpha) start + alpha tuned`` for each alpha (WiSE-FT, arXiv:2109.01903).

    Give the run evaluations of both kinds: of what it was tuned for, and of what it should not forget. Choose alpha by
    validation data, as any other setting.

    Args:
        run: its recipe says what is measured, and on which data.
        start: the model before fine-tuning.
        tuned: None = the run's own.
        alphas: in any order.
        evaluations: by name; None = all of the recipe's.

    Raises:
        ConfigError: the models cannot be interpolated, or there is no such evaluation.
    """
    tuned = run.model if tuned is None else tuned
    names = None if evaluations is None else list(evaluations)
    return [Point(float(alpha), run.evaluate(names, interpolate(start, tuned, alpha))) for alpha in alphas]


def charts(points: Sequence[Point]) -> list[Chart]:
    """One chart an evaluation: its most telling figure over alpha, in every direction, beside chance."""
    points = sorted(points, key=lambda point: point.alpha)
    drawn: list[Chart | None] = []
    for number, name in enumerate(points[0].results if points else ()):
        rows = _rows(points[0], name, "model")
        figure = telling([key for key in rows[0] if key not in ("who", "direction")])
        alphas = tuple(point.alpha for point in points)
        curves = [
            Line(
                row.get("direction", "") or figure, alphas,
                tuple(float(_rows(point, name, "model")[i][figure]) for point in points),
            )
            for i, row in enumerate(rows)
        ]  # fmt: skip
        levels = {row[figure] for row in _rows(points[0], name, "chance") if isinstance(row.get(figure), float)}
        ends = (alphas[0], alphas[-1])
        curves += [Line("chance", ends, (level, level), flat=True) for level in sorted(levels)]
        drawn.append(line_chart(f"{figure} on {name}", curves, f"a{number}", x="alpha"))
    return [chart for chart in drawn if chart is not None]


def write_sweep(points: Sequence[Point], folder: Path, *, about: str = "") -> Path:
    """Write ``sweep.json`` (alpha and results of every point) and ``sweep.html`` (the charts, one file, no script).

    Returns:
        The page.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    folder.mkdir(parents=True, exist_ok=True)
    plain = [{"alpha": point.alpha, "results": point.results} for point in points]
    (folder / "sweep.json").write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("mmrep.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("charts.html").render(
        title="Between two models", about=clean(about), charts=charts(points)
    )
    (folder / "sweep.html").write_text(page, encoding="utf-8")
    return folder / "sweep.html"


def _rows(point: Point, name: str, who: str) -> list[dict[str, Any]]:
    return [row for row in point.results[name]["rows"] if row["who"] == who]
