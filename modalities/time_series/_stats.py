"""Mean, spread and shape of the observed values along one axis, exact where naive formulas overflow or cancel."""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-30  # below it, differences count as none: their reciprocal would leave float32
_FLAT = 1e-12  # least variance in units of the largest difference; real ones are above 1 / (4 n)


def standardize(values: Tensor, observed: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Standardise the observed values along ``dim`` by their own mean and (biased) standard deviation.

    Differences from the first observed value, over the largest of them, are what is averaged: so a constant series has
    a spread of exactly zero at any offset, 1e30 does not overflow when squared, and 1e-20 does not vanish.

    Args:
        values: float32 [...], finite; values that are not observed do not count.
        observed: bool [...].
        dim: the axis.

    Returns:
        The shape [...], 0 where nothing is observed and where all observed values are equal; the mean and the spread,
        with ``dim`` of size 1, both 0 where nothing is observed.
    """
    # `argmax` of equal values is the first on every backend for integers only as a rule; of this ramp it is unique.
    ramp = torch.arange(values.shape[dim], 0, -1, device=values.device)
    ramp = ramp.view([-1 if axis == dim % values.ndim else 1 for axis in range(values.ndim)])
    first = values.gather(dim, (observed * ramp).argmax(dim, keepdim=True))
    count = observed.sum(dim, keepdim=True).clamp_min(1)
    apart = torch.where(observed, values - first, 0.0)
    largest = apart.abs().amax(dim, keepdim=True)
    units = apart / largest.clamp_min(_TINY)
    mean = units.sum(dim, keepdim=True) / count
    centred = torch.where(observed, units - mean, 0.0)
    spread = (centred.square().sum(dim, keepdim=True) / count).clamp_min(_FLAT).sqrt()
    first = torch.where(observed.any(dim, keepdim=True), first, 0.0)
    return centred / spread, first + mean * largest, spread * largest
