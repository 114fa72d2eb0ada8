"""Warping of one picture or feature map onto another, and how unlike they then are: the parts of unsupervised flow.

A *flow* [n, 2, rows, columns] is a displacement (rows, columns) at every cell, in cells. The flow from a to b says that
what is at p in a is at p + flow(p) in b, so that b, read there, looks like a.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def warp(values: Tensor, flow: Tensor) -> Tensor:
    """``values`` read at p + flow(p), bilinear between cells and the nearest edge cell beyond the edge.

    Args:
        values: [n, C, rows, columns].
        flow: [n, 2, rows, columns], in the dtype of ``values``.
    """
    size = flow.shape[2:]
    axes = [torch.arange(count, device=flow.device, dtype=flow.dtype) for count in size]
    cells = torch.stack(torch.meshgrid(*axes, indexing="ij")) + flow
    # Pixel centres of torch's grid: cell i of W is at (2 i + 1) / W - 1, columns first.
    places = [(2 * cells[:, axis] + 1) / size[axis] - 1 for axis in (1, 0)]
    return F.grid_sample(values, torch.stack(places, -1), "bilinear", "border", align_corners=False)


def resize_flow(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """A flow on a grid of another size, its displacements in cells of that grid."""
    if tuple(flow.shape[2:]) == tuple(size):
        return flow
    factor = flow.new_tensor([size[0] / flow.shape[2], size[1] / flow.shape[3]])
    return F.interpolate(flow, size, mode="bilinear", align_corners=False) * factor[:, None, None]


def cost_volume(a: Tensor, b: Tensor, radius: int) -> Tensor:
    """The cosine of each cell of ``a`` with the cells of ``b`` up to ``radius`` away, 0 beyond the edge.

    Returns:
        [n, (2 radius + 1)^2, rows, columns]; displacements in raster order, rows from -radius to radius first.
    """
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    rows, columns = a.shape[2:]
    b = F.pad(b, [radius] * 4)
    span = range(2 * radius + 1)
    return torch.stack([(a * b[:, :, y : y + rows, x : x + columns]).sum(1) for y in span for x in span], 1)


def ssim(a: Tensor, b: Tensor, window: int = 3) -> Tensor:
    """Structural similarity (Wang et al. 2004, IEEE TIP 13(4)) of every ``window`` x ``window`` cells, unweighted.

    Args:
        a: [n, C, rows, columns]; the constants are those of a range of 1.
        b: as ``a``.
        window: its side, in cells; smaller where the pictures are.

    Returns:
        [n, C, rows - window + 1, columns - window + 1], at most 1.
    """
    side = min(window, *a.shape[2:])

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, side, stride=1)

    mean_a, mean_b = mean(a), mean(b)
    spread = mean(a * a) + mean(b * b) - mean_a.square() - mean_b.square()
    together = mean(a * b) - mean_a * mean_b
    same = (2 * mean_a * mean_b + 0.01**2) / (mean_a.square() + mean_b.square() + 0.01**2)
    return same * (2 * together + 0.03**2) / (spread + 0.03**2)


def photometric(a: Tensor, b: Tensor, l1: float, l2: float, similarity: float) -> Tensor:
    """How unlike two pictures are: weighted means of ``|a - b|``, ``(a - b)^2`` and ``(1 - SSIM) / 2``, [n]."""
    apart = a - b
    terms = l1 * apart.abs().flatten(1).mean(1) + l2 * apart.square().flatten(1).mean(1)
    return terms + similarity * (1 - ssim(a, b)).flatten(1).mean(1) / 2


def smoothness(flow: Tensor, picture: Tensor, edge: float) -> Tensor:
    """First differences of the flow, which count less across the picture's edges: [n].

    The sum over both axes of the mean over cells of ``exp(-edge * mean_c |d picture|) * mean_2 |d flow|``.
    """
    total = flow.new_zeros(len(flow))
    for axis in (2, 3):
        if flow.shape[axis] > 1:
            here = (-edge * picture.diff(dim=axis).abs().mean(1)).exp()
            total = total + (here * flow.diff(dim=axis).abs().mean(1)).flatten(1).mean(1)
    return total
