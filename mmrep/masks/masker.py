"""The contract of a masker: index sets over the tokens of a grid, drawn on the device.

All randomness derives from one integer seed a sample, so that a mask depends neither on the rest of the batch nor on
the number of processes, and a resumed run draws the same ones.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from mmrep.tokens import Grid, Mask


class Masker:
    """Draws a `Mask` for each sample of a batch. It is built as ``cls(config)``.

    What every masker keeps to, and `mmrep.testing.check_mask` looks at:

    * special tokens and padding are neither visible (they are kept anyway) nor target;
    * no token is visible and target in the same pair of groups, and none is twice in a group;
    * counts are what the config says, to the token, not on average, wherever a sample has tokens enough; they are
      never reached by cutting off the last tokens in raster order;
    * every position can be visible and every position can be target;
    * a sample of two tokens or more has at least one visible token and one target in every group.

    Either there is one visible group, from which all target groups are predicted, or there are as many as target groups
    and each predicts its own.
    """

    Config: ClassVar[type]

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, grid: Grid, seeds: Tensor, progress: float = 0.0) -> Mask:
        """Draw.

        Args:
            grid: the tokens' geometry, B samples.
            seeds: int64 [B], one a sample.
            progress: share of the run that is done, 0 to 1, for curricula.
        """
        raise NotImplementedError


def maskable(grid: Grid) -> Tensor:
    """Bool [B, N]: the tokens that a mask may name."""
    return grid.valid & ~grid.special


def share(ratio: float, count: Tensor) -> Tensor:
    """``ratio`` of ``count`` int64 [B], rounded half up, but one at least on both sides where there are two."""
    wanted = (count * ratio + 0.5).floor().long()
    return wanted.clamp_min(1).minimum(count - 1).clamp_min(0)


def lowest(scores: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """Bool [B, N]: the ``count`` int64 [B] tokens of lowest ``scores`` float [B, N] where ``among`` bool [B, N]."""
    order = scores.masked_fill(~among, float("inf")).argsort(dim=1, stable=True)
    rank = order.argsort(dim=1)
    return among & (rank < count[:, None])
