"""Raw graphs of every kind become the same record, or a clear refusal."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import scipy.sparse
import torch
from torch_geometric.data import Batch, Data, HeteroData

from mmrep import BadSampleError
from mmrep.modalities.graph.read import Reading, read
from mmrep.modalities.graph.record import Graph

PAIRS = [(0, 1), (1, 2), (3, 1)]
WAYS = {(0, 1), (1, 0), (1, 2), (2, 1), (3, 1), (1, 3)}
INDEX = np.array(sorted(WAYS)).T


def ways(graph: Graph) -> list[tuple[int, int]]:
    return sorted(map(tuple, graph.edges.tolist()))


def matrix(directed: bool = False) -> np.ndarray:
    out = np.zeros((5, 5))
    for i, j in PAIRS:
        out[i, j] = 2
        out[j, i] = 0 if directed else 2
    return out


def networkx_graph(kind=nx.Graph) -> nx.Graph:
    graph = kind()
    graph.add_nodes_from(range(5))
    graph.add_edges_from(PAIRS)
    return graph


@pytest.mark.parametrize("raw", [
    {"edges": PAIRS, "num_nodes": 5},
    {"edges": [*PAIRS, (1, 0), (0, 1)], "num_nodes": np.int64(5)},
    {"edge_index": INDEX, "num_nodes": torch.tensor(5)},
    {"edge_index": torch.tensor(INDEX, dtype=torch.int32), "num_nodes": 5},
    {"edge_index": INDEX.tolist(), "num_nodes": 5},
    {"edge_index": np.array(PAIRS).T, "num_nodes": 5, "directed": False},
    Data(edge_index=torch.tensor(INDEX), num_nodes=5),
    {"adjacency": matrix()},
    {"adjacency": matrix() > 0},
    {"adjacency": scipy.sparse.csr_matrix(matrix())},
    {"adjacency": scipy.sparse.coo_array(matrix())},
    {"adjacency": matrix(directed=True), "directed": False},
    networkx_graph(),
    networkx_graph(nx.MultiGraph),
])  # fmt: skip
def test_an_undirected_graph_has_both_ways_of_each_edge_once(raw):
    graph = read(raw, Reading())
    assert len(graph) == 5
    assert not graph.directed
    assert ways(graph) == sorted(WAYS)
    assert set(graph.edge_types) == {0}
    by_id: dict[int, set] = {}
    for number, (i, j) in zip(graph.edge_ids, graph.edges, strict=True):
        by_id.setdefault(int(number), set()).add(frozenset((int(i), int(j))))
    assert len(by_id) == 3
    assert all(len(ends) == 1 for ends in by_id.values())


DIRECTED = [
    {"edges": PAIRS, "num_nodes": 5, "directed": True},
    {"edge_index": np.array(PAIRS).T, "num_nodes": 5},
    Data(edge_index=torch.tensor(PAIRS).T, num_nodes=5),
    {"adjacency": matrix(directed=True)},
    {"adjacency": scipy.sparse.coo_array(matrix(directed=True))},
    networkx_graph(nx.DiGraph),
]


@pytest.mark.parametrize("raw", DIRECTED)
def test_a_directed_graph_is_read_as_the_config_says_or_refused(raw):
    with pytest.raises(BadSampleError, match="undirected, keep or both") as caught:
        read(raw, Reading())
    assert caught.value.cause == "directed graph"
    kept = read(raw, Reading(directed="keep"))
    assert kept.directed
    assert ways(kept) == sorted(PAIRS)
    assert set(kept.edge_types) == {1}
    both = read(raw, Reading(directed="both"))
    assert {(i, j, t) for (i, j), t in zip(both.edges.tolist(), both.edge_types.tolist(), strict=True)} == {
        *((i, j, 1) for i, j in PAIRS), *((j, i, 2) for i, j in PAIRS)
    }  # fmt: skip
    assert sorted(both.edge_ids.tolist()) == [0, 0, 1, 1, 2, 2]
    either = read(raw, Reading(directed="undirected"))
    assert ways(either) == sorted(WAYS)
    assert set(either.edge_types) == {0}


def test_opposite_directed_edges_are_two_edges():
    raw = {"edges": [(0, 1), (1, 0)], "directed": True}
    assert ways(read(raw, Reading(directed="keep"))) == [(0, 1), (1, 0)]
    both = read(raw, Reading(directed="both"))
    assert sorted(zip(both.edges[:, 0], both.edge_types, both.edge_ids, strict=True)) == [
        (0, 1, 0), (0, 2, 1), (1, 1, 1), (1, 2, 0)
    ]  # fmt: skip
    assert ways(read(raw, Reading(directed="undirected"))) == [(0, 1), (1, 0)]


def test_features_that_differ_by_direction_make_a_graph_directed():
    raw = {"edge_index": [[0, 1], [1, 0]], "edge_attr": [[1.0], [2.0]]}
    with pytest.raises(BadSampleError, match="directed graph"):
        read(raw, Reading(edge_features=1))
    same = read({**raw, "edge_attr": [[1.0], [1.0]]}, Reading(edge_features=1))
    assert not same.directed
    told = read({**raw, "directed": False}, Reading(edge_features=1))
    assert told.edge_features.tolist() == [[1.0], [1.0]], "the direction listed first gives the features"


def test_parallel_edges_are_merged_or_kept():
    raw = {"edges": [(0, 1), (0, 1), (1, 2)], "edge_attr": [[1.0], [2.0], [3.0]]}
    merged = read(raw, Reading(edge_features=1))
    assert ways(merged) == [(0, 1), (1, 0), (1, 2), (2, 1)]
    assert sorted(merged.edge_features[:, 0].tolist()) == [1, 1, 3, 3]
    kept = read(raw, Reading(edge_features=1, parallel="keep"))
    assert ways(kept) == [(0, 1), (0, 1), (1, 0), (1, 0), (1, 2), (2, 1)]
    assert sorted(kept.edge_features[:, 0].tolist()) == [1, 1, 2, 2, 3, 3]
    assert len(set(kept.edge_ids)) == 3
    listed_both_ways = {"edge_index": [[0, 1, 0, 1], [1, 0, 1, 0]], "edge_attr": [[1.0], [1.0], [2.0], [2.0]]}
    again = read(listed_both_ways, Reading(edge_features=1, parallel="keep"))
    assert sorted(zip(again.edges[:, 0], again.edge_features[:, 0], strict=True)) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    multi = nx.MultiGraph([(0, 1), (1, 0), (1, 2)])
    assert len(read(multi, Reading(parallel="keep")).edges) == 6
    assert len(read(multi, Reading()).edges) == 4
    directed = {"edges": [(0, 1), (0, 1), (1, 0)], "directed": True}
    assert ways(read(directed, Reading(directed="keep", parallel="keep"))) == [(0, 1), (0, 1), (1, 0)]


@pytest.mark.parametrize("directed", [False, True])
def test_a_self_loop_is_there_once_or_not_at_all(directed: bool):
    raw = {"edges": [(0, 0), (0, 1), (1, 1), (1, 1)], "directed": directed}
    loops = [way for way in ways(read(raw, Reading(directed="both"))) if way[0] == way[1]]
    assert loops == [(0, 0), (1, 1)]
    assert ways(read(raw, Reading(directed="both", self_loops="drop"))) == [(0, 1), (1, 0)]


def test_features_go_with_their_nodes_and_edges():
    how = Reading(node_features=2, node_categories=(3,), edge_features=1, edge_categories=(4, 2))
    x, kinds = np.arange(10).reshape(5, 2) / 2, [0, 1, 2, 0, 1]
    attr, sorts = [10.0, 20.0, 30.0], [[0, 1], [3, 0], [2, 1]]
    graph = read({"edges": PAIRS, "node_features": x, "node_categories": kinds, "edge_features": attr,
                  "edge_categories": sorts}, how)  # fmt: skip
    assert graph.features.dtype == np.float32
    np.testing.assert_array_equal(graph.features, x)
    assert graph.categories.tolist() == [[k] for k in kinds]
    for (i, j), value, sort in zip(graph.edges.tolist(), graph.edge_features, graph.edge_categories, strict=True):
        place = PAIRS.index((i, j) if (i, j) in PAIRS else (j, i))
        assert value.tolist() == [attr[place]]
        assert sort.tolist() == sorts[place]
    ways_of = {tuple(p): k for k, p in enumerate(PAIRS)} | {p[::-1]: k for k, p in enumerate(PAIRS)}
    data = Data(edge_index=torch.tensor(INDEX), x=torch.tensor(x, dtype=torch.bfloat16),
                node_categories=torch.tensor(kinds),
                edge_attr=torch.tensor([attr[ways_of[i, j]] for i, j in INDEX.T.tolist()]),
                edge_categories=torch.tensor([sorts[ways_of[i, j]] for i, j in INDEX.T.tolist()]))  # fmt: skip
    other = read(data, how)
    assert not other.directed
    np.testing.assert_array_equal(other.features, x)
    for (i, j), value in zip(other.edges.tolist(), other.edge_features, strict=True):
        assert value.tolist() == [attr[ways_of[i, j]]]


def test_categories_may_stand_in_the_main_array_if_no_floats_are_expected():
    graph = read({"edges": PAIRS, "x": [[1], [0], [2], [2]], "edge_attr": [1, 0, 1]},
                 Reading(node_categories=(3,), edge_categories=(2,)))  # fmt: skip
    assert graph.categories[:, 0].tolist() == [1, 0, 2, 2]
    assert graph.edge_categories[:, 0].tolist() == [1, 0, 1, 1, 0, 1]


def test_networkx_attributes_are_named_by_the_config_and_ids_are_kept():
    graph = nx.Graph()
    graph.add_node("b", size=1.5, place=[1, 2], kind=2)
    graph.add_node("a", size=2.5, place=[3, 4], kind=0)
    graph.add_edge("a", "b", length=7.0, bond=1, unread="x")
    how = Reading(
        node_features=3, node_attributes=("size", "place"), node_categories=(3,), node_labels=("kind",),
        edge_features=1, edge_attributes=("length",), edge_categories=(2,), edge_labels=("bond",),
    )  # fmt: skip
    record = read(graph, how)
    assert record.ids == ("b", "a")
    assert record.features.tolist() == [[1.5, 1, 2], [2.5, 3, 4]]
    assert record.categories.tolist() == [[2], [0]]
    assert record.edge_features.tolist() == [[7], [7]]
    assert record.edge_categories.tolist() == [[1], [1]]
    del graph.nodes["a"]["kind"]
    with pytest.raises(BadSampleError, match="1 of 2 nodes have no attribute 'kind'"):
        read(graph, how)
    lonely = nx.Graph()
    lonely.add_node("c", size=0.0, place=[0, 0], kind=1)
    assert read(lonely, how).edge_features.shape == (0, 1)


def test_values_of_an_adjacency_matrix_are_the_edge_feature_if_one_is_expected():
    assert set(read({"adjacency": matrix()}, Reading(edge_features=1)).edge_features[:, 0]) == {2}
    assert read({"adjacency": matrix()}, Reading()).edge_features is None
    lopsided = matrix()
    lopsided[0, 1] = 5
    with pytest.raises(BadSampleError, match="directed graph"):
        read({"adjacency": lopsided}, Reading(edge_features=1))


def test_zeros_that_a_sparse_matrix_stores_are_no_edges():
    stored = scipy.sparse.coo_array(([1.0, 1.0, 0.0, 0.0], ([0, 1, 1, 2], [1, 0, 2, 1])), shape=(3, 3))
    assert ways(read({"adjacency": stored}, Reading())) == [(0, 1), (1, 0)]


def test_the_number_of_nodes_is_that_of_the_features_or_the_last_one_named():
    assert len(read({"edges": PAIRS}, Reading())) == 4
    assert len(read({"edges": PAIRS, "x": np.zeros((6, 1))}, Reading(node_features=1))) == 6
    assert len(read({"edges": PAIRS, "x": np.zeros((6, 1))}, Reading(extra="ignore"))) == 6
    assert len(read(Data(x=torch.zeros(3, 1)), Reading(node_features=1))) == 3
    assert len(read({"edge_index": [[], []], "num_nodes": 2}, Reading())) == 2
    assert read({"edge_index": np.zeros((2, 0)), "num_nodes": 2}, Reading()).edges.shape == (0, 2)


def test_hetero_data_is_refused_with_a_fix_that_works():
    hetero = HeteroData()
    hetero["author"].num_nodes, hetero["paper"].num_nodes = 2, 3
    hetero["author", "writes", "paper"].edge_index = torch.tensor([[0, 1, 1], [0, 1, 2]])
    with pytest.raises(BadSampleError, match="to_homogeneous") as caught:
        read(hetero, Reading())
    assert caught.value.cause == "heterogeneous graph"
    whole = hetero.to_homogeneous()
    raw = {"edge_index": whole.edge_index, "node_categories": whole.node_type[:, None],
           "edge_categories": whole.edge_type[:, None]}  # fmt: skip
    graph = read(raw, Reading(node_categories=(2,), edge_categories=(1,), directed="keep"))
    assert graph.categories[:, 0].tolist() == [0, 0, 1, 1, 1]
    assert ways(graph) == [(0, 2), (1, 3), (1, 4)]


FLOATS = Reading(node_features=2)
KINDS = Reading(node_categories=(3, 2))
BAD = [
    (Reading(), {"edges": [(0, 1), (1, 5)], "num_nodes": 3}, "dangling edge", "node 5 of a graph of 3 nodes"),
    (Reading(), {"edges": [(0, 2)], "x": None, "num_nodes": 2}, "dangling edge", "node 2"),
    (Reading(), {"edges": np.array([[0, 2**64 - 1]], np.uint64), "num_nodes": 2}, "dangling edge", str(2**64 - 1)),
    (Reading(), {"edges": [(0, 1)], "num_nodes": 0}, "dangling edge", "node 1"),
    (Reading(), {"edges": [(0, -1)], "num_nodes": 3}, "negative index", "-1"),
    (Reading(), {"edges": [(0, -1)]}, "negative index", "-1"),
    (Reading(), {"edges": [(0.0, 1.0)]}, "edge dtype", "float64"),
    (Reading(), {"edges": [(True, False)]}, "edge dtype", "bool"),
    (Reading(), {"edges": [("a", "b")]}, "not numeric", "edges"),
    (Reading(), {"edges": [(0, 1), (1,)]}, "not numeric", "edges"),
    (Reading(), {"edges": [(0, 10**30)]}, "not numeric", "64 bits"),
    (Reading(), {"edges": [(0, 1, 2)] * 4}, "edge shape", r"\(4, 3\), not \[e, 2\]"),
    (Reading(), {"edges": INDEX}, "edge shape", "give it as 'edge_index'"),
    (Reading(), {"edge_index": INDEX.T}, "edge shape", "give it as 'edges'"),
    (Reading(), {"adjacency": np.ones((2, 3))}, "edge shape", "not \\[n, n\\]"),
    (Reading(), {"adjacency": np.ones((2, 2, 2))}, "edge shape", "not \\[n, n\\]"),
    (Reading(), {"adjacency": [[0, np.nan], [np.nan, 0]]}, "not finite", "adjacency"),
    (Reading(), {"adjacency": np.ones((2, 2)), "num_nodes": 3}, "node count", "adjacency: 2, num_nodes: 3"),
    (Reading(), {"edges": [], "num_nodes": 0}, "no nodes", "no nodes"),
    (Reading(), {"edges": []}, "no nodes", "give num_nodes"),
    (Reading(), {"adjacency": np.zeros((0, 0))}, "no nodes", "no nodes"),
    (Reading(), nx.Graph(), "no nodes", "no nodes"),
    (Reading(), {"edges": [], "num_nodes": 2.5}, "node count", "2.5"),
    (Reading(), {"edges": [], "num_nodes": -2}, "node count", "-2"),
    (FLOATS, {"edges": PAIRS, "x": np.zeros((4, 2)), "num_nodes": 5}, "node count", "num_nodes: 5"),
    (Reading(max_nodes=3), {"edges": PAIRS}, "too many nodes", "max_nodes is 3"),
    (Reading(max_nodes=3), networkx_graph(), "too many nodes", "max_nodes is 3"),
    (Reading(), {"edges": [(0, 10**12)]}, "too many nodes", "1000000000001 nodes"),
    (Reading(max_edges=2), {"edges": PAIRS}, "too many edges", "3 edges; max_edges is 2"),
    (FLOATS, {"edges": PAIRS}, "missing features", "2 columns of node_features"),
    (FLOATS, {"edges": PAIRS, "x": np.zeros((4, 3))}, "feature width", "3 columns; the encoder expects 2"),
    (FLOATS, {"edges": PAIRS, "x": np.zeros((4, 2, 1))}, "feature rows", "for 4 nodes"),
    (FLOATS, {"edges": PAIRS, "x": [[0, np.nan]] * 4}, "not finite", "node_features"),
    (FLOATS, {"edges": PAIRS, "x": [[0, np.inf]] * 4}, "not finite", "node_features"),
    (FLOATS, {"edges": PAIRS, "x": [[0, 1e39]] * 4}, "not finite", "float32"),
    (FLOATS, {"edges": PAIRS, "x": [["a", "b"]] * 4}, "not numeric", "x"),
    (KINDS, {"edges": PAIRS, "x": [[0, 2]] * 4}, "category range", r"\[0, 1\] is 2, not 0..1"),
    (KINDS, {"edges": PAIRS, "x": [[-1, 0]] * 4}, "category range", "is -1, not 0..2"),
    (KINDS, {"edges": PAIRS, "x": [[0.0, 1.0]] * 4}, "feature dtype", "categories are integers"),
    (Reading(edge_features=1), {"edges": PAIRS}, "missing features", "edge_features"),
    (Reading(edge_features=1), {"edges": PAIRS, "edge_attr": np.zeros((6, 1))}, "feature rows", "for 3 edges"),
    (Reading(), {"edges": PAIRS, "x": np.zeros((4, 7))}, "unexpected features", "set node_features: 7"),
    (Reading(), {"edges": PAIRS, "edge_attr": np.zeros((3, 2))}, "unexpected features", "set edge_features: 2"),
    (Reading(), {}, "not a graph", "needs one of edge_index, edges and adjacency"),
    (Reading(), {"edges": PAIRS, "edge_index": INDEX}, "not a graph", "needs one of"),
    (Reading(), "CCO", "not a graph", "set input: molecule"),
    (Reading(), np.eye(3), "not a graph", "{'adjacency': matrix}"),
    (Reading(), PAIRS, "not a graph", "list"),
    (Reading(), None, "not a graph", "NoneType"),
    (Reading(), Batch.from_data_list([Data(x=torch.zeros(1, 1))] * 2), "not a graph", "Batch of 2 graphs"),
]  # fmt: skip


@pytest.mark.parametrize(("how", "raw", "cause", "words"), BAD, ids=[f"{i}-{b[2]}" for i, b in enumerate(BAD)])
def test_what_is_wrong_is_said(how: Reading, raw, cause: str, words: str):
    with pytest.raises(BadSampleError, match=words) as caught:
        read(raw, how)
    assert caught.value.cause == cause


def test_the_transformed_adjacency_of_torch_geometric_is_refused_with_the_fix():
    class Transformed:
        edge_index, adj_t, num_nodes = None, object(), 3

    with pytest.raises(BadSampleError, match="undo the ToSparseTensor"):
        read(Transformed(), Reading())


def test_extra_features_are_ignored_where_the_config_says_so():
    graph = read({"edges": PAIRS, "x": np.zeros((4, 7)), "edge_attr": np.zeros((3, 2))}, Reading(extra="ignore"))
    assert graph.features is None
    assert graph.edge_features is None


def test_a_part_of_a_graph_numbers_its_nodes_and_edges_anew():
    graph = read({"edges": [(0, 1), (1, 2), (2, 3)], "x": [[0.0], [1.0], [2.0], [3.0]]}, Reading(node_features=1))
    part = graph.induced(np.array([2, 3]))
    assert part.nodes.tolist() == [2, 3]
    assert ways(part) == [(0, 1), (1, 0)]
    assert part.edge_ids.tolist() == [0, 0]
    assert part.features.tolist() == [[2.0], [3.0]]
