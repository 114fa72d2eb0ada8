"""Where a token sits: what DropPos predicts of tokens whose position was taken away."""

from __future__ import annotations

from dataclasses import field as default
from typing import TYPE_CHECKING, Annotated, cast

import torch
from pydantic import Field
from torch import Tensor

from mmrep.config import config
from mmrep.model import Tower
from mmrep.schedules import Schedule
from mmrep.targets.target import Target, look
from mmrep.tokens import Content

if TYPE_CHECKING:
    from mmrep.step import Step


@config
class PositionTargetConfig:
    """smoothing: how far the probability of a place spreads to others, in tokens; 0 = not at all. schedule: how it
    moves over the run (by default linearly to 0).
    """

    smoothing: Annotated[float, Field(ge=0)] = 1.0
    schedule: Schedule | None = default(default_factory=lambda: Schedule(shape="linear", end=0.0))


class PositionTarget(Target):
    """The place of each token among those of its grid (DropPos, Wang et al. 2023, arXiv:2309.03576, section 3).

    A probability for every place, ``exp(-d / smoothing^2)`` over its sum, d the distance in coordinates (position
    smoothing, section 3.2); near a smoothing of 0, the number of the place alone. Of regular grids of one size. The
    encoder must not be told the positions: ``input: unplaced``.
    """

    Config = PositionTargetConfig
    losses = ("cross-entropy",)

    def __init__(self, config: PositionTargetConfig, tower: Tower) -> None:
        super().__init__(config, tower)
        shape = look(tower.encoder).tokens.grid.shape
        if shape is None:
            raise ValueError("target 'position' needs a regular grid of one size, and these tokens are ragged")
        self.shape = shape
        self.width = torch.Size(shape).numel()

    @torch.no_grad()
    def forward(self, step: Step, field: str, view: int = 0) -> Content:
        """See `Target.forward`: probabilities float32 [B, N, places], or places int64 [B, N].

        Raises:
            ValueError: a grid of another shape than that of the encoder's examples.
        """
        config, grid = cast(PositionTargetConfig, self.config), step.tokens(field, view).grid
        if grid.shape != self.shape:
            raise ValueError(f"target 'position' knows a grid of {self.shape}, and these tokens lie on {grid.shape}")
        (B, N), places = grid.valid.shape, torch.arange(self.width, device=grid.coords.device)
        own = torch.cat([places.new_zeros(N - self.width), places])
        spread = step.clock.value(config.smoothing, config.schedule)
        if spread < 1e-2:
            return Content(own.expand(B, -1), vocabulary=self.width)
        return Content(smoothed(grid.coords[0, N - self.width :], spread)[own].expand(B, -1, -1))


def smoothed(coords: Tensor, spread: float) -> Tensor:
    """Probabilities float32 [K, K] of places at ``coords`` [K, C]: in row k those where the place is k."""
    distance = (coords[:, None] - coords).float().square().sum(-1).sqrt()
    return (-distance / spread**2).softmax(-1)
