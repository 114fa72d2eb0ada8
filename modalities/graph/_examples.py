"""Example graphs and odd graphs, by integer arithmetic alone: the same on every machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmrep.modalities.graph.read import Reading

Pairs = list[tuple[int, int]]


def examples(how: Reading, n: int, seed: int) -> list[Any]:
    """``n`` raw graphs that ``how`` reads, ragged, in turn of every shape and raw form."""
    made: list[Any] = []
    for i in range(n):
        draws = _Draws(seed * 1_009 + i)
        size, pairs = _SHAPES[i % len(_SHAPES)](draws)
        made.append(_dress(how, size, pairs, draws, _FORMS[(i + i // len(_SHAPES)) % len(_FORMS)]))
    return made


class _Draws:
    """Small random integers from a linear congruential generator (Knuth's MMIX constants)."""

    def __init__(self, seed: int) -> None:
        self.state = (seed * 2_654_435_761 + 12_345) % 2**64

    def below(self, n: int) -> int:
        self.state = (self.state * 6_364_136_223_846_793_005 + 1_442_695_040_888_963_407) % 2**64
        return (self.state >> 33) % n

    def floats(self, rows: int, width: int) -> NDArray[np.float32]:
        cells = [self.below(2_001) - 1_000 for _ in range(rows * width)]
        return (np.array(cells) / 500).astype(np.float32).reshape(rows, width)

    def categories(self, rows: int, sizes: tuple[int, ...]) -> NDArray[np.int64]:
        return np.array([[self.below(size) for size in sizes] for _ in range(rows)], np.int64).reshape(rows, len(sizes))


def _path(draws: _Draws) -> tuple[int, Pairs]:
    n = 3 + draws.below(4)
    return n, [(i, i + 1) for i in range(n - 1)]


def _cycle(draws: _Draws) -> tuple[int, Pairs]:
    n = 5 + draws.below(5)
    return n, [(i, (i + 1) % n) for i in range(n)] + [(0, n // 2)]


def _star(draws: _Draws) -> tuple[int, Pairs]:
    n = 4 + draws.below(3)
    return n, [(0, i) for i in range(1, n)]


def _random(draws: _Draws) -> tuple[int, Pairs]:
    n = 9 + draws.below(6)
    return n, [(i, j) for i in range(n) for j in range(i + 1, n) if draws.below(4) == 0]


_SHAPES: tuple[Callable[[_Draws], tuple[int, Pairs]], ...] = (_path, _random, _star, _cycle)
_FORMS = ("edge_index", "edges", "networkx", "adjacency")


def _dress(how: Reading, n: int, pairs: Pairs, draws: _Draws, form: str) -> Any:
    """A raw graph with the features that ``how`` expects, in a raw form that can hold them."""
    nodes: dict[str, Any] = {}
    edges: dict[str, Any] = {}
    if how.node_features:
        nodes["x"] = draws.floats(n, how.node_features)
    if how.node_sizes:
        nodes["node_categories"] = draws.categories(n, how.node_sizes)
    if how.edge_features:
        edges["edge_attr"] = draws.floats(len(pairs), how.edge_features)
    if how.edge_sizes:
        edges["edge_categories"] = draws.categories(len(pairs), how.edge_sizes)
    index = np.array(pairs, np.int64).reshape(-1, 2)
    directed = how.directed != "refuse" and how.input == "graph" and draws.below(2) == 0
    if form == "networkx" and not (nodes or edges):
        import networkx  # torch brings it

        graph = networkx.DiGraph() if directed else networkx.Graph()
        graph.add_nodes_from(f"node {i}" for i in range(n))
        graph.add_edges_from((f"node {i}", f"node {j}") for i, j in pairs)
        return graph
    if form == "adjacency" and not edges:
        matrix = np.zeros((n, n), np.int64)
        matrix[tuple(index.T)] = 1
        return {"adjacency": matrix if directed else matrix | matrix.T, "directed": directed, **nodes}
    if form == "edges":
        return {"edges": pairs, "num_nodes": n, "directed": directed, **nodes, **edges}
    if not directed:
        index = np.concatenate([index, index[:, ::-1]])
        edges = {key: np.concatenate([value, value]) for key, value in edges.items()}
    return {"edge_index": index.T, "num_nodes": n, "directed": directed, **nodes, **edges}


def oddities(how: Reading, seed: int) -> dict[str, Any]:
    """Raw values at and past the edge of what a graph may be, by what is odd about them."""
    draws = _Draws(seed)

    def graph(n: int, pairs: Pairs, **changes: Any) -> dict[str, Any]:
        return {**_dress(how, n, pairs, draws, "edges"), **changes}

    def without_features(raw: dict[str, Any]) -> dict[str, Any]:
        names = ("x", "node_categories", "edge_attr", "edge_categories")
        return {key: value for key, value in raw.items() if key not in names}

    triangle = [(0, 1), (1, 2), (2, 0)]
    broken = np.full((3, max(how.node_features, 1)), np.nan)
    found = {
        "no edges": graph(4, []),
        "one node": graph(1, []),
        "one node with a loop": graph(1, [(0, 0)]),
        "zero nodes": graph(0, []),
        "zero nodes but an edge": {**without_features(graph(2, [(0, 1)])), "num_nodes": 0},
        "dangling index": graph(3, triangle, edges=[(0, 1), (1, 2), (2, 3)]),
        "negative index": graph(3, triangle, edges=[(0, 1), (1, 2), (2, -1)]),
        "float index": graph(3, triangle, edges=[(0.0, 1.0), (1.0, 2.0), (2.0, 0.0)]),
        "huge ids": graph(3, triangle, edges=[(0, 10**12), (1, 2), (2, 0)]),
        "ids beyond 64 bits": graph(3, triangle, edges=[(0, 10**30), (1, 2), (2, 0)]),
        "one huge graph": {**without_features(graph(2, [(0, 1)])), "num_nodes": 10**9},
        "ragged edges": graph(3, triangle, edges=[(0, 1), (1,), (2, 0)]),
        "edges of three": graph(3, triangle, edges=[(0, 1, 2)] * 3),
        "words as edges": graph(3, triangle, edges=[("a", "b"), ("b", "c"), ("c", "a")]),
        "NaN feature": graph(3, triangle, x=broken),
        "feature that overflows": graph(3, triangle, x=np.full_like(broken, 1e39)),
        "wrong width": graph(3, triangle, x=np.zeros((3, how.node_features + 1))),
        "too few rows": graph(3, triangle, x=np.zeros((2, max(how.node_features, 1)))),
        "no features": without_features(graph(3, triangle)),
        "category out of range": graph(3, triangle, node_categories=np.full((3, max(len(how.node_sizes), 1)), 10**6)),
        "disconnected parts": graph(7, [(0, 1), (2, 3), (3, 4), (4, 2)]),
        "self loops only": graph(3, [(0, 0), (1, 1), (2, 2)]),
        "duplicate edges": graph(3, [(0, 1), (0, 1), (1, 0), (1, 2)]),
        "a directed graph": graph(3, triangle, directed=True),
        "a complete graph": graph(12, [(i, j) for i in range(12) for j in range(i)]),
        "two forms at once": graph(3, triangle, edge_index=np.array(triangle).T),
        "adjacency not square": {**without_features(graph(2, [])), "edges": None, "adjacency": np.ones((2, 3))},
        "bare matrix": np.eye(3),
        "string": "a graph of words",
        "number": 7,
        "none": None,
        "list": triangle,
        "empty dict": {},
        "hetero data": _Hetero(),
    }
    if how.input == "molecule":
        found |= {"invalid SMILES": "C1CC", "empty SMILES": "", "blank SMILES": "  ", "salt": "[Na+].[Cl-]",
                  "wild card": "*CC", "two lines": "CC\nCCO", "one hydrogen": "[H]"}  # fmt: skip
    return found


class _Hetero:
    """Looks like torch_geometric's ``HeteroData`` as far as reading looks, and costs no import."""

    node_types = ("author", "paper")
    edge_types = (("author", "writes", "paper"),)
