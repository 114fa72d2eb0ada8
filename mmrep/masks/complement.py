"""What another mask shows is hidden, and what it hides is shown.

Of two fields with one geometry (a picture and its depth, two sensors of one clock) each is then seen where the other is
not: give their objectives one word under ``tied``, and one of them this mask.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, cast

from torch import Tensor

from mmrep.config import Component, Of, component, config
from mmrep.masks.masker import Masker
from mmrep.tokens import Grid, Mask


@config
class ComplementMaskConfig:
    """of: the mask that is turned around."""

    of: Annotated[Component, Of("masks")] = field(default_factory=lambda: component("masks", "random"))


class ComplementMask(Masker):
    """The targets of the inner mask are visible, each group by itself, and what it shows is the target of each."""

    Config = ComplementMaskConfig

    def __init__(self, config: ComplementMaskConfig) -> None:
        super().__init__(config)
        self.of = cast(Masker, config.of.build())
        self.grids = self.of.grids

    def __call__(self, grid: Grid, seeds: Tensor, progress: float = 0.0) -> Mask:
        """See `Masker.__call__`."""
        mask = self.of(grid, seeds, progress)
        groups = mask.target.shape[1]
        return Mask(visible=mask.target, target=mask.visible.expand(-1, groups, -1))
