"""Connected parts of a graph hidden (Graph-JEPA, Skenderi et al. 2023, arXiv:2309.16014, predicts subgraphs).

A part is grown from a node, breadth first or by a random walk along the edges.
"""

from __future__ import annotations

from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from mmrep.config import config
from mmrep.masks._blocks import Ratio, whole
from mmrep.masks.masker import Masker, draw, grouped, lowest, maskable, ranked, share, spared
from mmrep.tokens import Grid, Mask

_STEPS = 4  # of a walk, per node that it should meet; what it has not met by then is added breadth first


@config
class SubgraphMaskConfig:
    """ratio: share of a sample's nodes that each target holds. targets: groups, each predicted by itself.

    grow: ``breadth`` takes the nodes that are fewest edges away, ``walk`` those that a random walk meets first.
    """

    ratio: Ratio = 0.25
    targets: Annotated[int, Field(ge=1)] = 4
    grow: Literal["breadth", "walk"] = "breadth"


class SubgraphMask(Masker):
    """A target is ``round(ratio * n)`` nodes of one connected part, if that has so many; the rest is visible.

    Edges count both ways. Where the part is too small, nodes drawn at random from the rest fill the target up, so
    without edges the mask is a random one. One node of a sample, drawn at random, is in no target, though targets are
    grown through it: see `mmrep.masks.masker.spared`. Targets may overlap.
    """

    Config = SubgraphMaskConfig
    grids = frozenset({"graph"})

    def __call__(self, grid: Grid, seeds: Tensor, progress: float = 0.0) -> Mask:
        """See `Masker.__call__`; groups are one visible and ``targets`` target."""
        self.accept(grid)
        config, among = cast(SubgraphMaskConfig, self.config), maskable(grid)
        (B, N), T = among.shape, config.targets
        wanted = share(config.ratio, among.sum(1)).repeat_interleave(T, 0)
        free = (among & ~spared(draw(seeds, 1, N), among)).repeat_interleave(T, 0)
        edges = _both_ways(grid, among)
        first = ranked(draw(seeds, T, N, 1), free)
        met = torch.where((first == 0) & free, 0.0, float("inf"))
        if config.grow == "walk":
            met = _walk(met, edges, wanted, seeds, T)
        met = _spread(met, edges, wanted, free, T)
        hidden = lowest(met, free, wanted, ties=draw(seeds, T, N, 2))
        return Mask(visible=grouped(among & ~hidden.view(B, T, N).any(1), 1), target=grouped(hidden, T))


def _both_ways(grid: Grid, among: Tensor) -> Tensor:
    """The edges between maskable nodes, each way once, in ascending order: int64 [2, E].

    The order makes the walk on a graph the same in any batch.
    """
    assert grid.edges is not None
    there = among.flatten()[grid.edges].all(0)
    source, end = grid.edges[:, there]
    return torch.unique(torch.stack([torch.cat([source, end]), torch.cat([end, source])]), dim=1)


def _spread(met: Tensor, edges: Tensor, wanted: Tensor, free: Tensor, groups: int) -> Tensor:
    """Number the nodes that are not ``met`` yet, breadth first: float [B * groups, N], infinite beyond reach.

    Args:
        met: float [B * groups, N], when a node was met; infinite where it was not.
        edges: int64 [2, E], indices into the flattened [B * N] nodes.
        wanted: int64 [B * groups]; a row stops when it has met so many ``free`` nodes.
        free: bool [B * groups, N].
        groups: of each graph.
    """
    (R, N), (source, end) = met.shape, edges
    if R == 0 or N == 0:
        return met
    hop = torch.where(met.isfinite(), met, 0.0).amax(1, keepdim=True)
    while True:
        seen = met.isfinite()
        flat = seen.view(R // groups, groups, N).transpose(1, 2).reshape(-1, groups).int()
        near = torch.zeros_like(flat).index_add(0, end, flat[source]) > 0
        fresh = near.view(-1, N, groups).transpose(1, 2).reshape(R, N) & ~seen
        fresh &= ((seen & free).sum(1) < wanted)[:, None]
        if not bool(fresh.any()):
            return met
        hop = hop + 1
        met = torch.where(fresh, hop, met)


def _walk(met: Tensor, edges: Tensor, wanted: Tensor, seeds: Tensor, groups: int) -> Tensor:
    """When a random walk from the node that is ``met`` first comes by each node: float [B * groups, N].

    A walk takes `_STEPS` steps for each of the ``wanted`` nodes.
    """
    (R, N), (source, end) = met.shape, edges
    if len(source) == 0:
        return met
    total = R // groups * N
    degree = torch.bincount(source, minlength=total)
    begin = degree.cumsum(0) - degree
    base = torch.arange(R, device=met.device).div(groups, rounding_mode="floor") * N
    at, steps = met.argmin(1) + base, _STEPS * wanted
    longest = int(steps.max())
    turns = draw(seeds, groups, longest, 3)
    for step in range(longest):
        chosen = begin[at] + whole(turns[:, step], degree[at])
        moves = (degree[at] > 0) & (step < steps)
        at = torch.where(moves, end[chosen.clamp_max(len(end) - 1)], at)
        here = (at - base)[:, None]
        met = met.scatter(1, here, met.gather(1, here).clamp_max(step + 1.0))
    return met
