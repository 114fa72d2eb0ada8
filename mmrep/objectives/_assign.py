"""What a teacher's logits become: probabilities that neither sharpen to one prototype nor flatten to all."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import config
from mmrep.losses.sinkhorn import sinkhorn
from mmrep.schedules import Clock
from mmrep.world import World


@config
class AssignConfig:
    """How the teacher's logits are made probabilities.

    by: ``centre``: less a moving average of their mean (DINO); ``sinkhorn``: in equal shares over the samples of all
    processes (SwAV, DINOv2), which wants many more samples than prototypes are used. momentum: of the centre.
    iterations: of Sinkhorn. temperature: of the teacher; it moves there from ``start``, linearly, in ``warmup`` steps
    (below 1, a share of the run).
    """

    by: Literal["centre", "sinkhorn"] = "centre"
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.9
    iterations: Annotated[int, Field(ge=1)] = 3
    temperature: Annotated[float, Field(gt=0)] = 0.07
    start: Annotated[float, Field(gt=0)] = 0.04
    warmup: Annotated[float, Field(ge=0)] = 0.3


class Assign(nn.Module):
    """Probabilities of a teacher's logits; the centre is a buffer, and takes a batch in after its optimizer step."""

    def __init__(self, config: AssignConfig, K: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("centre", torch.zeros(K))
        self.centre: Tensor
        self._sum: Tensor | None = None  # of the logits of this step, on all processes, and how many
        self._count: Tensor | None = None

    def temperature(self, clock: Clock) -> float:
        """The teacher's temperature now."""
        c = self.config
        steps = c.warmup if c.warmup >= 1 else c.warmup * (clock.total or 0)
        done = 1.0 if steps <= 0 else min(1.0, clock.step / steps)
        return c.start + (c.temperature - c.start) * done

    @torch.no_grad()
    def forward(self, logits: Tensor, clock: Clock, world: World) -> Tensor:
        """[n, K] of one view (or of the masked tokens of one) to probabilities; every process calls it."""
        temperature = self.temperature(clock)
        if self.config.by == "sinkhorn":
            return sinkhorn(logits, temperature, iterations=self.config.iterations, world=world)
        if self.training:
            total = world.sum(logits.sum(0))
            count = world.sum(torch.tensor(len(logits), device=logits.device))
            self._sum = total if self._sum is None else self._sum + total
            self._count = count if self._count is None else self._count + count
        return ((logits - self.centre.to(logits.dtype)) / temperature).softmax(1)

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Move the centre to the mean of what was seen since the last step; it stays where nothing was."""
        if self._sum is not None and self._count is not None:
            mean = (self._sum / self._count.clamp_min(1)).to(self.centre.dtype)
            moved = self.centre * self.config.momentum + mean * (1 - self.config.momentum)
            self.centre.copy_(torch.where(self._count > 0, moved, self.centre))
        self._sum = self._count = None
