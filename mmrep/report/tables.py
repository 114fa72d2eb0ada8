"""Results beside chance: what stands at the top of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmrep.report.thumbnails import clean

_COUNTS = ("queries", "items", "excluded", "ties")
_SHARES = ("R@", "true_recall@", "accuracy", "top", "precision", "recall")
_TIMES = "\N{MULTIPLICATION SIGN}"
_TELLING = ("R@5", "R@1", "accuracy", "top1", "mean_reciprocal_rank")


@dataclass(frozen=True)
class Figure:
    """One number as shown, and how many times better than chance it is (or nothing)."""

    text: str
    ratio: str = ""


@dataclass(frozen=True)
class TableRow:
    """A contestant in one direction; ``kind`` is ``"model"``, ``"chance"`` or ``"baseline"``."""

    direction: str
    who: str
    kind: str
    figures: list[Figure]


@dataclass(frozen=True)
class Table:
    """One evaluation: names of the figures, rows, and a note on what was counted."""

    name: str
    about: str
    heads: list[str]
    rows: list[TableRow]
    note: str


@dataclass(frozen=True)
class Card:
    """A headline: a figure of the model, what it is, and how it compares."""

    value: str
    what: str
    where: str
    versus: str


def result_tables(evaluations: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """A table for each evaluation; its columns are the figures that its rows have."""
    return [_table(name, result) for name, result in evaluations.items()]


def headline_cards(evaluations: Mapping[str, Mapping[str, Any]], most: int = 6) -> list[Card]:
    """The model's most telling figure in each direction of each evaluation, with its ratio to chance."""
    cards: list[Card] = []
    for name, result in evaluations.items():
        for row in result.get("rows", ()):
            key = next((k for k in _TELLING if _number(row.get(k)) is not None), None)
            if row.get("who") != "model" or key is None:
                continue
            chance = _chance(row, result["rows"])
            ratio = _ratio(key, row.get(key), chance.get(key))
            versus = f"{ratio} chance ({_text(key, chance[key])})" if ratio else ""
            what = " ".join(filter(None, (clean(str(row.get("direction", ""))), _head(key))))
            cards.append(Card(_text(key, row[key]), what, clean(name), versus))
    return cards[:most]


def _table(name: str, result: Mapping[str, Any]) -> Table:
    rows: Sequence[Mapping[str, Any]] = result.get("rows", ())
    every = dict.fromkeys(k for row in rows for k in row if _number(row.get(k)) is not None)
    keys = [k for k in every if k not in _COUNTS]
    shown = [
        TableRow(clean(str(row.get("direction", ""))), clean(str(row.get("who", ""))), _kind(row),
                 [_figure(k, row, _chance(row, rows)) for k in keys])
        for row in rows
    ]  # fmt: skip
    counted = next((row for row in rows if row.get("who") == "model"), {})
    note = ", ".join(f"{counted[k]:.0f} {k}" for k in _COUNTS if _number(counted.get(k)) is not None)
    about = ", ".join(filter(None, (str(result.get("type", "")), f"on {result['data']}" if result.get("data") else "")))
    return Table(clean(name), clean(about), [_head(k) for k in keys], shown, note)


def _kind(row: Mapping[str, Any]) -> str:
    return {"model": "model", "chance": "chance"}.get(str(row.get("who")), "baseline")


def _chance(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row of chance in the same direction; for chance itself, nothing."""
    same = (r for r in rows if r.get("who") == "chance" and r.get("direction") == row.get("direction"))
    return {} if row.get("who") == "chance" else next(same, {})


def _figure(key: str, row: Mapping[str, Any], chance: Mapping[str, Any]) -> Figure:
    value = _number(row.get(key))
    if value is None:
        return Figure("")
    return Figure(_text(key, value), _ratio(key, value, chance.get(key)))


def _ratio(key: str, value: Any, chance: Any) -> str:
    """How many times better than chance; of a rank, where less is better, chance over value."""
    a, b = _number(value), _number(chance)
    if key.endswith("rank") and "reciprocal" not in key:
        a, b = b, a
    elif not key.startswith((*_SHARES, "mean_reciprocal_rank")):
        return ""  # whether more or less of it is better is not known
    if a is None or b is None or not (0 < b < math.inf and 0 <= a < math.inf):
        return ""
    return f"{a / b:.0f}{_TIMES}" if a / b >= 10 else f"{a / b:.1f}{_TIMES}"


def _text(key: str, value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if key.startswith(_SHARES):
        return f"{100 * value:.1f} %"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def _head(key: str) -> str:
    return clean(key.replace("_", " "))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
