"""Tokens hidden one by one, independently (MAE, He et al. 2022, arXiv:2111.06377, section 3)."""

from __future__ import annotations

from typing import Annotated, cast

from pydantic import Field
from torch import Tensor

from mmrep.config import config
from mmrep.masks.masker import Masker, lowest, maskable, share
from mmrep.tokens import Grid, Mask, index_set
from mmrep.views.view import uniform


@config
class RandomMaskConfig:
    """ratio: share of a sample's tokens that is hidden and predicted. masks: of a sample, at once (data2vec 2)."""

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    masks: Annotated[int, Field(ge=1)] = 1


class RandomMask(Masker):
    """A uniformly random subset of exactly ``round(ratio * n)`` of a sample's n tokens is target, the rest visible."""

    Config = RandomMaskConfig

    def __call__(self, grid: Grid, seeds: Tensor, progress: float = 0.0) -> Mask:
        """See `Masker.__call__`; groups are ``masks`` visible and ``masks`` target."""
        config, among = cast(RandomMaskConfig, self.config), maskable(grid).repeat_interleave(self.config.masks, 0)
        B, N = grid.valid.shape
        scores = uniform(seeds, config.masks * N).view(B * config.masks, N)
        hidden = lowest(scores, among, share(config.ratio, among.sum(1)))
        shape = (B, config.masks, -1)
        return Mask(visible=index_set(among & ~hidden).view(shape), target=index_set(hidden).view(shape))
