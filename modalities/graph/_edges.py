"""Directions and duplicates: a listed graph to the ways that messages go."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmrep.modalities.graph.record import FORWARD, REVERSE, UNDIRECTED, Graph, Listed


def symmetric(listed: Listed) -> bool:
    """Whether every edge is listed in both directions, with the same features."""
    parts = [listed.edges.astype(np.float64)]
    parts += [part.astype(np.float64) for part in (listed.edge_features, listed.edge_categories) if part is not None]
    table = np.concatenate(parts, 1)
    turned = table.copy()
    turned[:, [0, 1]] = table[:, [1, 0]]
    return np.array_equal(np.unique(table, axis=0), np.unique(turned, axis=0))


def wire(listed: Listed, directed: bool, how: str, *, merge: bool, loops: bool) -> Graph:
    """The ways of a graph.

    Args:
        listed: the graph.
        directed: whether it is.
        how: ``"undirected"``, ``"keep"`` or ``"both"``, see `mmrep.modalities.graph.read.Reading`; any value for an
            undirected graph.
        merge: of equal edges keep the first, with its features. An undirected edge that is listed in both directions
            is one edge in any case, and the direction listed first gives the features.
        loops: keep self-loops, each once.
    """
    source, target = listed.edges[:, 0], listed.edges[:, 1]
    as_directed = directed and how != "undirected"
    rank = np.zeros(len(source), np.int64) if merge else _rank(source * listed.n + target)
    low, high = (source, target) if as_directed else (np.minimum(source, target), np.maximum(source, target))
    identity = np.stack([low, high, rank], 1)
    _, first = np.unique(identity, axis=0, return_index=True)
    rows = np.sort(first)
    if not loops:
        rows = rows[source[rows] != target[rows]]
    there = listed.edges[rows]
    ids = np.arange(len(rows))
    types = np.full(len(rows), FORWARD if as_directed else UNDIRECTED)
    if not as_directed or how == "both":
        back = there[:, 0] != there[:, 1]
        rows, ids = np.concatenate([rows, rows[back]]), np.concatenate([ids, ids[back]])
        types = np.concatenate([types, np.full(int(back.sum()), REVERSE if as_directed else UNDIRECTED)])
        there = np.concatenate([there, there[back][:, ::-1]])

    def take(values: NDArray[Any] | None) -> Any:
        return None if values is None else values[rows]

    return Graph(
        nodes=np.arange(listed.n),
        edges=np.ascontiguousarray(there),
        edge_ids=ids,
        edge_types=types,
        features=listed.features,
        categories=listed.categories,
        edge_features=take(listed.edge_features),
        edge_categories=take(listed.edge_categories),
        directed=directed,
        ids=listed.ids,
    )


def _rank(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many equal keys stand before each."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1)) if len(keys) else np.zeros(0, np.int64)
    lengths = np.diff(np.append(starts, len(keys)))
    rank = np.empty(len(keys), np.int64)
    rank[order] = np.arange(len(keys)) - np.repeat(starts, lengths)
    return rank
