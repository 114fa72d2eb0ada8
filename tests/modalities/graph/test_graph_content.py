"""What nodes are made from: the element of an atom, or features; a hidden node keeps its place and its edges."""

from __future__ import annotations

import pytest
import torch

from mmrep.config import component
from mmrep.modalities.graph.molecules import ATOM_CATEGORIES

BOTH = ["graph-gnn", "graph-transformer"]


def small(name: str, **fields):
    torch.manual_seed(0)
    return component("encoders", name, width=32, depth=2, heads=2, **fields).build().eval()


def batch(encoder, *raws):
    return encoder.collate([encoder.prepare(raw) for raw in raws])


@pytest.mark.parametrize(("name", "fields"), [*((n, {}) for n in BOTH), ("graph-transformer", {"class_token": True})])
def test_the_content_of_an_atom_is_its_element(name: str, fields: dict):
    pytest.importorskip("rdkit")
    from rdkit import Chem

    encoder = small(name, input="molecule", **fields)
    texts = ["CCO", "c1ccncc1F", "[Na+].[Cl-]"]
    inputs = batch(encoder, *texts)
    content, grid = encoder.content(inputs), encoder.tokenize(inputs).grid
    assert content.vocabulary == next(iter(ATOM_CATEGORIES.values()))
    for i, text in enumerate(texts):
        numbers = [atom.GetAtomicNum() for atom in Chem.MolFromSmiles(text).GetAtoms()]
        plain = grid.valid[i] & ~grid.special[i]
        codes = inputs["categories"][i, : len(numbers), 0]
        assert torch.equal(content.values[i][plain], codes)
        assert len(set(zip(codes.tolist(), numbers, strict=True))) == len(set(numbers)) == len(set(codes.tolist()))
        assert content.observed[i][plain].all()


def path(n: int, **more) -> dict:
    return {"edges": [[i, i + 1] for i in range(n - 1)], "num_nodes": n, **more}


@pytest.mark.parametrize("name", BOTH)
def test_an_unknown_category_is_not_observed(name: str):
    encoder = small(name, node_categories=[4])
    inputs = batch(encoder, path(3, node_categories=[[1], [3], [0]]))
    inputs["categories"][0, 1, 0] = -1  # as a view masks it
    content = encoder.content(inputs)
    assert content.values[0].tolist() == [1, 0, 0]
    assert content.observed[0].tolist() == [True, False, True]


@pytest.mark.parametrize("name", BOTH)
def test_features_are_the_content_where_there_are_no_categories(name: str):
    encoder = small(name, node_features=2)
    x = torch.randn(4, 2)
    content = encoder.content(batch(encoder, path(4, x=x.numpy())))
    assert torch.equal(content.values[0], x)
    assert content.vocabulary is None


@pytest.mark.parametrize("name", BOTH)
def test_nodes_without_attributes_have_nothing_to_hide(name: str):
    encoder = small(name)
    inputs = batch(encoder, path(4))
    assert not encoder.supports & {"content", "mask_token"}
    assert encoder.tokenize(inputs).positions is None
    with pytest.raises(ValueError, match="does not support 'content'"):
        encoder.content(inputs)


@pytest.mark.parametrize(("name", "fields"), [
    ("graph-gnn", {}), ("graph-gnn", {"conv": "gat", "edge_features": 1}), ("graph-gnn", {"degree": False}),
    ("graph-transformer", {"class_token": True, "laplacian": 2}), ("graph-transformer", {"edge_features": 1}),
])  # fmt: skip
def test_a_hidden_node_keeps_its_edges_and_its_place(name: str, fields: dict):
    encoder, token = small(name, node_features=2, **fields), torch.randn(32)
    torch.manual_seed(1)
    edge = {"edge_attr": torch.randn(4, 1).numpy()} if "edge_features" in fields else {}
    x, y = torch.randn(5, 2), torch.randn(5, 2)
    y[3:] = x[3:]
    front = int("class_token" in fields)
    hidden = front + torch.tensor([[0, 1, 2]])
    one, two = (encoder.tokenize(batch(encoder, path(5, x=values.numpy(), **edge))) for values in (x, y))
    assert torch.equal(one.positions, two.positions)
    a, b = (encoder.encode(t.hide(hidden, token)).tokens.values for t in (one, two))
    assert torch.equal(a, b)
    # The middle of the path has other edges than its end.
    assert not torch.allclose(a[0, front], a[0, front + 1], atol=1e-5)


@pytest.mark.parametrize(("name", "fields"), [
    ("graph-gnn", {"conv": "gat", "edge_features": 1}), ("graph-transformer", {"class_token": True, "edge_features": 1})
])  # fmt: skip
def test_repeated_graphs_keep_what_belongs_to_their_edges(name: str, fields: dict):
    encoder = small(name, node_features=2, **fields)
    torch.manual_seed(1)
    raws = [path(n, x=torch.randn(n, 2).numpy(), edge_attr=torch.randn(n - 1, 1).numpy()) for n in (4, 6)]
    tokens = encoder.tokenize(batch(encoder, *raws))
    once, thrice = encoder.encode(tokens).tokens, encoder.encode(tokens.repeat(3)).tokens
    valid = once.grid.valid.repeat_interleave(3, 0)
    torch.testing.assert_close(thrice.values[valid], once.values.repeat_interleave(3, 0)[valid])
