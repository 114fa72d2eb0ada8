"""A harder or softer press."""

from __future__ import annotations

from mmrep.config import config
from mmrep.views.view import View, uniform


class Press(View):
    """Multiplies all pressures of a sample by one factor."""

    @config
    class Config:
        """spread: the factor is between 1 - spread and 1 + spread."""

        spread: float = 0.2

    def batch(self, inputs, seeds):
        factor = 1 + self.config.spread * (2 * uniform(seeds.to(inputs["frames"].device), 1) - 1)
        return {**inputs, "frames": inputs["frames"] * factor[:, :, None, None]}, {"factor": factor[:, 0]}
