"""Soft targets: how similar pairs are in a frozen space says how much of a positive each is of the other."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from mmrep.losses._ring import Ring
from mmrep.losses._tiles import (
    Scratch,
    Tile,
    blocks,
    default_tile,
    fit,
    refuse_second_derivative,
    row_dots,
    row_dots_inside,
)
from mmrep.world import World


class Soften:
    """The weights ``q_ij = softmax_j(f_i . f_j / temperature)`` of this rank's pairs over the pairs of all ranks.

    Args:
        features: [n, F] of this rank's valid pairs, from a frozen space. They are centred on the mean of the global
            batch (in a narrow cone every pair would look alike) and normalised; no gradient reaches them.
        temperature: of the softmax, > 0.
        world: the ranks.
        dtype: to compute in.
        gathered: every rank holds the features of all; else they travel (see `Ring`).
        tile: rows and columns held at a time; by default what suits the device.
    """

    def __init__(
        self,
        features: Tensor,
        temperature: float,
        world: World,
        dtype: torch.dtype,
        *,
        gathered: bool,
        tile: Tile | None = None,
    ) -> None:
        own = features.detach().to(dtype)
        if gathered:
            keys = world.gather(own)
            self._ring, count, total = Ring.local(keys), len(keys), keys.sum(0)
        else:
            keys = own
            self._ring = Ring.of(world, own)
            count, total = sum(self._ring.sizes), world.sum(own.sum(0))
        centre = total / max(count, 1)
        self._keys, own = F.normalize(keys - centre, dim=1), F.normalize(own - centre, dim=1)
        self._queries = own / temperature
        self._largest = row_dots_inside(self._queries, own)
        self._tile = fit(tile or default_tile(own.device), len(own), max(self._ring.sizes))

    def logits(self, a: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        """``sum_j q_ij * scale * a_i . values_j``, [n].

        ``values`` [m, D] are of the pairs whose features are held: of all ranks if gathered, else of this one.
        """
        arguments = (self._queries, self._largest, self._keys, values, self._ring, self._tile)
        mean = cast(Tensor, _SoftMean.apply(*arguments))
        return scale * row_dots(a, mean)


class _SoftMean(torch.autograd.Function):
    """``softmax(queries @ keys.T) @ values`` over the keys of the ring, with a gradient for values alone; by tiles.

    No product of a query is larger than that with its own key, ``largest``. This serves as the shift: the sum of a
    row's exponentials is then at least 1, without a search for its maximum.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, largest: Tensor, keys: Tensor, values: Tensor, ring: Ring, tile: Tile
    ) -> Tensor:
        ctx.ring, ctx.tile, guest_keys = ring, tile, keys
        sums, masses = values.new_zeros(len(queries), values.shape[1]), queries.new_zeros(len(queries))
        exponentials = _Exponentials(queries, largest, tile)
        with torch.autocast(queries.device.type, enabled=False):
            for visit in ring.visits():
                for i, j in exponentials.tiles(guest_keys):
                    exponential = exponentials(i, guest_keys[j])
                    sums[i].addmm_(exponential, values[j])
                    masses[i] += exponential.sum(1)
                guest_keys, values = visit.hand_on_constant(guest_keys), visit.hand_on_constant(values)
        ctx.save_for_backward(queries, largest + masses.log(), keys)
        return sums.div_(masses.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (grad,) = grad_outputs
        queries, logsumexps, guest_keys = cast("tuple[Tensor, Tensor, Tensor]", ctx.saved_tensors)
        ring = cast(Ring, ctx.ring)
        grad_values = grad.new_zeros(len(guest_keys), grad.shape[1])
        weights = _Exponentials(queries, logsumexps, ctx.tile)
        with torch.autocast(queries.device.type, enabled=False):
            for visit in ring.visits():
                for i, j in weights.tiles(guest_keys):
                    grad_values[j].addmm_(weights(i, guest_keys[j]).T, grad[i])
                guest_keys, grad_values = visit.hand_on_constant(guest_keys), visit.hand_on(grad_values)
        return None, None, None, grad_values, None, None


class _Exponentials:
    """Tiles of ``exp(queries @ keys.T - shifts)``; the one returned last is overwritten by the next."""

    def __init__(self, queries: Tensor, shifts: Tensor, tile: Tile) -> None:
        self._queries, self._shifts, self._tile = queries, shifts.unsqueeze(1), tile
        self._scratch = Scratch(queries, tile)

    def tiles(self, keys: Tensor) -> list[tuple[slice, slice]]:
        return [(i, j) for i in blocks(len(self._queries), self._tile[0]) for j in blocks(len(keys), self._tile[1])]

    def __call__(self, i: slice, keys: Tensor) -> Tensor:
        tile = self._scratch(i.stop - i.start, len(keys))
        return torch.mm(self._queries[i], keys.T, out=tile).sub_(self._shifts[i]).exp_()
