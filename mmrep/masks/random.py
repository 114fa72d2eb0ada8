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
    """ratio: share of a sample's tokens that is hidden and predicted. dropped: share that is neither visible nor
    predicted; with ``ratio`` less than 1. masks: of a sample, at once (data2vec 2).
    """

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    dropped: Annotated[float, Field(ge=0, lt=1)] = 0.0
    masks: Annotated[int, Field(ge=1)] = 1

    def __post_init__(self) -> None:
        if self.ratio + self.dropped >= 1:
            raise ValueError(f"ratio={self.ratio:g} and dropped={self.dropped:g} leave nothing visible")


class RandomMask(Masker):
    """A uniformly random subset of exactly ``round(ratio * n)`` of a sample's n tokens is target, the rest visible.

    Of that rest ``round(dropped * n)`` are not, but one is always left.
    """

    Config = RandomMaskConfig

    def __call__(self, grid: Grid, seeds: Tensor, progress: float = 0.0) -> Mask:
        """See `Masker.__call__`; groups are ``masks`` visible and ``masks`` target."""
        self.accept(grid)
        config, among = cast(RandomMaskConfig, self.config), maskable(grid).repeat_interleave(self.config.masks, 0)
        scores, count = draw(seeds, config.masks, among.shape[1]), among.sum(1)
        hidden = lowest(scores, among, share(config.ratio, count))
        visible = among & ~hidden
        if config.dropped:
            # The next in the same order: which of those that are left is as random as which were hidden.
            gone = (count * config.dropped + 0.5).floor().long().minimum(visible.sum(1) - 1).clamp_min(0)
            visible = visible & ~lowest(scores, visible, gone)
        return Mask(visible=grouped(visible, config.masks), target=grouped(hidden, config.masks))
