"""The lattice that tokens sit on, read from their coordinates: it is the same alone and in a padded batch.

`Grid.shape` is not: an encoder gives it only where no token of the batch is padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmrep.tokens import Grid

GRIDS = frozenset({"regular", "sequence", "points", "graph"})

# Places of the smallest lattice around the tokens, per token, up to which they count as a lattice with holes. Points in
# general position have n to the power of the axes less one.
_SPARSE = 8


def lattice(grid: Grid) -> tuple[Tensor, Tensor]:
    """Where each token sits along each axis, counted in distinct coordinates of its sample.

    Returns:
        Int64 [B, N, C] places, from 0 (they mean nothing at special and padded tokens), and int64 [B, C], how many
        distinct coordinates a sample has along each axis.
    """
    among = (grid.valid & ~grid.special)[..., None]
    coords = grid.coords.to(torch.float64).masked_fill(~among, float("inf"))
    ordered, order = coords.sort(dim=1, stable=True)
    fresh = ordered.isfinite()
    fresh[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    places = torch.zeros_like(order).scatter_(1, order, fresh.long().cumsum(1) - 1)
    return places, fresh.sum(1)


def kinds(grid: Grid) -> frozenset[str]:
    """What a grid is, of `GRIDS`: a graph, or points, which may lie on one axis or on a lattice as well."""
    if grid.edges is not None:
        return frozenset({"graph"})
    if grid.coords.shape[-1] == 1:
        return frozenset({"points", "sequence"})
    if grid.shape is not None:
        return frozenset({"points", "regular"})
    box, count = lattice(grid)[1].prod(1).sum(), (grid.valid & ~grid.special).sum()
    return frozenset({"points", "regular"} if bool(box <= _SPARSE * count) else {"points"})
