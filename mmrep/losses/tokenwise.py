"""Losses of one predicted token: [n, K] against [n, K] (or codes [n]) to [n], without reduction.

Each is computed in fp32 (or fp64). ``observed`` bool [n, K] leaves figures out; a token of which nothing was observed
costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

TokenLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def mse(predicted: Tensor, target: Tensor, observed: Tensor | None = None) -> Tensor:
    """Mean squared difference."""
    return _mean((predicted - _known(target, observed)).square(), observed)


def l1(predicted: Tensor, target: Tensor, observed: Tensor | None = None) -> Tensor:
    """Mean absolute difference (SimMIM, V-JEPA)."""
    return _mean((predicted - _known(target, observed)).abs(), observed)


def smooth_l1(predicted: Tensor, target: Tensor, observed: Tensor | None = None) -> Tensor:
    """Half the square where the difference is below 1, linear beyond (I-JEPA)."""
    return _mean(F.smooth_l1_loss(predicted, _known(target, observed), reduction="none"), observed)


def cosine(predicted: Tensor, target: Tensor, observed: Tensor | None = None) -> Tensor:
    """``1 - cos``; of codes int64 [n], whose ``observed`` is [n] too, with their one-hot vectors."""
    if not target.is_floating_point():
        loss = 1 - F.normalize(predicted, dim=-1, eps=1e-8).gather(1, target[:, None])[:, 0]
        return loss if observed is None else loss * observed
    if observed is None:
        return 1 - F.cosine_similarity(predicted, target, dim=-1)
    loss = 1 - F.cosine_similarity(predicted * observed, _known(target, observed), dim=-1)
    return loss * observed.any(-1)


def sce(predicted: Tensor, target: Tensor, observed: Tensor | None = None, gamma: float = 3.0) -> Tensor:
    """Scaled cosine error ``(1 - cos)^gamma`` (GraphMAE, arXiv:2205.10803, eq. 2)."""
    # Rounding must not make the base negative, nor the gradient of a power infinite at 0.
    return cosine(predicted, target, observed).clamp_min(0).pow(gamma)


def cross_entropy(predicted: Tensor, target: Tensor, observed: Tensor | None = None) -> Tensor:
    """Of logits [n, K] and codes int64 [n], or of target probabilities [n, K].

    Codes int64 [n, C] are those of C codebooks of one size: the logits [n, C * K] are read codebook by codebook, and
    the loss is the mean over the codebooks. ``observed`` has the shape of the codes.
    """
    if target.is_floating_point():
        loss = F.cross_entropy(predicted, target, reduction="none")
        return loss if observed is None else loss * observed.any(-1)
    if target.ndim == 1:
        loss = F.cross_entropy(predicted, target, reduction="none")
        return loss if observed is None else loss * observed
    n, C = target.shape
    logits = predicted.reshape(n * C, predicted.shape[1] // C)
    return _mean(F.cross_entropy(logits, target.reshape(-1), reduction="none").view(n, C), observed)


def chamfer(predicted: Tensor, target: Tensor, observed: Tensor | None = None) -> Tensor:
    """Squared Chamfer distance of two point sets, [n, 3 k] each (Point-MAE, arXiv:2203.06604, eq. 5)."""
    target = _known(target, observed)
    n = len(predicted)
    a, b = predicted.view(n, predicted.shape[1] // 3, 3), target.view(n, target.shape[1] // 3, 3)
    distance = (a[:, :, None] - b[:, None, :]).square().sum(-1)  # cdist has no gradient where points coincide
    if observed is None:
        return distance.min(2).values.mean(1) + distance.min(1).values.mean(1)
    there = observed.reshape(b.shape).all(-1)  # a group of fewer points than the others
    count = there.sum(1).clamp_min(1)
    nearest = distance.masked_fill(~there[:, None, :], torch.inf).min(2).values
    nearest = torch.where(there.any(1, keepdim=True), nearest, torch.zeros_like(nearest)).mean(1)
    return nearest + (distance.min(1).values * there).sum(1) / count


LOSSES: dict[str, TokenLoss] = {
    "mse": mse, "l1": l1, "smooth-l1": smooth_l1, "cosine": cosine, "sce": sce, "cross-entropy": cross_entropy,
    "chamfer": chamfer,
}  # fmt: skip


def _known(target: Tensor, observed: Tensor | None) -> Tensor:
    """Zeros where nothing was observed: whatever stands there, a NaN too, must reach neither loss nor gradient."""
    return target if observed is None else target.masked_fill(~observed, 0)


def _mean(each: Tensor, observed: Tensor | None) -> Tensor:
    if observed is None:
        return each.mean(-1)
    weight = observed.to(each.dtype)
    return (each * weight).sum(-1) / weight.sum(-1).clamp_min(1)
