"""The record of one graph, between reading and tensors; sample-level views take and return it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORWARD, REVERSE, UNDIRECTED = 1, 2, 0
"""What an entry of `Graph.edges` is: an edge of a directed graph, its added reverse, a way along an undirected edge."""


@dataclass(frozen=True)
class Listed:
    """A graph as its source lists it, validated: ``edges`` int64 [e, 2], and columns of nodes and edges.

    directed: None = an undirected edge is listed in both directions, so look. ids: the source's names of the nodes.
    """

    n: int
    edges: NDArray[np.int64]
    features: NDArray[np.float32] | None = None
    categories: NDArray[np.int64] | None = None
    edge_features: NDArray[np.float32] | None = None
    edge_categories: NDArray[np.int64] | None = None
    directed: bool | None = None
    ids: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Graph:
    """One graph, ready to become tensors. A message goes from ``edges[:, 0]`` to ``edges[:, 1]``.

    Attributes:
        nodes: int64 [n]; where each node stood in the raw graph (sub-graphs have gaps).
        edges: int64 [e, 2], indices into ``nodes``; an undirected edge is there twice, once each way.
        edge_ids: int64 [e]; both ways of one edge have the same number, and every number is less than e.
        edge_types: int64 [e]; `UNDIRECTED`, `FORWARD` or `REVERSE`.
        features: float32 [n, F], or None. categories: int64 [n, K], or None.
        edge_features: float32 [e, F'], or None. edge_categories: int64 [e, K'], or None; -1 is unknown.
        directed: whether the raw graph was.
        ids: the raw graph's names of its nodes, in the order of ``nodes`` before any was dropped; None = 0, 1, 2 …
        edge_weights: float32 [e], of a diffusion view; None = 1.
        diffusion: the parameter of a diffusion view.
    """

    nodes: NDArray[np.int64]
    edges: NDArray[np.int64]
    edge_ids: NDArray[np.int64]
    edge_types: NDArray[np.int64]
    features: NDArray[np.float32] | None = None
    categories: NDArray[np.int64] | None = None
    edge_features: NDArray[np.float32] | None = None
    edge_categories: NDArray[np.int64] | None = None
    directed: bool = False
    ids: tuple[Any, ...] | None = None
    edge_weights: NDArray[np.float32] | None = None
    diffusion: float | None = None

    def __len__(self) -> int:
        return len(self.nodes)

    def induced(self, keep: NDArray[np.int64]) -> Graph:
        """The sub-graph of the nodes at ``keep``, in that order, and of the edges between them, numbered anew."""
        moved = np.full(len(self.nodes), -1)
        moved[keep] = np.arange(len(keep))
        edges = moved[self.edges]
        stay = (edges >= 0).all(1)

        def cut(values: Any, index: Any) -> Any:
            return None if values is None else values[index]

        return replace(
            self,
            nodes=self.nodes[keep],
            edges=edges[stay],
            edge_ids=np.unique(self.edge_ids[stay], return_inverse=True)[1].reshape(-1),
            edge_types=self.edge_types[stay],
            features=cut(self.features, keep),
            categories=cut(self.categories, keep),
            edge_features=cut(self.edge_features, stay),
            edge_categories=cut(self.edge_categories, stay),
            edge_weights=cut(self.edge_weights, stay),
        )
