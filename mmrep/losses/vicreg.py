"""VICReg: views of a sample agree, while every column keeps its spread and no two columns say the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from mmrep.losses._views import centred, count, cross_product, prepare, select
from mmrep.world import World


class VICReg(nn.Module):
    r"""Variance, invariance, covariance (Bardes, Ponce and LeCun 2022, arXiv:2105.04906, equations 1 to 6).

    With N valid rows of all ranks, variances and covariances C unbiased (of N - 1), means over views and pairs of
    views::

        invariance = mean over pairs of mean_ij (a_ij - b_ij)^2
        variance   = mean over views of mean_j relu(target - sqrt(C_jj + eps))
        covariance = mean over views of 2 / D * sum_{j != k} C_jk^2
        loss = weights . (invariance, variance, covariance)

    For two views this is the authors' code, whose covariance is the sum over the two and whose variance the mean of
    them; coefficients of other codes are in other units. With ``invariance`` 0 it is the term against collapse alone
    (VJ-VCR, arXiv:2412.10925), and takes tokens too.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Fields of a ``vicreg`` loss.

        Attributes:
            invariance: weight of the squared distance of two views.
            variance: weight of the hinge on the standard deviation of a column.
            covariance: weight of the squared covariances of different columns.
            target: the standard deviation from which a column is spread enough.
            eps: added to the variances, inside the root: it bounds the gradient of a collapsed column.
        """

        invariance: float = 25.0
        variance: float = 25.0
        covariance: float = 1.0
        target: float = 1.0
        eps: float = 1e-4

        def __post_init__(self) -> None:
            if min(self.invariance, self.variance, self.covariance) < 0 or self.eps <= 0 or self.target <= 0:
                raise ValueError("vicreg: weights are not negative, and target and eps are positive")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    @property
    def paired(self) -> bool:
        """Rows are compared if ``invariance`` has a weight."""
        return self.config.invariance > 0

    def forward(
        self, views: Sequence[Tensor], *, valid: Sequence[Tensor] | None = None, world: World | None = None
    ) -> dict[str, Tensor]:
        """See `mmrep.losses._views.ViewLoss`; parts are the three terms without their weights."""
        c = self.config
        views, valid, world = prepare(views, valid, world, paired=self.paired)
        with torch.autocast(views[0].device.type, enabled=False):
            spread = [self._of_view(select(x, v), world) for x, v in zip(views, valid, strict=True)]
            variance = torch.stack([s[0] for s in spread]).mean()
            covariance = 2 * torch.stack([s[1] for s in spread]).mean()
            invariance = views[0].new_zeros(())
            if self.paired and len(views) > 1:
                pairs = list(combinations(range(len(views)), 2))
                terms = [_distance(views[i], views[j], valid[i] & valid[j], world) for i, j in pairs]
                invariance = torch.stack(terms).mean()
            loss = c.invariance * invariance + c.variance * variance + c.covariance * covariance
        parts = {"invariance": invariance, "variance": variance, "covariance": covariance}
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    def _of_view(self, x: Tensor, world: World) -> tuple[Tensor, Tensor]:
        """Hinge and covariance of one view; of fewer than two rows there are none."""
        n, (_, D) = count(x, world), x.shape
        x, free = centred(x, n, world), (n - 1).clamp_min(1)
        C = world.sum(cross_product(x, x)) / free
        diagonal = C.diagonal()
        hinge = (self.config.target - (diagonal + self.config.eps).sqrt()).relu().mean()
        rest = (C.square().sum() - diagonal.square().sum()) / D
        return hinge * (n > 1), rest * (n > 1)

    def after_optimizer_step(self) -> None:
        """Nothing moves."""


def _distance(a: Tensor, b: Tensor, valid: Tensor, world: World) -> Tensor:
    """Mean squared difference over the rows of all ranks and the columns."""
    a, b = select(a, valid), select(b, valid)
    return world.sum((a - b).square().sum()) / (count(a, world) * a.shape[1]).clamp_min(1)
