"""Tokens hidden one by one, independently (MAE, He et al. 2022, arXiv:2111.06377, section 3)."""

from __future__ import annotations

from typing import Annotated, cast

from pydantic import Field
from torch import Tensor

from mmrep.config import config
from mmrep.masks.masker import Masker, draw, grouped, lowest, maskable, share
from mmrep.tokens import Grid, Mask


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
        self.accept(grid)
        config, among = cast(RandomMaskConfig, self.config), maskable(grid).repeat_interleave(self.config.masks, 0)
        hidden = lowest(draw(seeds, config.masks, among.shape[1]), among, share(config.ratio, among.sum(1)))
        return Mask(visible=grouped(among & ~hidden, config.masks), target=grouped(hidden, config.masks))
