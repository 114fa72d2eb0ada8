"""`graph-transformer`: its encodings against torch_geometric and networkx, its attention against a slow twin."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.transforms import AddLaplacianEigenvectorPE, AddRandomWalkPE

from mmrep.config import component
from mmrep.heads import MeanPool
from mmrep.modalities.graph._structure import SignFree, adjacency, laplacian, random_walk, shortest_paths
from mmrep.modalities.graph.transformer import GraphTransformer

PLAIN = {"edges": [(0, 1), (1, 2), (2, 3), (3, 0), (3, 4), (4, 5), (1, 6)], "num_nodes": 8}


def transformer(**fields) -> GraphTransformer:
    torch.manual_seed(0)
    encoder = component("encoders", "graph-transformer", **{"width": 16, "depth": 2, "heads": 2, **fields}).build()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return encoder.eval()


def ways(pairs: list[tuple[int, int]]) -> torch.Tensor:
    return torch.tensor([*pairs, *((j, i) for i, j in pairs)])


def random_pairs(n: int, seed: int, p: float = 0.3) -> list[tuple[int, int]]:
    return list(nx.gnp_random_graph(n, p, seed=seed).edges)


def test_random_walks_return_as_often_as_torch_geometric_says():
    pairs = random_pairs(12, 0)
    index = ways(pairs)
    links = adjacency(index[None], None, 14)  # two nodes of padding
    found = random_walk(links, 6)[0]
    want = AddRandomWalkPE(6, attr_name="pe")(Data(edge_index=index.T, num_nodes=12)).pe
    torch.testing.assert_close(found[:12], want)
    assert found[12:].abs().max() == 0


def test_a_walk_follows_directed_edges():
    """From 0 to 1 or 2, and back to 0 from 1 alone."""
    links = adjacency(torch.tensor([[[0, 1], [0, 2], [1, 0], [2, 1]]]), None, 3)
    want = AddRandomWalkPE(3, attr_name="pe")(
        Data(edge_index=torch.tensor([[0, 0, 1, 2], [1, 2, 0, 1]]), num_nodes=3)
    ).pe
    torch.testing.assert_close(random_walk(links, 3)[0], want)
    assert want[0].tolist() == [0, 0.5, 0.5]
    uneven = adjacency(torch.tensor([[[0, 1], [1, 0], [2, 1]]]), None, 3)
    assert random_walk(uneven, 2)[0].tolist() == [[0, 1], [0, 1], [0, 0]]


def test_the_laplacian_forgets_directions():
    pairs = random_pairs(9, 5)
    valid = torch.ones(1, 9, dtype=torch.bool)
    one, both = (laplacian(adjacency(e[None], None, 9), valid, 4) for e in (torch.tensor(pairs), ways(pairs)))
    torch.testing.assert_close(one[1], both[1])
    torch.testing.assert_close(one[0].abs(), both[0].abs(), rtol=1e-4, atol=1e-5)


def test_an_isolated_node_is_an_eigenvalue_of_zero():
    """As Chung defines the normalised Laplacian; torch_geometric puts a one there."""
    links = adjacency(torch.tensor([[[0, 1], [1, 0]]]), None, 3)
    _, values, _ = laplacian(links, torch.ones(1, 3, dtype=torch.bool), 2)
    torch.testing.assert_close(values, torch.tensor([[0.0, 2.0]]))


def test_eigenvectors_that_a_graph_lacks_add_nothing():
    torch.manual_seed(0)
    free = SignFree(3, 8)
    vectors, values = torch.randn(1, 4, 3), torch.rand(1, 3)
    has = torch.tensor([[True, False, False]])
    found = free(vectors, values, has)
    cut = (free.phi(torch.stack([vectors, values[:, None].expand_as(vectors)], -1))
           + free.phi(torch.stack([-vectors, values[:, None].expand_as(vectors)], -1)))[:, :, 0]  # fmt: skip
    torch.testing.assert_close(found, cut @ free.rho.weight[:, :16].T + free.rho.bias)
    torch.testing.assert_close(free(-vectors, values, has), found)
    assert (free(vectors.abs(), values, has) - found).abs().max() == 0
    assert (free(2 * vectors, values, has) - found).abs().max() > 1e-3


def test_a_graph_of_which_nothing_is_kept_stays_finite():
    encoder = transformer()
    tokens = encoder.tokenize(encoder.collate([encoder.prepare(PLAIN), encoder.prepare(PLAIN)]))
    keep = torch.tensor([[0, 1], [-1, -1]])
    found = encoder.encode(tokens, keep=keep).tokens
    # Attention over nothing is zero on this backend and NaN on others, so no row may be without a key.
    assert encoder._bias(tokens.keep(keep)).isfinite().any(-1).all()
    found.values[found.grid.valid].sum().backward()
    assert found.values.isfinite().all()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


def test_weights_make_a_weighted_walk():
    links = adjacency(torch.tensor([[[0, 1], [1, 0], [1, 2], [2, 1]]]), torch.tensor([[3.0, 3.0, 1.0, 1.0]]), 3)
    assert random_walk(links, 2)[0].tolist() == [[0, 0.75], [0, 1], [0, 0.25]]


def test_parallel_edges_and_padding_in_the_adjacency_matrix():
    links = adjacency(torch.tensor([[[0, 1], [0, 1], [-1, -1]]]), None, 2)
    assert links.tolist() == [[[0, 2], [0, 0]]]


def test_laplacian_eigenvectors_are_those_of_torch_geometric_up_to_sign():
    pairs = random_pairs(11, 4, 0.4)
    assert nx.is_connected(nx.Graph(pairs))
    index = ways(pairs)
    valid = torch.arange(13) < 11
    vectors, values, has = laplacian(adjacency(index[None], None, 13), valid[None], 4)
    want = AddLaplacianEigenvectorPE(4, attr_name="pe")(Data(edge_index=index.T, num_nodes=11)).pe
    torch.testing.assert_close(vectors[0, :11].abs() / 11**0.5, want.abs(), rtol=1e-4, atol=1e-4)
    assert has.all()
    assert vectors[0, 11:].abs().max() == 0
    spectrum = nx.normalized_laplacian_spectrum(nx.Graph(pairs))
    np.testing.assert_allclose(values[0], np.sort(spectrum)[1:5], atol=1e-5)


def test_an_eigenvalue_that_occurs_twice_gives_lengths_of_projections():
    ring = ways([(i, (i + 1) % 6) for i in range(6)])
    vectors, values, has = laplacian(adjacency(ring[None], None, 6), torch.ones(1, 6, dtype=torch.bool), 7)
    torch.testing.assert_close(values[0, :5], torch.tensor([0.5, 0.5, 1.5, 1.5, 2.0]))
    assert has[0].tolist() == [True] * 5 + [False] * 2
    assert values[0, 5:].tolist() == [0, 0]
    # A ring looks the same from every node, so a node's share of each plane is the same: sqrt(2 / 6) of the length.
    torch.testing.assert_close(vectors[0, :, :4], torch.full((6, 4), 2**0.5))
    assert vectors[0, :, 5:].abs().max() == 0


def test_shortest_paths_are_those_of_networkx():
    pairs = [*random_pairs(10, 1, 0.2), (10, 11)]
    graph = nx.Graph(pairs)
    graph.add_nodes_from(range(13))
    found = shortest_paths(adjacency(ways(pairs)[None], None, 13), 3)[0]
    lengths = dict(nx.all_pairs_shortest_path_length(graph))
    for i in range(13):
        for j in range(13):
            steps = lengths[i].get(j, 99)
            assert found[i, j] == (steps if steps <= 3 else 4)
    one_way = shortest_paths(adjacency(torch.tensor([[[0, 1], [1, 2]]]), None, 3), 4)[0]
    assert one_way.tolist() == [[0, 1, 2], [5, 0, 1], [5, 5, 0]]


CONFIGS = [
    {},
    {"laplacian": 3, "class_token": True},
    {"laplacian": 12, "random_walk": 0, "distance": 0},
    {"directed": "both", "edge_features": 1, "node_features": 2, "laplacian": 2},
]


def dressed(encoder: GraphTransformer, pairs: list, n: int, directed: bool) -> dict:
    torch.manual_seed(3)
    raw: dict = {"edges": pairs, "num_nodes": n, "directed": directed}
    if encoder.reading.edge_features:
        raw["edge_attr"] = torch.randn(len(pairs), 1)
    if encoder.reading.node_features:
        raw["x"] = torch.randn(n, 2)
    return raw


@pytest.mark.parametrize("pairs", [
    random_pairs(9, 2), [(i, (i + 1) % 8) for i in range(8)], [(0, i) for i in range(1, 7)], [(0, 1), (2, 3), (4, 5)]
], ids=["random", "ring", "star", "parts"])  # fmt: skip
@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_renumbering_nodes_renumbers_tokens_and_leaves_the_pooled_vector(fields: dict, pairs: list):
    """Rings, stars and equal parts have repeated eigenvalues, where a solver's basis depends on the order of nodes."""
    encoder = transformer(**fields)
    n = max(map(max, pairs)) + 1
    raw = dressed(encoder, pairs, n, "directed" in fields)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(4))
    place = order.argsort().tolist()
    turned = {**raw, "edges": [(place[i], place[j]) for i, j in pairs]}
    if "x" in raw:
        turned["x"] = raw["x"][order]
    first, second = (encoder(encoder.collate([encoder.prepare(r)])) for r in (raw, turned))
    special = int(encoder.special is not None)
    torch.testing.assert_close(
        second.tokens.values[:, special:], first.tokens.values[:, special:][:, order], rtol=1e-4, atol=1e-4
    )
    pool = MeanPool(MeanPool.Config(), encoder.width)
    torch.testing.assert_close(pool(second), pool(first), rtol=1e-4, atol=1e-4)


