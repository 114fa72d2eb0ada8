"""How much two readings of a text agree in what its tokens attend to: mutual information of attention maps."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST = 1 - 1e-6
"""Of a squared correlation: two maps that are the same have a finite information."""


def attention_information(a: Tensor, b: Tensor, valid: Tensor) -> Tensor:
    """``-1/2 log(1 - rho^2)`` nats, the mean over layers and heads, with rho the correlation of log-attention.

    miCSE (Klein and Nabi 2022, arXiv:2211.04928, section 3.2): attention weights are taken as log-normal, so that the
    mutual information of two maps is that of correlated normal variables. Of a map count the weights between valid
    tokens that are above 0 in both readings, since dropout sets some to 0. A map with fewer than three of them, or all
    alike, has no information.

    Args:
        a: [B, layers, heads, N, N], as `mmrep.encoder.Encoder.attended` gives it.
        b: the other reading's.
        valid: bool [B, N].

    Returns:
        [B], float32 (or float64 where ``a`` is), 0 or more.

    Raises:
        ValueError: shapes that do not fit.
    """
    if a.ndim != 5 or a.shape != b.shape or valid.shape != (a.shape[0], a.shape[3]):
        raise ValueError(
            f"attention is [B, layers, heads, N, N] twice with valid [B, N], got {tuple(a.shape)}, {tuple(b.shape)} "
            f"and {tuple(valid.shape)}"
        )
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    with torch.autocast(a.device.type, enabled=False):
        counted = (valid[:, :, None] & valid[:, None, :])[:, None, None] & (a > 0) & (b > 0)
        weight, n = counted.to(dtype), counted.sum((-1, -2))
        share = weight / n.clamp_min(1)[..., None, None]
        # A weight of 1 where none counts: its log is 0, and no gradient is infinite.
        x, y = (torch.where(counted, w.to(dtype), 1).log() for w in (a, b))
        x, y = ((w - (w * share).sum((-1, -2), keepdim=True)) * weight for w in (x, y))
        spread = (x.square().sum((-1, -2)) * y.square().sum((-1, -2))).clamp_min(torch.finfo(dtype).tiny)
        squared = (x * y).sum((-1, -2)).square() / spread
        information = -0.5 * torch.log1p(-squared.clamp_max(_MOST))
        return information.masked_fill(n < 3, 0).mean((1, 2))
