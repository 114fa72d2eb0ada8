"""The decoder that passes messages: GraphMAE's equation written as loops, and what it must not see."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmrep.config import component
from mmrep.data.batch import Batch
from mmrep.data.sample import stable_hash
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.root import Root
from mmrep.tokens import Tokens

KINDS, WIDTH = 5, 8
GRAPHS = [
    {"edges": [(0, 1), (1, 2), (2, 0), (2, 3)], "num_nodes": 5},
    {"edges": [], "num_nodes": 2},
    {"edges": [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0), (0, 3)], "num_nodes": 7},
]
GNN = {"type": "graph-gnn", "node_categories": [KINDS], "edge_categories": [3], "width": WIDTH, "depth": 2}
TRANSFORMER = {**GNN, "type": "graph-transformer", "heads": 2}


def graphs():
    generator = torch.Generator().manual_seed(4)
    return [
        {**graph, "node_categories": torch.randint(KINDS, (graph["num_nodes"], 1), generator=generator).numpy(),
         "edge_categories": torch.randint(3, (len(graph["edges"]), 1), generator=generator).numpy()}
        for graph in GRAPHS
    ]  # fmt: skip


def root(encoder=GNN, **predictor):
    torch.manual_seed(0)
    tower = TowerConfig(encoder=component("encoders", **encoder), projector=component("projectors", "identity"))
    objective = component(
        "objectives", "masked", field="g", input="mask-token", mask={"type": "random", "ratio": 0.5}, loss="sce",
        predictor={"type": "graph-gnn", **predictor},
    )  # fmt: skip
    model = Model(ModelConfig(dim=WIDTH, towers={"graph": tower}))
    return Root(model, [objective], fields={"g": "graph"}, views={}).double()


def batch(built, rows=(0, 1, 2)):
    encoder, raw = built.model.tower("graph").encoder, graphs()
    inputs = encoder.collate([encoder.prepare(raw[i]) for i in rows])
    return Batch(
        ids=[str(i) for i in rows], inputs={"g": [inputs]}, present={"g": torch.ones(len(rows), dtype=torch.bool)},
        seeds=torch.tensor(rows) * 7,
    )  # fmt: skip


def gine(conv, nodes, edges, vectors):
    """arXiv:1905.12265: ``MLP((1 + eps) h_i + sum over j of relu(h_j + e_ij))``."""
    sums = [torch.zeros_like(nodes[0]) for _ in nodes]
    for k, (source, end) in enumerate(edges.T.tolist()):
        sums[end] = sums[end] + F.relu(nodes[source] + vectors[k])
    return conv.nn(torch.stack([(1 + conv.eps) * node + total for node, total in zip(nodes, sums, strict=True)]))


def test_graphmae_is_its_equation():
    built = root(depth=2).train()
    (objective,) = built.objectives.values()
    encoder, decoder = built.model.tower("graph").encoder, objective.predictor
    errors = []
    for i in range(3):
        one = batch(built, (i,))
        tokens = encoder.tokenize(one.inputs["g"][0])
        mask = objective.masker(tokens.grid, one.seeds + stable_hash("g", 0, "mask", None))
        hidden = mask.target[0, 0].tolist()
        assert len(hidden) == round(len(tokens.values[0]) * 0.5 + 1e-9)
        masked = torch.stack([
            objective.token + tokens.positions[0, n] if n in hidden else tokens.values[0, n]
            for n in range(len(tokens.values[0]))
        ])  # fmt: skip
        coded = encoder.encode(Tokens(masked[None], tokens.grid, tokens.positions)).tokens.values[0]
        again = torch.stack([decoder.token if n in hidden else decoder.embed(coded[n]) for n in range(len(coded))])
        vectors = tokens.grid.edge_values
        first = gine(decoder.convs[0], again, tokens.grid.edges, vectors)
        out = decoder.head(gine(decoder.convs[1], F.relu(first), tokens.grid.edges, vectors))
        kinds = encoder.content(one.inputs["g"][0]).values[0]
        each = []
        for n in hidden:
            cosine = out[n] @ F.one_hot(kinds[n], KINDS).double() / out[n].norm()
            each.append((1 - cosine) ** 3)
        errors.append(torch.stack(each).mean())
    twin = torch.stack(errors).mean()
    loss = built(batch(built))["loss"]
    torch.testing.assert_close(loss, twin)
    leaves = {name: p for name, p in built.named_parameters() if p.requires_grad}
    mine, slow = (torch.autograd.grad(out, list(leaves.values()), allow_unused=True) for out in (loss, twin))
    for name, a, b in zip(leaves, mine, slow, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, msg=name)  # None: the temperature


@pytest.mark.parametrize("remask", [True, False])
def test_what_the_encoder_made_of_a_hidden_node_reaches_no_one_after_the_second_mask(remask):
    built = root(remask=remask)
    (objective,) = built.objectives.values()
    one = batch(built, (0,))
    tokens = built.model.tower("graph").encoder.tokenize(one.inputs["g"][0])
    values = torch.randn(1, 5, WIDTH, dtype=torch.double, requires_grad=True)
    target = torch.tensor([[1, 2]])
    out = objective.predictor(Tokens(values, tokens.grid), torch.arange(5)[None], tokens, target)
    (gradient,) = torch.autograd.grad(out.sum(), values)
    moved = (gradient.abs().sum(-1) > 0)[0].tolist()  # 4 has no edge: it can tell nothing
    assert moved == [True, not remask, not remask, True, False]


@pytest.mark.parametrize(("encoder", "conv"), [
    (GNN, "gat"), (GNN, "sage"), (GNN, "gcn"), (TRANSFORMER, "gin"), (TRANSFORMER, "gat"),
])  # fmt: skip
def test_every_convolution_decodes_a_graph_alike_alone_and_in_a_batch(encoder, conv):
    built = root(encoder, conv=conv).eval()
    whole = built(batch(built))["loss"]
    alone = [built(batch(built, (i,)))["loss"] for i in range(3)]
    torch.testing.assert_close(whole, torch.stack(alone).mean())
    built.train()(batch(built))["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in built.parameters() if p.requires_grad)


def test_edges_that_are_told_apart_are_told_apart_in_decoding():
    built = root().eval()
    (objective,) = built.objectives.values()
    seen = []
    forward = objective.predictor.convs[0].forward
    objective.predictor.convs[0].forward = lambda *given: (seen.append(given), forward(*given))[1]
    built(batch(built, (0,)))
    assert seen[0][2].shape == (8, WIDTH)
    assert seen[0][2].unique(dim=0).shape[0] > 1


def test_what_it_cannot_decode_is_refused():
    built = root()
    (objective,) = built.objectives.values()
    tokens = built.model.tower("graph").encoder.tokenize(batch(built, (0,)).inputs["g"][0])
    more = Tokens(torch.zeros(1, 6, WIDTH, dtype=torch.double), tokens.grid.select(torch.tensor([[0, 1, 2, 3, 4, 0]])))
    with pytest.raises(ValueError, match="without `given`"):
        objective.predictor(more, torch.arange(6)[None], tokens, torch.tensor([[1]]))
    with pytest.raises(ValueError, match="takes no condition"):
        component("predictors", "graph-gnn").build(width=8, out=2, axes=1, condition=1)
    with pytest.raises(ValueError, match="heads=3 does not divide width=8"):
        component("predictors", "graph-gnn", conv="gat", heads=3).build(width=8, out=2, axes=1)
