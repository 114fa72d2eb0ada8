"""KoLeo: every vector away from its nearest neighbour, which spreads a batch evenly over the sphere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.losses._views import count, prepare, select
from mmrep.world import World


class KoLeo(nn.Module):
    r"""The entropy estimator of Kozachenko and Leonenko (Sablayrolles et al. 2019, arXiv:1806.03198, equation 2).

    ``-mean_i log |x_i - x_nn(i)|`` over unit vectors, as in DINOv2 (arXiv:2304.07193, section 4) with the neighbours of
    all ranks; mean over views, each by itself (over all at once the nearest neighbour would be the sample's own other
    view). Rows are brought to unit length here.

    A row that coincides with its neighbour (closer than ``closest``) has no direction to go: it counts as being that
    near, without gradient. The published formula has there a slope of 1e8, which no fp16 gradient survives.
    """

    paired = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Fields of a ``koleo`` loss.

        Attributes:
            eps: added to the distance in the logarithm, and to each difference.
            closest: distances below it are held to it.
        """

        eps: float = 1e-8
        closest: float = 1e-4

        def __post_init__(self) -> None:
            if self.eps < 0 or self.closest <= 0:
                raise ValueError("koleo: eps is not negative, and closest is positive")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, views: Sequence[Tensor], *, valid: Sequence[Tensor] | None = None, world: World | None = None
    ) -> dict[str, Tensor]:
        """See `mmrep.losses._views.ViewLoss`; of one row there is no neighbour, and no loss."""
        views, valid, world = prepare(views, valid, world, paired=False)
        with torch.autocast(views[0].device.type, enabled=False):
            terms = [self._of_view(select(x, v), world) for x, v in zip(views, valid, strict=True)]
        return {"loss": torch.stack(terms).mean()}

    def _of_view(self, x: Tensor, world: World) -> Tensor:
        c, n = self.config, count(x, world)
        x = F.normalize(x, dim=1, eps=1e-6)
        everyone = world.gather(x)
        if len(everyone) < 2:
            return everyone.sum() * 0
        with torch.no_grad():
            start = world.offset(len(x))
            rows = torch.arange(len(x), device=x.device)
            cosines = x @ everyone.T
            cosines[rows, start + rows] = -2
            nearest = cosines.argmax(1)
        apart = F.pairwise_distance(x, everyone[nearest], eps=c.eps).clamp_min(c.closest)
        return world.sum(-(apart + c.eps).log().sum()) / n

    def after_optimizer_step(self) -> None:
        """Nothing moves."""
