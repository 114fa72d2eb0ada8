"""Node and edge features to vectors: linear maps of floats, sums of one embedding a category."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from mmrep.modalities.graph.read import Reading
from mmrep.tokens import Inputs

EDGE_TYPES = 3
"""`mmrep.modalities.graph.record`: undirected, forward, reverse."""


class Categories(nn.Module):
    """The sum of one embedding a column (as OGB's atom and bond encoders, arXiv:2005.00687); -1 is "unknown".

    Args:
        sizes: number of values of each column.
        width: D.
        std: of the initial values.
    """

    def __init__(self, sizes: Sequence[int], width: int, std: float) -> None:
        super().__init__()
        # One table for all columns: one look-up. The first row of each column's part is its "unknown".
        starts = [0, *accumulate(size + 1 for size in sizes)]
        self.table = nn.Embedding(starts[-1], width)
        nn.init.normal_(self.table.weight, std=std)
        self.register_buffer("starts", torch.tensor(starts[:-1]) + 1, persistent=False)
        self.starts: Tensor

    def forward(self, values: Tensor) -> Tensor:
        """int64 [..., K] to [..., D]."""
        return self.table(values + self.starts).sum(-2)


class Floats(nn.Linear):
    """Float columns to vectors."""


class NodeEmbedding(nn.Module):
    """What a node starts from: its features, categories and degree, added up.

    Terms are scaled at the start so that the sum has about unit variance, however many there are.

    Args:
        how: which features there are.
        width: D.
    """

    def __init__(self, how: Reading, width: int) -> None:
        super().__init__()
        tables = 1 if not how.degree else 2 if how.directed == "keep" else 1
        terms = len(how.node_sizes) + bool(how.node_features) + how.degree * tables
        std = max(terms, 1) ** -0.5
        self.features = Floats(how.node_features, width) if how.node_features else None
        self.categories = Categories(how.node_sizes, width, std) if how.node_sizes else None
        self.degree = Categories([how.max_degree + 1] * tables, width, std) if how.degree else None
        self.constant = None if terms else nn.Parameter(torch.randn(width))
        self.max_degree = how.max_degree

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Collated inputs to what a node starts from, and what of it is its place, the degree alone: [B, N, D] each."""
        values = 0
        if self.features is not None:
            values = values + self.features(inputs["features"].to(self.features.weight.dtype))
        if self.categories is not None:
            values = values + self.categories(inputs["categories"])
        if self.constant is not None:
            values = self.constant.expand(*inputs["valid"].shape, -1)
        if self.degree is None:
            assert isinstance(values, Tensor)
            return values, torch.zeros_like(values)
        counts = degrees(inputs["edges"], inputs["valid"].shape[1])[..., : len(self.degree.starts)]
        places = self.degree(counts.clamp_max(self.max_degree))
        return values + places, places


class EdgeEmbedding(nn.Module):
    """What an edge is: its features, categories and direction, added up.

    Args:
        how: which features there are; see `reads_edges`.
        width: D.
    """

    def __init__(self, how: Reading, width: int) -> None:
        super().__init__()
        sizes = [*how.edge_sizes, *([EDGE_TYPES] if how.directed == "both" else [])]
        std = (len(sizes) + bool(how.edge_features)) ** -0.5
        self.features = Floats(how.edge_features, width) if how.edge_features else None
        self.categories = Categories(sizes, width, std) if sizes else None
        self.own, self.typed = bool(how.edge_sizes), how.directed == "both"

    def forward(self, inputs: Inputs) -> Tensor:
        """Collated inputs to [B, E, D]."""
        values = 0
        if self.features is not None:
            values = values + self.features(inputs["edge_features"].to(self.features.weight.dtype))
        if self.categories is not None:
            parts = [inputs["edge_categories"]] if self.own else []
            parts += [inputs["edge_types"][..., None]] if self.typed else []
            values = values + self.categories(torch.cat(parts, -1))
        assert isinstance(values, Tensor)
        return values


def reads_edges(how: Reading) -> bool:
    """Whether there is anything to tell edges apart by."""
    return bool(how.edge_features or how.edge_sizes or how.directed == "both")


def degrees(edges: Tensor, N: int) -> Tensor:
    """How many edges come in and go out, int64 [B, N, 2], of ``edges`` [B, E, 2] where -1 is none."""
    counts = edges.new_zeros(len(edges), 2, N + 1)
    ends = edges.flip(-1).transpose(1, 2)  # in-degree first: the target's
    ends = ends.masked_fill(ends < 0, N)
    return counts.scatter_add_(2, ends, torch.ones_like(ends))[..., :N].transpose(1, 2)
