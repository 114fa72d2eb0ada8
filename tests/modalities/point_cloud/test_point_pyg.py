"""The networks of torch_geometric: our neighbours are its, and a batch is its own clouds one by one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch_geometric.nn import EdgeConv, PointNetConv, PointTransformerConv

from mmrep.config import ConfigError, component
from mmrep.modalities.point_cloud._pyg_networks import DGCNN, NETWORKS, edges
from mmrep.modalities.point_cloud.pyg import PyGPoints
from mmrep.registry import MissingPackageError

FIELDS = {"max_points": 64, "groups": 8, "neighbors": 5, "width": 16}


def encoder(network: str = "pointnet", **fields) -> PyGPoints:
    torch.manual_seed(0)
    return component("encoders", "pyg-points", network=network, **{**FIELDS, **fields}).build().eval()


def test_edges_point_from_neighbours_to_their_group():
    index = torch.tensor([[[0, 2], [1, -1]], [[3, 0], [-1, -1]]])
    assert edges(index, 4).tolist() == [[0, 2, 1, 7, 4], [0, 0, 1, 2, 2]]


def test_an_edge_convolution_is_the_papers():
    """max over the nearest of h(x_i, x_j - x_i), with neighbours found by sorting (arXiv:1801.07829, equation 7)."""
    net = encoder("dgcnn").network
    assert isinstance(net, DGCNN)
    points = torch.rand(1, 20, 3, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(1, 20, dtype=torch.bool)
    conv, seen = net.layers[0], []
    handle = conv.register_forward_hook(lambda _, __, out: seen.append(out))
    net(points.new_zeros(1, 20, 0), (points, valid))
    handle.remove()
    x = points[0]
    near = torch.cdist(x, x).argsort(1)[:, :5]
    want = torch.stack([
        torch.stack([conv.nn(torch.cat([x[i], x[j] - x[i]])) for j in near[i]]).max(0).values for i in range(20)
    ])  # fmt: skip
    torch.testing.assert_close(seen[0], want)


def test_dgcnn_looks_for_neighbours_among_the_features():
    net = encoder("dgcnn").network
    points = torch.rand(1, 30, 3, generator=torch.Generator().manual_seed(0))
    graphs = []
    for conv in net.layers:
        conv.register_forward_hook(lambda _, inputs, __: graphs.append({tuple(e) for e in inputs[1].T.tolist()}))
    net(points.new_zeros(1, 30, 0), (points, torch.ones(1, 30, dtype=torch.bool)))
    assert [len(graph) for graph in graphs] == [150] * 3
    assert graphs[0] != graphs[1] != graphs[2]


@pytest.mark.parametrize("network", NETWORKS)
def test_padding_and_company_leave_no_trace(network: str):
    e = encoder(network).double()  # in fp32 sums of another order differ by more than what is looked for
    items = [
        {k: v.double() if v.is_floating_point() else v for k, v in e.prepare(raw).items()} for raw in e.examples(5, 0)
    ]
    inputs = e.collate(items)
    inputs["points"] = inputs["points"].masked_fill(~inputs["valid"][..., None], 77.0)
    with torch.no_grad():
        together = e(inputs).tokens
        for i, item in enumerate(items):
            alone = e(e.collate([item])).tokens
            torch.testing.assert_close(alone.values[0][alone.grid.valid[0]], together.values[i][together.grid.valid[i]],
                                       atol=1e-6, rtol=0)  # fmt: skip
    assert together.grid.valid.sum(1).tolist() == [min(8, len(item["points"])) for item in items]


@pytest.mark.parametrize(
    ("network", "conv"), [("pointnet", PointNetConv), ("dgcnn", EdgeConv), ("point-transformer", PointTransformerConv)]
)
def test_the_convolutions_are_torch_geometrics(network: str, conv: type):
    assert sum(type(module) is conv for module in encoder(network).modules()) >= 2


def test_a_checkpoint_is_loaded_and_its_path_is_not_needed_again(tmp_path: Path):
    first = encoder()
    path = tmp_path / "network.safetensors"
    save_file({name: value + 1 for name, value in first.network.state_dict().items()}, path)
    second = encoder(checkpoint=str(path))
    for name, value in second.network.state_dict().items():
        torch.testing.assert_close(value, first.network.state_dict()[name] + 1)
    folder = tmp_path / "files"
    folder.mkdir()
    second.save_files(folder)
    path.unlink()
    again = PyGPoints(second.config, files=folder)
    again.load_state_dict(second.state_dict())
    with pytest.raises(ValueError, match="there is no file"):
        PyGPoints(second.config)
    first.save_files(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    first.save_files(empty)
    assert not list(empty.iterdir())


def test_checkpoints_that_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="pickle"):
        component("encoders", "pyg-points", checkpoint="weights.pt")
    path = tmp_path / "other.safetensors"
    save_file({"nothing": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"(?s)cannot be loaded.*nothing"):
        encoder(checkpoint=str(path))
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="cannot be loaded"):
        encoder(checkpoint=str(path))


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_geometric"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    with pytest.raises(MissingPackageError, match=r'pip install "mmrep\[graph\]"'):
        encoder()
