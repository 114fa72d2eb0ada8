"""SigLIP's sum over all pairs of a matrix of logits that is never held.

The derivative of a term needs no statistic of its row, so it is accumulated in the forward pass: one n*m*D product, or
three where gradients are wanted, and none backward. In a ring of ranks the keys' owner does not know yet how the sums
of the other ranks will be weighted: there the backward pass computes the tiles again, and the products are four.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mmrep.losses._ring import Ring
from mmrep.losses._tiles import Scratch, Tile, blocks, default_tile, fit, refuse_second_derivative, row_dots_inside


def tiled_sigmoid_sum(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    bias: Tensor,
    query_groups: Tensor,
    key_groups: Tensor,
    *,
    ring: Ring | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Sum over all pairs of ``softplus(-z * (scale * q.k + bias))``, z = +1 for a pair of equal group, else -1.

    Args:
        queries: [n, D], float32 or float64; n may be 0.
        keys: [m, D], the same dtype and device; m may be 0.
        scale: 0-D, the same dtype.
        bias: 0-D, the same dtype.
        query_groups: [n] integers.
        key_groups: [m] integers; one that equals no query group marks a key that is negative to all.
        ring: the pairs are with the keys of all its ranks. None: one process. ``keys`` need a gradient on all ranks or
            on none, and so do ``queries``.
        tile: rows and columns of one tile; by default what suits the device.

    Returns:
        0-D. Differentiable once in queries, keys, scale and bias.
    """
    tile = fit(tile or default_tile(queries.device), len(queries), max(ring.sizes) if ring else len(keys))
    arguments = (queries, keys, scale, bias, query_groups, key_groups, tile)
    if ring is not None and ring.world.size > 1:
        return cast(Tensor, _RingSigmoidSum.apply(*arguments, ring))
    return cast(Tensor, _SigmoidSum.apply(*arguments, torch.is_grad_enabled()))


class _SigmoidSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        bias: Tensor,
        query_groups: Tensor,
        key_groups: Tensor,
        tile: Tile,
        grad_enabled: bool,
    ) -> Tensor:
        wanted = [grad_enabled and w for w in ctx.needs_input_grad[:4]]
        pairs = _Pairs(queries, scale, bias, query_groups, tile)
        total = scale.new_zeros(())
        grads = _Gradients.zeros(queries, keys, wanted)
        pairs.add(keys, key_groups, total, grads)
        ctx.save_for_backward(*grads.finished(queries, scale, wanted))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (grad,) = grad_outputs
        return (*(None if saved is None else saved * grad for saved in ctx.saved_tensors), None, None, None, None)


class _RingSigmoidSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        bias: Tensor,
        query_groups: Tensor,
        key_groups: Tensor,
        tile: Tile,
        ring: Ring,
    ) -> Tensor:
        ctx.tile, ctx.ring = tile, ring
        ctx.save_for_backward(queries, keys, scale, bias, query_groups, key_groups)
        pairs, total = _Pairs(queries, scale, bias, query_groups, tile), scale.new_zeros(())
        for visit in ring.visits():
            pairs.add(keys, key_groups, total, None)
            keys, key_groups = visit.hand_on_constant(keys), visit.hand_on_constant(key_groups)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        queries, guests, scale, bias, query_groups, guest_groups = ctx.saved_tensors
        pairs = _Pairs(queries, scale, bias, query_groups, ctx.tile)
        grads = _Gradients.zeros(queries, guests, ctx.needs_input_grad[:4], weight=grad_outputs[0])
        for visit in cast(Ring, ctx.ring).visits():
            pairs.add(guests, guest_groups, None, grads)
            guests, guest_groups = visit.hand_on_constant(guests), visit.hand_on_constant(guest_groups)
            grads.keys = None if grads.keys is None else visit.hand_on(grads.keys)
        return (*grads.finished(queries, scale, ctx.needs_input_grad[:4]), None, None, None, None)


