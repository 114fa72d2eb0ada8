"""Fixed positions of sound tokens, for clips of any length."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos(places: Tensor, width: int) -> Tensor:
    """Float [N] to float32 [N, width], by the sines of Vaswani et al. (arXiv:1706.03762, section 3.5).

    sin(p * w_i), then cos(p * w_i), w_i = 10000^(-2i / width); ``width`` is even.
    """
    frequency = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float32, device=places.device) * 2 / width)
    angle = places.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)
