"""Puts the page together: everything is computed here and only laid out in ``template.html``."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrep.report.charts import Chart, training_charts
from mmrep.report.data import PairSet, ReportData
from mmrep.report.examples import Direction, examples
from mmrep.report.health import Measure, between, per_field
from mmrep.report.heatmap import CELL, Heatmap, similarity_heatmap
from mmrep.report.map import PICTURE, SpaceMap, space_map
from mmrep.report.tables import headline_cards, result_tables
from mmrep.report.thumbnails import Viewer, clean, clean_lines

logger = logging.getLogger(__name__)
SECTIONS = {
    "results": "Results",
    "training": "Training",
    "similarity": "Similarity of pairs",
    "map": "Map of the space",
    "examples": "Example retrievals",
    "health": "Health of the space",
    "quarantine": "Quarantine",
    "config": "Config",
    "versions": "Versions",
}
"""Sections by id, in order. Every page has all of them."""


@dataclass(frozen=True)
class Drawn:
    """What is drawn of one set; ``reason`` says why nothing is."""

    title: str
    size: int
    fields: tuple[str, str]
    quarantined: int
    reason: str = ""
    heatmap: Heatmap | None = None
    map: SpaceMap | None = None
    map_reason: str = ""
    directions: tuple[Direction, ...] = ()
    per_field: tuple[Measure, ...] = ()
    between: tuple[Measure, ...] = ()


def write_report(report: ReportData, path: Path) -> Path:
    """Write one HTML file that needs no server, no network and no script.

    The same data gives the same bytes on one machine. Every text is escaped, and a content security policy in the page
    forbids scripts and everything that is not in the file.

    Args:
        report: what to show; see `ReportData` for what may be absent.
        path: the file; its folder is made. An older file is replaced whole.

    Returns:
        ``path``.
    """
    html = render(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_bytes(html.encode("utf-8"))
    os.replace(beside, path)
    logger.info("wrote %s, %.1f MB", path, path.stat().st_size / 1e6)
    return path


def render(report: ReportData) -> str:
    """The page as text; see `write_report`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mmrep.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    charts = training_charts(report.metrics, report.evaluations)
    return environment.get_template("template.html").render(
        title=clean(report.title),
        about=clean(report.about),
        config=clean_lines(report.config),
        versions=[(clean(name), clean(value)) for name, value in report.versions.items()],
        sections=SECTIONS,
        facts=_facts(report),
        cards=headline_cards(report.evaluations),
        tables=result_tables(report.evaluations),
        charts=charts,
        chart_reason=_chart_reason(report, charts),
        sets=[draw(pairs) for pairs in report.sets],
        quarantined=_counts(report.quarantined),
        cell=CELL,
        picture=PICTURE,
    )


def draw(pairs: PairSet) -> Drawn:
    """Compute all that is shown of a set."""
    title, size, bad = clean(pairs.title), len(pairs.encoded), len(pairs.encoded.quarantined)
    reason = pairs.unusable()
    if reason:
        return Drawn(title, size, pairs.fields, bad, reason=clean(reason))
    viewer = Viewer(pairs)
    plane = space_map(pairs, viewer)
    return Drawn(
        title=title,
        size=size,
        fields=pairs.fields,
        quarantined=bad,
        heatmap=similarity_heatmap(pairs, viewer),
        map=plane if isinstance(plane, SpaceMap) else None,
        map_reason=plane if isinstance(plane, str) else "",
        directions=tuple(examples(pairs, viewer)),
        per_field=tuple(per_field(pairs)),
        between=tuple(between(pairs)),
    )


def _facts(report: ReportData) -> list[tuple[str, str]]:
    """Name and value of what a reader asks first: how long, how fast, how well it fits."""
    last: dict[str, Any] = {}
    for line in report.metrics:
        last |= line
    known: list[tuple[str, str, Callable[[Any], str]]] = [
        ("step", "steps", lambda v: f"{v:.0f}"),
        ("loss", "last loss", lambda v: f"{v:.3g}"),
        ("seconds", "training", lambda v: f"{v:.0f} s" if v < 600 else f"{v / 60:.0f} min"),
        ("samples_per_second", "samples a second", lambda v: f"{v:,.0f}".replace(",", " ")),
    ]
    facts = [(name, show(last[key])) for key, name, show in known if isinstance(last.get(key), int | float)]
    for name, temperature in report.temperatures.items():
        name = "" if name == "default" and len(report.temperatures) == 1 else f" {name}"
        facts += [(clean(f"logit {key}{name}"), f"{value:.3g}") for key, value in temperature.items()]
    return facts


def _chart_reason(report: ReportData, charts: list[Chart]) -> str:
    if charts:
        return ""
    return "No figure was logged." if report.metrics else "There is no metrics.jsonl: nothing was trained here yet."


def _counts(quarantined: Mapping[str, int] | None) -> list[tuple[str, int]] | None:
    if quarantined is None:
        return None
    return sorted(((clean(cause), n) for cause, n in quarantined.items()), key=lambda pair: (-pair[1], pair[0]))
