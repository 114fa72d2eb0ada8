"""Barlow Twins over any number of views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from mmrep.losses._views import prepare
from mmrep.losses.cross_correlation import cross_correlation_loss
from mmrep.world import World


class BarlowTwins(nn.Module):
    """The cross-correlation of two views is to be the identity (Zbontar et al. 2021, arXiv:2103.03230, equation 1).

    Each view is standardised by its mean and biased variance over the valid rows of *all* ranks, as a synchronised
    batch normalisation does; see `mmrep.losses.cross_correlation.cross_correlation_loss`. Of more than two views it is
    the mean over pairs.
    """

    paired = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Fields of a ``barlow`` loss.

        Attributes:
            redundancy: weight of the entries that are not on the diagonal.
            eps: added to the variances.
        """

        redundancy: float = 5e-3
        eps: float = 1e-5

        def __post_init__(self) -> None:
            if self.redundancy < 0 or self.eps <= 0:
                raise ValueError("barlow: redundancy is not negative, and eps is positive")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, views: Sequence[Tensor], *, valid: Sequence[Tensor] | None = None, world: World | None = None
    ) -> dict[str, Tensor]:
        """See `mmrep.losses._views.ViewLoss`; rows that both views of a pair have take part in it.

        Raises:
            ValueError: fewer than two views.
        """
        if len(views) < 2:
            raise ValueError(f"barlow compares two views or more, got {len(views)}")
        views, valid, world = prepare(views, valid, world, paired=True)
        terms = [
            cross_correlation_loss(
                views[i],
                views[j],
                redundancy=self.config.redundancy,
                valid=valid[i] & valid[j],
                world=world,
                eps=self.config.eps,
            )["common"]
            for i, j in combinations(range(len(views)), 2)
        ]
        return {"loss": torch.stack(terms).mean()}

    def after_optimizer_step(self) -> None:
        """Nothing moves."""
