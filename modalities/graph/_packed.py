"""Padded batches of nodes as torch_geometric's convolutions take them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmrep.tokens import Grid


class Packed:
    """The valid tokens of a batch one after another, as torch_geometric takes them.

    Attributes:
        edges: int64 [2, E], among the packed nodes. graph: int64 [M], the row of the batch that each comes from.
        graphs: B.
    """

    def __init__(self, grid: Grid) -> None:
        assert grid.edges is not None
        self.shape = grid.valid.shape
        self.graphs = len(grid.valid)
        flat = grid.valid.flatten()
        self.index = flat.nonzero()[:, 0]
        self.edges = (flat.cumsum(0) - 1)[grid.edges]
        self.graph = self.index // max(self.shape[1], 1)

    def take(self, values: Tensor) -> Tensor:
        """[B, N, D] to [M, D]."""
        return values.flatten(0, 1)[self.index]

    def put(self, values: Tensor) -> Tensor:
        """[M, D] to [B, N, D]; padding is zero."""
        padded = values.new_zeros(self.shape[0] * self.shape[1], values.shape[1])
        return padded.index_copy(0, self.index, values).view(*self.shape, values.shape[1])


def convolution(geometric: Any, conv: str, width: int, heads: int, *, typed: bool) -> nn.Module:
    """One of torch_geometric's, ``geometric`` being its ``nn``; ``typed`` if it is to see vectors of the edges."""
    if conv == "gin":
        mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        return geometric.GINEConv(mlp, train_eps=True) if typed else geometric.GINConv(mlp, train_eps=True)
    if conv == "gcn":
        return geometric.GCNConv(width, width)
    if conv == "sage":
        return geometric.SAGEConv(width, width)
    return geometric.GATConv(width, width // heads, heads=heads, edge_dim=width if typed else None)
