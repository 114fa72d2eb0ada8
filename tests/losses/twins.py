"""Slow twins: the losses' equations read off the page, a loop over anchors, on one process with the whole matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def info_nce_twin(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    negatives: Tensor | None = None,
    group: Tensor | None = None,
    valid: Tensor | None = None,
    symmetric: bool = True,
    duplicates: str = "positive",
) -> Tensor:
    members = [i for i in range(len(a)) if valid is None or valid[i]]
    if not members:
        return 0 * (a.sum() + b.sum() + scale)
    same = {i: [j for j in members if j == i or (group is not None and group[i] == group[j])] for i in members}
    total = a.new_zeros(())
    for i in members:
        others = [j for j in members if duplicates == "positive" or j == i or j not in same[i]]
        positives = same[i] if duplicates == "positive" else [i]
        row = [scale * (a[i] @ b[j]) for j in others]
        row += [] if negatives is None else [scale * (a[i] @ x) for x in negatives]
        terms = [torch.logsumexp(torch.stack(row), 0) - scale * (a[i] @ b[p]) for p in positives]
        if symmetric:
            column = [scale * (a[j] @ b[i]) for j in others]
            terms += [torch.logsumexp(torch.stack(column), 0) - scale * (a[p] @ b[i]) for p in positives]
        total = total + torch.stack(terms).mean()
    return total / len(members)


def siglip_twin(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    negatives: Tensor | None = None,
    group: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    members = [i for i in range(len(a)) if valid is None or valid[i]]
    total = 0 * (a.sum() + b.sum() + scale + bias)
    for i in members:
        for j in members:
            matching = i == j or (group is not None and group[i] == group[j])
            total = total - F.logsigmoid((1 if matching else -1) * (scale * (a[i] @ b[j]) + bias))
        for x in [] if negatives is None else negatives:
            total = total - F.logsigmoid(-(scale * (a[i] @ x) + bias))
    return total / max(len(members), 1)