def test_structure_tells_nodes_apart():
    for fields in ({"random_walk": 8, "laplacian": 0}, {"random_walk": 0, "laplacian": 3}):
        encoder = transformer(degree=False, distance=0, **fields)
        tokens = encoder.tokenize(encoder.collate([encoder.prepare(PLAIN)])).values[0]
        # 4 and 6 have the same place up to the triangle; 5 ends a longer arm.
        assert (tokens[4] - tokens[5]).abs().max() > 1e-3
        assert (tokens[0] - tokens[3]).abs().max() > 1e-3
    nothing = transformer(degree=False, distance=0, random_walk=0)
    tokens = nothing.tokenize(nothing.collate([nothing.prepare(PLAIN)])).values[0]
    assert (tokens - tokens[0]).abs().max() == 0


def test_encodings_of_kept_nodes_are_those_of_the_whole_graph():
    encoder = transformer(laplacian=3, class_token=True)
    tokens = encoder.tokenize(encoder.collate([encoder.prepare(PLAIN)]))
    kept = tokens.keep(torch.tensor([[6, 1]]))  # nodes 5 and 0
    assert torch.equal(kept.values[0, 1:], tokens.values[0, [6, 1]])
    assert kept.grid.coords[0, :, 0].tolist() == [0, 5, 0]
    far = encoder.config.distance + 2
    assert kept.grid.distances[0].tolist() == [[far, far, far], [far, 0, 3], [far, 3, 0]]
    assert kept.grid.edges.shape == (2, 0)


