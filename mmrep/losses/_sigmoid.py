"""SigLIP's sum over all pairs of a matrix of logits that is never held.

The derivative of a term needs no statistic of its row, so it is accumulated in the forward pass: one n*m*D product, or
three where gradients are wanted, and none backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmrep.losses._tiles import Scratch, Tile, blocks, default_tile, fit, refuse_second_derivative, row_dots_inside


def tiled_sigmoid_sum(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    bias: Tensor,
    query_groups: Tensor,
    key_groups: Tensor,
    *,
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
        tile: rows and columns of one tile; by default what suits the device.

    Returns:
        0-D. Differentiable once in queries, keys, scale and bias.
    """
    tile = tile or default_tile(queries.device)
    arguments = (queries, keys, scale, bias, query_groups, key_groups, tile, torch.is_grad_enabled())
    return _SigmoidSum.apply(*arguments)


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
        wants_queries, wants_keys, wants_scale, wants_bias = (grad_enabled and w for w in ctx.needs_input_grad[:4])
        n, m = len(queries), len(keys)
        tile = fit(tile, n, m)
        grad_queries = torch.zeros_like(queries) if wants_queries or wants_scale else None
        grad_keys = torch.zeros_like(keys) if wants_keys else None
        total, grad_bias = scale.new_zeros(()), scale.new_zeros(())
        memories = [Scratch(queries, tile) for _ in range(4)]
        with torch.autocast(queries.device.type, enabled=False):
            for i in blocks(n, tile[0]):
                block = queries[i] * scale
                for j in blocks(m, tile[1]):
                    x, u, w, sign = (memory(len(block), j.stop - j.start) for memory in memories)
                    torch.mm(block, keys[j].T, out=x)
                    torch.eq(query_groups[i].unsqueeze(1), key_groups[j].unsqueeze(0), out=sign)
                    sign.mul_(-2).add_(1)
                    x.add_(bias).mul_(sign)  # -z * logit: the term is softplus(x), its derivative sign * sigmoid(x)
                    torch.abs(x, out=u).neg_().exp_()
                    total += torch.clamp_min(x, 0, out=w).sum()
                    derivative = x.sigmoid_().mul_(sign)
                    total += _log1p_sum(u, w, sign)
                    if grad_queries is not None:
                        grad_queries[i].addmm_(derivative, keys[j])
                    if grad_keys is not None:
                        grad_keys[j].addmm_(derivative.T, block)
                    if wants_bias:
                        grad_bias += derivative.sum()
            grad_scale = None
            if grad_queries is not None:
                grad_scale = row_dots_inside(queries, grad_queries).sum() if wants_scale else None
                grad_queries.mul_(scale)
        grad_queries = grad_queries if wants_queries else None
        ctx.save_for_backward(grad_queries, grad_keys, grad_scale, grad_bias if wants_bias else None)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (grad,) = grad_outputs
        return (*(None if saved is None else saved * grad for saved in ctx.saved_tensors), None, None, None, None)


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