@dataclass
class _Gradients:
    """What the gradients have come to so far, None where not wanted; of ``weight`` times the sum over pairs.

    All but that of the keys, which other ranks weigh differently, get the weight in the end.
    """

    queries: Tensor | None  # without the scale, which is its product's with the gradient of the scale
    keys: Tensor | None
    bias: Tensor | None
    weight: Tensor | None

    @staticmethod
    def zeros(queries: Tensor, keys: Tensor, wanted: list[bool], weight: Tensor | None = None) -> _Gradients:
        wants_queries, wants_keys, wants_scale, wants_bias = wanted
        return _Gradients(
            torch.zeros_like(queries) if wants_queries or wants_scale else None,
            torch.zeros_like(keys) if wants_keys else None,
            queries.new_zeros(()) if wants_bias else None,
            weight,
        )

    def finished(self, queries: Tensor, scale: Tensor, wanted: list[bool]) -> tuple[Tensor | None, ...]:
        """Of queries, keys, scale and bias."""
        wants_queries, _, wants_scale, _ = wanted
        grad_queries = grad_scale = None
        if self.queries is not None:
            grad_queries = self.queries if self.weight is None else self.queries.mul_(self.weight)
            grad_scale = row_dots_inside(queries, grad_queries).sum() if wants_scale else None
            grad_queries = grad_queries.mul_(scale) if wants_queries else None
        weighted_bias = self.bias if self.bias is None or self.weight is None else self.bias * self.weight
        return grad_queries, self.keys, grad_scale, weighted_bias


class _Pairs:
    """One rank's queries and the memory in which they are paired, tile by tile, with one block of keys or several."""

    def __init__(self, queries: Tensor, scale: Tensor, bias: Tensor, groups: Tensor, tile: Tile) -> None:
        self._queries, self._scale, self._bias, self._groups, self._tile = queries, scale, bias, groups, tile
        self._memories = [Scratch(queries, tile) for _ in range(4)]

    def add(self, keys: Tensor, key_groups: Tensor, total: Tensor | None, grads: _Gradients | None) -> None:
        """Add the terms of a block of keys to ``total``, and their gradients to ``grads``."""
        with torch.autocast(keys.device.type, enabled=False):
            for i in blocks(len(self._queries), self._tile[0]):
                block = self._queries[i] * self._scale
                weighted_block = block if grads is None or grads.weight is None else block * grads.weight
                for j in blocks(len(keys), self._tile[1]):
                    x, u, w, sign = (memory(len(block), j.stop - j.start) for memory in self._memories)
                    torch.mm(block, keys[j].T, out=x)
                    torch.eq(self._groups[i].unsqueeze(1), key_groups[j].unsqueeze(0), out=sign)
                    sign.mul_(-2).add_(1)
                    # -z * logit: the term is softplus(x), its derivative sign * sigmoid(x)
                    x.add_(self._bias).mul_(sign)
                    if total is not None:
                        torch.abs(x, out=u).neg_().exp_()
                        total += torch.clamp_min(x, 0, out=w).sum()
                    if grads is not None:
                        derivative = x.sigmoid_().mul_(sign)
                        if grads.queries is not None:
                            grads.queries[i].addmm_(derivative, keys[j])
                        if grads.keys is not None:
                            grads.keys[j].addmm_(derivative.T, weighted_block)
                        if grads.bias is not None:
                            grads.bias += derivative.sum()
                    if total is not None:
                        total += _log1p_sum(u, w, sign)


def _log1p_sum(u: Tensor, w: Tensor, rest: Tensor) -> Tensor:
    """Sum of log(1 + u) for 0 <= u <= 1, overwriting all three; torch.log1p costs ten times as much on a CPU."""
    if u.device.type != "cpu":
        return torch.log1p(u, out=w).sum()
    # With w the rounded 1 + u, log(1 + u) = log(w) + (u - (w - 1)) / w up to the square of the rounding error, and
    # w - 1 is exact: no digit of a small u is lost.
    torch.add(u, 1, out=w)
    torch.sub(w, 1, out=rest)
    rest.sub_(u).div_(w)
    return w.log_().sub_(rest).sum()
