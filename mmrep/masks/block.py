"""Blocks hidden until a share of the tokens is (BEiT, Bao et al. 2022, arXiv:2106.08254, algorithm 1).

With a range of ratios it is the block-wise masking of iBOT (Zhou et al. 2022, arXiv:2111.07832, section 4.1).
"""

from __future__ import annotations

import math
from typing import Annotated, cast

from pydantic import Field
from torch import Tensor

from mmrep.config import config
from mmrep.masks._blocks import Aspect, Ratio, Share, Temporal, between, fill, lengths, ordered
from mmrep.masks._lattice import lattice
from mmrep.masks.masker import Masker, draw, grouped, maskable, share
from mmrep.tokens import Grid, Mask


@config
class BlockMaskConfig:
    """ratio: share of a sample's tokens that is hidden; a range [low, high] draws one for each sample.

    scale: smallest and largest area of a block, as a share of one frame; a block is never drawn larger than what is
    still to be hidden. aspect: range of its height over its width, drawn log-uniformly. temporal: share of the frames
    of a video that a block covers; ``full`` makes tubes. masks: of a sample, at once.
    """

    ratio: Ratio | tuple[Ratio, Ratio] = 0.4
    scale: tuple[Share, Share] = (0.08, 1.0)
    aspect: tuple[Aspect, Aspect] = (0.3, 1 / 0.3)
    temporal: Temporal = "full"
    masks: Annotated[int, Field(ge=1)] = 1

    def __post_init__(self) -> None:
        if isinstance(self.ratio, tuple):
            ordered("ratio", self.ratio)
        ordered("scale", self.scale)
        ordered("aspect", self.aspect)


class BlockMask(Masker):
    """Blocks are laid over hidden places until exactly ``round(ratio * n)`` of a sample's n tokens are; the rest is
    visible.

    Unlike in BEiT, whose blocks lie uniformly and so seldom reach a corner, a block is laid over a token drawn at
    random. On one axis blocks are spans.
    """

    Config = BlockMaskConfig
    grids = frozenset({"regular", "sequence"})

    def __call__(self, grid: Grid, seeds: Tensor, progress: float = 0.0) -> Mask:
        """See `Masker.__call__`; groups are ``masks`` visible and ``masks`` target."""
        self.accept(grid)
        config = cast(BlockMaskConfig, self.config)
        groups = config.masks
        places, sizes, among = (part.repeat_interleave(groups, 0) for part in (*lattice(grid), maskable(grid)))
        ratio = config.ratio
        if isinstance(ratio, tuple):
            ratio = between(ratio, draw(seeds, groups, 1, 3)[:, 0])
        frame = sizes[:, -2:].prod(1)
        frames = sizes[:, :-2].prod(1)

        def length(box: int, missing: Tensor) -> Tensor:
            area, aspect = draw(seeds, groups, 2, 5 + 2 * box).unbind(1)
            part = 1.0 if isinstance(config.temporal, str) else config.temporal
            most = (missing / (frames * part).round().clamp_min(1)).clamp_min(1)
            low, high = (most.minimum(frame * end) for end in config.scale)
            low_aspect, high_aspect = (math.log(end) for end in config.aspect)
            stretched = between((low_aspect, high_aspect), aspect).exp()
            return lengths(low + (high - low) * area, stretched, sizes, config.temporal)

        hidden = fill(places, sizes, among, share(ratio, among.sum(1)), seeds, length)
        return Mask(visible=grouped(among & ~hidden, groups), target=grouped(hidden, groups))
