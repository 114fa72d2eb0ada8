"""The encoder contract, run on both graph encoders in every form of input."""

from __future__ import annotations

import sys

import pytest
import torch

from mmrep.config import ConfigError, component
from mmrep.registry import MissingPackageError, encoders
from mmrep.testing import check_encoder

SMALL = {"width": 32, "depth": 2}
GNN = [
    {},
    {"conv": "gcn", "max_degree": 2},
    {"conv": "sage", "node_features": 3, "norm": "graph"},
    {"conv": "gat", "edge_features": 2, "jump": "cat"},
    {"conv": "gat", "input": "molecule", "dropout": 0.1},
    {"input": "molecule", "jump": "max"},
    {"input": "molecule", "conv": "gcn", "norm": "none"},
    {"directed": "both", "node_categories": [4, 5], "degree": False},
    {"directed": "keep", "degree": False, "residual": False, "self_loops": "drop"},
    {"directed": "undirected", "node_features": 2, "node_categories": [3], "edge_features": 1, "edge_categories": [2]},
]
TRANSFORMER = [
    {},
    {"class_token": True, "laplacian": 4, "heads": 2},
    {"random_walk": 0, "distance": 0, "degree": False},
    {"input": "molecule", "class_token": True},
    {"directed": "both", "node_features": 3, "edge_features": 2, "dropout": 0.1, "drop_path": 0.1},
    {"directed": "keep", "distance": 0, "laplacian": 30, "layer_scale": 1e-4},
    {"edge_categories": [3], "distance": 0, "random_walk": 0, "class_token": True, "parallel": "keep"},
]
CASES = [("graph-gnn", fields) for fields in GNN] + [("graph-transformer", fields) for fields in TRANSFORMER]


@pytest.mark.parametrize(("name", "fields"), CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)])
def test_contract(name: str, fields: dict):
    torch.manual_seed(0)
    check_encoder(component("encoders", name, **SMALL, **fields).build(), n=6)


def test_every_registered_graph_encoder_is_among_the_cases():
    registered = {name for name, cls in encoders.load_all().items() if getattr(cls, "modality", "") == "graph"}
    assert registered == {name for name, _ in CASES}


@pytest.mark.parametrize("name", ["graph-gnn", "graph-transformer"])
def test_a_batch_of_nothing_can_be_collated(name: str):
    encoder = component("encoders", name, **SMALL, node_features=2).build()
    assert encoder(encoder.collate([])).tokens.values.shape[::2] == (0, 32)


@pytest.mark.parametrize("name", ["graph-gnn", "graph-transformer"])
def test_a_batch_without_any_edge_gives_every_parameter_a_gradient(name: str):
    encoder = component("encoders", name, **SMALL, edge_features=2, jump="cat").build() if name == "graph-gnn" else (
        component("encoders", name, **SMALL, edge_features=2).build())  # fmt: skip
    lone = encoder.collate([encoder.prepare({"edges": [], "num_nodes": 2})] * 2)
    encoder(lone).tokens.values.square().sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []  # or DDP would wait for it


@pytest.mark.parametrize(("module", "raw", "words"), [
    ("torch_geometric.nn", None, r'pip install "mmrep\[graph\]"'),
    ("rdkit.Chem", "CCO", r'pip install "mmrep\[molecules\]"'),
])  # fmt: skip
def test_an_absent_package_is_named_with_its_extra(module: str, raw: str | None, words: str, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=words):
        component("encoders", "graph-gnn", **SMALL, input="molecule").build().prepare(raw)


def test_examples_are_ragged_and_of_every_raw_form():
    encoder = component("encoders", "graph-gnn", **SMALL).build()
    made = encoder.examples(12, 0)
    kinds = {next((k for k in ("edge_index", "edges", "adjacency") if k in raw), "") if isinstance(raw, dict)
             else type(raw).__name__ for raw in made}  # fmt: skip
    assert kinds == {"edge_index", "edges", "adjacency", "Graph"}
    assert len({encoder.length(encoder.prepare(raw)) for raw in made}) > 4
    directed = component("encoders", "graph-gnn", **SMALL, directed="both").build()
    types = torch.cat([directed.prepare(raw)["edge_types"] for raw in directed.examples(12, 0)])
    assert set(types.tolist()) == {0, 1, 2}


@pytest.mark.parametrize(("fields", "words"), [
    ({"conv": "gcn", "edge_features": 2}, "conv 'gcn' cannot tell edges apart, so edge features"),
    ({"conv": "sage", "directed": "both"}, "so directed: both would be lost"),
    ({"conv": "gat", "width": 30}, "heads=4 does not divide width=30"),
    ({"input": "molecule", "node_features": 3}, "leave out node_features"),
    ({"checkpoint": "weights.pt"}, "not a .safetensors file"),
    ({"node_categories": [0]}, "node_categories"),
])  # fmt: skip
def test_a_config_that_cannot_be_is_refused(fields: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        component("encoders", "graph-gnn", **fields)
    if "conv" not in fields and "checkpoint" not in fields:
        with pytest.raises(ConfigError, match=words):
            component("encoders", "graph-transformer", **fields)


def test_graph_transformer_checks_its_heads():
    with pytest.raises(ConfigError, match="heads=3 does not divide width=32"):
        component("encoders", "graph-transformer", width=32, heads=3)
