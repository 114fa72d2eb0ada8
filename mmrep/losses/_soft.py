"""Soft targets: how similar pairs are in a frozen space says how much of a positive each is of the other."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from mmrep.losses._tiles import blocks, default_tile, refuse_second_derivative, row_dots
from mmrep.world import World


class Soften:
    """The weights ``q_ij = softmax_j(f_i . f_j / temperature)`` of this rank's pairs over the pairs of all ranks.

    Args:
        features: [n, F] of this rank's valid pairs, from a frozen space. They are centred on the mean of the global
            batch (in a narrow cone every pair would look alike) and normalised; no gradient reaches them.
        temperature: of the softmax, > 0.
        world: the ranks.
        dtype: to compute in.
    """

    def __init__(self, features: Tensor, temperature: float, world: World, dtype: torch.dtype) -> None:
        own = features.detach().to(dtype)
        everyone = world.gather(own)
        centre = everyone.mean(0) if len(everyone) else own.new_zeros(own.shape[1])
        self._queries = F.normalize(own - centre, dim=1) / temperature
        self._keys = F.normalize(everyone - centre, dim=1)

    def logits(self, a: Tensor, everyone: Tensor, scale: Tensor) -> Tensor:
        """``sum_j q_ij * scale * a_i . everyone_j``, [n]; ``everyone`` [N, D] are the gathered pairs, in order."""
        mean = cast(Tensor, _SoftMean.apply(self._queries, self._keys, everyone))
        return scale * row_dots(a, mean)


class _SoftMean(torch.autograd.Function):
    """``softmax(queries @ keys.T) @ values`` with a gradient for values alone; a block of rows at a time."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(queries, keys)
        out = values.new_zeros(len(queries), values.shape[1])
        for rows in blocks(len(queries), _rows(queries)):
            out[rows] = (queries[rows] @ keys.T).softmax(1) @ values
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative()
        queries, keys = cast("tuple[Tensor, Tensor]", ctx.saved_tensors)
        values = grad.new_zeros(len(keys), grad.shape[1])
        for rows in blocks(len(queries), _rows(queries)):
            values.addmm_((queries[rows] @ keys.T).softmax(1).T, grad[rows])
        return None, None, values


def _rows(queries: Tensor) -> int:
    """Whole rows are held, so a block of them is kept a quarter as high as a tile."""
    return default_tile(queries.device)[0] // 4
