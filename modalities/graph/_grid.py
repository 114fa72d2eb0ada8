"""A grid whose edges carry data, which the induced subgraph must keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmrep.tokens import Grid


@dataclass(frozen=True)
class GraphGrid(Grid):
    """`Grid` with what belongs to edges and to pairs of nodes; `select` cuts it all alike.

    Attributes:
        edge_values: float [E, C]; embedded features of ``edges``.
        edge_weights: float [E]; weights of ``edges``.
        distances: int64 [B, N, N]; steps from the first node to the second in the whole graph.
    """

    edge_values: Tensor | None = None
    edge_weights: Tensor | None = None
    distances: Tensor | None = None

    def repeat(self, times: int) -> GraphGrid:
        """See `Grid.repeat`: the edges of all samples, once for each time."""
        grid = super().repeat(times)
        return GraphGrid(
            coords=grid.coords,
            valid=grid.valid,
            special=grid.special,
            edges=grid.edges,
            edge_values=None if self.edge_values is None else self.edge_values.repeat(times, 1),
            edge_weights=None if self.edge_weights is None else self.edge_weights.repeat(times),
            distances=None if self.distances is None else self.distances.repeat_interleave(times, 0),
        )

    def select(self, index: Tensor) -> GraphGrid:
        """The grid of the tokens at ``index`` int64 [B, K], see `Grid.select`."""
        cut = super().select(index)
        assert self.edges is not None
        B, N = self.valid.shape
        named = torch.zeros(B, N + 1, dtype=torch.bool, device=index.device)
        named = named.scatter(1, index.masked_fill(index < 0, N), True)[:, :N].flatten()
        stay = named[self.edges].all(0)
        at = index.clamp_min(0)
        distances = self.distances
        if distances is not None:
            rows = distances.gather(1, at[:, :, None].expand(-1, -1, N))
            distances = rows.gather(2, at[:, None, :].expand(-1, at.shape[1], -1))
        return GraphGrid(
            coords=cut.coords,
            valid=cut.valid,
            special=cut.special,
            edges=cut.edges,
            edge_values=None if self.edge_values is None else self.edge_values[stay],
            edge_weights=None if self.edge_weights is None else self.edge_weights[stay],
            distances=distances,
        )
