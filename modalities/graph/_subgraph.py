"""Parts and diffusions of one graph, in numpy, for sample-level views."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmrep.modalities.graph.record import UNDIRECTED, Graph

Matrix = NDArray[Any]
"""float64 [n, n]."""


def hops(graph: Graph, steps: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """The nodes within ``steps`` edges of a random node, either way: int64, ascending, at least one."""
    found = np.zeros(len(graph), bool)
    found[generator.integers(len(graph))] = True
    for _ in range(steps):
        touched = graph.edges[found[graph.edges].any(1)]
        found[touched.ravel()] = True
    return np.flatnonzero(found)


def walk(graph: Graph, share: float, restart: float, generator: np.random.Generator) -> NDArray[np.int64]:
    """The nodes that a random walk with restart has met once it has met ``share`` of all: int64, ascending.

    It follows edges either way, and gives up after 10 steps a node, in a component too small, say. At least one node.

    Args:
        graph: the graph.
        share: of its nodes, 0..1.
        restart: probability of going back to the start before a step.
        generator: random numbers.
    """
    n = len(graph)
    wanted = max(1, math.ceil(share * n))
    ends = np.concatenate([graph.edges, graph.edges[:, ::-1]])
    ends = ends[np.argsort(ends[:, 0], kind="stable")]
    first = np.searchsorted(ends[:, 0], np.arange(n + 1))
    start = int(generator.integers(n))
    here, met = start, {start}
    for _ in range(10 * n):
        if len(met) >= wanted:
            break
        if generator.random() < restart:
            here = start
        low, high = first[here], first[here + 1]
        if low == high:
            break
        here = int(ends[generator.integers(low, high), 1])
        met.add(here)
    return np.array(sorted(met), np.int64)


def ppr(links: Matrix, alpha: float) -> Matrix:
    """Personalised PageRank, alpha (I - (1 - alpha) T)^-1 (MVGRL, arXiv:2006.05582, equation 3): [n, n].

    T is the adjacency matrix with a self-loop added at every node, divided by the roots of both ends' degrees.
    """
    return alpha * np.linalg.inv(np.eye(len(links)) - (1 - alpha) * _transition(links))


def heat(links: Matrix, time: float) -> Matrix:
    """The heat kernel exp(-time (I - T)) (arXiv:2006.05582, equation 4): [n, n]; T as in `ppr`."""
    values, vectors = np.linalg.eigh(_transition(links))
    return (vectors * np.exp(time * (values - 1))) @ vectors.T


def diffuse(graph: Graph, kind: str, parameter: float, threshold: float) -> Graph:
    """The graph whose edges are the entries of its diffusion matrix that are at least ``threshold``.

    Directions are forgotten. Edges that were there keep their features; new ones have features of zero and unknown
    categories. ``edge_weights`` are the entries, ``diffusion`` is ``parameter``: alpha of `ppr`, time of `heat`.
    """
    n = len(graph)
    links = np.zeros((n, n))
    np.add.at(links, (graph.edges[:, 0], graph.edges[:, 1]), 1.0)
    if (graph.edge_types != UNDIRECTED).any():
        links = np.maximum(links, links.T)
    spread = ppr(links, parameter) if kind == "ppr" else heat(links, parameter)
    spread = (spread + spread.T) / 2  # what rounding made unequal must not put one way of an edge below the threshold
    edges = np.argwhere(spread >= threshold)
    low, high = edges.min(1), edges.max(1)
    _, ids = np.unique(low * n + high, return_inverse=True)
    source = np.full((n, n), -1)
    for row in range(len(graph.edges) - 1, -1, -1):  # backwards: of parallel edges the first stays
        a, b = graph.edges[row]
        source[a, b] = row
        source[b, a] = row if source[b, a] < 0 else source[b, a]
    old = source[edges[:, 0], edges[:, 1]]

    def carry(values: NDArray[Any] | None, fill: int) -> NDArray[Any] | None:
        if values is None:
            return None
        out = np.full((len(edges), values.shape[1]), fill, values.dtype)
        out[old >= 0] = values[old[old >= 0]]
        return out

    return replace(
        graph,
        edges=edges,
        edge_ids=ids.reshape(-1),
        edge_types=np.full(len(edges), UNDIRECTED),
        edge_features=carry(graph.edge_features, 0),
        edge_categories=carry(graph.edge_categories, -1),
        edge_weights=spread[edges[:, 0], edges[:, 1]].astype(np.float32),
        diffusion=parameter,
    )


def _transition(links: Matrix) -> Matrix:
    looped = links + np.eye(len(links))
    scale = 1 / np.sqrt(looped.sum(1))
    return scale[:, None] * looped * scale[None, :]
