"""Point networks of torch_geometric's convolutions over padded batches, with our own sampling and neighbours.

torch_geometric finds neighbours through pyg-lib, which PyPI does not have; its convolutions need only the edges.
Normalisation is LayerNorm throughout, where the papers have BatchNorm, which would mix samples.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from mmrep.modalities.point_cloud.grouping import farthest_points, gather, nearest
from mmrep.registry import require

Places = tuple[Tensor, Tensor]
"""Coordinates float [B, N, 3], and which are valid, bool [B, N]."""


class PointNet(nn.Module):
    """Two set abstractions of PointNet++ (arXiv:1706.02413), over nearest neighbours in place of balls.

    Args:
        channels: features of a point beside its place.
        width: D of the tokens.
        groups: tokens per cloud; the first abstraction has four times as many.
        neighbors: points that each reads.
    """

    def __init__(self, channels: int, width: int, groups: int, neighbors: int) -> None:
        super().__init__()
        conv = require("torch_geometric.nn", "graph").PointNetConv
        hidden = max(1, width // 2)
        self.levels, self.neighbors = (4 * groups, groups), neighbors
        self.first = conv(mlp(channels + 3, hidden, hidden), add_self_loops=False)
        self.second = conv(mlp(hidden + 3, width, width), add_self_loops=False)

    def forward(self, values: Tensor, places: Places) -> tuple[Tensor, Places]:
        """[B, N, channels] to tokens [B, groups, D] and their places."""
        for conv, count in zip((self.first, self.second), self.levels, strict=True):
            centres, index = _down(places, count, self.neighbors)
            source, target = places[0].flatten(0, 1), centres[0].flatten(0, 1)
            out = conv((values.flatten(0, 1), None), (source, target), edges(index, values.shape[1]))
            values, places = out.view(*index.shape[:2], out.shape[1]), centres
        return values, places


class DGCNN(nn.Module):
    """Three edge convolutions, each over neighbours in the space of its input (arXiv:1801.07829).

    A token is the maximum over the points of its group. `torch_geometric.nn.DynamicEdgeConv` is the same, but cannot be
    built without pyg-lib.

    Args:
        channels: features of a point beside its place.
        width: D of the tokens.
        groups: tokens per cloud.
        neighbors: points that each reads.
    """

    def __init__(self, channels: int, width: int, groups: int, neighbors: int) -> None:
        super().__init__()
        conv = require("torch_geometric.nn", "graph").EdgeConv
        hidden = max(1, width // 2)
        inputs = (channels + 3, hidden, hidden)
        self.groups, self.neighbors = groups, neighbors
        self.layers = nn.ModuleList(conv(mlp(2 * n, hidden), aggr="max") for n in inputs)
        self.joined = mlp(3 * hidden, width)

    def forward(self, values: Tensor, places: Places) -> tuple[Tensor, Places]:
        """[B, N, channels] to tokens [B, groups, D] and their places."""
        B, N = places[1].shape
        values, found = torch.cat([places[0].to(values.dtype), values], 2), []
        for conv in self.layers:
            index = nearest(values, values, places[1], self.neighbors)
            flat = conv(values.flatten(0, 1), edges(index.masked_fill(~places[1][..., None], -1), N))
            values = flat.view(B, N, flat.shape[1])
            found.append(values)
        centres, index = _down(places, self.groups, self.neighbors)
        return _pooled(self.joined(torch.cat(found, 2)), index), centres


class PointTransformer(nn.Module):
    """Attention blocks before and after one transition down (arXiv:2012.09164, sections 3.2 to 3.4).

    Args:
        channels: features of a point beside its place.
        width: D of the tokens.
        groups: tokens per cloud.
        neighbors: points that each reads.
    """

    def __init__(self, channels: int, width: int, groups: int, neighbors: int) -> None:
        super().__init__()
        hidden = max(1, width // 2)
        self.groups, self.neighbors = groups, neighbors
        self.stem = mlp(channels + 3, hidden)
        self.first, self.second = _Attention(hidden, neighbors), _Attention(width, neighbors)
        self.down = mlp(hidden, width)

    def forward(self, values: Tensor, places: Places) -> tuple[Tensor, Places]:
        """[B, N, channels] to tokens [B, groups, D] and their places."""
        values = self.first(self.stem(torch.cat([places[0].to(values.dtype), values], 2)), places)
        centres, index = _down(places, self.groups, self.neighbors)
        return self.second(_pooled(self.down(values), index), centres), centres


class _Attention(nn.Module):
    """A point transformer block: a layer, vector attention over the nearest, a layer, and the residual."""

    def __init__(self, width: int, neighbors: int) -> None:
        super().__init__()
        conv = require("torch_geometric.nn", "graph").PointTransformerConv
        self.neighbors = neighbors
        # No bias at the end of the attention's network: the softmax over neighbours takes a constant out again.
        weigh = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width, bias=False))
        place = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width))
        self.before, self.after = mlp(width, width), nn.Linear(width, width)
        self.attention = conv(width, width, pos_nn=place, attn_nn=weigh, add_self_loops=False)

    def forward(self, values: Tensor, places: Places) -> Tensor:
        points, valid = places
        index = nearest(points, points, valid, self.neighbors).masked_fill(~valid[..., None], -1)
        flat = self.attention(
            self.before(values).flatten(0, 1), points.flatten(0, 1).to(values.dtype), edges(index, valid.shape[1])
        )
        return values + self.after(flat).view_as(values)


NETWORKS: dict[str, type[nn.Module]] = {"pointnet": PointNet, "dgcnn": DGCNN, "point-transformer": PointTransformer}


def mlp(*widths: int) -> nn.Sequential:
    """Linear, LayerNorm and ReLU between each two of ``widths``."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.LayerNorm(b), nn.ReLU()]
    return nn.Sequential(*layers)


def edges(index: Tensor, count: int) -> Tensor:
    """Neighbours ``index`` int64 [B, Q, K], -1 for none, as edges int64 [2, E] from source to target.

    Sources count on through the batch in steps of ``count``, targets in steps of Q.
    """
    B, Q, K = index.shape
    first = torch.arange(B, device=index.device)[:, None, None] * count
    targets = torch.arange(B * Q, device=index.device).view(B, Q, 1).expand(-1, -1, K)
    present = index >= 0
    return torch.stack([(index + first)[present], targets[present]])


def _down(places: Places, count: int, neighbors: int) -> tuple[Places, Tensor]:
    """The places of ``count`` farthest points, and who of the points is near each: int64 [B, count, neighbors]."""
    points, valid = places
    chosen = farthest_points(points, valid, count)
    centres = gather(points, chosen)
    return (centres, chosen >= 0), nearest(centres, points, valid, neighbors)


def _pooled(values: Tensor, index: Tensor) -> Tensor:
    """The maximum of ``values`` [B, N, C] over the neighbours [B, Q, K].

    Values come from a ReLU, so that the zero of an empty slot is never above them.
    """
    return gather(values, index).amax(2)
