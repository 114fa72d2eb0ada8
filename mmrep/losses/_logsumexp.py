"""Log-sum-exp of every row and every column of a matrix of logits that is never held.

One n*m*D product forward and three backward: the tile is recomputed there, as in FlashAttention (arXiv:2205.14135). The
column sums come from the same tile as the row sums, so that a symmetric contrast needs no second product. The keys may
be the blocks of a ring of ranks (as in Inf-CL, arXiv:2410.17243): row sums grow with every guest, column sums travel.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from mmrep.losses._ring import Ring
from mmrep.losses._tiles import Scratch, Tile, blocks, default_tile, fit, refuse_second_derivative, row_dots_inside


def tiled_logsumexp(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    *,
    query_groups: Tensor | None = None,
    key_groups: Tensor | None = None,
    ring: Ring | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of every row and of every column of ``scale * queries @ keys.T``, from one product per tile.

    Args:
        queries: [n, D], float32 or float64; n may be 0.
        keys: [m, D], the same dtype and device; m may be 0.
        scale: 0-D, the same dtype.
        query_groups: [n] integers. With ``key_groups``, a pair of equal group is left out of both sums.
        key_groups: [m] integers.
        ring: rows are summed over the keys of all its ranks, and columns over their queries. None: one process.
            ``keys`` need a gradient on all ranks or on none, and so do ``queries``.
        tile: rows and columns of one tile; by default what suits the device.

    Returns:
        ``(rows [n], columns [m])``; -inf where nothing is summed. Differentiable once in queries, keys and scale; the
        gradient of a -inf entry is zero.
    """
    ring = ring or Ring.local(keys)
    tile = fit(tile or default_tile(queries.device), len(queries), max(ring.sizes))
    return cast("tuple[Tensor, Tensor]", _LogSumExp.apply(queries, keys, scale, query_groups, key_groups, ring, tile))


