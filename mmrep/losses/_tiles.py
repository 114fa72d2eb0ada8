"""What the tiled losses share: the walk over tiles, their memory, and row-wise dot products.

A tiled loss computes statistics of the matrix ``scale * queries @ keys.T`` without ever holding it: one tile is
computed, reduced and overwritten. Products dominate the cost, n*m*D multiply-adds each, so the losses count them.
Everything is computed in the dtype of the inputs, which the caller has made float32 or float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.utils.checkpoint
from torch import Tensor

Tile = tuple[int, int]
T = TypeVar("T")

_CPU_TILE: Tile = (512, 1024)  # 2 MiB in float32: stays in a core's cache between the product and its reductions
_ACCELERATOR_TILE: Tile = (2048, 4096)  # fewer kernel launches; 32 MiB a buffer


def default_tile(device: torch.device) -> Tile:
    """Rows and columns of one tile on this kind of device."""
    return _CPU_TILE if device.type == "cpu" else _ACCELERATOR_TILE


def fit(tile: Tile, n: int, m: int) -> Tile:
    """The tile, no larger than the matrix [n, m]."""
    return min(tile[0], max(n, 1)), min(tile[1], max(m, 1))


def blocks(length: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``length``."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


class Scratch:
    """Tile-sized memory, allocated once a pass; a ragged tile gets a contiguous part of it."""

    def __init__(self, like: Tensor, tile: Tile) -> None:
        self._memory = like.new_empty(tile[0] * tile[1])

    def __call__(self, rows: int, columns: int) -> Tensor:
        return self._memory[: rows * columns].view(rows, columns)


def refuse_second_derivative() -> None:
    """In a backward pass, gradients are recorded only for ``create_graph=True``.

    (``once_differentiable`` lets a constant incoming gradient pass, and the second derivative would silently be 0.)
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the tiled losses have no second derivative: call backward or grad without create_graph=True"
        )


def recomputed(function: Callable[..., T], *arguments: Tensor) -> T:
    """``function(*arguments)``, of which only the arguments are kept: it is called again for the backward pass."""
    checkpoint = cast(Any, torch.utils.checkpoint).checkpoint
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def lengths(x: Tensor) -> Tensor:
    """Of the rows of [n, D]: [n]; differentiable, with gradient 0 where a row is 0."""
    return cast(Any, torch.linalg).vector_norm(x, dim=1)


def row_dots(x: Tensor, y: Tensor) -> Tensor:
    """Dot products [n] of the rows of two [n, D], without an [n, D] temporary; differentiable once."""
    return _RowDots.apply(x, y)


class _RowDots(torch.autograd.Function):
    """A function of its own because bmm's backward pass would obey an autocast that surrounds ``loss.backward()``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return row_dots_inside(x, y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        refuse_second_derivative()
        x, y = ctx.saved_tensors
        grad = grad_outputs[0].unsqueeze(1)
        return grad * y if ctx.needs_input_grad[0] else None, grad * x if ctx.needs_input_grad[1] else None


def row_dots_inside(x: Tensor, y: Tensor) -> Tensor:
    """`row_dots` for use inside a forward or backward pass, where nothing is recorded."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.bmm(x.unsqueeze(1), y.unsqueeze(2)).flatten()
