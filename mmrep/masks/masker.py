"""The contract of a masker: index sets over the tokens of a grid, drawn on the device.

All randomness derives from one integer seed a sample, so that a mask depends neither on the rest of the batch nor on
the number of processes, and a resumed run draws the same ones.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from mmrep.masks._lattice import GRIDS, kinds
from mmrep.tokens import Grid, Mask, index_set
from mmrep.views.view import uniform

_GROUPS = 1024  # streams of random numbers that one use may take, one a group


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

    Attributes:
        grids: what it can mask, of ``"regular"`` (a lattice of two axes or more, padded or with holes in it),
            ``"sequence"`` (one axis), ``"points"`` (any coordinates) and ``"graph"``. It refuses the rest.
    """

    Config: ClassVar[type]
    grids: frozenset[str] = GRIDS

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, grid: Grid, seeds: Tensor, progress: float = 0.0) -> Mask:
        """Draw.

        Args:
            grid: the tokens' geometry, B samples.
            seeds: int64 [B], one a sample.
            progress: share of the run that is done, 0 to 1, for curricula.

        Raises:
            ValueError: a grid that is none of ``grids``.
        """
        raise NotImplementedError

    def accept(self, grid: Grid) -> None:
        """Refuse a grid that is none of ``grids``; every masker begins with it.

        Raises:
            ValueError: naming what this masker takes and what it was given.
        """
        given = kinds(grid)
        if not given & self.grids:
            raise ValueError(
                f"{type(self).__name__} takes tokens of the kind {' or '.join(sorted(self.grids))}; these are "
                f"{' and '.join(sorted(given))} (coordinates {tuple(grid.coords.shape)}, shape {grid.shape})"
            )


def maskable(grid: Grid) -> Tensor:
    """Bool [B, N]: the tokens that a mask may name."""
    return grid.valid & ~grid.special


def draw(seeds: Tensor, groups: int, n: int, use: int = 0) -> Tensor:
    """Uniform random numbers, float32 [B * groups, n]: the groups of a sample one after the other.

    The first numbers of a row do not depend on ``n``, so a sample's mask does not depend on how far it is padded.

    Args:
        seeds: int64 [B].
        groups: independent rows per sample.
        n: numbers per row.
        use: separates independent uses within one masker.
    """
    return torch.stack([uniform(seeds, n, use * _GROUPS + group) for group in range(groups)], 1).flatten(0, 1)


def grouped(marks: Tensor, groups: int) -> Tensor:
    """Bool [B * groups, N] as index sets int64 [B, groups, K], -1 behind the last."""
    index = index_set(marks)
    return index.view(len(marks) // groups, groups, index.shape[1])


def share(ratio: float | Tensor, count: Tensor) -> Tensor:
    """``ratio`` of ``count`` int64 [B], rounded half up, but one at least on both sides where there are two.

    A float32 ``ratio`` [B] gives each its own.
    """
    wanted = (count * ratio + 0.5).floor().long()
    return wanted.clamp_min(1).minimum(count - 1).clamp_min(0)


def lowest(scores: Tensor, among: Tensor, count: Tensor, ties: Tensor | None = None) -> Tensor:
    """Bool [B, N]: the ``count`` int64 [B] tokens of lowest ``scores`` float [B, N] where ``among`` bool [B, N].

    Equal scores are ordered by ``ties`` float [B, N], else by position.
    """
    if ties is None:
        return among & (ranked(scores, among) < count[:, None])
    order = ties.argsort(dim=1, stable=True)
    chosen = lowest(scores.gather(1, order), among.gather(1, order), count)
    return torch.zeros_like(among).scatter(1, order, chosen)


def ranked(scores: Tensor, among: Tensor) -> Tensor:
    """Int64 [B, N]: the place of each token by ascending ``scores`` float [B, N]; those not ``among`` come last."""
    scores = scores.clamp_max(torch.finfo(scores.dtype).max).masked_fill(~among, float("inf"))
    return scores.argsort(dim=1, stable=True).argsort(dim=1)


def spared(scores: Tensor, among: Tensor) -> Tensor:
    """Bool [B, N]: one token of each sample of two or more, the one of lowest ``scores``: no group may hide it.

    The token in the middle of a cloud is near to all others, and the hub of a graph is met on every walk: grown sets
    would always hide them. It also leaves something visible however many sets overlap.
    """
    return lowest(scores, among, (among.sum(1) > 1).long())
