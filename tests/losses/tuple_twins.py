"""Slow twins of the tuple losses: the equations read off the page, loops over tuples, on one process."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor


def members(x: list[Tensor], valid: Tensor | None) -> list[int]:
    return [i for i in range(len(x[0])) if valid is None or bool(valid[i].all())]


def same(group: Tensor | None, i: int, j: int) -> bool:
    return i == j or (group is not None and bool(group[i] == group[j]))


def nothing(x: list[Tensor], scale: Tensor) -> Tensor:
    return 0 * (sum(y.nan_to_num().sum() for y in x) + scale.sum())


def volume(vectors: list[Tensor]) -> Tensor:
    rows = torch.stack(vectors)
    return torch.linalg.det(rows @ rows.T).sqrt()


def area(vectors: list[Tensor]) -> Tensor:
    a, b, c = vectors
    u, v = a - b, a - c
    return ((u @ u) * (v @ v) - (u @ v) ** 2).sqrt() / 2


def twice_squared_area(vectors: list[Tensor]) -> Tensor:
    return 2 * area(vectors) ** 2


def measure_twin(x, scale, group=None, valid=None, anchor=None, measure=volume) -> Tensor:
    """GRAM and TRIANGLE: both directions of a contrast by a measure of the anchor i and the rest of tuple j."""
    rows = members(x, valid)
    turns = range(len(x)) if anchor is None else [anchor]
    terms = [nothing(x, scale)]
    for turn in turns:

        def logit(i, j, turn=turn):
            return -scale * measure([x[turn][i], *[y[j] for k, y in enumerate(x) if k != turn]])

        for i in rows:
            others = [j for j in rows if j == i or not same(group, i, j)]
            row = torch.logsumexp(torch.stack([logit(i, j) for j in others]), 0)
            column = torch.logsumexp(torch.stack([logit(j, i) for j in others]), 0)
            terms.append(((row - logit(i, i)) + (column - logit(i, i))) / 2)
    return torch.stack([t.reshape(()) for t in terms]).sum() / (max(len(rows), 1) * len(turns))


def symile_twin(x, scale, group=None, valid=None, anchor=None, choices=None) -> Tensor:
    """``choices``: for an anchor field, lists of places among the valid tuples, one for each other; None = all."""
    rows = members(x, valid)
    turns = range(len(x)) if anchor is None else [anchor]
    terms = [nothing(x, scale)]
    for turn in turns:
        rest = [y for k, y in enumerate(x) if k != turn]
        picked = product(range(len(rows)), repeat=len(rest)) if choices is None else choices(turn, len(rows))
        picked = [[rows[place] for place in places] for places in picked]
        for i in rows:

            def logit(places, i=i, turn=turn, rest=rest):
                value = x[turn][i]
                for y, j in zip(rest, places, strict=True):
                    value = value * y[j]
                return scale * value.sum()

            wrong = [places for places in picked if not all(same(group, i, j) for j in places)]
            positive = logit([i] * len(rest))
            total = torch.logsumexp(torch.stack([positive, *[logit(places) for places in wrong]]), 0)
            terms.append(total - positive)
    return torch.stack([t.reshape(()) for t in terms]).sum() / (max(len(rows), 1) * len(turns))


def centroid_twin(x, scale, group=None, valid=None, anchor=None, duplicates="positive") -> Tensor:
    has = torch.ones(len(x[0]), len(x), dtype=torch.bool) if valid is None else valid
    terms = [nothing(x, scale)]
    for k in range(len(x)) if anchor is None else [anchor]:
        rows = [i for i in range(len(x[0])) if has[i, k] and has[i].sum() >= 2]
        centres = {}
        for i in rows:
            mean = torch.stack([x[m][i] for m in range(len(x)) if m != k and has[i, m]]).mean(0)
            centres[i] = mean / mean.norm()
        for i in rows:
            friends = [j for j in rows if same(group, i, j)]
            others = [j for j in rows if duplicates == "positive" or j == i or j not in friends]
            for p in friends if duplicates == "positive" else [i]:
                share = 1 / (2 * (len(friends) if duplicates == "positive" else 1))
                row = torch.logsumexp(torch.stack([scale * x[k][i] @ centres[j] for j in others]), 0)
                column = torch.logsumexp(torch.stack([scale * x[k][j] @ centres[i] for j in others]), 0)
                terms.append(share * (row - scale * x[k][i] @ centres[p] + column - scale * x[k][p] @ centres[i]))
    count = sum(
        int(has[i, k] and has[i].sum() >= 2)
        for i in range(len(x[0]))
        for k in (range(len(x)) if anchor is None else [anchor])
    )
    return torch.stack([t.reshape(()) for t in terms]).sum() / max(count, 1)


def cross_correlation_twin(a, b, common, redundancy, valid=None, eps=1e-5) -> tuple[Tensor, Tensor]:
    """Common and unique part."""
    rows = [i for i in range(len(a)) if valid is None or valid[i]]
    if len(rows) < 2:
        return (0 * (a.nan_to_num().sum() + b.nan_to_num().sum()),) * 2
    a, b = (torch.stack([x[i] for i in rows]) for x in (a, b))
    width, loss = a.shape[1], [a.sum() * 0, a.sum() * 0]

    def standard(x, column):
        return (x[:, column] - x[:, column].mean()) / (x[:, column].var(correction=0) + eps).sqrt()

    for i in range(width):
        for j in range(width):
            if (i < common) != (j < common):
                continue
            c = (standard(a, i) * standard(b, j)).mean()
            if i != j:
                loss[i >= common] = loss[i >= common] + redundancy * c**2
            else:
                loss[i >= common] = loss[i >= common] + (c - (1 if i < common else 0)) ** 2
    return loss[0], loss[1]
