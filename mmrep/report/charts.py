"""Line charts over training steps, as inline SVG whose colours follow the page's light or dark theme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from mmrep.report.thumbnails import clean, shorten

_POINTS = 600
"""More points than this are averaged in bins: a chart is not wider than this many pixels."""
_MOVING = 40
"""From so many points on, a noisy curve is drawn beside its moving average."""
_MAX_LINES = 8
_TELLING = ("R@5", "R@1", "accuracy")
"""Of an evaluation's figures, the first of these that it has is drawn."""
_BOOKKEEPING = {"step", "epoch", "seconds", "samples"}

# matplotlib writes colours as hexadecimal numbers; these stand for the page's CSS variables.
_INK, _GRID, _GROUND = "#0a0b0c", "#0a0b0d", "#0a0b0e"
_SERIES = [f"#0a0b{number:02x}" for number in range(0x10, 0x10 + _MAX_LINES)]
_VARIABLES = {_INK: "var(--muted)", _GRID: "var(--line)", _GROUND: "var(--ground)"} | {
    color: f"var(--series-{number})" for number, color in enumerate(_SERIES, 1)
}
_DASHES: list[Any] = ["-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))]


@dataclass(frozen=True)
class Line:
    """A curve: steps and finite values of one length, and a name; ``flat`` lines are references, such as chance."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]
    flat: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawn chart: title, the SVG, and what it shows in words."""

    title: str
    svg: str
    summary: str


def training_charts(metrics: Sequence[Mapping[str, Any]], evaluations: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    """Charts of loss, learning rate, held-out figures and whatever else was logged, in this order.

    Args:
        metrics: lines with ``step``; values that are not finite are left out and counted in the summary.
        evaluations: final results, for the level of chance.
    """
    names = [k for k in dict.fromkeys(key for line in metrics for key in line) if k not in _BOOKKEEPING]
    losses = [k for k in names if k == "loss" or (k.endswith("/loss") and not k.startswith("eval/"))]
    rates = [k for k in names if k == "lr" or k.startswith("lr/")]
    evals = [k for k in names if k.startswith("eval/")]
    rest = [k for k in names if k not in {*losses, *rates, *evals}]
    lines = {name: line for name in names if (line := _line(name, metrics))}
    if len(losses) == 2 and all(k in lines for k in losses) and lines[losses[0]].values == lines[losses[1]].values:
        losses = losses[:1]  # one objective of weight 1: its loss is the loss
    charts = [
        _draw("Loss", [lines[k] for k in losses if k in lines], "loss", metrics),
        _draw("Learning rate", [lines[k] for k in rates if k in lines], "lr", metrics),
    ]
    charts += _held_out({k: lines[k] for k in evals if k in lines}, evaluations)
    charts += [_draw(k.replace("_", " "), [lines[k]], f"r{n}", metrics) for n, k in enumerate(rest) if k in lines]
    return [chart for chart in charts if chart is not None]


def telling(figures: Sequence[str]) -> str:
    """The figure of an evaluation that is drawn where one must do."""
    return next((figure for figure in _TELLING if figure in figures), figures[0])


def line_chart(title: str, lines: Sequence[Line], key: str, *, x: str = "step") -> Chart | None:
    """Lines over ``x``, which ``Line.steps`` then are; None if there are no lines. ``key`` is one in a page."""
    return _draw(title, lines, key, (), x)


def _held_out(lines: Mapping[str, Line], evaluations: Mapping[str, Mapping[str, Any]]) -> list[Chart | None]:
    """One chart per evaluation: its most telling figure, in every direction, beside chance."""
    found: dict[str, dict[tuple[str, str], Line]] = {}
    for key, line in lines.items():
        _, name, *direction, figure = key.split("/") if key.count("/") > 1 else ("", "", key)
        found.setdefault(name, {})[("/".join(direction), figure)] = line
    charts: list[Chart | None] = []
    for number, (name, by_figure) in enumerate(found.items()):
        figures = list(dict.fromkeys(figure for _, figure in by_figure))
        figure = telling(figures)
        chosen = {direction: line for (direction, f), line in by_figure.items() if f == figure}
        curves = [Line(direction or figure, line.steps, line.values) for direction, line in chosen.items()]
        levels = {
            float(row[figure])
            for row in evaluations.get(name, {}).get("rows", ())
            if row.get("who") == "chance" and row.get("direction", "") in chosen and isinstance(row.get(figure), float)
        }
        reach = (min(line.steps[0] for line in curves), max(line.steps[-1] for line in curves))
        curves += [Line("chance", reach, (level, level), flat=True) for level in sorted(levels)]
        charts.append(_draw(f"{figure} on {name}", curves, f"e{number}", ()))
    return charts


def _line(name: str, metrics: Sequence[Mapping[str, Any]]) -> Line | None:
    points = [
        (float(line["step"]), float(line[name]))
        for line in metrics
        if isinstance(line.get("step"), int | float) and isinstance(line.get(name), int | float)
    ]
    points = sorted(point for point in points if math.isfinite(point[1]))
    if not points:
        return None
    return Line(name, tuple(step for step, _ in points), tuple(value for _, value in points))


def _draw(
    title: str, lines: Sequence[Line], key: str, metrics: Sequence[Mapping[str, Any]], x: str = "step"
) -> Chart | None:
    """Draw lines over steps; ``key`` makes the SVG's ids its own."""
    if not lines:
        return None
    left_out = len(lines[_MAX_LINES:])
    lines = lines[:_MAX_LINES]
    summary = "; ".join(_words(line, x) for line in lines)
    bad = sum(line.name in row and _not_finite(row[line.name]) for row in metrics for line in lines)
    summary += f"; {bad} values are not finite and are left out" if bad else ""
    summary += f"; {left_out} more are not drawn" if left_out else ""
    return Chart(clean(title), _svg(lines, key, x), clean(summary) + ".")


def _svg(lines: Sequence[Line], key: str, x: str) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none", "svg.hashsalt": key, "font.family": ["sans-serif"], "font.size": 9,
        "axes.edgecolor": _GRID, "axes.labelcolor": _INK, "text.color": _INK, "text.parse_math": False,
        "xtick.color": _GRID, "ytick.color": _GRID,
        "xtick.labelcolor": _INK, "ytick.labelcolor": _INK, "grid.color": _GRID, "grid.linewidth": 0.6,
        "axes.grid": True, "axes.grid.axis": "y", "axes.spines.top": False, "axes.spines.right": False,
        "axes.spines.left": False, "axes.formatter.limits": (-3, 5), "axes.formatter.use_mathtext": False,
        "legend.frameon": False, "ytick.major.size": 0, "axes.axisbelow": True,
    }  # fmt: skip
    with rc_context(cast(Any, style)):
        figure = Figure(figsize=(5.2, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for number, line in enumerate(lines):
            color = _INK if line.flat else _SERIES[number]
            dash = (0, (2, 3)) if line.flat else _DASHES[number % len(_DASHES)]
            steps, values = _binned(line)
            label = shorten(clean(line.name), 32).lstrip("_")  # matplotlib hides labels that begin with an underscore
            if len(values) < _MOVING or _smooth(values):
                axes.plot(steps, values, color=color, linestyle=dash, linewidth=1.6, label=label,
                          marker="o" if len(values) <= 12 and not line.flat else None, markersize=4)  # fmt: skip
            else:
                axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
                axes.plot(steps, _moving_average(values), color=color, linestyle=dash, linewidth=1.8, label=label)
        axes.set_xlabel(x)
        axes.margins(x=0.02)
        if len(lines) > 1:
            axes.legend(loc="best", labelcolor=_INK, handlelength=2.4)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _inline(buffer.getvalue(), key)


def _inline(svg: str, key: str) -> str:
    """An SVG file as part of a page: no prologue, its own ids, theme colours, the page's font, a fluid size."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>chart-{key}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", svg)
    return re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg ', _fluid, svg, count=1)


def _fluid(match: re.Match[str]) -> str:
    return f'<svg aria-hidden="true" {match[1] or ""}'


def _binned(line: Line) -> tuple[np.ndarray, np.ndarray]:
    steps, values = np.array(line.steps), np.array(line.values)
    if len(values) <= _POINTS:
        return steps, values
    size = math.ceil(len(values) / _POINTS)  # all bins but the last alike, or the noise would seem to change
    parts = np.split(np.arange(len(values)), range(size, len(values), size))
    return np.array([steps[p].mean() for p in parts]), np.array([values[p].mean() for p in parts])


def _smooth(values: np.ndarray) -> bool:
    """Whether neighbours differ so little that a moving average adds nothing (a learning rate, a temperature)."""
    return bool(np.abs(np.diff(values)).mean() <= 0.02 * np.ptp(values) + 1e-12)


def _moving_average(values: np.ndarray) -> np.ndarray:
    """Mean of a centred window of a twentieth of the curve, narrower at the ends."""
    half = max(len(values) // 40, 1)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _words(line: Line, x: str) -> str:
    if line.flat:
        return f"{line.name} {_short(line.values[0])}"
    first, last = (line.steps[0], line.values[0]), (line.steps[-1], line.values[-1])
    if len(line.values) == 1:
        return f"{line.name} {_short(first[1])} at {x} {_place(first[0])}"
    return (
        f"{line.name} from {_short(first[1])} at {x} {_place(first[0])} to {_short(last[1])} at {x} {_place(last[0])}"
    )


def _place(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:g}"


def _short(value: float) -> str:
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _not_finite(value: Any) -> bool:
    """A number that is not finite, or null, which stands for it in JSON."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))
