"""Scalars of any size as vectors: numerically multi-scaled embedding (NuTime, arXiv:2310.07402)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_EPS = 1e-6  # inside the logarithm: scales a million times too large all weigh the same
_FLOOR = 1e-6  # under the fraction: a scalar that equals a scale is embedded at that scale alone
_FAR = 1e30  # ratios beyond it could leave float32
_NORM_EPS = 1e-5  # of the layer norm


class ScalarEmbedding(nn.Module):
    """e(x) = sum_i a_i(x) LayerNorm(x w_i + k_i b_i), with a_i proportional to 1 / |log(|x| / k_i + eps)|.

    Each scale k_i resolves the scalars near it: those far below give LayerNorm(b_i) and those far above
    LayerNorm(±w_i), so the sum tells apart scalars over the whole range of the scales and is bounded at any scalar. The
    layer norm has no parameters. It does not change if its input is multiplied, so x and k_i are first divided by
    |x| + k_i; with that its eps counts the same at every size, where the paper's own code lets small scalars vanish.

    Args:
        width: E.
        scales: k_i, positive.
    """

    def __init__(self, width: int, scales: Sequence[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(len(scales), width).uniform_(-1, 1))
        self.bias = nn.Parameter(torch.empty(len(scales), width).uniform_(-1, 1))
        self.register_buffer("scales", torch.tensor(scales, dtype=torch.float32), persistent=False)
        self.scales: Tensor

    def forward(self, scalars: Tensor) -> Tensor:
        """Float [...], finite, to float32 [..., E]."""
        with torch.autocast(scalars.device.type, enabled=False):
            x, k = scalars.float()[..., None], self.scales.float()
            size = x.abs() + k
            x_share, k_share = x / size, k / size
            # The norm of x w + k b, without the vectors: its centre and its variance are linear and bilinear in them.
            w, b = (p.float() - p.float().mean(1, keepdim=True) for p in (self.weight, self.bias))
            ww, wb, bb = w.square().mean(1), (w * b).mean(1), b.square().mean(1)
            variance = x_share.square() * ww + 2 * x_share * k_share * wb + k_share.square() * bb
            weight = 1 / (((x.abs() / k).clamp_max(_FAR) + _EPS).log().abs() + _FLOOR)
            weight = weight / weight.sum(-1, keepdim=True) / (variance.clamp_min(0) + _NORM_EPS).sqrt()
            return (weight * x_share) @ w + (weight * k_share) @ b
