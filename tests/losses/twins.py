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
    soft: Tensor | None = None,
    soft_weight: float = 0.5,
    soft_temperature: float = 0.05,
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
        if soft is not None:  # one soft term in each direction, beside the mean over the positives
            total = total + soft_weight * _soft_terms(i, members, a, b, scale, soft, soft_temperature, row, symmetric)
        terms = [torch.logsumexp(torch.stack(row), 0) - scale * (a[i] @ b[p]) for p in positives]
        if symmetric:
            column = [scale * (a[j] @ b[i]) for j in others]
            terms += [torch.logsumexp(torch.stack(column), 0) - scale * (a[p] @ b[i]) for p in positives]
        total = total + (1.0 if soft is None else 1 - soft_weight) * torch.stack(terms).mean()
    return total / len(members)


def _soft_terms(i, members, a, b, scale, soft, temperature, row, symmetric) -> Tensor:
    centre = torch.stack([soft[j] for j in members]).mean(0)
    cosines = torch.stack([F.cosine_similarity(soft[i] - centre, soft[j] - centre, dim=0) for j in members])
    q = torch.softmax(cosines / temperature, 0)
    rows = torch.logsumexp(torch.stack(row), 0) - sum(
        w * scale * (a[i] @ b[j]) for w, j in zip(q, members, strict=True)
    )
    if not symmetric:
        return rows
    column = torch.logsumexp(torch.stack([scale * (a[j] @ b[i]) for j in members]), 0)
    columns = column - sum(w * scale * (a[j] @ b[i]) for w, j in zip(q, members, strict=True))
    return (rows + columns) / 2


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
