"""Cosine similarities of a few pairs, every left value against every right one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmrep.report.data import PairSet
from mmrep.report.thumbnails import Shown, Viewer, shorten

PAIRS = 24
CELL = 26
_LABEL = 200
_TOP_TEXT = 132


@dataclass(frozen=True)
class Cell:
    """One similarity: place in pixels, colour, and whether it is the largest of its row."""

    x: int
    y: int
    color: str
    mark: str
    title: str


@dataclass(frozen=True)
class Tick:
    """One row or column: where it is, what it shows, and its text cut to the space."""

    at: int
    shown: Shown
    label: str


@dataclass(frozen=True)
class Heatmap:
    """Geometry of the drawing, in pixels. ``hits`` of ``len(rows)`` rows have their largest value on the diagonal."""

    width: int
    height: int
    left: int
    top: int
    cells: list[Cell]
    rows: list[Tick]
    columns: list[Tick]
    row_field: str
    column_field: str
    low: float
    high: float
    legend: list[str]
    hits: int


def similarity_heatmap(pairs: PairSet, viewer: Viewer, seed: int = 0) -> Heatmap:
    """Draw up to 24 pairs of different groups, chosen at random and put in order so that similar ones are neighbours.

    Text is on the rows and pictures on the columns, where there are both.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    first, second = pairs.fields
    swap = first in viewer.pictured and second not in viewer.pictured
    row_field, column_field = (second, first) if swap else (first, second)
    chosen = _order(pairs, _choose(pairs, seed))
    rows, columns = (unit(pairs.encoded.embeddings[name][chosen]) for name in (row_field, column_field))
    scores = rows @ columns.T
    low, high = float(scores.min()), float(scores.max())
    share = (scores - low) / ((high - low) or 1.0)
    palette = colormaps["viridis"]
    left, top = _LABEL, (CELL + 6 if column_field in viewer.pictured else _TOP_TEXT)
    ticks = {
        name: [
            Tick(n * CELL, shown := viewer.show(int(i), name, size=48), shorten(shown.text, length))
            for n, i in enumerate(chosen)
        ]
        for name, length in ((row_field, 30), (column_field, 17))
    }
    best = scores.argmax(axis=1)
    cells = [
        Cell(
            left + n * CELL,
            top + m * CELL,
            to_hex(palette(share[m, n])),
            ("#000000" if share[m, n] > 0.6 else "#ffffff") if best[m] == n else "",
            f"{ticks[row_field][m].shown.text} | {ticks[column_field][n].shown.text}: {scores[m, n]:.2f}",
        )
        for m in range(len(chosen))
        for n in range(len(chosen))
    ]
    return Heatmap(
        width=left + len(chosen) * CELL + 1,
        height=top + len(chosen) * CELL + 1,
        left=left,
        top=top,
        cells=cells,
        rows=ticks[row_field],
        columns=ticks[column_field],
        row_field=row_field,
        column_field=column_field,
        low=low,
        high=high,
        legend=[to_hex(palette(step / 8)) for step in range(9)],
        hits=int((best == np.arange(len(chosen))).sum()),
    )


def unit(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Rows at unit length, in fp64; a zero row stays zero."""
    wide = x.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)


def _choose(pairs: PairSet, seed: int) -> NDArray[np.int64]:
    groups = pairs.encoded.groups()
    seen: dict[str, int] = {}
    for index in np.random.default_rng(seed).permutation(pairs.paired()):
        seen.setdefault(groups[index], int(index))
        if len(seen) == PAIRS:
            break
    return np.array(list(seen.values()))


def _order(pairs: PairSet, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Leaves of a clustering of the pairs' mean vectors: blocks of alike pairs stand out on the diagonal."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    if len(chosen) < 3:
        return chosen
    left, right = (unit(pairs.encoded.embeddings[name][chosen]) for name in pairs.fields)
    return chosen[leaves_list(linkage(left + right, "average", optimal_ordering=True))]
