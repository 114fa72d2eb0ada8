"""Log-sum-exp of every row and every column of a matrix of logits that is never held.

One n*m*D product forward and three backward: the tile is recomputed there, as in FlashAttention (arXiv:2205.14135). The
column sums come from the same tile as the row sums, so that a symmetric contrast needs no second product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmrep.losses._tiles import Scratch, Tile, blocks, default_tile, fit, refuse_second_derivative, row_dots_inside


def tiled_logsumexp(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    *,
    query_groups: Tensor | None = None,
    key_groups: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of every row and of every column of ``scale * queries @ keys.T``, from one product per tile.

    Args:
        queries: [n, D], float32 or float64; n may be 0.
        keys: [m, D], the same dtype and device; m may be 0.
        scale: 0-D, the same dtype.
        query_groups: [n] integers. With ``key_groups``, a pair of equal group is left out of both sums.
        key_groups: [m] integers.
        tile: rows and columns of one tile; by default what suits the device.

    Returns:
        ``(rows [n], columns [m])``; -inf where nothing is summed. Differentiable once in queries, keys and scale; the
        gradient of a -inf entry is zero.
    """
    return _LogSumExp.apply(queries, keys, scale, query_groups, key_groups, tile or default_tile(queries.device))


class _LogSumExp(torch.autograd.Function):
    """Two ways to the same numbers.

    *Shared shift*: one constant is subtracted from every logit, so a single exponential serves row and column sums and
    no maxima are searched. The Cauchy-Schwarz bound on the logits rules overflow out beforehand, and the finished sums
    show whether underflow could have cost a digit. Unit vectors with a temperature pass practically always.
    *Online*: each tile is reduced with its own maxima (Milakov & Gimelshein, arXiv:1805.02867). Slower, and needed for
    logits of an extreme range.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        query_groups: Tensor | None,
        key_groups: Tensor | None,
        tile: Tile,
    ) -> tuple[Tensor, Tensor]:
        n, m = len(queries), len(keys)
        logits = _Logits(queries, keys, scale, query_groups, key_groups, fit(tile, n, m))
        shift = 0.0
        result: tuple[Tensor, Tensor] | None = None
        with torch.autocast(queries.device.type, enabled=False):
            if n and m:
                shift = _shift(queries, keys, scale)
                result = _shared_shift(logits, shift) if math.isfinite(shift) else None
            ctx.shift = shift if result is not None else None
            rows, columns = result if result is not None else _online(logits)
        ctx.tile = logits.tile
        ctx.save_for_backward(queries, keys, scale, query_groups, key_groups, rows, columns)
        return rows, columns

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        grad_rows, grad_columns = grad_outputs
        queries, keys, scale, query_groups, key_groups, rows, columns = ctx.saved_tensors
        wants_queries, wants_keys, wants_scale = ctx.needs_input_grad[:3]
        n, m = len(queries), len(keys)
        logits = _Logits(queries, keys, scale, query_groups, key_groups, ctx.tile)
        grad_queries = torch.zeros_like(queries) if wants_queries or wants_scale else None
        grad_keys = torch.zeros_like(keys) if wants_keys else None
        # The weights are brought to order 1 and the result scaled back, so that 1 / (a huge sum) stays a normal number.
        size = torch.cat([grad_rows, grad_columns]).abs().amax() if n + m else scale.new_zeros(())
        size = size.clamp_min(torch.finfo(scale.dtype).tiny)
        empty_rows, empty_columns = rows == -math.inf, columns == -math.inf
        row_weights = (grad_rows / size).masked_fill_(empty_rows, 0).unsqueeze(1)
        column_weights = (grad_columns / size).masked_fill_(empty_columns, 0).unsqueeze(0)
        # Nothing was summed into an empty entry: +inf makes its probabilities exp(x - inf) = 0 and no inf - inf.
        rows = rows.masked_fill(empty_rows, math.inf).unsqueeze(1)
        columns = columns.masked_fill(empty_columns, math.inf).unsqueeze(0)
        shift: float | None = ctx.shift
        if shift is not None:
            row_weights, column_weights = row_weights * (shift - rows).exp_(), column_weights * (shift - columns).exp_()
        with torch.autocast(queries.device.type, enabled=False):
            scratch = Scratch(queries, logits.tile)
            for i in blocks(n, logits.tile[0]):
                block = queries[i] * scale
                for j in blocks(m, logits.tile[1]):
                    weights = scratch(len(block), j.stop - j.start)
                    if shift is not None:
                        tile = logits.exponentials(block, i, j, shift)
                        torch.add(row_weights[i], column_weights[:, j], out=weights)
                        tile.mul_(weights)
                    else:
                        tile = logits.masked(block, i, j)
                        torch.sub(tile, rows[i], out=weights)
                        weights.exp_().mul_(row_weights[i])
                        tile.sub_(columns[:, j]).exp_().mul_(column_weights[:, j]).add_(weights)
                    if grad_queries is not None:
                        grad_queries[i].addmm_(tile, keys[j])
                    if grad_keys is not None:
                        grad_keys[j].addmm_(tile.T, block)
            grad_scale = None
            if grad_queries is not None:
                grad_scale = row_dots_inside(queries, grad_queries).sum() * size if wants_scale else None
                grad_queries.mul_(scale * size)
            if grad_keys is not None:
                grad_keys.mul_(size)
        return grad_queries if wants_queries else None, grad_keys, grad_scale, None, None, None


class _Logits:
    """The tiles of ``scale * queries @ keys.T``; the tile returned last is overwritten by the next."""

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        query_groups: Tensor | None,
        key_groups: Tensor | None,
        tile: Tile,
    ) -> None:
        self.queries, self.keys, self.scale, self.tile = queries, keys, scale, tile
        self._query_groups, self._key_groups = query_groups, key_groups
        self._scratch = Scratch(queries, tile)

    def _product(self, block: Tensor, j: slice) -> Tensor:
        tile = self._scratch(len(block), j.stop - j.start)
        return torch.mm(block, self.keys[j].T, out=tile)

    def _fill_equal_groups(self, tile: Tensor, i: slice, j: slice, value: float) -> Tensor:
        if self._query_groups is None or self._key_groups is None:
            return tile
        return tile.masked_fill_(self._query_groups[i].unsqueeze(1) == self._key_groups[j].unsqueeze(0), value)

    def exponentials(self, block: Tensor, i: slice, j: slice, shift: float) -> Tensor:
        """``exp(logit - shift)``, 0 for left-out pairs; ``block`` is ``scale * queries[i]``."""
        tile = self._product(block, j)
        if shift:
            tile.sub_(shift)
        return self._fill_equal_groups(tile.exp_(), i, j, 0.0)

    def masked(self, block: Tensor, i: slice, j: slice) -> Tensor:
        """The logits, -inf for left-out pairs."""
        return self._fill_equal_groups(self._product(block, j), i, j, -math.inf)


def _shift(queries: Tensor, keys: Tensor, scale: Tensor) -> float:
    """The smallest shift >= 0 with which no sum of exponentials can overflow; not finite where the inputs are not."""
    bound = float(
        scale.abs() * row_dots_inside(queries, queries).amax().sqrt() * row_dots_inside(keys, keys).amax().sqrt()
    )
    limit = 0.9 * math.log(torch.finfo(scale.dtype).max) - math.log(max(len(queries), len(keys)))
    return max(0.0, bound - limit) if math.isfinite(bound) else math.nan


def _shared_shift(logits: _Logits, shift: float) -> tuple[Tensor, Tensor] | None:
    """Row and column log-sum-exp from one exponential per logit, or None where underflow may have cost a digit."""
    n, m = len(logits.queries), len(logits.keys)
    rows, columns = logits.queries.new_zeros(n), logits.queries.new_zeros(m)
    for i in blocks(n, logits.tile[0]):
        block = logits.queries[i] * logits.scale
        for j in blocks(m, logits.tile[1]):
            tile = logits.exponentials(block, i, j, shift)
            rows[i] += tile.sum(1)
            columns[j] += tile.sum(0)
    # A term below the smallest normal number may vanish: together at most max(n, m) * tiny, so a sum above this many
    # times that has lost less than one rounding error. A NaN fails the comparison and goes the online way.
    numbers = torch.finfo(rows.dtype)
    floor = max(n, m) * numbers.tiny / numbers.eps
    if not bool(torch.minimum(rows.amin(), columns.amin()) >= floor):
        return None
    return rows.log_().add_(shift), columns.log_().add_(shift)


def _online(logits: _Logits) -> tuple[Tensor, Tensor]:
    n, m = len(logits.queries), len(logits.keys)
    rows, columns = logits.queries.new_full((n,), -math.inf), logits.queries.new_full((m,), -math.inf)
    for i in blocks(n, logits.tile[0]):
        block = logits.queries[i] * logits.scale
        for j in blocks(m, logits.tile[1]):
            tile = logits.masked(block, i, j)
            rows[i] = torch.logaddexp(rows[i], torch.logsumexp(tile, 1))
            columns[j] = torch.logaddexp(columns[j], torch.logsumexp(tile, 0))
    return rows, columns
