"""`graph-augment`: drawn from each seed alone, both ways of an edge together, never without a node."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_geometric.data import Data
from torch_geometric.transforms import GDC

from mmrep.config import ConfigError, component
from mmrep.modalities.graph._subgraph import diffuse, hops, walk
from mmrep.modalities.graph.read import Reading, read
from mmrep.modalities.graph.views import GraphAugment

FIELDS = {"width": 16, "depth": 2, "node_features": 3, "node_categories": [4, 5], "edge_features": 2}
ENCODER = component("encoders", "graph-gnn", **FIELDS).build().eval()
LADDER = {"edges": [(i, i + 1) for i in range(19)] + [(i, i + 5) for i in range(15)], "num_nodes": 20}


def view(**fields) -> GraphAugment:
    return component("views", "graph-augment", **{"edge_drop": 0.0, **fields}).build()


def inputs(n: int = 6, seed: int = 0, encoder=ENCODER):
    return encoder.collate([encoder.prepare(raw) for raw in encoder.examples(n, seed)])


def seeds(n: int) -> torch.Tensor:
    return torch.arange(n) * 7_919 + 2**40


def many(count: int = 200):
    item = component("encoders", "graph-gnn", width=8, depth=1).build()
    return item.collate([item.prepare(LADDER)] * count)


def ways(edges: torch.Tensor) -> set[tuple[int, int]]:
    return {(i, j) for i, j in edges.tolist() if i >= 0}


ALL = {"edge_drop": 0.3, "node_drop": 0.3, "feature_mask": 0.4, "column_mask": 0.3}


def test_with_everything_off_nothing_changes():
    given = inputs()
    found, params = view().batch(given, seeds(6))
    assert found.keys() == given.keys()
    for key in given:
        assert torch.equal(found[key], given[key]), key
    assert torch.equal(params["nodes"], given["nodes"])
    assert torch.equal(params["edges"], given["edges"][..., 0] >= 0)
    assert not params["masked"].any()
    assert not params["columns"].any()
    record = read(LADDER, Reading())
    assert view().sample(record, 3) is record


def test_a_graph_is_changed_alike_alone_and_in_any_batch():
    raw = ENCODER.examples(6, 0)
    items = [ENCODER.prepare(r) for r in raw]
    together, params = view(**ALL).batch(ENCODER.collate(items), seeds(6))
    for i, item in enumerate(items):
        alone, own = view(**ALL).batch(ENCODER.collate([item]), seeds(6)[i : i + 1])
        n, e = len(item["nodes"]), len(item["edges"])
        for key in alone:
            assert torch.equal(alone[key][0], together[key][i, : (e if key.startswith("edge") else n)]), key
        assert torch.equal(own["nodes"][0], params["nodes"][i, :n])
        assert torch.equal(own["edges"][0], params["edges"][i, :e])
        assert torch.equal(own["masked"][0], params["masked"][i, :n])
        assert torch.equal(own["columns"][0], params["columns"][i])
        assert not together["valid"][i, n:].any()
    again, _ = view(**ALL).batch(ENCODER.collate(items), seeds(6) + 1)
    assert not torch.equal(again["edges"], together["edges"])
    assert not torch.equal(again["valid"], together["valid"])


def test_both_ways_of_an_edge_are_dropped_together_and_as_often_as_asked():
    given = many()
    found, params = view(edge_drop=0.3).batch(given, seeds(200))
    for row in found["edges"]:
        left = ways(row)
        assert left == {(j, i) for i, j in left}
    assert abs(params["edges"].float().mean() - 0.7) < 0.02
    assert len({tuple(row.tolist()) for row in params["edges"]}) == 200
    assert torch.equal(found["edges"][params["edges"]], given["edges"][params["edges"]])
    assert found["valid"].all()


def test_edges_of_a_directed_graph_are_dropped_one_by_one_and_with_their_reverse():
    raw = {"edges": [(0, 1), (1, 0)], "directed": True}
    for directed, together in (("keep", False), ("both", True)):
        encoder = component("encoders", "graph-gnn", width=8, depth=1, directed=directed).build()
        given = encoder.collate([encoder.prepare(raw)] * 64)
        _, params = view(edge_drop=0.5).batch(given, seeds(64))
        left = params["edges"]
        assert (left[:, 0] != left[:, 1]).any(), "two edges fare differently"
        if together:
            assert torch.equal(left[:, :2], left[:, 2:])


def test_dropped_nodes_lose_their_edges_and_one_node_stays():
    given = inputs(8)
    found, params = view(node_drop=0.5).batch(given, seeds(8))
    assert found["valid"].any(1).all()
    assert found["valid"].sum() < given["valid"].sum()
    assert (found["valid"] <= given["valid"]).all()
    assert torch.equal(params["nodes"] >= 0, found["valid"])
    for edges, valid, old in zip(found["edges"], found["valid"], given["edges"], strict=True):
        assert ways(edges) == {(i, j) for i, j in ways(old) if valid[i] and valid[j]}
    bare, _ = view(node_drop=1.0, edge_drop=1.0).batch(given, seeds(8))
    assert bare["valid"].sum(1).tolist() == [1] * 8
    assert ENCODER(bare).tokens.values[bare["valid"]].isfinite().all()
    rates = view(node_drop=0.3).batch(many(), seeds(200))[0]["valid"].float().mean()
    assert abs(rates - 0.7) < 0.02


def test_masked_nodes_have_no_features_and_unknown_categories():
    given = inputs()
    found, params = view(feature_mask=0.5).batch(given, seeds(6))
    masked = params["masked"]
    assert 0 < masked.sum() < given["valid"].sum()
    assert not (masked & ~given["valid"]).any()
    assert (found["features"][masked] == 0).all()
    assert (found["categories"][masked] == -1).all()
    for key in ("features", "categories"):
        assert torch.equal(found[key][~masked], given[key][~masked])
    assert (ENCODER(found).tokens.values - ENCODER(given).tokens.values).abs().max() > 1e-3


def test_a_masked_column_is_masked_at_every_node():
    given = inputs()
    found, params = view(column_mask=0.5).batch(given, seeds(6))
    columns = params["columns"]
    assert columns.shape == (6, 5)
    assert 0 < columns.sum() < 30
    for i in range(6):
        valid = given["valid"][i]
        for c in range(3):
            want = torch.zeros_like(given["features"][i, :, c]) if columns[i, c] else given["features"][i, :, c]
            assert torch.equal(found["features"][i, :, c], want)
        for c in range(2):
            want = (
                torch.full_like(given["categories"][i, :, c], -1) if columns[i, 3 + c] else given["categories"][i, :, c]
            )
            assert torch.equal(found["categories"][i, valid, c], want[valid])


def test_every_choice_is_independent_of_the_others():
    given = many()
    alone = view(edge_drop=0.3).batch(given, seeds(200))[1]["edges"].float()
    nodes = view(node_drop=0.3).batch(given, seeds(200))[0]["valid"].float()
    masked = view(feature_mask=0.3).batch(given, seeds(200))[1]["masked"].float()
    n = nodes.shape[1]
    for a, b in ((alone[:, :n], nodes), (nodes, masked), (alone[:, :n], masked)):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 0.06


def test_a_batch_of_none_is_left_so():
    found, params = view(**ALL).batch({key: value[:0] for key, value in inputs().items()}, seeds(0))
    assert found["valid"].shape[0] == params["edges"].shape[0] == 0


def test_hops_are_those_of_the_graph():
    record = read(LADDER, Reading())
    for seed in range(10):
        start = int(np.random.default_rng(seed).integers(20))
        reach = {start}
        for steps in range(3):
            assert hops(record, steps, np.random.default_rng(seed)).tolist() == sorted(reach)
            reach |= {b for a, b in record.edges.tolist() if a in reach}
    one_way = read({"edges": [(0, 1), (1, 2)], "directed": True}, Reading(directed="keep"))
    assert all(1 in hops(one_way, 1, np.random.default_rng(s)) for s in range(6))


def test_a_walk_meets_a_connected_part_of_the_size_asked_for():
    record = read(LADDER, Reading())
    sizes = set()
    for seed in range(20):
        nodes = walk(record, 0.4, 0.1, np.random.default_rng(seed))
        assert len(nodes) == 8
        part = record.induced(nodes)
        reach = {0}
        for _ in range(8):
            reach |= {b for a, b in part.edges.tolist() if a in reach}
        assert reach == set(range(8))
        sizes.add(tuple(nodes))
    assert len(sizes) > 10
    parts = read({"edges": [(0, 1), (2, 3)], "num_nodes": 5}, Reading())
    assert {len(walk(parts, 1.0, 0.1, np.random.default_rng(s))) for s in range(20)} == {1, 2}
    assert len(walk(parts, 0.0, 0.0, np.random.default_rng(0))) == 1
    one_way = read({"edges": [(0, 1), (1, 2)], "directed": True}, Reading(directed="keep"))
    assert all(len(walk(one_way, 1.0, 0.0, np.random.default_rng(s))) == 3 for s in range(6))


@pytest.mark.parametrize("kind", ["walk", "hops"])
def test_a_subgraph_keeps_features_with_their_nodes_and_tells_which_are_left(kind: str):
    raw = {**LADDER, "x": np.arange(60).reshape(20, 3) / 60, "node_categories": np.arange(40).reshape(20, 2) % 4,
           "edge_attr": np.arange(68).reshape(34, 2) / 68}  # fmt: skip
    whole = ENCODER.prepare(raw)
    v = view(subgraph=kind, size=0.5)
    item = ENCODER.prepare(raw, view=v, seed=11)
    again = ENCODER.prepare(raw, view=v, seed=11)
    assert all(torch.equal(item[key], again[key]) for key in item)
    assert not torch.equal(item["nodes"], ENCODER.prepare(raw, view=v, seed=12)["nodes"])
    left = item["nodes"]
    assert 1 <= len(left) < 20
    assert torch.equal(item["features"], whole["features"][left])
    old = {(int(a), int(b)): f for (a, b), f in zip(whole["edges"].tolist(), whole["edge_features"], strict=True)}
    got = {
        (int(left[a]), int(left[b])): f for (a, b), f in zip(item["edges"].tolist(), item["edge_features"], strict=True)
    }
    inside = {way for way in old if way[0] in left and way[1] in left}
    assert got.keys() == inside
    assert all(torch.equal(got[way], old[way]) for way in inside)
    _, params = v.batch(ENCODER.collate([item]), seeds(1))
    assert params["nodes"][0].tolist() == left.tolist()


@pytest.mark.parametrize(("kind", "options"), [
    ("ppr", {"method": "ppr", "alpha": 0.2}), ("heat", {"method": "heat", "t": 3.0})
])  # fmt: skip
def test_a_diffusion_is_that_of_torch_geometric(kind: str, options: dict):
    record = read(LADDER, Reading())
    parameter = options["alpha"] if kind == "ppr" else options["t"]
    found = diffuse(record, kind, parameter, 0.02)
    transform = GDC(self_loop_weight=1, normalization_in="sym", normalization_out=None, diffusion_kwargs=options,
                    sparsification_kwargs={"method": "threshold", "eps": 0.02}, exact=True)  # fmt: skip
    data = transform(Data(edge_index=torch.from_numpy(record.edges).T, num_nodes=20))
    want = {(i, j): w for i, j, w in zip(*data.edge_index.tolist(), data.edge_attr.tolist(), strict=True)}
    got = {(i, j): w for (i, j), w in zip(found.edges.tolist(), found.edge_weights.tolist(), strict=True)}
    assert got.keys() == want.keys()
    assert 0 < len(got) < 400
    np.testing.assert_allclose([got[w] for w in want], list(want.values()), rtol=1e-4)
    assert found.diffusion == parameter


def test_a_heat_kernel_is_an_exponential_of_the_laplacian():
    record = read({"edges": [(0, 1), (1, 2)]}, Reading())
    looped = np.array([[1, 1, 0], [1, 1, 1], [0, 1, 1]]) / np.sqrt(np.outer([2, 3, 2], [2, 3, 2]))
    want = scipy.linalg.expm(2.0 * (looped - np.eye(3)))
    found = diffuse(record, "heat", 2.0, 1e-9)
    got = np.zeros((3, 3))
    got[tuple(found.edges.T)] = found.edge_weights
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_diffusion_keeps_what_it_can_of_edges():
    how = Reading(edge_features=1, edge_categories=(9,))
    raw = {"edges": [(0, 1), (1, 2)], "edge_attr": [[5.0], [6.0]], "edge_categories": [[7], [8]]}
    found = diffuse(read(raw, how), "ppr", 0.2, 1e-6)
    assert len(found.edges) == 9
    by_way = {tuple(way): (float(f[0]), int(c[0])) for way, f, c in zip(
        found.edges.tolist(), found.edge_features, found.edge_categories, strict=True)}  # fmt: skip
    assert by_way[0, 1] == by_way[1, 0] == (5, 7)
    assert by_way[2, 1] == by_way[1, 2] == (6, 8)
    assert by_way[0, 2] == by_way[1, 1] == (0, -1)
    pairs = {tuple(sorted(way)): number for way, number in zip(found.edges.tolist(), found.edge_ids, strict=True)}
    assert len(set(pairs.values())) == 6
    assert set(found.edge_types) == {0}
    directed = {"edges": [(0, 1), (1, 2)], "directed": True}
    for mode in ("keep", "both", "undirected"):
        spread = diffuse(read(directed, Reading(directed=mode)), "ppr", 0.2, 1e-6)
        np.testing.assert_allclose(np.sort(spread.edge_weights), np.sort(found.edge_weights), rtol=1e-6)


def test_the_parameter_of_a_diffusion_is_drawn_from_the_seed_and_returned():
    encoder = component("encoders", "graph-gnn", conv="gcn", width=8, depth=1).build().eval()
    v = view(diffusion="ppr", alpha=(0.1, 0.4), edge_drop=0.2)
    items = [encoder.prepare(raw, view=v, seed=s) for s, raw in enumerate([LADDER] * 20)]
    found, params = v.batch(encoder.collate(items), seeds(20))
    alphas = params["diffusion"]
    assert alphas.min() >= 0.1
    assert alphas.max() <= 0.4
    assert alphas.std() > 0.03
    first = diffuse(read(LADDER, Reading()), "ppr", float(alphas[0]), 0.01)
    np.testing.assert_allclose(items[0]["edge_weights"], first.edge_weights, rtol=1e-5)
    for row in found["edges"]:
        left = ways(row)
        assert left == {(j, i) for i, j in left}
    out = encoder(found).tokens.values
    assert out.isfinite().all()
    weightless = {key: value for key, value in found.items() if key != "edge_weights"}
    assert (encoder(weightless).tokens.values - out).abs().max() > 1e-3


def test_a_subgraph_is_the_same_with_and_without_a_diffusion():
    record = read(LADDER, Reading())
    plain = view(subgraph="walk", size=0.5).sample(record, 5)
    spread = view(subgraph="walk", size=0.5, diffusion="heat").sample(record, 5)
    assert plain.nodes.tolist() == spread.nodes.tolist()
    assert spread.edge_ids.max() < len(spread.edges)
    whole = diffuse(record, "heat", 5.0, 0.01)
    weights = {tuple(way): w for way, w in zip(whole.edges.tolist(), whole.edge_weights, strict=True)}
    for (a, b), w in zip(spread.edges.tolist(), spread.edge_weights, strict=True):
        assert w == weights[spread.nodes[a], spread.nodes[b]], "the diffusion is that of the whole graph"


@pytest.mark.parametrize("name", ["graph-gnn", "graph-transformer"])
def test_encoders_read_what_views_leave(name: str):
    encoder = component("encoders", name, **FIELDS).build().eval()
    v = view(**ALL, subgraph="walk", diffusion="ppr")
    items = [encoder.prepare(raw, view=v, seed=i) for i, raw in enumerate(encoder.examples(6, 0))]
    found, _ = v.batch(encoder.collate(items), seeds(6))
    together = encoder(found).tokens
    assert together.values.isfinite().all()
    for i in range(6):
        alone, _ = v.batch(encoder.collate([items[i]]), seeds(6)[i : i + 1])
        tokens = encoder(alone).tokens
        torch.testing.assert_close(
            together.values[i][together.grid.valid[i]], tokens.values[0][tokens.grid.valid[0]], rtol=1e-4, atol=1e-5
        )


def test_a_range_the_wrong_way_round_is_refused():
    with pytest.raises(ConfigError, match=r"alpha: the lowest, 0.4, is above the highest, 0.1"):
        component("views", "graph-augment", alpha=(0.4, 0.1))
    assert view(role="local").role == "local"
