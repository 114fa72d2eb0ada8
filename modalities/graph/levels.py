"""Embeddings of nodes and edges; those of graphs are what `Model.encode` gives.

Example::

    nodes = node_embeddings(model, [graph], "graph")[0]                       # [n, D], in the graph's own order
    links = edge_embeddings(model, [graph], [[(0, 1), (4, 2)]], "graph")[0]   # [2, D]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmrep.encoder import BadSampleError
from mmrep.modalities.graph._base import GraphEncoder, tensors
from mmrep.modalities.graph.read import read
from mmrep.model import Model, Tower
from mmrep.registry import near

if TYPE_CHECKING:
    from mmrep.modalities.graph.record import Graph

How = Literal["hadamard", "difference", "concat"]
_HOW = ("hadamard", "difference", "concat")


def node_embeddings(
    model: Model | Tower, graphs: Sequence[Any], tower: str = "graph", *, project: bool = False, batch_size: int = 32
) -> list[Tensor]:
    """The tokens of the nodes of each graph.

    Args:
        model: a model, or one tower of it. It runs in eval mode, without gradient, and is left in the mode it was in.
        graphs: raw graphs.
        tower: which tower of a model: its name or modality.
        project: map each node into the common space by the tower's projector (and normalise it, if the model does).
            The projector was trained on pooled vectors, so that means most where the pool is the mean.
        batch_size: graphs per forward pass.

    Returns:
        One float32 [n, D] a graph, on the CPU, in the order of its nodes (of a networkx graph, that of
        ``graph.nodes``). D is the encoder's width, or that of the common space.

    Raises:
        ValueError: the tower is none of graphs.
        BadSampleError: a graph cannot be read; the message has its position.
    """
    chosen, encoder = _encoder(model, tower)
    return _nodes(chosen, encoder, _read_all(encoder, graphs), project, batch_size)


def edge_embeddings(
    model: Model | Tower,
    graphs: Sequence[Any],
    edges: Sequence[Any] | None = None,
    tower: str = "graph",
    *,
    how: How = "hadamard",
    project: bool = False,
    batch_size: int = 32,
) -> list[Tensor]:
    """Embeddings of pairs of nodes, which may be joined or not, from those of their nodes (node2vec, arXiv:1607.00653).

    For an undirected graph an embedding does not depend on which node is named first.

    Args:
        model: as in `node_embeddings`.
        graphs: raw graphs.
        edges: for each graph pairs of nodes: places, or a networkx graph's own names. None: the graph's edges, each
            once, in the order they are read.
        tower: as in `node_embeddings`.
        how: ``hadamard``, the product; ``difference``, the absolute difference; ``concat``, twice as wide: source
            then target of a directed graph, and the greater then the smaller of both, number by number, else.
        project: as in `node_embeddings`.
        batch_size: graphs per forward pass.

    Returns:
        One float32 [number of pairs, D or 2 D] a graph, on the CPU.

    Raises:
        ValueError: a pair names a node that the graph does not have, or ``how`` is unknown; and as in
            `node_embeddings`.
    """
    if how not in _HOW:
        raise ValueError(f"how={how!r} is unknown{near(how, _HOW)} One of: {', '.join(_HOW)}")
    chosen, encoder = _encoder(model, tower)
    read_graphs = _read_all(encoder, graphs)
    if edges is not None and len(edges) != len(read_graphs):
        raise ValueError(f"edges of {len(edges)} graphs for {len(read_graphs)} graphs")
    pairs = [_pairs(graph, None if edges is None else edges[i], i) for i, graph in enumerate(read_graphs)]
    nodes = _nodes(chosen, encoder, read_graphs, project, batch_size)
    return [
        _join(values[pair[:, 0]], values[pair[:, 1]], how, graph.directed and encoder.reading.directed != "undirected")
        for values, pair, graph in zip(nodes, pairs, read_graphs, strict=True)
    ]


def _encoder(model: Model | Tower, tower: str) -> tuple[Tower, GraphEncoder]:
    chosen = model.tower(tower) if isinstance(model, Model) else model
    if not isinstance(chosen.encoder, GraphEncoder):
        raise ValueError(f"tower {tower!r} reads {chosen.modality}, not graphs: it has no nodes")
    return chosen, chosen.encoder


def _read_all(encoder: GraphEncoder, graphs: Sequence[Any]) -> list[Graph]:
    found: list[Graph] = []
    for position, raw in enumerate(graphs):
        try:
            found.append(read(raw, encoder.reading))
        except BadSampleError as error:
            raise BadSampleError(error.cause, f"graph {position}: {error}") from error
    return found


@torch.no_grad()
def _nodes(
    tower: Tower, encoder: GraphEncoder, graphs: Sequence[Graph], project: bool, batch_size: int
) -> list[Tensor]:
    device = next(tower.parameters()).device
    order = sorted(range(len(graphs)), key=lambda i: len(graphs[i]))  # similar sizes together: less padding
    found: dict[int, Tensor] = {}
    was_training = tower.training
    tower.eval()
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            inputs = encoder.collate([tensors(graphs[i]) for i in rows])
            tokens = tower.encoding({name: value.to(device) for name, value in inputs.items()}).tokens
            for values, grid_row, i in zip(tokens.values, tokens.grid.valid & ~tokens.grid.special, rows, strict=True):
                kept = values[grid_row]
                found[i] = (tower.project(kept) if project else kept).float().cpu()
    finally:
        tower.train(was_training)
    return [found[i] for i in range(len(graphs))]


def _pairs(graph: Graph, given: Any, position: int) -> Tensor:
    """Places of the two nodes of each pair, int64 [p, 2]."""
    if given is None:
        _, first = np.unique(graph.edge_ids, return_index=True)
        return torch.from_numpy(graph.edges[np.sort(first)])
    place = None if graph.ids is None else {name: i for i, name in enumerate(graph.ids)}
    rows: list[tuple[int, int]] = []
    for pair in given.tolist() if hasattr(given, "tolist") else given:
        u, v = (_place(node, place, len(graph), position) for node in pair)
        rows.append((u, v))
    return torch.tensor(rows, dtype=torch.long).view(-1, 2)


def _place(node: Any, place: dict[Any, int] | None, n: int, position: int) -> int:
    if place is not None and node in place:
        return place[node]
    if place is None and isinstance(node, (int, np.integer)) and 0 <= node < n:
        return int(node)
    allowed = f"0 to {n - 1}" if place is None else ", ".join(repr(name) for name in list(place)[:5])
    raise ValueError(
        f"graph {position} has no node {node!r}; it has {allowed}{'' if place is None or n <= 5 else ', …'}"
    )


def _join(source: Tensor, target: Tensor, how: How, directed: bool) -> Tensor:
    if how == "hadamard":
        return source * target
    if how == "difference":
        return (source - target).abs()
    if directed:
        return torch.cat([source, target], -1)
    return torch.cat([torch.maximum(source, target), torch.minimum(source, target)], -1)
