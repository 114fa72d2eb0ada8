"""GRAM: contrast by the volume of the parallelotope that the vectors of a tuple span; never an N x N matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmrep.losses._flats import contrast, direction, flats
from mmrep.losses._tiles import Tile, lengths
from mmrep.losses._tuples import anchors, check_fields, tuple_batch
from mmrep.world import World


def gram(
    embeddings: Sequence[Tensor],
    *,
    scale: Tensor | float,
    group: Tensor | None = None,
    valid: Tensor | None = None,
    anchor: int | None = None,
    world: World | None = None,
    tile: Tile | None = None,
) -> dict[str, Tensor]:
    r"""Volume contrast (arXiv:2412.11959, losses D2A and A2D).

    The volume of M unit vectors is ``sqrt(det G)``, G their Gram matrix: 0 for vectors that coincide, 1 for orthogonal
    ones. With ``v_ij`` that of anchor i with the other fields of tuple j, and C the complete tuples of all ranks::

        data to anchor: mean_{j in C} [log sum_{i in C} exp(-scale * v_ij) + scale * v_jj]
        anchor to data: mean_{i in C} [log sum_{j in C} exp(-scale * v_ij) + scale * v_ii]
        loss = the mean of the two

    Tuples of one group are left out of each other's denominators. (Their code also smooths the labels by 0.1, which no
    equation has.) For M = 2 the volume is the sine of the angle.

    ``det G_ij = det G_j * dist(a_i, span_j)^2`` (the Schur complement), so that all v_ij of an anchor field take M - 1
    products of n x N x D, tile by tile, three times that backward; memory is O(N M D) and M tiles. The bases of the
    spans and each tuple's own volume are computed in float64 by Gram-Schmidt, O(n M^2 D), which keeps the digits of
    vectors that almost coincide, where a determinant of cosines loses them all. Gradients are finite where vectors
    coincide: a distance of zero has none. (Two fields that coincide have volume 0 with every third, matching or not.)

    Args, returns and raises: see `mmrep.losses._tuples.TupleLoss`; the part ``volume`` is the mean of the own volumes.
    tile: rows and columns held at a time.
    """
    check_fields("GRAM", GRAM.fields, len(embeddings))
    turns = anchors(anchor, len(embeddings))
    batch = tuple_batch(embeddings, scale=scale, group=group, valid=valid, world=world)
    total, own = batch.scale.new_zeros(()), batch.scale.new_zeros(len(batch.groups))
    for turn in turns:
        of = flats(_span, batch.fields[turn], [x for k, x in enumerate(batch.fields) if k != turn])
        total = total + contrast(batch, batch.fields[turn], of, tile=tile) / len(turns)
        own = of.own
    return batch.result(total, volume=own)


class GRAM(nn.Module):
    """`gram` as a component; see there for the equation."""

    fields: ClassVar[tuple[int, int | None]] = (2, None)
    takes_partial: ClassVar[bool] = False
    draws_negatives = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """A ``gram`` loss has no fields of its own."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    @staticmethod
    def bounds(dim: int, fields: int) -> tuple[float, float]:
        """Volumes are from 0 to 1 whatever the dimension."""
        return 1.0, 100.0

    def forward(
        self,
        embeddings: Sequence[Tensor],
        *,
        scale: Tensor | float,
        group: Tensor | None = None,
        valid: Tensor | None = None,
        anchor: int | None = None,
        world: World | None = None,
    ) -> dict[str, Tensor]:
        """Return ``loss``, ``n`` and ``volume``; arguments as `gram`."""
        return gram(embeddings, scale=scale, group=group, valid=valid, anchor=anchor, world=world)


def _span(anchor: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, None, Tensor]:
    """Volume [n] of the rest [n, K, D], an orthonormal basis of its span, no point, and the volume with the anchor."""
    volume, basis = rest.new_ones(len(rest)), list[Tensor]()
    for vector in rest.unbind(1):
        left, length = _beside(vector, basis)
        volume = volume * length
        basis.append(direction(left, length))  # 0 of a vector in the span of those before, which adds nothing to it
    return volume, torch.stack(basis, 1), None, volume * _beside(anchor, basis)[1]


def _beside(vector: Tensor, basis: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What of a vector [n, D] is orthogonal to the basis, and its length [n], whose gradient at 0 is 0."""
    for unit in basis:  # from what is left by the one before (modified Gram-Schmidt), not from the whole
        vector = vector - (vector * unit).sum(1, keepdim=True) * unit
    return vector, lengths(vector)
