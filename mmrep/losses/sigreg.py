"""LeJEPA: views near their mean, and embeddings whose every projection is a standard normal (SIGReg)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmrep.losses._views import count, cross_product, prepare, select
from mmrep.world import World


class SIGReg(nn.Module):
    r"""Sketched isotropic Gaussian regularisation (Balestriero and LeCun 2025, arXiv:2511.08544, section 4 and 5).

    Rows are projected onto random unit vectors ("slices"); the empirical characteristic function of each projection is
    compared with that of a standard normal (Epps and Pulley 1983), with N the valid rows of all ranks::

        statistic = N * integral |1/N sum_n exp(i t x_n) - exp(-t^2/2)|^2 exp(-t^2/2) dt
        loss = weight * mean over views and slices of statistic + (1 - weight) * invariance
        invariance = mean over views, rows and columns of (z_v - mean of the global views)^2

    The integral is a trapezoid over knots from -range to range; being even, it is taken as twice that from 0.
    The factor N makes ``weight`` depend on the batch; ``times_n: false`` leaves it out.

    Slices are drawn on the CPU from a generator seeded with ``seed`` and the number of optimizer steps, which is a
    buffer: they are the same on all ranks and devices, anew in each step, and a resumed run goes on with them.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Fields of a ``sigreg`` loss.

        Attributes:
            weight: 0 to 1, share of the statistic in the loss; 1 = no invariance, and views need not be paired.
            slices: random directions in each step.
            knots: points of the integral from 0 to ``range``, at least 2.
            range: where the integral ends.
            times_n: whether the statistic is multiplied by the number of rows, as published.
            globals: so many first views make the mean that all are compared with; None = all.
            seed: of the slices.
        """

        weight: float = 0.05
        slices: int = 1024
        knots: int = 17
        range: float = 3.0
        times_n: bool = True
        globals: int | None = None
        seed: int = 0

        def __post_init__(self) -> None:
            if not 0 <= self.weight <= 1:
                raise ValueError(f"sigreg: weight is a share from 0 to 1, got {self.weight}")
            if self.slices < 1 or self.knots < 2 or self.range <= 0:
                raise ValueError("sigreg: at least 1 slice, 2 knots, and a positive range")
            if self.globals is not None and self.globals < 1:
                raise ValueError(f"sigreg: at least one view makes the mean, got globals={self.globals}")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.step: Tensor

    @property
    def paired(self) -> bool:
        """Rows are compared unless ``weight`` is 1."""
        return self.config.weight < 1

    def forward(
        self, views: Sequence[Tensor], *, valid: Sequence[Tensor] | None = None, world: World | None = None
    ) -> dict[str, Tensor]:
        """See `mmrep.losses._views.ViewLoss`; parts ``sigreg`` and ``invariance``, without their weights."""
        views, valid, world = prepare(views, valid, world, paired=self.paired)
        weight = self.config.weight
        with torch.autocast(views[0].device.type, enabled=False):
            statistics = [self._statistic(select(x, v), world) for x, v in zip(views, valid, strict=True)]
            sigreg = torch.stack(statistics).mean()
            invariance = self._invariance(views, valid, world) if self.paired else sigreg.new_zeros(())
            loss = weight * sigreg + (1 - weight) * invariance
        return {"loss": loss, "sigreg": sigreg.detach(), "invariance": invariance.detach()}

    def directions(self, width: int, like: Tensor) -> Tensor:
        """The slices of this step: unit columns [width, slices], in the dtype and on the device of ``like``."""
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + int(self.step)) % 2**63)
        drawn = torch.randn(width, self.config.slices, generator=generator)
        drawn = drawn.to(device=like.device, dtype=like.dtype)
        return drawn / drawn.square().sum(0).sqrt()

    def _statistic(self, x: Tensor, world: World) -> Tensor:
        """The mean over slices of the statistic of Epps and Pulley."""
        c, n = self.config, count(x, world)
        t = torch.linspace(0, c.range, c.knots, dtype=x.dtype, device=x.device)
        normal = (-t.square() / 2).exp()
        steps = torch.full_like(t, 2 * c.range / (c.knots - 1))
        steps[[0, -1]] /= 2
        projected = cross_product(x.T, self.directions(x.shape[1], x))[..., None] * t  # [n, slices, knots]
        sums = world.sum(torch.stack([projected.cos().sum(0), projected.sin().sum(0)])) / n.clamp_min(1)
        apart = (sums[0] - normal).square() + sums[1].square()
        statistic = (apart * (steps * normal)).sum(-1).mean()
        return statistic * (n if c.times_n else n > 0)

    def _invariance(self, views: list[Tensor], valid: list[Tensor], world: World) -> Tensor:
        """Mean squared distance of each view to the mean of the global ones that the sample has."""
        first = len(views) if self.config.globals is None else self.config.globals
        stacked, there = torch.stack(views), torch.stack(valid)
        stacked = stacked.masked_fill(~there[..., None], 0)
        centre = stacked[:first].sum(0) / there[:first].sum(0).clamp_min(1)[:, None]
        compared = there & there[:first].any(0)
        apart = ((stacked - centre).square().sum(-1) * compared).sum()
        return world.sum(apart) / (world.sum(compared.sum()) * stacked.shape[-1]).clamp_min(1)

    def after_optimizer_step(self) -> None:
        """Other slices from here on."""
        self.step += 1
