"""Distance correlation: how much two sets of vectors of the same samples depend on each other, whatever the shape."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from mmrep.world import LocalWorld, World


def distance_correlation(x: Tensor, z: Tensor, *, world: World | None = None) -> Tensor:
    """The empirical distance correlation (Szekely, Rizzo and Bakirov 2007, definitions 3 to 5).

    With ``a_ij = |x_i - x_j|`` of the N rows of all processes and ``A`` the same with the means of its rows and columns
    taken off (and that of all added again), ``B`` likewise of z::

        sqrt(mean_ij A B) / (mean_ij A^2 mean_ij B^2)^(1/4)

    This is the biased estimate, as in MV-MR (Kinakh et al. 2023, arXiv:2303.12130): of few samples of independent
    vectors it is far from 0. Widths may differ, and neither scale nor rotation of either side matters. (MV-MR's code
    takes no distance for less than 0.01, not even of a row from itself; here distances are what they are.)

    Args:
        x: [n, D] of this process, n >= 0.
        z: [n, E] of the same samples.
        world: the processes.

    Returns:
        0-D in 0..1, equal on all processes; 0 with a zero gradient where all rows of one side are alike, or there are
        fewer than two. float64 of two float64, else float32.

    Raises:
        ValueError: not the same rows.
    """
    if x.ndim != 2 or z.ndim != 2 or len(x) != len(z):
        raise ValueError(f"two sets of vectors of the same samples, got {tuple(x.shape)} and {tuple(z.shape)}")
    world = world or LocalWorld()
    with torch.autocast(x.device.type, enabled=False):
        double = x.dtype == z.dtype == torch.float64
        a, b = (_centred_distances(v if double else v.float(), world) for v in (x, z))
        both, own_x, own_z = (world.sum((p * q).sum().reshape(1)).sum() for p, q in ((a, b), (a, a), (b, b)))
        size = (own_x * own_z).clamp_min(torch.finfo(a.dtype).tiny).sqrt()
        share = both / size
        # Below this it is rounding, of which the root would have a gradient without bound.
        floor = 1e2 * torch.finfo(a.dtype).eps
        return torch.where(share > floor, share.clamp_min(floor).sqrt(), 0 * both)


def _centred_distances(x: Tensor, world: World) -> Tensor:
    """[n, N]: of the rows of this process from all, less the means of rows and columns, plus that of all."""
    everyone = world.gather(x)
    distances = torch.cdist(x, everyone, compute_mode="donot_use_mm_for_euclid_dist")
    if x.shape[1] == 0 or len(everyone) < 2:
        return distances * 0
    means = cast(Any, distances).mean(1)
    return distances - means[:, None] - world.gather(means)[None] + world.gather(means).mean()
