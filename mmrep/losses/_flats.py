"""Contrast of anchors with tuples by distance: from an anchor to the flat that the rest of a tuple spans; tiled.

A flat is a point and directions, and a logit is ``-scale * weight_j * |anchor_i - flat_j|``: the volume of a
parallelotope and the area of a triangle are both "measure of the rest times distance of the anchor to it". With
orthonormal directions the squared distance is ``|a|^2 + |p|^2 - 2 a.p - sum_k (a.q_k)^2``, so a matrix of N x N
measures is one product for each direction (and one for the point), computed once forward and three times backward, as
for InfoNCE. A tile of each is held, never the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mmrep.losses._tiles import (
    Scratch,
    Tile,
    blocks,
    default_tile,
    fit,
    recomputed,
    refuse_second_derivative,
    row_dots_inside,
)
from mmrep.losses._tuples import TupleBatch

_ROWS = 512
"""Tuples whose flats are computed at a time; in float64, and again for the backward pass."""


@dataclass(frozen=True)
class Flats:
    """Of this rank's tuples, without their anchors.

    Attributes:
        weights: [n].
        directions: [n, K, D], orthonormal; zero where a tuple spans less.
        points: [n, D], orthogonal to the directions. None: the origin.
        own: [n], exact measure of each tuple with its own anchor.
    """

    weights: Tensor
    directions: Tensor
    points: Tensor | None
    own: Tensor


Measure = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None, Tensor]]
"""Anchors [n, D] and the rest [n, K, D], float64, to the four attributes of `Flats`."""


def flats(measure: Measure, anchors: Tensor, rest: list[Tensor]) -> Flats:
    """Apply ``measure`` in float64, in which tuples that almost coincide keep their digits; some rows at a time."""
    others = torch.stack(rest, 1)
    exact = torch.float32 if anchors.device.type == "mps" else torch.float64
    found: list[tuple[Tensor, ...]] = []
    for rows in blocks(max(len(anchors), 1), _ROWS):
        parts = recomputed(measure, anchors[rows].to(exact), others[rows].to(exact))
        found.append(tuple(x.to(anchors.dtype) for x in parts if x is not None))
    weights, directions, *point, own = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Flats(weights, directions, point[0] if point else None, own)


def direction(vectors: Tensor, long: Tensor) -> Tensor:
    """Unit vectors of [n, D], whose lengths are ``long`` [n]; 0, and no gradient, of a vector that is 0."""
    real = (long > 0).unsqueeze(1)
    return torch.where(real, vectors / torch.where(real, long.unsqueeze(1), 1), 0)


def contrast(batch: TupleBatch, anchors: Tensor, of: Flats, *, root: bool = True, tile: Tile | None = None) -> Tensor:
    """Sum over this rank of the contrast in both directions, anchor to tuples and tuple to anchors, 0-D.

    Tuples of the same group are left out of the denominators.

    Args:
        batch: the tuples.
        anchors: [n, D], of its tuples.
        of: the rest of its tuples.
        root: the measure is ``weight * distance``; else ``weight * distance^2``.
        tile: rows and columns held at a time.
    """
    positives = -batch.scale * of.own
    world = batch.world
    # One tensor, so that one collective brings all: directions, then the point.
    packed = of.directions if of.points is None else torch.cat([of.directions, of.points.unsqueeze(1)], 1)
    packed, weights = world.gather(packed), world.gather(of.weights)
    rows, columns = tiled_flat_logsumexp(
        anchors, packed, weights, batch.scale, batch.groups, batch.all_groups, of.points is not None, root, tile
    )
    columns = world.logsumexp(columns)[batch.own]
    # The tuple itself is of its own group, so it was left out of the tiles and comes back exact.
    total = torch.logaddexp(rows, positives) + torch.logaddexp(columns, positives) - 2 * positives
    return total.sum() / 2


def tiled_flat_logsumexp(
    anchors: Tensor,
    packed: Tensor,
    weights: Tensor,
    scale: Tensor,
    anchor_groups: Tensor,
    flat_groups: Tensor,
    with_points: bool,
    root: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of every row and every column of the logits, pairs of equal group left out.

    Args:
        anchors: [n, D], float32 or float64; n may be 0.
        packed: [m, K, D], the same dtype: the directions, and last the point if ``with_points``.
        weights: [m].
        scale: 0-D.
        anchor_groups: [n] integers.
        flat_groups: [m] integers.
        with_points: whether there are points.
        root: logits are of the distance, else of its square.
        tile: rows and columns of one tile; by default what suits the device.

    Returns:
        ``(rows [n], columns [m])``; -inf where nothing is summed. Differentiable once in the first four.
    """
    tile = fit(tile or default_tile(anchors.device), len(anchors), len(packed))
    arguments = (anchors, packed, weights, scale, anchor_groups, flat_groups, with_points, root, tile)
    return cast("tuple[Tensor, Tensor]", _FlatLogSumExp.apply(*arguments))


