"""Embeddings of nodes and edges, in the caller's order."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import torch

from mmrep import BadSampleError
from mmrep.config import component
from mmrep.modalities.graph.levels import edge_embeddings, node_embeddings
from mmrep.model import Model, ModelConfig, TowerConfig

GRAPHS = [
    {"edges": [(0, 1), (1, 2), (2, 3), (3, 4)], "num_nodes": 6},
    {"edges": [(0, 1)], "num_nodes": 2},
    {"edges": [(0, 2), (1, 2)], "num_nodes": 3},
]


def model(name: str = "graph-gnn", **fields) -> Model:
    torch.manual_seed(0)
    towers = {"graph": TowerConfig(encoder=component("encoders", name, width=16, depth=2, **fields)),
              "text": TowerConfig(encoder=component("encoders", "text-transformer", width=16, depth=1))}  # fmt: skip
    return Model(ModelConfig(dim=5, towers=towers))


@pytest.mark.parametrize("fields", [{"name": "graph-gnn"}, {"name": "graph-transformer", "class_token": True}])
def test_nodes_are_the_tokens_of_their_graph_in_the_caller_s_order(fields: dict):
    m = model(**fields, dropout=0.5).train()
    encoder = m.tower("graph").encoder
    found = node_embeddings(m, GRAPHS, batch_size=2)
    assert m.tower("graph").training
    assert [tuple(f.shape) for f in found] == [(6, 16), (2, 16), (3, 16)]
    m.eval()
    for raw, values in zip(GRAPHS, found, strict=True):
        tokens = encoder(encoder.collate([encoder.prepare(raw)])).tokens
        torch.testing.assert_close(values, tokens.values[0][~tokens.grid.special[0]].detach(), rtol=1e-5, atol=1e-5)
    one = node_embeddings(m.tower("graph"), GRAPHS[:1])[0]
    torch.testing.assert_close(one, found[0], rtol=1e-5, atol=1e-5)


def test_projected_nodes_live_in_the_common_space():
    m = model().eval()
    found = node_embeddings(m, GRAPHS, project=True)[2]
    assert found.shape == (3, 5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    lone = {"edges": [], "num_nodes": 1}
    pooled = torch.from_numpy(m.encode([lone], "graph"))
    torch.testing.assert_close(node_embeddings(m, [lone], project=True)[0], pooled, rtol=1e-5, atol=1e-5)


def test_edges_join_their_nodes():
    m = model()
    nodes = node_embeddings(m, GRAPHS)
    pairs = [[(0, 1), (5, 2)], [], np.array([[2, 0]])]
    product, gap, both = (edge_embeddings(m, GRAPHS, pairs, how=how) for how in ("hadamard", "difference", "concat"))
    a, b = nodes[0][5], nodes[0][2]
    torch.testing.assert_close(product[0][1], a * b)
    torch.testing.assert_close(gap[0][1], (a - b).abs())
    torch.testing.assert_close(both[0][1], torch.cat([torch.maximum(a, b), torch.minimum(a, b)]))
    assert [tuple(f.shape) for f in both] == [(2, 32), (0, 32), (1, 32)]


@pytest.mark.parametrize("how", ["hadamard", "difference", "concat"])
def test_of_an_undirected_graph_either_end_may_come_first(how: str):
    m = model()
    there, back = (edge_embeddings(m, GRAPHS[:1], [[pair]], how=how)[0] for pair in ((0, 3), (3, 0)))
    assert torch.equal(there, back)


def test_of_a_directed_graph_the_source_comes_first():
    m = model(directed="keep")
    raw = {**GRAPHS[2], "directed": True}
    nodes = node_embeddings(m, [raw])[0]
    there, back = edge_embeddings(m, [raw], [[(0, 2), (2, 0)]], how="concat")[0]
    torch.testing.assert_close(there, torch.cat([nodes[0], nodes[2]]))
    torch.testing.assert_close(back, torch.cat([nodes[2], nodes[0]]))


def test_without_pairs_every_edge_comes_once():
    m = model()
    found = edge_embeddings(m, GRAPHS)
    want = edge_embeddings(m, GRAPHS, [graph["edges"] for graph in GRAPHS])
    for f, w in zip(found, want, strict=True):
        torch.testing.assert_close(f, w)


def test_nodes_of_a_networkx_graph_go_by_their_names():
    m = model()
    graph = nx.Graph([("b", "a"), ("a", 7)])
    nodes = node_embeddings(m, [graph])[0]
    found = edge_embeddings(m, [graph], [[(7, "b")]])[0][0]
    torch.testing.assert_close(found, nodes[2] * nodes[0])
    with pytest.raises(ValueError, match="graph 0 has no node 'c'; it has 'b', 'a', 7"):
        edge_embeddings(m, [graph], [[("a", "c")]])


def test_what_cannot_be_is_said():
    m = model()
    with pytest.raises(ValueError, match="tower 'text' reads text, not graphs"):
        node_embeddings(m, GRAPHS, "text")
    with pytest.raises(ValueError, match="graph 1 has no node 2; it has 0 to 1"):
        edge_embeddings(m, GRAPHS, [[], [(0, 2)], []])
    with pytest.raises(ValueError, match="graph 1 has no node -1"):
        edge_embeddings(m, GRAPHS, [[], [(0, -1)], []])
    with pytest.raises(ValueError, match="did you mean 'hadamard'"):
        edge_embeddings(m, GRAPHS, how="hadamar")
    with pytest.raises(ValueError, match="edges of 2 graphs for 3 graphs"):
        edge_embeddings(m, GRAPHS, [[], []])
    with pytest.raises(BadSampleError, match=r"graph 2: .*node 9") as caught:
        node_embeddings(m, [*GRAPHS[:2], {"edges": [(0, 9)], "num_nodes": 3}])
    assert caught.value.cause == "dangling edge"


def test_no_graphs_give_no_embeddings():
    assert node_embeddings(model(), []) == []
