"""Whole stretches of time and bands of frequency hidden, and ever more of them as training goes on.

A-JEPA (Fei et al. 2023, arXiv:2311.15830, section 3.2): at first tokens are hidden at random, later by time and
frequency, which is harder, as a spectrogram's neighbours along either axis tell much of each other.
"""

from __future__ import annotations

from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor

from mmrep.config import config
from mmrep.masks._blocks import Ratio, Share, between, fill, ordered
from mmrep.masks._lattice import lattice
from mmrep.masks.masker import Masker, draw, grouped, lowest, maskable, share
from mmrep.tokens import Grid, Mask

Probability = Annotated[float, Field(ge=0, le=1)]


@config
class TimeFrequencyMaskConfig:
    """ratio: share of a sample's tokens that is hidden.

    time: range of the length of a stretch of time, as a share of the clip. frequency: of a band, as a share of the
    bands. balance: probability that the next one is a stretch of time. curriculum: probability that a sample is masked
    by time and frequency, at the start and at the end of the run, moving linearly between them; else its tokens are
    hidden one by one. masks: of a sample, at once.
    """

    ratio: Ratio = 0.6
    time: tuple[Share, Share] = (0.05, 0.25)
    frequency: tuple[Share, Share] = (0.1, 0.3)
    balance: Probability = 0.5
    curriculum: tuple[Probability, Probability] = (0.0, 1.0)
    masks: Annotated[int, Field(ge=1)] = 1

    def __post_init__(self) -> None:
        ordered("time", self.time)
        ordered("frequency", self.frequency)


class TimeFrequencyMask(Masker):
    """Columns and rows of a (time, frequency) grid are hidden until exactly ``round(ratio * n)`` of n tokens are.

    The first coordinate of a token is its time, the others are frequencies (or the channel of a series). Of the last
    stretch or band some tokens, drawn at random, stay visible to make the count come out.
    """

    Config = TimeFrequencyMaskConfig
    grids = frozenset({"regular"})

    def __call__(self, grid: Grid, seeds: Tensor, progress: float = 0.0) -> Mask:
        """See `Masker.__call__`; groups are ``masks`` visible and ``masks`` target."""
        self.accept(grid)
        config = cast(TimeFrequencyMaskConfig, self.config)
        groups = config.masks
        places, sizes, among = (part.repeat_interleave(groups, 0) for part in (*lattice(grid), maskable(grid)))
        wanted = share(config.ratio, among.sum(1))
        probability = config.curriculum[0] + (config.curriculum[1] - config.curriculum[0]) * progress
        coin, single = draw(seeds, groups, 1, 3), draw(seeds, groups, among.shape[1], 2)
        structured = coin < probability
        axes = torch.arange(sizes.shape[1], device=sizes.device)

        def length(box: int, missing: Tensor) -> Tensor:
            kind, which, long = draw(seeds, groups, 3, 5 + 2 * box).split(1, 1)
            axis = torch.where(kind < config.balance, 0, 1 + (which * (len(axes) - 1)).long())
            part = torch.where(axis == 0, between(config.time, long), between(config.frequency, long))
            return torch.where(axes == axis, (sizes * part).round().long().clamp_min(1), sizes)

        striped = fill(places, sizes, among, wanted * structured[:, 0], seeds, length)
        hidden = torch.where(structured, striped, lowest(single, among, wanted))
        return Mask(visible=grouped(among & ~hidden, groups), target=grouped(hidden, groups))