class _FlatLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        packed: Tensor,
        weights: Tensor,
        scale: Tensor,
        anchor_groups: Tensor,
        flat_groups: Tensor,
        with_points: bool,
        root: bool,
        tile: Tile,
    ) -> tuple[Tensor, Tensor]:
        pairs = _Pairs(anchors, packed, weights, scale, anchor_groups, flat_groups, with_points, root, tile)
        rows, columns = anchors.new_full((len(anchors),), -math.inf), anchors.new_full((len(packed),), -math.inf)
        with torch.autocast(anchors.device.type, enabled=False):
            for i, j in pairs.tiles():
                logits = pairs.logits(pairs.squares(i, j), i, j)
                rows[i] = torch.logaddexp(rows[i], torch.logsumexp(logits, 1))
                columns[j] = torch.logaddexp(columns[j], torch.logsumexp(logits, 0))
        ctx.options = with_points, root, tile
        ctx.save_for_backward(anchors, packed, weights, scale, anchor_groups, flat_groups, rows, columns)
        return rows, columns

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        *tensors, rows, columns = cast("tuple[Tensor, ...]", ctx.saved_tensors)
        anchors, packed, weights, scale, anchor_groups, flat_groups = tensors
        pairs = _Pairs(anchors, packed, weights, scale, anchor_groups, flat_groups, *ctx.options)
        softmax = _Softmax(rows, grad_outputs[0], columns, grad_outputs[1])
        grad_anchors, grad_packed = torch.zeros_like(anchors), torch.zeros_like(packed)
        totals = torch.zeros_like(weights)  # by tuple, of what the weights are multiplied with
        with torch.autocast(anchors.device.type, enabled=False):
            for i, j in pairs.tiles():
                squares = pairs.squares(i, j)
                probabilities = softmax(pairs.logits(squares, i, j), i, j)
                totals[j] += (probabilities * pairs.measure(squares)).sum(0)
                pairs.add_gradients(probabilities, squares, i, j, grad_anchors, grad_packed)
        return (grad_anchors, grad_packed, -scale * totals, -(weights * totals).sum(), *[None] * 5)


class _Pairs:
    """The tiles of one pass; products returned last are overwritten by the next tile."""

    def __init__(
        self,
        anchors: Tensor,
        packed: Tensor,
        weights: Tensor,
        scale: Tensor,
        anchor_groups: Tensor,
        flat_groups: Tensor,
        with_points: bool,
        root: bool,
        tile: Tile,
    ) -> None:
        count = packed.shape[1]
        self._anchors, self._groups, self._flat_groups = anchors, anchor_groups, flat_groups
        self._packed = [packed[:, k] for k in range(count)]
        self._directions = count - with_points
        self._root, self._tile = root, tile
        self._norms = row_dots_inside(anchors, anchors)
        self._point_norms = row_dots_inside(packed[:, -1], packed[:, -1]) if with_points else None
        self._factors = -scale * weights
        self._memories = [Scratch(anchors, tile) for _ in range(count)]
        self._products: list[Tensor] = []

    def tiles(self) -> list[tuple[slice, slice]]:
        rows, columns = blocks(len(self._anchors), self._tile[0]), list(blocks(len(self._flat_groups), self._tile[1]))
        return [(i, j) for i in rows for j in columns]

    def squares(self, i: slice, j: slice) -> Tensor:
        """Squared distances [rows, columns] of a tile."""
        block, width = self._anchors[i], j.stop - j.start
        self._products = [
            torch.mm(block, flats[j].T, out=memory(len(block), width))
            for flats, memory in zip(self._packed, self._memories, strict=True)
        ]
        squares = self._norms[i].unsqueeze(1).expand(-1, width).clone()
        for product in self._products[: self._directions]:
            squares.addcmul_(product, product, value=-1)
        if self._point_norms is not None:
            squares.add_(self._products[-1], alpha=-2).add_(self._point_norms[j])
        return squares.clamp_min_(0)

    def measure(self, squares: Tensor) -> Tensor:
        """What is multiplied by scale and weight."""
        return squares.sqrt() if self._root else squares

    def logits(self, squares: Tensor, i: slice, j: slice) -> Tensor:
        """Logits of a tile, -inf for left-out pairs."""
        same = self._groups[i].unsqueeze(1) == self._flat_groups[j].unsqueeze(0)
        return (self.measure(squares) * self._factors[j]).masked_fill_(same, -math.inf)

    def add_gradients(
        self, probabilities: Tensor, squares: Tensor, i: slice, j: slice, grad_anchors: Tensor, grad_packed: Tensor
    ) -> None:
        """Add the gradients of a tile whose squares were computed last; overwrites all its tensors."""
        block = self._anchors[i]
        # Twice the derivative in the squared distance; a distance of 0 has no direction to give.
        if self._root:
            slopes = torch.where(squares > 0, squares, math.inf).rsqrt_().mul_(self._factors[j])
        else:
            slopes = (2 * self._factors[j]).expand_as(squares)
        slopes = probabilities.mul_(slopes)
        grad_anchors[i] += slopes.sum(1, keepdim=True) * block
        for k, product in enumerate(self._products[: self._directions]):
            product.mul_(slopes)
            grad_anchors[i] -= product @ self._packed[k][j]
            grad_packed[j, k] -= product.T @ block
        if self._point_norms is not None:
            points = self._packed[-1][j]
            grad_anchors[i] -= slopes @ points
            grad_packed[j, -1] += slopes.sum(0).unsqueeze(1) * points - slopes.T @ block


class _Softmax:
    """Tiles of ``grad_row * exp(logit - row) + grad_column * exp(logit - column)``."""

    def __init__(self, rows: Tensor, grad_rows: Tensor, columns: Tensor, grad_columns: Tensor) -> None:
        empty_rows, empty_columns = rows == -math.inf, columns == -math.inf
        # Nothing was summed into an empty entry: +inf makes its probabilities exp(x - inf) = 0 and no inf - inf.
        self._rows = rows.masked_fill(empty_rows, math.inf).unsqueeze(1)
        self._columns = columns.masked_fill(empty_columns, math.inf)
        self._grad_rows = grad_rows.masked_fill(empty_rows, 0).unsqueeze(1)
        self._grad_columns = grad_columns.masked_fill(empty_columns, 0)

    def __call__(self, logits: Tensor, i: slice, j: slice) -> Tensor:
        found = (logits - self._rows[i]).exp_().mul_(self._grad_rows[i])
        return found.add_(logits.sub_(self._columns[j]).exp_().mul_(self._grad_columns[j]))
