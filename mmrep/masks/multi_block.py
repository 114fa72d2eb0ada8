"""Several target blocks predicted from one context, or each from all around it.

I-JEPA (Assran et al. 2023, arXiv:2301.08243, section 3) and, with ``complement``, V-JEPA (Bardes et al. 2024,
arXiv:2404.08471, section 3.2). Its short-range masks are ``targets: 1, blocks: 8, scale: [0.15, 0.15]``, its long-range
ones ``blocks: 2, scale: [0.7, 0.7]``.
"""

from __future__ import annotations

from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor

from mmrep.config import config
from mmrep.masks._blocks import Aspect, Share, Temporal, between, inside, lengths, ordered, whole
from mmrep.masks._lattice import lattice
from mmrep.masks.masker import Masker, draw, grouped, lowest, maskable
from mmrep.tokens import Grid, Mask


@config
class MultiBlockMaskConfig:
    """targets: groups that are predicted, each by itself. blocks: that a target is the union of; they may overlap.

    scale: range of the area of a block, as a share of one frame. aspect: range of its height over its width. context:
    range of the area of the visible block, whose aspect is 1. temporal: share of the frames of a video that a target's
    blocks cover; ``full`` makes tubes. complement: each target is predicted from all that is not in it; there is no
    context block.
    """

    targets: Annotated[int, Field(ge=1)] = 4
    blocks: Annotated[int, Field(ge=1)] = 1
    scale: tuple[Share, Share] = (0.15, 0.2)
    aspect: tuple[Aspect, Aspect] = (0.75, 1.5)
    context: tuple[Share, Share] = (0.85, 1.0)
    temporal: Temporal = "full"
    complement: bool = False

    def __post_init__(self) -> None:
        for name in ("scale", "aspect", "context"):
            ordered(name, getattr(self, name))


class MultiBlockMask(Masker):
    """Target blocks at uniformly random offsets, and a context block less all that is in a target.

    Scale and aspect of each block are drawn independently of each other, and offsets reach the last row and column.
    Groups differ in size, and are filled up with -1: none is cut to the size of the smallest. Where targets cover the
    whole context, what no target covers is visible; where they cover the whole sample, one token drawn at random is
    taken from them. On one axis blocks are spans.

    If every block is longer than half the lattice on both axes (a scale of 0.7), its middle is in all of them: it is
    target always and never visible.
    """

    Config = MultiBlockMaskConfig
    grids = frozenset({"regular", "sequence"})

    def __call__(self, grid: Grid, seeds: Tensor, progress: float = 0.0) -> Mask:
        """See `Masker.__call__`; groups are one visible (``targets`` with ``complement``) and ``targets`` target."""
        self.accept(grid)
        config = cast(MultiBlockMaskConfig, self.config)
        among, (places, sizes) = maskable(grid), lattice(grid)
        T, K, (B, N) = config.targets, config.blocks, among.shape
        boxes = self._boxes(seeds, places, sizes, T * K, config.scale, config.aspect, config.temporal, 0)
        target = boxes.view(B, T, K, N).any(2) & among[:, None]
        # The groups that must leave something visible together: each by itself, or all.
        sets = target.view(B * T, 1, N) if config.complement else target
        around, scores = among, draw(seeds, 1, N, 4)
        if config.complement:
            around, scores = among.repeat_interleave(T, 0), draw(seeds, T, N, 4)
        sets = _leave(sets, around, scores)
        visible = around & ~sets.any(1)
        if not config.complement:
            context = self._boxes(seeds, places, sizes, 1, config.context, (1.0, 1.0), "full", 2)[:, 0] & visible
            visible = torch.where(context.any(1, keepdim=True), context, visible)
        return Mask(visible=grouped(visible, T if config.complement else 1), target=grouped(sets.flatten(0, 1), T))

    def _boxes(
        self,
        seeds: Tensor,
        places: Tensor,
        sizes: Tensor,
        count: int,
        scale: tuple[float, float],
        aspect: tuple[float, float],
        temporal: float | str,
        use: int,
    ) -> Tensor:
        """``count`` boxes for each sample: bool [B, count, N]."""
        (B, _, C), around = places.shape, sizes[:, None].expand(-1, count, -1)
        area, stretch = draw(seeds, count, 2, use).view(B, count, 2).unbind(2)
        frame = sizes[:, -2:].prod(1)[:, None]
        length = lengths(between(scale, area) * frame, between(aspect, stretch), around, temporal)
        start = whole(draw(seeds, count, C, use + 1).view(B, count, C), around - length + 1)
        return inside(places[:, None], start, length)


def _leave(sets: Tensor, among: Tensor, scores: Tensor) -> Tensor:
    """Take one token out of all sets of a sample that cover it whole; a set that it was all of gets another.

    A set that holds nothing, for there are holes in the lattice, gets a token too.

    Args:
        sets: bool [R, S, N].
        among: bool [R, N]; the sample's tokens.
        scores: float [R, N], random: the lowest is taken out.
    """
    left = lowest(scores, among, (~(among & ~sets.any(1)).any(1) & (among.sum(1) > 1)).long())
    sets = sets & ~left[:, None]
    several = among.sum(1) > 1
    bare = left | lowest(scores, among & ~left, (several & ~left.any(1)).long())
    other = lowest(scores, among & ~bare, several.long())
    return (sets | (other[:, None] & ~sets.any(2, keepdim=True))) & several[:, None, None]
