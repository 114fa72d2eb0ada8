"""Tokens hidden that lie together in space (Point-MAE, Pang et al. 2022, arXiv:2203.06604, block masking).

With several groups it is the target blocks of Point-JEPA (arXiv:2404.16432) and 3D-JEPA (arXiv:2409.15803).
"""

from __future__ import annotations

from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor

from mmrep.config import config
from mmrep.masks._blocks import Ratio
from mmrep.masks.masker import Masker, draw, grouped, lowest, maskable, ranked, share, spared
from mmrep.tokens import Grid, Mask


@config
class NeighborhoodMaskConfig:
    """ratio: share of a sample's tokens that each target holds. targets: groups, each predicted by itself.

    centers: tokens that a target is grown around at once.
    """

    ratio: Ratio = 0.6
    targets: Annotated[int, Field(ge=1)] = 1
    centers: Annotated[int, Field(ge=1)] = 1


class NeighborhoodMask(Masker):
    """A target is the ``round(ratio * n)`` tokens nearest to tokens drawn at random; what no target holds is visible.

    Distances are Euclidean, over all coordinates; equal ones are ordered at random. One token of a sample, drawn at
    random, is in no target: see `mmrep.masks.masker.spared`. Targets may overlap.
    """

    Config = NeighborhoodMaskConfig

    def __call__(self, grid: Grid, seeds: Tensor, progress: float = 0.0) -> Mask:
        """See `Masker.__call__`; groups are one visible and ``targets`` target."""
        self.accept(grid)
        config, among = cast(NeighborhoodMaskConfig, self.config), maskable(grid)
        (B, N), T = among.shape, config.targets
        wanted = share(config.ratio, among.sum(1)).repeat_interleave(T, 0)
        free = (among & ~spared(draw(seeds, 1, N), among)).repeat_interleave(T, 0)
        coords = grid.coords.double().repeat_interleave(T, 0)
        order = ranked(draw(seeds, T, N, 1), free)
        nearest = coords.new_full((B * T, N), float("inf"))
        for k in range(min(config.centers, N)):
            center = (order == k).long().argmax(1)
            at = coords.gather(1, center[:, None, None].expand(-1, 1, coords.shape[2]))
            # A sample with fewer free tokens than centres is grown around those that it has.
            exists = free.gather(1, center[:, None])
            nearest = torch.where(exists, nearest.minimum((coords - at).square().sum(2)), nearest)
        hidden = lowest(nearest, free, wanted, ties=draw(seeds, T, N, 2))
        visible = among & ~hidden.view(B, T, N).any(1)
        return Mask(visible=grouped(visible, 1), target=grouped(hidden, T))