def test_attention_is_biased_by_distance_and_edge_as_a_slow_twin_says():
    encoder = transformer(depth=1, edge_features=1, distance=2, class_token=True).double()
    attributes = torch.arange(7.0)[:, None] - 3
    other = {"edges": [(0, 1)], "num_nodes": 2, "edge_attr": [[0.5]]}
    tokens = encoder.tokenize(
        encoder.collate([encoder.prepare({**PLAIN, "edge_attr": attributes}), encoder.prepare(other)])
    )
    found = encoder.encode(tokens, layers=[1]).layers[0][0]
    block, x = encoder.transformer.blocks[0], tokens.values[0]
    heads, width = 2, 8
    q, k, v = block.attention.qkv(block.norm1(x)).view(9, 3, heads, width).permute(1, 2, 0, 3)
    graph = nx.Graph(PLAIN["edges"])
    graph.add_nodes_from(range(8))
    lengths = dict(nx.all_pairs_shortest_path_length(graph))
    mixed = torch.zeros(9, heads, width, dtype=torch.float64)
    for head in range(heads):
        logits = q[head] @ k[head].T / width**0.5
        for i in range(9):
            for j in range(9):
                row = 4 if 0 in (i, j) else min(lengths[i - 1].get(j - 1, 99), 3)
                logits[i, j] = logits[i, j] + encoder.distance.weight[row, head]
        for (i, j), attribute in zip(PLAIN["edges"], attributes, strict=True):
            edge = encoder.edge_embedding.features(attribute.double())[head]
            logits[i + 1, j + 1] = logits[i + 1, j + 1] + edge
            logits[j + 1, i + 1] = logits[j + 1, i + 1] + edge
        mixed[:, head] = logits.softmax(-1) @ v[head]
    want = x + block.attention.out(mixed.flatten(1))
    want = want + block.mlp(block.norm2(want))
    torch.testing.assert_close(found, want)


