"""Which of several vectors is that of the hidden token: the contrastive loss of wav2vec 2.0.

(Baevski et al. 2020, arXiv:2006.11477, section 3.2, eq. 3.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SAME = 1e-6
"""Distractors of this cosine distance to the right answer are the same code, but for rounding."""


def contrast(predicted: Tensor, target: Tensor, valid: Tensor, noise: Tensor | None, temperature: float) -> Tensor:
    """``-log(exp(s_t) / (exp(s_t) + sum over distractors of exp(s)))``, s the cosine over the temperature.

    Distractors are drawn, with replacement, from the other valid tokens of the same row. One that equals the right
    answer does not count; a token without distractors costs nothing.

    Args:
        predicted: float [R, T, D].
        target: float [R, T, D]; may have a gradient.
        valid: bool [R, T]; other tokens are neither predicted nor distractors.
        noise: float [R, T, M] in [0, 1): what M distractors of each token are drawn by. None: each of the other valid
            tokens is one distractor (Selfie, arXiv:1906.02940, section 2).
        temperature: > 0.

    Returns:
        [R, T], 0 where not valid.
    """
    a, b = F.normalize(predicted, dim=-1), F.normalize(target, dim=-1)
    with torch.autocast(predicted.device.type, enabled=False):  # in bf16 any two near vectors would be the same code
        cosines = a @ b.transpose(1, 2)
        same = b.detach() @ b.detach().transpose(1, 2) > 1 - SAME
    if noise is None:
        left_out = same | ~valid[:, None, :] | torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    else:
        at, alone = _drawn(valid, noise)
        cosines, left_out = cosines.gather(2, at), same.gather(2, at) | alone[:, None, None]
    negatives = (cosines / temperature).masked_fill(left_out, -torch.inf)
    right = (a * b).sum(-1, keepdim=True) / temperature
    loss = torch.cat([right, negatives], -1).logsumexp(-1) - right[..., 0]
    return torch.where(valid, loss, torch.zeros_like(loss))


def _drawn(valid: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Places int64 [R, T, M] of the distractors of each token, and bool [R], where there are none to draw from."""
    count = valid.sum(1)
    order = (~valid).to(torch.int8).argsort(dim=1, stable=True)  # the valid tokens first
    rank = valid.cumsum(1) - 1
    others = (count - 1).clamp_min(0)[:, None, None]
    drawn = (noise * others).long().minimum((others - 1).clamp_min(0))
    drawn = drawn + (drawn >= rank[..., None])  # itself left out
    R, T, M = noise.shape
    at = order.gather(1, drawn.clamp(0, max(T - 1, 0)).view(R, T * M)).view(R, T, M) if T else drawn
    return at, count < 2
