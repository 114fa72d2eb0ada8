"""Blocks kept, the rest hidden (data2vec 2.0, Baevski et al. 2023, arXiv:2212.07525, section 3.3)."""

from __future__ import annotations

from typing import Annotated, cast

from pydantic import Field
from torch import Tensor

from mmrep.config import config
from mmrep.masks._blocks import Ratio, Temporal, fill, lengths
from mmrep.masks._lattice import lattice
from mmrep.masks.masker import Masker, grouped, maskable, share
from mmrep.tokens import Grid, Mask


@config
class InverseBlockMaskConfig:
    """ratio: share of a sample's tokens that is hidden. length: side of a block that is kept, in tokens.

    temporal: share of the frames of a video that a block covers; ``full`` keeps tubes. masks: of a sample, at once;
    data2vec 2.0 predicts 8 to 16 masks of a sample from one pass of the teacher.
    """

    ratio: Ratio = 0.8
    length: Annotated[int, Field(ge=1)] = 3
    temporal: Temporal = "full"
    masks: Annotated[int, Field(ge=1)] = 1


class InverseBlockMask(Masker):
    """Square blocks are kept until exactly ``n - round(ratio * n)`` of a sample's n tokens are; the rest is target.

    What stays visible hangs together, so a hidden token is less easily filled in from its neighbours than among tokens
    kept one by one. On one axis blocks are spans.
    """

    Config = InverseBlockMaskConfig
    grids = frozenset({"regular", "sequence"})

    def __call__(self, grid: Grid, seeds: Tensor, progress: float = 0.0) -> Mask:
        """See `Masker.__call__`; groups are ``masks`` visible and ``masks`` target."""
        self.accept(grid)
        config = cast(InverseBlockMaskConfig, self.config)
        groups = config.masks
        places, sizes, among = (part.repeat_interleave(groups, 0) for part in (*lattice(grid), maskable(grid)))
        count = among.sum(1)
        side = count.new_full(count.shape, config.length)
        area = (side * side if sizes.shape[1] > 1 else side).double()

        def length(box: int, missing: Tensor) -> Tensor:
            return lengths(area, area.new_ones(()), sizes, config.temporal)

        kept = fill(places, sizes, among, count - share(config.ratio, count), seeds, length)
        return Mask(visible=grouped(kept, groups), target=grouped(among & ~kept, groups))
