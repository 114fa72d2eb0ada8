"""Farthest point sampling and nearest neighbours over padded batches of points, in plain torch.

Both are exact and give the same indices in any batch: distances are sums of squares of differences, rounded alike
whatever the shape (an expansion through a matrix product is not), and equal distances go to the lowest index.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Distances held at once by `nearest`: what stays in a processor's cache, or keeps an accelerator busy.
_CHUNK, _CHUNK_ON_DEVICE = 1 << 18, 1 << 24
_PAST_ALL = torch.iinfo(torch.int64).max


@torch.no_grad()
def farthest_points(points: Tensor, valid: Tensor, count: int) -> Tensor:
    """Farthest point sampling (Eldar et al., IEEE Trans. Image Processing 6(9), 1997; PointNet++, arXiv:1706.02413).

    The first point is the one farthest from the centroid; each next one is farthest from those chosen. No point is
    chosen twice, even where several lie on one place.

    Args:
        points: float [B, N, 3]; computed in float32, whatever the dtype.
        valid: bool [B, N]; points that are not valid are never chosen, and their values do not matter.
        count: how many to choose.

    Returns:
        int64 [B, min(count, N)], in the order of choice; -1 where a cloud has fewer valid points.
    """
    B, N = valid.shape
    count = min(count, N)
    axes = _axes(points, valid)
    blocked = torch.where(valid, torch.inf, -1.0)  # an upper bound of what a point's distance may be
    gap = torch.minimum(_squared(axes, _centroid(axes, valid)), blocked)
    nearest, chosen, gaps = blocked, [torch.empty(B, 0, dtype=torch.long, device=points.device)], [gap[:, :0]]
    for _ in range(count):
        furthest, best = gap.max(1, keepdim=True)  # the first of equals
        chosen.append(best)
        gaps.append(furthest)
        place = axes.gather(2, best.expand(3, -1, -1))
        nearest = gap = torch.minimum(nearest, _squared(axes, place)).scatter_(1, best, -1.0)
    return torch.cat(chosen, 1).masked_fill_(torch.cat(gaps, 1) < 0, -1)


@torch.no_grad()
def nearest(queries: Tensor, points: Tensor, valid: Tensor, k: int) -> Tensor:
    """The ``k`` nearest points of each query, itself included if it is among the points.

    Memory is O(B Q k + B N) beside a constant, not O(B Q N): queries are taken in chunks.

    Args:
        queries: float [B, Q, C]; C = 3, or any other number for neighbours in a space of features.
        points: float [B, N, C]; computed in float32, whatever the dtype.
        valid: bool [B, N]; points that are not valid are nobody's neighbours.
        k: how many.

    Returns:
        int64 [B, Q, min(k, N)], nearest first, equals by index; -1 where a cloud has fewer valid points.
    """
    (B, N), Q = valid.shape, queries.shape[1]
    k = min(k, N)
    points, queries = points.float(), queries.float()
    index = torch.arange(N, device=points.device)
    step = max(1, (_CHUNK if points.device.type == "cpu" else _CHUNK_ON_DEVICE) // max(1, B * N))
    parts: list[Tensor] = [torch.empty(B, 0, k, dtype=torch.long, device=points.device)]
    for start in range(0, Q, step):
        ends = queries[:, start : start + step].contiguous()
        distance = torch.cdist(ends, points, compute_mode="donot_use_mm_for_euclid_dist")
        # The bits of a float that is not negative sort as it does; below them the index makes every key unique.
        keys = distance.view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(index)
        keys = keys.masked_fill_(~valid[:, None], _PAST_ALL).topk(k, dim=2, largest=False).values
        parts.append(torch.where(keys == _PAST_ALL, -1, keys & 0xFFFFFFFF))
    return torch.cat(parts, dim=1)


def gather(values: Tensor, index: Tensor) -> Tensor:
    """``values`` [B, N, C] at ``index`` int64 [B, …]: [B, …, C], zero where the index is -1."""
    flat = index.flatten(1)
    picked = values.gather(1, flat.clamp_min(0)[..., None].expand(-1, -1, values.shape[2]))
    return picked.masked_fill((flat < 0)[..., None], 0).view(*index.shape, values.shape[2])


def _axes(points: Tensor, valid: Tensor) -> Tensor:
    """Float32 [C, B, N], zero at padding."""
    return points.float().masked_fill(~valid[..., None], 0).permute(2, 0, 1).contiguous()


def _centroid(axes: Tensor, valid: Tensor) -> Tensor:
    """[3, B, 1]. A running sum, and in double precision: padding must not move it by a bit, or ties would turn over."""
    total = axes.double().cumsum(2)[:, :, -1:]
    return (total / valid.sum(1, keepdim=True).clamp_min(1)).float()


def _squared(axes: Tensor, ends: Tensor) -> Tensor:
    """Squared distances [B, N] of [3, B, N] and [3, B, 1]."""
    difference = axes - ends
    x, y, z = difference.mul_(difference)
    return x.add_(y).add_(z)
