"""Redundancy reduction by the cross-correlation of two batches: Barlow Twins, and the block target of DeCUR."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrep.losses._batch import check_pairs
from mmrep.losses._tuples import agree, common_dtype
from mmrep.losses._views import centred, cross_product
from mmrep.world import LocalWorld, World


def cross_correlation_loss(
    a: Tensor,
    b: Tensor,
    *,
    common: int | None = None,
    redundancy: float = 5e-3,
    valid: Tensor | None = None,
    world: World | None = None,
    eps: float = 1e-5,
) -> dict[str, Tensor]:
    r"""Bring the cross-correlation of two batches near to a target.

    With every column of a and b brought to mean 0 and variance 1 (biased, plus ``eps``) over the valid rows of all
    ranks, and ``C = a^T b / N``, over the first ``common`` columns of both and over the rest::

        common = sum_i (1 - C_ii)^2 + redundancy * sum_{i != j} C_ij^2     i, j < common
        unique = sum_i C_ii^2       + redundancy * sum_{i != j} C_ij^2     i, j >= common

    The entries between a common and a unique column have no target. With all columns common, ``common`` is the loss of
    Barlow Twins (arXiv:2103.03230, equations 1 and 2); with some, the two are L_com and L_uni of DeCUR
    (arXiv:2309.05300).

    The statistics are global: standardising by those of each rank, as is common, is another function with another
    gradient. Cost N D^2, a third of it on the way forward; memory and traffic D^2, whatever N is.

    Args:
        a: [n, D] this rank's rows, of any length. bf16 and fp16 are cast to float32 and autocast is off inside; two
            float64 inputs stay float64.
        b: [n, D], paired with ``a``.
        common: 0 to D; None is D.
        redundancy: weight of the other entries than the diagonal.
        valid: [n] booleans; a false row takes no part. It is never read.
        world: the ranks that share the batch; None is one process.
        eps: added to the variances.

    Returns:
        ``common`` and ``unique``, 0-D, equal on all ranks, so that their mean over ranks is the loss of one process on
        the concatenated batch (see `mmrep.world`); ``n``, the number of valid rows of all ranks (int64). Of fewer than
        two rows there is no correlation: exactly 0, with zero gradients.

    Raises:
        ValueError: shapes or dtypes do not fit, or ``common`` is not among the columns.
    """
    check_pairs(a, b, None, None, valid)
    width = a.shape[1]
    common = width if common is None else common
    if not 0 <= common <= width:
        raise ValueError(f"common is a number of the {width} columns, got {common}")
    world, dtype = world or LocalWorld(), common_dtype([a, b])
    if valid is not None:
        rows = valid.nonzero().squeeze(1)
        a, b = a[rows], b[rows]
    a, b = agree([a.to(dtype), b.to(dtype)], None, world)
    with torch.autocast(a.device.type, enabled=False):
        n = world.sum(torch.tensor(len(a), device=a.device))
        enough, count = n > 1, n.clamp_min(1)
        z_a, z_b = _standardised(a, count, world, eps), _standardised(b, count, world, eps)
        c = world.sum(cross_product(z_a, z_b)) / count
        parts = {
            "common": _near(c[:common, :common], 1, redundancy),
            "unique": _near(c[common:, common:], 0, redundancy),
        }
        return {name: part * enough for name, part in parts.items()} | {"n": n}


def _standardised(x: Tensor, count: Tensor, world: World, eps: float) -> Tensor:
    """Columns of mean 0 and variance 1 over all ranks."""
    x = centred(x, count, world)
    return x * (world.sum(x.square().sum(0)) / count + eps).rsqrt()


def _near(c: Tensor, diagonal: float, redundancy: float) -> Tensor:
    """Squared distance of a matrix to ``diagonal`` times the identity; what is not on the diagonal counts less."""
    rest = c - c.diagonal().diag()
    return (c.diagonal() - diagonal).square().sum() + redundancy * rest.square().sum()
