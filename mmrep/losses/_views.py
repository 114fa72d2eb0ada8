"""The contract of a loss over several views of the same samples, and what these losses share: selection, moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from mmrep.losses._tiles import refuse_second_derivative
from mmrep.losses._tuples import agree, common_dtype
from mmrep.world import LocalWorld, World


class ViewLoss(Protocol):
    """A loss over V views: readings of one field, or several fields of one sample.

    Attributes:
        paired: rows of different views are compared, so that row i of each view must be of sample i; else each view is
            looked at by itself, and may be any set of vectors (tokens, say).
    """

    @property
    def paired(self) -> bool:
        """See above."""
        ...

    def __call__(
        self, views: Sequence[Tensor], *, valid: Sequence[Tensor] | None = None, world: World | None = None
    ) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            views: V of [B, D], this rank's rows. bf16 and fp16 are cast to float32 and autocast is off inside; if all
                are float64, they stay so.
            valid: V of bool [B]; the other rows are never read. None = all rows.
            world: the ranks that share the batch; None is one process. All statistics are of the rows of all ranks.

        Returns:
            ``loss`` 0-D, equal on all ranks and exactly 0, with zero gradients, where there are too few rows for it;
            detached parts.

        Raises:
            ValueError: shapes or dtypes do not fit.
        """
        ...

    def after_optimizer_step(self) -> None:
        """Draw anew, count on: once per optimizer step."""
        ...


def prepare(
    views: Sequence[Tensor], valid: Sequence[Tensor] | None, world: World | None, *, paired: bool
) -> tuple[list[Tensor], list[Tensor], World]:
    """Check, cast, and make sure that all ranks will meet in the backward pass."""
    if not views:
        raise ValueError("a loss of views needs at least one view, got none")
    for x in views:
        if x.ndim != 2 or not x.is_floating_point():
            raise ValueError(f"a view is floating-point rows [B, D], got {x.dtype} {tuple(x.shape)}")
    if paired and len({x.shape for x in views}) > 1:
        shapes = ", ".join(str(tuple(x.shape)) for x in views)
        raise ValueError(f"the views of a paired loss are rows of one shape [B, D], got {shapes}")
    given = [torch.ones(len(x), dtype=torch.bool, device=x.device) for x in views] if valid is None else list(valid)
    if [v.shape for v in given] != [x.shape[:1] for x in views] or any(v.dtype != torch.bool for v in given):
        found = ", ".join(f"{v.dtype} {tuple(v.shape)}" for v in given)
        raise ValueError(f"valid must be one bool [B] for each of {len(views)} views, got {found}")
    world, dtype = world or LocalWorld(), common_dtype(views)
    return agree([x.to(dtype) for x in views], None, world), given, world


def select(x: Tensor, valid: Tensor) -> Tensor:
    """The rows of x [B, D] where ``valid``: what is in the others reaches neither value nor gradient."""
    return x[valid.nonzero().squeeze(1)]


def count(x: Tensor, world: World) -> Tensor:
    """Number of rows of all ranks, int64 0-D."""
    return world.sum(torch.tensor(len(x), device=x.device))


def centred(x: Tensor, n: Tensor, world: World) -> Tensor:
    """``x`` less its mean over the ``n`` rows of all ranks; the mean goes before any squares, which loses no digit."""
    return x - world.sum(x.sum(0)) / n.clamp_min(1)


def cross_product(a: Tensor, b: Tensor) -> Tensor:
    """``a.T @ b``, of which autocast changes neither the value nor the gradient."""
    return cast(Tensor, _CrossProduct.apply(a, b))


class _CrossProduct(torch.autograd.Function):
    """A function of its own because a product's backward pass would obey an autocast that surrounds it."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a.T @ b

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        refuse_second_derivative()
        a, b = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            return (
                b @ grad_outputs[0].T if ctx.needs_input_grad[0] else None,
                a @ grad_outputs[0] if ctx.needs_input_grad[1] else None,
            )
