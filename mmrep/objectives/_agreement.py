"""Whether what is predicted of a token is the same under several masks (Point-CMAE, arXiv:2407.05862)."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmrep.tokens import indicator


def disagreement(predicted: Tensor, target: Tensor, groups: int, n: int) -> Tensor:
    """The mean of ``1 - cos`` over the tokens and pairs of groups that both predict the token; 0 if none do: [B].

    Args:
        predicted: [B * groups, Nt, width].
        target: int64 [B * groups, Nt], of which tokens; -1 is an empty slot.
        groups: of a sample.
        n: tokens of a sample.
    """
    B = len(target) // groups
    predicted = predicted if predicted.dtype == torch.float64 else predicted.float()
    at = target.masked_fill(target < 0, n)[..., None].expand_as(predicted)
    whole = predicted.new_zeros(B * groups, n + 1, predicted.shape[2]).scatter(1, at, predicted)[:, :n]
    hidden = indicator(target, n).view(B, groups, n)
    unit = F.normalize(whole, dim=-1, eps=1e-8).view(B, groups, n, -1)
    total, count = predicted.new_zeros(B), predicted.new_zeros(B)
    for a, b in combinations(range(groups), 2):
        both = hidden[:, a] & hidden[:, b]
        total = total + ((1 - (unit[:, a] * unit[:, b]).sum(-1)) * both).sum(1)
        count = count + both.sum(1)
    return total / count.clamp_min(1)