def test_the_bias_of_a_directed_edge_is_where_its_target_attends_to_its_source():
    encoder = transformer(directed="keep", edge_features=1, distance=3)
    raw = {"edges": [(0, 1)], "directed": True, "edge_attr": [[2.0]]}
    tokens = encoder.tokenize(encoder.collate([encoder.prepare(raw)]))
    bias = encoder._bias(tokens)[0]
    edge = encoder.edge_embedding.features(torch.tensor([2.0]))
    torch.testing.assert_close(bias[:, 1, 0], encoder.distance.weight[1] + edge)
    torch.testing.assert_close(bias[:, 0, 1], encoder.distance.weight[4])  # no way from 1 to 0


def test_edges_that_a_view_dropped_are_not_seen():
    encoder = transformer(laplacian=2)
    inputs = encoder.collate([encoder.prepare(PLAIN)])
    gone = (inputs["edge_ids"] == 3) | (inputs["edge_ids"] == 6)
    found = encoder({**inputs, "edges": inputs["edges"].masked_fill(gone[..., None], -1)}).tokens.values
    left = {**PLAIN, "edges": [e for i, e in enumerate(PLAIN["edges"]) if i not in (3, 6)]}
    torch.testing.assert_close(found, encoder(encoder.collate([encoder.prepare(left)])).tokens.values)


def test_edge_weights_change_walks_and_spectrum():
    for fields in ({"random_walk": 4}, {"random_walk": 0, "laplacian": 3}):
        encoder = transformer(distance=0, **fields)
        inputs = encoder.collate([encoder.prepare(PLAIN)])
        plain = encoder(inputs).tokens.values
        ones = torch.ones(inputs["edges"].shape[:2])
        torch.testing.assert_close(encoder({**inputs, "edge_weights": ones}).tokens.values, plain)
        uneven = 1 + inputs["edge_ids"].float()
        assert (encoder({**inputs, "edge_weights": uneven}).tokens.values - plain).abs().max() > 1e-3


def test_the_class_token_has_no_edges_and_moves_those_of_the_nodes():
    encoder = transformer(class_token=True)
    two = {"edges": [(0, 1)], "num_nodes": 2}
    grid = encoder.tokenize(encoder.collate([encoder.prepare(two), encoder.prepare(PLAIN)])).grid
    assert grid.special[:, 0].all()
    first = grid.edges[:, grid.edges[0] < 9]
    assert sorted(map(tuple, first.T.tolist())) == [(1, 2), (2, 1)]
    second = grid.edges[:, grid.edges[0] >= 9] - 9 - 1
    assert sorted(map(tuple, second.T.tolist())) == sorted(map(tuple, ways(PLAIN["edges"]).tolist()))


def test_position_tables_do_not_decay():
    assert transformer(class_token=True).no_weight_decay() == {"special", "distance.weight"}
    assert transformer(distance=0).no_weight_decay() == set()