class _LogSumExp(torch.autograd.Function):
    """Two ways to the same numbers, chosen for each block of keys.

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
        ring: Ring,
        tile: Tile,
    ) -> tuple[Tensor, Tensor]:
        logits = _Logits(queries, scale, query_groups, tile)
        rows, columns = queries.new_full((len(queries),), -math.inf), keys.new_full((len(keys),), -math.inf)
        guests, guest_groups = keys, key_groups
        shifts: list[float | None] = []
        with torch.autocast(queries.device.type, enabled=False):
            for visit in ring.visits():
                logits.keys, logits.key_groups = guests, guest_groups
                more_rows, more_columns, shift = _sums(logits)
                rows, columns = torch.logaddexp(rows, more_rows), torch.logaddexp(columns, more_columns)
                shifts.append(shift)
                guests, columns = visit.hand_on_constant(guests), visit.hand_on(columns)
                guest_groups = None if guest_groups is None else visit.hand_on_constant(guest_groups)
        ctx.ring, ctx.tile, ctx.shifts = ring, tile, shifts
        ctx.save_for_backward(queries, keys, scale, query_groups, key_groups, rows, columns)
        return rows, columns

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        grad_rows, grad_columns = grad_outputs
        queries, guests, scale, query_groups, guest_groups, rows, columns = ctx.saved_tensors
        wants_queries, wants_keys, wants_scale = ctx.needs_input_grad[:3]
        logits = _Logits(queries, scale, query_groups, ctx.tile)
        grad_queries = torch.zeros_like(queries) if wants_queries or wants_scale else None
        grad_guests = torch.zeros_like(guests) if wants_keys else None
        with torch.autocast(queries.device.type, enabled=False):
            for visit, shift in zip(cast(Ring, ctx.ring).visits(), cast("list[float | None]", ctx.shifts), strict=True):
                logits.keys, logits.key_groups = guests, guest_groups
                if shift is not None and ctx.ring.world.size > 1 and not _serves(shift, rows, columns):
                    shift = None
                weights = _Weights(rows, grad_rows, columns, grad_columns, shift)
                _add_gradients(logits, weights, grad_queries, grad_guests)
                guests, columns = visit.hand_on_constant(guests), visit.hand_on_constant(columns)
                grad_columns = visit.hand_on_constant(grad_columns)
                guest_groups = None if guest_groups is None else visit.hand_on_constant(guest_groups)
                grad_guests = None if grad_guests is None else visit.hand_on(grad_guests)
            grad_scale = None
            if grad_queries is not None:
                grad_scale = row_dots_inside(queries, grad_queries).sum() if wants_scale else None
                grad_queries.mul_(scale)
        return grad_queries if wants_queries else None, grad_guests, grad_scale, None, None, None, None


class _Logits:
    """The tiles of ``scale * queries @ keys.T``; the tile returned last is overwritten by the next."""

    keys: Tensor
    key_groups: Tensor | None

    def __init__(self, queries: Tensor, scale: Tensor, query_groups: Tensor | None, tile: Tile) -> None:
        self.queries, self.scale, self.tile = queries, scale, tile
        self._query_groups = query_groups
        self._scratch = Scratch(queries, tile)

    def _product(self, block: Tensor, j: slice) -> Tensor:
        tile = self._scratch(len(block), j.stop - j.start)
        return torch.mm(block, self.keys[j].T, out=tile)

    def _fill_equal_groups(self, tile: Tensor, i: slice, j: slice, value: float) -> Tensor:
        if self._query_groups is None or self.key_groups is None:
            return tile
        return tile.masked_fill_(self._query_groups[i].unsqueeze(1) == self.key_groups[j].unsqueeze(0), value)

    def exponentials(self, block: Tensor, i: slice, j: slice, shift: float) -> Tensor:
        """``exp(logit - shift)``, 0 for left-out pairs; ``block`` is ``scale * queries[i]``."""
        tile = self._product(block, j)
        if shift:
            tile.sub_(shift)
        return self._fill_equal_groups(tile.exp_(), i, j, 0.0)

    def masked(self, block: Tensor, i: slice, j: slice) -> Tensor:
        """The logits, -inf for left-out pairs."""
        return self._fill_equal_groups(self._product(block, j), i, j, -math.inf)


def _sums(logits: _Logits) -> tuple[Tensor, Tensor, float | None]:
    """Row and column log-sum-exp, and the shared shift if that was the way."""
    if len(logits.queries) and len(logits.keys):
        shift = _shift(logits.queries, logits.keys, logits.scale)
        result = _shared_shift(logits, shift) if math.isfinite(shift) else None
        if result is not None:
            return *result, shift
    return *_online(logits), None


def _headroom(dtype: torch.dtype) -> float:
    """How far above the shift a log-sum-exp may lie."""
    return 0.9 * math.log(torch.finfo(dtype).max)


def _shift(queries: Tensor, keys: Tensor, scale: Tensor) -> float:
    """The smallest shift >= 0 with which no sum of exponentials can overflow; not finite where the inputs are not."""
    bound = float(
        scale.abs() * row_dots_inside(queries, queries).amax().sqrt() * row_dots_inside(keys, keys).amax().sqrt()
    )
    limit = _headroom(scale.dtype) - math.log(max(len(queries), len(keys)))
    return max(0.0, bound - limit) if math.isfinite(bound) else math.nan


def _serves(shift: float, rows: Tensor, columns: Tensor) -> bool:
    """Whether the shift of one block is fit for sums over all, next to which it could make probabilities underflow."""
    return bool(torch.cat([rows, columns]).amax() <= shift + _headroom(rows.dtype))


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


class _Weights:
    """What every probability of a block is weighted with: that of a row ``exp(logit - row)``, that of a column alike.

    The weights are brought to order 1, and the gradient back by ``size``, so that 1 / (a huge sum) stays a normal
    number.
    """

    def __init__(
        self, rows: Tensor, grad_rows: Tensor, columns: Tensor, grad_columns: Tensor, shift: float | None
    ) -> None:
        size = torch.cat([grad_rows, grad_columns]).abs().amax() if len(rows) + len(columns) else rows.new_zeros(())
        self.size = size.clamp_min(torch.finfo(size.dtype).tiny)
        empty_rows, empty_columns = rows == -math.inf, columns == -math.inf
        self.row_weights = (grad_rows / self.size).masked_fill_(empty_rows, 0).unsqueeze(1)
        self.column_weights = (grad_columns / self.size).masked_fill_(empty_columns, 0).unsqueeze(0)
        # Nothing was summed into an empty entry: +inf makes its probabilities exp(x - inf) = 0 and no inf - inf.
        self._rows = rows.masked_fill(empty_rows, math.inf).unsqueeze(1)
        self._columns = columns.masked_fill(empty_columns, math.inf).unsqueeze(0)
        self.shift = shift
        if shift is not None:
            self.row_weights = self.row_weights * (shift - self._rows).exp_()
            self.column_weights = self.column_weights * (shift - self._columns).exp_()

    def of(self, logits: _Logits, block: Tensor, i: slice, j: slice, scratch: Scratch) -> Tensor:
        """The tile of ``grad_row * exp(logit - row) + grad_column * exp(logit - column)``, up to ``size``."""
        weights = scratch(len(block), j.stop - j.start)
        if self.shift is not None:
            tile = logits.exponentials(block, i, j, self.shift)
            torch.add(self.row_weights[i], self.column_weights[:, j], out=weights)
            return tile.mul_(weights)
        tile = logits.masked(block, i, j)
        torch.sub(tile, self._rows[i], out=weights)
        weights.exp_().mul_(self.row_weights[i])
        return tile.sub_(self._columns[:, j]).exp_().mul_(self.column_weights[:, j]).add_(weights)


def _add_gradients(logits: _Logits, weights: _Weights, grad_queries: Tensor | None, grad_keys: Tensor | None) -> None:
    """Add the gradients of a block; that of the queries is still to be multiplied by the scale."""
    keys, scratch = logits.keys, Scratch(logits.queries, logits.tile)
    for i in blocks(len(logits.queries), logits.tile[0]):
        block = logits.queries[i] * logits.scale
        sized_block = block * weights.size
        row_sums = torch.zeros_like(block)
        for j in blocks(len(keys), logits.tile[1]):
            tile = weights.of(logits, block, i, j, scratch)
            if grad_queries is not None:
                row_sums.addmm_(tile, keys[j])
            if grad_keys is not None:
                grad_keys[j].addmm_(tile.T, sized_block)
        if grad_queries is not None:
            grad_queries[i] += row_sums.mul_(weights.size)
