"""Is each tower's space used, and do the two meet: the label-free measures, with what is good."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmrep.evaluate.diagnostics import alignment, dimension_spread, effective_rank, modality_gap, uniformity
from mmrep.report.data import PairSet
from mmrep.report.heatmap import unit

ROWS = 4096
"""Rows beyond this are left out of the measures, which are O(n²) in time."""
SQUARE = 1024
"""Likewise for the one measure that is O(n²) in memory."""


@dataclass(frozen=True)
class Measure:
    """One line: name, value by field (or of the pair), and what the value means."""

    name: str
    values: dict[str, str]
    meaning: str


def per_field(pairs: PairSet) -> list[Measure]:
    """Measures of each field's embeddings."""
    chosen = {name: _rows(pairs, name) for name in pairs.fields}
    dim = next(iter(chosen.values())).shape[1]

    def measure(name: str, compute: Callable[[NDArray[np.float32]], str], meaning: str) -> Measure:
        return Measure(name, {f: compute(x) if len(x) > 1 else "needs two samples" for f, x in chosen.items()}, meaning)

    return [
        measure("samples", lambda x: f"{len(x)}", f"embeddings measured, at most {ROWS}"),
        measure("effective rank", lambda x: f"{effective_rank(x):.1f} of {min(dim, len(x) - 1)}",
                "number of directions in use; 0 is a collapse"),
        measure("uniformity", lambda x: f"{uniformity(x):.2f}", "0 is a collapse; lower is more even, -4 the limit"),
        measure("spread", lambda x: f"{dimension_spread(x)['mean']:.2f}",
                "of a coordinate, times the root of the dimension: 1 is even, 0 a collapse"),
        measure("dead coordinates", lambda x: f"{dimension_spread(x)['dead']:.0%}", "share that hardly varies"),
    ]  # fmt: skip


def between(pairs: PairSet) -> list[Measure]:
    """Measures of how the two fields meet."""
    paired = _thinned(pairs.paired(), ROWS)
    left, right = (unit(pairs.encoded.embeddings[name][paired]) for name in pairs.fields)
    cosines = (left * right).sum(axis=1)
    lines = [
        ("modality gap", f"{modality_gap(left, right):.2f}", "distance of the two fields' centres: 0 to 2"),
        ("alignment", f"{alignment(left, right):.2f}", "mean squared distance of true pairs: 0 is perfect"),
        ("cosine of true pairs", _spread(cosines), "mean and standard deviation"),
    ]
    few = _thinned(np.arange(len(paired)), SQUARE)
    groups = np.array(pairs.encoded.groups(), dtype=object)[paired[few]]
    strange = groups[:, None] != groups[None, :]
    if strange.any():
        others = (left[few] @ right[few].T)[strange]
        lines.append(("cosine of strangers", _spread(others), "two samples of different groups"))
    return [Measure(name, {"": value}, meaning) for name, value, meaning in lines]


def _rows(pairs: PairSet, field: str) -> NDArray[np.float32]:
    return pairs.encoded.embeddings[field][_thinned(np.flatnonzero(pairs.encoded.present[field]), ROWS)]


def _thinned(index: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most ``most`` of the indices, evenly spaced."""
    return index if len(index) <= most else index[np.linspace(0, len(index) - 1, most).astype(np.int64)]


def _spread(values: NDArray[np.float64]) -> str:
    return f"{values.mean():.2f} ± {values.std():.2f}"
