"""Blocks of rows that visit one rank after another, so that no rank ever holds the rows of all.

Every rank works on the block that is its guest, hands it to the next rank and takes in the one before. What a rank adds
to a guest (sums of its columns, gradients of its rows) travels with it and is complete when the block is home again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from mmrep.losses._tiles import refuse_second_derivative
from mmrep.world import LocalWorld, World


@dataclass(frozen=True)
class Visit:
    """One step of a ring: this rank has the block of ``owner`` as its guest.

    Attributes:
        world: the ranks.
        owner: whose block it is; this rank's own in the first step.
        last: the next rank is the owner.
        next_rows: rows of the block that comes next.
    """

    world: World
    owner: int
    last: bool
    next_rows: int

    def hand_on(self, x: Tensor) -> Tensor:
        """Give the guest's ``x`` to the next rank, at the end to its owner; return that of the next guest."""
        return self.world.shift(x, self.next_rows)

    def hand_on_constant(self, x: Tensor) -> Tensor:
        """`hand_on` for what no rank changes, which therefore need not come home."""
        return x if self.last else self.hand_on(x)


@dataclass(frozen=True)
class Ring:
    """The ranks in a circle, each with a block of rows.

    Attributes:
        world: the ranks.
        sizes: rows of every rank's block, in rank order.
    """

    world: World
    sizes: list[int]

    @staticmethod
    def of(world: World, x: Tensor) -> Ring:
        """For blocks like ``x`` [n_rank, ...] of every rank, which need to agree in all but n."""
        return Ring(world, world.sizes(x))

    @staticmethod
    def local(x: Tensor) -> Ring:
        """One rank with one block: nothing travels."""
        return Ring(LocalWorld(), [len(x)])

    def visits(self) -> Iterator[Visit]:
        """One step for each block; all ranks hand on the same things in each."""
        size, rank = self.world.size, self.world.rank
        for step in range(size):
            owner, following = (rank - step) % size, (rank - step - 1) % size
            yield Visit(self.world, owner, step == size - 1, self.sizes[following])


def number_groups(group: Tensor, ring: Ring) -> Tensor:
    """Numbers in 0..N-1 for ``group`` [n], any integers: at which of the N rows of all ranks it first stands."""
    starts = [0, *accumulate(ring.sizes)]
    numbers = torch.full_like(group, starts[-1], dtype=torch.int64)
    guests = group
    for visit in ring.visits():
        if len(guests):
            ordered, order = guests.sort(stable=True)  # of equal ones, the first stands first
            at, found = _find(group, ordered)
            numbers = torch.where(found, numbers.minimum(order[at] + starts[visit.owner]), numbers)
        guests = visit.hand_on_constant(guests)
    return numbers


def group_means(x: Tensor, groups: Tensor, world: World) -> Tensor:
    """For each row of ``x`` [n, D] the mean over the rows of its group on all ranks, [n, D]; differentiable in x."""
    ring = Ring.of(world, groups)
    sums = cast(Tensor, _GroupSums.apply(x, groups, ring))
    return sums / _group_sums(x.new_ones(len(x), 1), groups, ring)


class _GroupSums(torch.autograd.Function):
    """For each row the sum over its group: a symmetric matrix times ``x``, so that the gradient takes the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Tensor, ring: Ring) -> Tensor:
        ctx.ring = ring
        ctx.save_for_backward(groups)
        return _group_sums(x, groups, ring)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative()
        return _group_sums(grad_outputs[0], *cast("tuple[Tensor]", ctx.saved_tensors), cast(Ring, ctx.ring)), None, None


def _group_sums(x: Tensor, groups: Tensor, ring: Ring) -> Tensor:
    sums, ordered = torch.zeros_like(x), groups.sort().values
    guests = ordered  # travels with the sums over each group's rows of one rank, which stand where the group first does
    partial = torch.zeros_like(x).index_add_(0, _find(groups, ordered)[0], x)
    for visit in ring.visits():
        if len(guests):
            at, found = _find(groups, guests)
            sums[found] += partial[at[found]]
        guests, partial = visit.hand_on_constant(guests), visit.hand_on_constant(partial)
    return sums


def _find(wanted: Tensor, ordered: Tensor) -> tuple[Tensor, Tensor]:
    """Where each of ``wanted`` first stands in ``ordered`` (of at least one), and whether it does at all."""
    at = torch.searchsorted(ordered, wanted).clamp_max_(len(ordered) - 1)
    return at, ordered[at] == wanted
