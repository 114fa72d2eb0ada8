"""TRIANGLE: contrast by the area of the triangle that three vectors are the corners of; never an N x N matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from mmrep.losses._flats import contrast, direction, flats
from mmrep.losses._tiles import Tile, lengths
from mmrep.losses._tuples import anchors, check_fields, tuple_batch
from mmrep.world import World


def triangle(
    embeddings: Sequence[Tensor],
    *,
    scale: Tensor | float,
    group: Tensor | None = None,
    valid: Tensor | None = None,
    anchor: int | None = None,
    squared: bool = False,
    world: World | None = None,
    tile: Tile | None = None,
) -> dict[str, Tensor]:
    r"""Area contrast of three fields (arXiv:2509.24734).

    The area of the triangle with corners a, b, c is ``sqrt(|u|^2 |v|^2 - (u.v)^2) / 2``, with u = a - b, v = a - c. Of
    unit vectors it is 0 where two of them coincide, and at most 1.3. With ``s_ij`` that of anchor i with the two other
    fields of tuple j, and C the complete tuples of all ranks::

        data to anchor: mean_{j in C} [log sum_{i in C} exp(-scale * s_ij) + scale * s_jj]
        anchor to data: mean_{i in C} [log sum_{j in C} exp(-scale * s_ij) + scale * s_ii]
        loss = the mean of the two

    Their published code leaves the root out: its measure is ``(|u|^2 |v|^2 - (u.v)^2) / 2``, twice the squared area,
    which ``squared`` gives. It also smooths the labels by 0.1, which no equation has.

    Tuples of one group are left out of each other's denominators.

    The area is half the distance b to c times that of a to the line through them, so that all s_ij of an anchor field
    take two products of n x N x D, tile by tile, three times that backward; memory is O(N D) and 3 tiles. Lines and
    each tuple's own area are computed in float64. Gradients are finite where corners coincide.

    Args, returns and raises: see `mmrep.losses._tuples.TupleLoss`; the part ``area`` is the mean of the own measures.
    squared: use twice the squared area. tile: rows and columns held at a time.
    """
    check_fields("TRIANGLE", Triangle.fields, len(embeddings))
    turns = anchors(anchor, len(embeddings))
    batch = tuple_batch(embeddings, scale=scale, group=group, valid=valid, world=world)
    total, own = batch.scale.new_zeros(()), batch.scale.new_zeros(len(batch.groups))
    for turn in turns:
        rest = [x for k, x in enumerate(batch.fields) if k != turn]
        of = flats(_line_squared if squared else _line, batch.fields[turn], rest)
        total = total + contrast(batch, batch.fields[turn], of, root=not squared, tile=tile) / len(turns)
        own = of.own
    return batch.result(total, area=own)


class Triangle(nn.Module):
    """`triangle` as a component; see there for the equation."""

    fields: ClassVar[tuple[int, int | None]] = (3, 3)
    takes_partial: ClassVar[bool] = False
    draws_negatives = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Fields of a ``triangle`` loss.

        Attributes:
            squared: contrast by twice the squared area, as in the authors' code, rather than by the area.
        """

        squared: bool = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    @staticmethod
    def bounds(dim: int, fields: int) -> tuple[float, float]:
        """Areas are from 0 to about 1 whatever the dimension."""
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
        """Return ``loss``, ``n`` and ``area``; arguments as `triangle`."""
        squared = self.config.squared
        return triangle(embeddings, scale=scale, group=group, valid=valid, anchor=anchor, squared=squared, world=world)


def _line(anchor: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the side between the rest [n, 2, D]: half its length, direction, foot of the origin; and the own area."""
    length, unit, foot, height = _height(anchor, rest)
    return length / 2, unit, foot, length * height / 2


def _line_squared(anchor: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_line` for a measure of twice the squared area."""
    length, unit, foot, height = _height(anchor, rest)
    return length.square() / 2, unit, foot, (length * height).square() / 2


def _height(anchor: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Length [n], direction [n, 1, D] and foot [n, D] of the base, and the distance [n] of the anchor to it."""
    corner, other = rest.unbind(1)
    side = other - corner
    length = lengths(side)
    unit = direction(side, length)
    foot, above = _beside(corner, unit), _beside(anchor - corner, unit)
    return length, unit.unsqueeze(1), foot, lengths(above)


def _beside(vector: Tensor, unit: Tensor) -> Tensor:
    return vector - (vector * unit).sum(1, keepdim=True) * unit
