"""`graph-gnn` is the torch_geometric network that one would write by hand on a `Batch`: values and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch_geometric import nn as pyg
from torch_geometric.data import Batch, Data

from mmrep.config import component
from mmrep.modalities.graph.gnn import GraphGNN
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.testing import check_encoder
from mmrep.tokens import Tokens

WIDTH = 8
GRAPHS = [
    {"edges": [(0, 1), (1, 2), (2, 0), (2, 3)], "num_nodes": 5},
    {"edges": [], "num_nodes": 1},
    {"edges": [(0, 1), (1, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0), (0, 3)], "num_nodes": 7},
]


def gnn(**fields) -> GraphGNN:
    torch.manual_seed(0)
    encoder = component("encoders", "graph-gnn", **{"width": WIDTH, "depth": 3, "degree": False, **fields}).build()
    with torch.no_grad():  # norms and residual mixtures that start as identities would hide mistakes
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return encoder.double().eval()


def raw_graphs(features: int, edge_features: int) -> list[dict]:
    torch.manual_seed(1)
    made = []
    for graph in GRAPHS:
        extra = {"edge_attr": torch.randn(len(graph["edges"]), edge_features)} if edge_features else {}
        made.append({**graph, "x": torch.randn(graph["num_nodes"], features), **extra})
    return made


def batch_of(raw: list[dict]) -> Batch:
    """By torch_geometric alone."""
    made = []
    for graph in raw:
        ways, attributes = [], []
        for k, (i, j) in enumerate(graph["edges"]):
            for way in {(i, j), (j, i)}:
                ways.append(way)
                attributes.append(graph["edge_attr"][k] if "edge_attr" in graph else torch.zeros(1))
        index = torch.tensor(ways, dtype=torch.long).view(-1, 2).T
        width = graph["edge_attr"].shape[1] if "edge_attr" in graph else 1
        attr = torch.stack(attributes) if attributes else torch.zeros(0, width)
        made.append(
            Data(x=graph["x"].double(), edge_index=index, edge_attr=attr.double(), num_nodes=graph["num_nodes"])
        )
    return Batch.from_data_list(made)


class ByHand(nn.Module):
    """The same network from torch_geometric's parts, for one `Batch`."""

    def __init__(self, conv: str, features: int, edge_features: int, norm: str, jump: str, residual: bool) -> None:
        super().__init__()
        D = WIDTH

        def layer() -> nn.Module:
            if conv == "gin":
                mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.ReLU(), nn.Linear(2 * D, D))
                return (pyg.GINEConv if edge_features else pyg.GINConv)(mlp, train_eps=True)
            if conv == "gat":
                return pyg.GATConv(D, D // 4, heads=4, edge_dim=D if edge_features else None)
            return {"gcn": pyg.GCNConv, "sage": pyg.SAGEConv}[conv](D, D)

        self.lift = nn.Linear(features, D)
        self.lift_edges = nn.Linear(edge_features, D) if edge_features else None
        self.convs = nn.ModuleList(layer() for _ in range(3))
        self.norms = nn.ModuleList(
            {"layer": nn.LayerNorm, "graph": pyg.GraphNorm}[norm](D) if norm != "none" else nn.Identity()
            for _ in range(3)
        )
        self.jump = jump
        self.joined = nn.Linear(3 * D, D) if jump == "cat" else None
        self.norm, self.kind, self.residual = nn.LayerNorm(D), norm, residual

    def forward(self, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x = self.lift(batch.x)
        outputs = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            extra = () if self.lift_edges is None else (self.lift_edges(batch.edge_attr),)
            out = conv(x, batch.edge_index, *extra)
            out = norm(out, batch.batch) if self.kind == "graph" else norm(out)
            x = out.relu() + x if self.residual else out.relu()
            outputs.append(x)
        if self.jump == "max":
            x = torch.stack(outputs).max(0).values
        if self.joined is not None:
            x = self.joined(torch.cat(outputs, 1))
        return self.norm(x), outputs


def copy_weights(encoder: GraphGNN, other: ByHand) -> dict[str, str]:
    """By name; returns which of ours is which of theirs."""
    names = {"node_embedding.features": "lift", "edge_embedding.features": "lift_edges"}
    own = {}
    for name in dict(encoder.named_parameters()):
        place, _, leaf = name.rpartition(".")
        own[name] = f"{names.get(place, place)}.{leaf}".lstrip(".")
    other.load_state_dict({own[name]: p.detach() for name, p in encoder.named_parameters()})
    return own


@pytest.mark.parametrize(("conv", "edge_features", "norm", "jump", "residual"), [
    ("gin", 0, "layer", "last", True), ("gin", 2, "graph", "cat", True), ("gcn", 0, "none", "max", True),
    ("gcn", 0, "graph", "last", False), ("sage", 0, "layer", "max", False), ("gat", 0, "layer", "cat", True),
    ("gat", 2, "graph", "last", True),
])  # fmt: skip
def test_values_and_gradients_are_those_of_the_network_by_hand(
    conv: str, edge_features: int, norm: str, jump: str, residual: bool
):
    encoder = gnn(conv=conv, node_features=3, edge_features=edge_features, norm=norm, jump=jump, residual=residual)
    other = ByHand(conv, 3, edge_features, norm, jump, residual).double().eval()
    own = copy_weights(encoder, other)
    raw = raw_graphs(3, edge_features)
    inputs = encoder.collate([encoder.prepare(graph) for graph in raw])
    found = encoder.encode(encoder.tokenize(inputs), layers=[2, 1])
    want, outputs = other(batch_of(raw))
    valid = found.tokens.grid.valid
    torch.testing.assert_close(found.tokens.values[valid], want, rtol=1e-9, atol=1e-9)
    for layer, number in zip(found.layers, [2, 1], strict=True):
        torch.testing.assert_close(layer[valid], outputs[number - 1], rtol=1e-9, atol=1e-9)
    weight = torch.randn(want.shape, dtype=torch.float64)
    (found.tokens.values[valid] * weight).sum().backward()
    (want * weight).sum().backward()
    theirs = dict(other.named_parameters())
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[own[name]].grad, rtol=1e-7, atol=1e-8, msg=name)


def test_atoms_are_embedded_as_in_ogb_by_a_sum_of_one_embedding_a_column():
    encoder = gnn(input="molecule", depth=1)
    item = encoder.prepare("CC(=O)O")
    table, starts = encoder.node_embedding.categories.table.weight, encoder.node_embedding.categories.starts
    values = encoder.tokenize(encoder.collate([item])).values[0]
    for atom, value in zip(item["categories"], values, strict=True):
        want = sum(table[int(start) + int(kind)] for start, kind in zip(starts, atom, strict=True))
        torch.testing.assert_close(value, want)
    assert len(table) == sum(size + 1 for size in encoder.reading.node_sizes)
    assert starts.tolist()[:3] == [1, 121, 131]  # 119 atomic numbers, 9 chiralities, and before each its "unknown"


def test_degrees_are_counted_in_and_out_and_up_to_the_highest():
    encoder = gnn(degree=True, directed="keep", max_degree=2, depth=1)
    star = {"edges": [(0, 1), (0, 2), (0, 3), (1, 2)], "directed": True}
    values = encoder.tokenize(encoder.collate([encoder.prepare(star)])).values[0]
    table = encoder.node_embedding.degree.table.weight
    for node, (come, go) in enumerate([(0, 2), (1, 1), (2, 0), (1, 0)]):  # of 3 that go from node 0, 2 count
        torch.testing.assert_close(values[node], table[1 + come] + table[5 + go])


def test_messages_follow_directed_edges():
    encoder = gnn(directed="keep", node_features=1, depth=1)
    raw = {"edges": [(0, 1)], "directed": True, "x": [[1.0], [2.0]]}
    before, after = (
        encoder(encoder.collate([encoder.prepare({**raw, "x": x})])).tokens.values[0]
        for x in ([[1.0], [2.0]], [[5.0], [2.0]])
    )
    assert (before[1] - after[1]).abs().max() > 1e-3
    before, after = (
        encoder(encoder.collate([encoder.prepare({**raw, "x": x})])).tokens.values[0]
        for x in ([[1.0], [2.0]], [[1.0], [7.0]])
    )
    torch.testing.assert_close(before[0], after[0])


def test_forward_and_reverse_edges_are_told_apart():
    encoder = gnn(directed="both", depth=2)
    ends = encoder(encoder.collate([encoder.prepare({"edges": [(0, 1)], "directed": True})])).tokens.values[0]
    assert (ends[0] - ends[1]).abs().max() > 1e-3
    same = encoder(encoder.collate([encoder.prepare({"edges": [(0, 1)]})])).tokens.values[0]
    torch.testing.assert_close(same[0], same[1])


def test_keep_passes_messages_on_the_induced_subgraph_with_its_edge_features():
    encoder = gnn(node_features=3, edge_features=2)
    raw = raw_graphs(3, 2)
    tokens = encoder.tokenize(encoder.collate([encoder.prepare(graph) for graph in raw]))
    keep = torch.tensor([[3, 2, 0], [0, -1, -1], [4, 5, 0]])
    found = encoder.encode(tokens, keep=keep).tokens
    for row, names in enumerate([[3, 2, 0], [0], [4, 5, 0]]):
        inside = [(k, i, j) for k, (i, j) in enumerate(raw[row]["edges"]) if i in names and j in names]
        part = {
            "edges": [(names.index(i), names.index(j)) for _, i, j in inside],
            "num_nodes": len(names),
            "x": raw[row]["x"][names],
            "edge_attr": raw[row]["edge_attr"][[k for k, _, _ in inside]],
        }
        alone = encoder(encoder.collate([encoder.prepare(part)])).tokens.values[0]
        torch.testing.assert_close(found.values[row, : len(names)], alone)
    assert found.grid.edges.shape[1] == found.grid.edge_values.shape[0] == 4 + 0 + 4
    assert found.grid.coords[0, :, 0].tolist() == [3, 2, 0]


def test_gcn_alone_sees_edge_weights():
    for conv, differs in (("gcn", True), ("sage", False)):
        encoder = gnn(conv=conv, node_features=3)
        inputs = encoder.collate([encoder.prepare(raw_graphs(3, 0)[0])])
        plain = encoder(inputs).tokens.values
        ones = {**inputs, "edge_weights": torch.ones(1, inputs["edges"].shape[1])}
        torch.testing.assert_close(encoder(ones).tokens.values, plain)
        weights = torch.linspace(0.1, 1, inputs["edges"].shape[1])[None]
        changed = (encoder({**inputs, "edge_weights": weights}).tokens.values - plain).abs().max()
        assert (changed > 1e-3) == differs


def test_edge_weights_go_with_their_edges_when_nodes_are_dropped():
    encoder = gnn(conv="gcn", node_features=3)
    inputs = encoder.collate([encoder.prepare(raw_graphs(3, 0)[2])])
    weights = torch.linspace(0.1, 1, inputs["edges"].shape[1])[None]
    tokens = encoder.tokenize({**inputs, "edge_weights": weights})
    kept = tokens.keep(torch.tensor([[5, 0, 3]])).grid
    want = {(i, j): w for (i, j), w in zip(inputs["edges"][0].tolist(), weights[0].tolist(), strict=True)}
    names = [5, 0, 3]
    assert kept.edges.shape[1] == 4
    for i, j, w in zip(*kept.edges.tolist(), kept.edge_weights.tolist(), strict=True):
        assert w == pytest.approx(want[names[i], names[j]])


def test_a_node_that_a_view_dropped_sends_nothing_and_its_edges_may_still_be_listed():
    encoder = gnn(node_features=3)
    inputs = encoder.collate([encoder.prepare(raw_graphs(3, 0)[0])])
    gone = inputs["valid"].clone()
    gone[0, 2] = False
    found = encoder({**inputs, "valid": gone}).tokens
    part = {"edges": [(0, 1)], "num_nodes": 4, "x": raw_graphs(3, 0)[0]["x"][[0, 1, 3, 4]]}
    alone = encoder(encoder.collate([encoder.prepare(part)])).tokens.values[0]
    torch.testing.assert_close(found.values[0, [0, 1, 3, 4]], alone)


def test_the_values_of_padding_do_not_reach_nodes():
    encoder = gnn(node_features=3, norm="graph")
    inputs = encoder.collate([encoder.prepare(graph) for graph in raw_graphs(3, 0)])
    tokens = encoder.tokenize(inputs)
    dirty = Tokens(tokens.values.masked_fill(~tokens.grid.valid[..., None], 1e6), tokens.grid)
    valid = tokens.grid.valid
    torch.testing.assert_close(encoder.encode(dirty).tokens.values[valid], encoder.encode(tokens).tokens.values[valid])


def test_weights_come_from_a_checkpoint_of_the_encoder_or_of_a_model_and_not_twice(tmp_path: Path):
    fields = {"width": WIDTH, "depth": 2, "node_features": 3}
    torch.manual_seed(5)
    source = component("encoders", "graph-gnn", **fields).build()
    save_file(source.state_dict(), tmp_path / "encoder.safetensors")
    tower = TowerConfig(encoder=component("encoders", "graph-gnn", **fields))
    model = Model(ModelConfig(dim=4, towers={"graph": tower}))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for name, want in (("encoder", source), ("model", model.tower("graph").encoder)):
        loaded = component("encoders", "graph-gnn", **fields, checkpoint=str(tmp_path / f"{name}.safetensors")).build()
        for key, value in want.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key
    whole = Model(ModelConfig(dim=4, towers={"graph": TowerConfig(encoder=component(
        "encoders", "graph-gnn", **fields, checkpoint=str(tmp_path / "encoder.safetensors")))}))  # fmt: skip
    whole.save_pretrained(tmp_path / "saved")
    (tmp_path / "encoder.safetensors").unlink()
    check_encoder(whole.tower("graph").encoder, only=["weights_round_trip"])
    again = Model.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.tower("graph").encoder.norm.weight, source.norm.weight)


@pytest.mark.parametrize(("make", "words"), [
    (lambda path: None, "there is no file"),
    (lambda path: path.write_bytes(b"not safetensors"), "cannot be loaded"),
    (lambda path: save_file({"other.weight": torch.zeros(2)}, path), "it lacks node_embedding"),
    (lambda path: save_file(gnn(node_features=3, degree=True).state_dict(), path), "not one of this config's"),
    (lambda path: save_file(gnn(node_features=3, depth=1, conv="gcn").state_dict(), path), "not one of this config's"),
])  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, make, words: str):
    path = tmp_path / "weights.safetensors"
    make(path)
    with pytest.raises(ValueError, match=words):
        component("encoders", "graph-gnn", width=WIDTH, depth=2, node_features=3, checkpoint=str(path)).build()
