"""Many-to-many retrieval: exact, tiled, and fair to ties.

Ranking metrics that count the items *strictly* above the positive give a collapsed model (every score equal) a perfect
R@1. Here every figure is the expected value under random order among equal scores, in closed form. For one query let
`b` be its best relevant score, `g` the number of items above `b`, `e` the number of items that score exactly `b`, and
`p` how many of those `e` are relevant. The first relevant item then has rank g + X, where X is the place of the first
of `p` marked cards in a shuffled deck of `e` (negative hypergeometric):

    P(X > j) = C(e - p, j) / C(e, j)      E[X] = (e + 1) / (p + 1)      P(hit at k) = 1 - C(e - p, k - g) / C(e, k - g)

A random ranking is the same formula with g = 0, e = number of items, p = number of relevant items, and that is what the
`chance_*` figures are: a collapsed model scores exactly chance.

Two notions of recall at k differ as soon as a query has several relevant items: `R@k`, the usual one in image-text
retrieval, asks whether *any* of them is among the first k; `true_recall@k` is the share of them that is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmrep.evaluate._arrays import ArrayLike, as_pair, products, spans, working_dtype
from mmrep.evaluate._relevance import Relevance


def retrieval_metrics(
    queries: ArrayLike,
    items: ArrayLike,
    relevant: Relevance | Sequence[Iterable[int]],
    ks: Sequence[int] = (1, 5, 10),
    *,
    true_recall: bool = False,
    tile: int = 2048,
) -> dict[str, float]:
    """How well the dot product finds the relevant items, beside what a random ranking would score.

    Scores are taken in fp32 (fp64 for fp64 input) in tiles of `tile` x `tile`, twice; the Q x N matrix never exists.
    For cosine similarity pass rows of unit length.

    Args:
        queries: [Q, D].
        items: [N, D].
        relevant: a `Relevance`, or for each query the indices of its relevant items.
        ks: cut-offs.
        true_recall: also report the share of the relevant items among the first k.
        tile: rows of queries and of items scored at once.

    Returns:
        Expected values under random order among ties (see the module's head):
        `R@k`: chance that any relevant item is among the first k, mean over queries, in [0, 1].
        `true_recall@k`: only with `true_recall`.
        `median_rank`: median of the rank of the first relevant item, 1 the best, over queries and over the orders of
        the tied.
        `mean_reciprocal_rank`: mean of 1 / that rank.
        `chance_*`: each of these for a random ranking with these numbers of relevant items.
        `ties`: number of queries whose best relevant item ties with an irrelevant one.
        `queries`: number of queries scored; `excluded`: number that have no relevant item and are left out; `items`: N.

    Raises:
        ValueError: on shapes that do not fit, values that are not finite, or when no query has a relevant item.
    """
    if any(k < 1 for k in ks):
        raise ValueError(f"ks must be at least 1, got {tuple(ks)}")
    counts = _count(queries, items, relevant, ks if true_recall else (), tile)
    if not len(counts.above):
        raise ValueError(f"none of the {counts.excluded} queries has a relevant item: nothing to measure")
    first = _Ranks.of(counts.above, counts.tied, counts.tied_relevant)
    chance = _Ranks.of(np.zeros_like(counts.above), np.full_like(counts.above, counts.items), counts.relevant)
    metrics: dict[str, float] = {}
    for prefix, ranks in (("", first), ("chance_", chance)):
        metrics |= {f"{prefix}R@{k}": ranks.hits(k) for k in ks}
        if true_recall:
            recalls = counts.recalls if ranks is first else {k: min(k / counts.items, 1.0) for k in ks}
            metrics |= {f"{prefix}true_recall@{k}": recalls[k] for k in ks}
        metrics[f"{prefix}median_rank"] = ranks.median(counts.items)
        metrics[f"{prefix}mean_reciprocal_rank"] = ranks.reciprocal()
    metrics["ties"] = float((counts.tied > counts.tied_relevant).sum())
    metrics["queries"] = float(len(counts.above))
    metrics["excluded"] = float(counts.excluded)
    metrics["items"] = float(counts.items)
    return metrics


def retrieval_ranks(
    queries: ArrayLike, items: ArrayLike, relevant: Relevance | Sequence[Iterable[int]], *, tile: int = 2048
) -> np.ndarray:
    """Expected rank of each query's first relevant item, g + (e + 1) / (p + 1): float64 [Q], NaN where there is none.

    With one relevant item it is the mid-rank of its tie group. Arguments as in `retrieval_metrics`.
    """
    counts = _count(queries, items, relevant, (), tile)
    ranks = np.full(len(counts.kept), np.nan)
    ranks[counts.kept] = counts.above + (counts.tied + 1) / (counts.tied_relevant + 1)
    return ranks


@torch.no_grad()
def top_k(queries: ArrayLike, items: ArrayLike, k: int, *, tile: int = 2048) -> tuple[Tensor, Tensor]:
    """The k items of largest dot product for each query, exact, best first, in tiles as `retrieval_metrics`.

    Returns:
        scores fp32 (fp64 for fp64 input) and indices int64, both [Q, min(k, N)] on the queries' device. The order among
        equal scores is not specified.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    q, x = as_pair(queries, items, ("queries", "items"))
    found = [_top_of_rows(q[rows], x, min(k, len(x)), tile) for rows in spans(len(q), tile)]
    if not found:
        shape = (0, min(k, len(x)))
        return q.new_zeros(shape, dtype=working_dtype(q, x)), torch.zeros(shape, dtype=torch.int64, device=q.device)
    return torch.cat([scores for scores, _ in found]), torch.cat([indices for _, indices in found])


def hit_probability(k: int | np.ndarray, above: np.ndarray, tied: np.ndarray, tied_relevant: np.ndarray) -> np.ndarray:
    """P(a relevant item is among the first k) = 1 - C(e - p, k - g) / C(e, k - g), for arrays of g, e, p (float64).

    The ratio is a product of min(k - g, p) factors 1 - max(k - g, p) / (e - i), summed as logarithms: ratios of
    factorials would lose the probability of one in a million.
    """
    draws = np.clip(k - above, 0, tied)
    few, many = np.minimum(draws, tied_relevant), np.maximum(draws, tied_relevant)
    result = np.where(draws > tied - tied_relevant, 1.0, 0.0)
    rows = np.flatnonzero((draws > 0) & (result == 0))
    log_miss = np.zeros(len(result))
    factor = 0
    while len(rows):
        log_miss[rows] += np.log1p(-many[rows] / (tied[rows] - factor))
        result[rows] = -np.expm1(log_miss[rows])
        factor += 1
        rows = rows[(few[rows] > factor) & (log_miss[rows] > -45)]  # exp(-45) < 2^-64: the rest cannot change the sum
    return result


@dataclass(frozen=True)
class _Ranks:
    """The first relevant rank over queries and tie orders: the distinct (g, e, p) and how often each occurs."""

    above: np.ndarray
    tied: np.ndarray
    tied_relevant: np.ndarray
    times: np.ndarray

    @classmethod
    def of(cls, above: np.ndarray, tied: np.ndarray, tied_relevant: np.ndarray) -> _Ranks:
        rows, times = np.unique(np.stack([above, tied, tied_relevant], axis=1), axis=0, return_counts=True)
        return cls(rows[:, 0], rows[:, 1], rows[:, 2], times)

    def hits(self, k: int) -> float:
        return float(
            (hit_probability(k, self.above, self.tied, self.tied_relevant) * self.times).sum() / self.times.sum()
        )

    def median(self, items: int) -> float:
        """Mean of the lower and the upper median, as numpy has it, of the pooled distribution whose CDF is `hits`."""
        slack = 1e-12

        def smallest(reached: float) -> int:
            low, high = 1, items
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if self.hits(middle) >= reached else (middle + 1, high)
            return low

        return (smallest(0.5 - slack) + smallest(0.5 + slack)) / 2

    def reciprocal(self) -> float:
        return float((self._reciprocals() * self.times).sum() / self.times.sum())

    def _reciprocals(self) -> np.ndarray:
        expected = 1.0 / (self.above + 1)
        for row in np.flatnonzero(self.tied > self.tied_relevant):
            g, e, p = int(self.above[row]), int(self.tied[row]), int(self.tied_relevant[row])
            place = np.arange(1, e - p + 2)  # X = 1 … e - p + 1, and P(X = j) = P(X > j - 1) · p / (e - j + 1)
            later = np.exp(np.concatenate([[0.0], np.cumsum(np.log1p(-p / (e - place[:-1] + 1)))]))
            expected[row] = (later * p / (e - place + 1) / (g + place)).sum()
        return expected


@dataclass(frozen=True)
class _Counts:
    kept: np.ndarray  # bool [Q]: has a relevant item; the arrays below have one entry for each of these
    above: np.ndarray
    tied: np.ndarray
    tied_relevant: np.ndarray
    relevant: np.ndarray
    items: int
    recalls: dict[int, float]

    @property
    def excluded(self) -> int:
        return int((~self.kept).sum())


@torch.no_grad()
def _count(
    queries: ArrayLike,
    items: ArrayLike,
    relevant: Relevance | Sequence[Iterable[int]],
    recall_ks: Sequence[int],
    tile: int,
) -> _Counts:
    q, x = as_pair(queries, items, ("queries", "items"))
    relevance = relevant if isinstance(relevant, Relevance) else Relevance.from_sets(relevant, len(x))
    if (relevance.queries, relevance.items) != (len(q), len(x)):
        raise ValueError(
            f"relevance is given for {relevance.queries} queries and {relevance.items} items, "
            f"but there are {len(q)} queries and {len(x)} items"
        )
    kept = relevance.counts > 0
    parts = [_count_rows(q[rows], x, relevance, rows, recall_ks, tile) for rows in spans(len(q), tile)]
    table = torch.cat(parts).cpu().numpy()[kept] if parts else np.zeros((0, 3 + len(recall_ks)))
    above, tied, tied_relevant = table[:, :3].astype(np.int64).T
    # the same tile product is compared with itself: a positive that fails to tie with its own score was not computed
    # twice alike
    assert (tied_relevant >= 1).all()
    counts = relevance.counts[kept]
    recalls = {k: float((table[:, 3 + i] / counts).mean()) for i, k in enumerate(recall_ks)} if len(table) else {}
    return _Counts(kept, above, tied, tied_relevant, counts, len(x), recalls)


def _count_rows(q: Tensor, x: Tensor, relevance: Relevance, rows: slice, recall_ks: Sequence[int], tile: int) -> Tensor:
    """g, e, p and, for each k, the expected number of relevant items in the top k: float64 [len(q), 3 + ks]."""
    dtype = working_dtype(q, x)
    deepest = min(max(recall_ks, default=0), len(x))
    best = torch.full((len(q), 1), -torch.inf, dtype=dtype, device=q.device)
    top = best.new_zeros(len(q), 0)
    for columns in spans(len(x), tile):
        scores = products(q, x[columns])
        positive = relevance.block(rows, columns, q.device)
        best = torch.maximum(best, scores.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True))
        if deepest:
            top = torch.cat([top, scores], dim=1)
            top = top.topk(min(deepest, top.shape[1]), dim=1).values
    thresholds = [best] + [top[:, [min(k, len(x)) - 1]] for k in recall_ks]
    totals = torch.zeros(len(thresholds), 4, len(q), dtype=torch.int64, device=q.device)
    for columns in spans(len(x), tile):
        scores = products(q, x[columns])
        positive = relevance.block(rows, columns, q.device)
        for total, threshold in zip(totals, thresholds, strict=True):
            higher, equal = scores > threshold, scores == threshold
            for row, chosen in zip(total, (higher, equal, equal & positive, higher & positive), strict=True):
                row += chosen.sum(dim=1)
    above, tied, tied_relevant, _ = totals[0].double()
    found = []
    for k, (higher, equal, equal_relevant, higher_relevant) in zip(recall_ks, totals[1:].double(), strict=True):
        found.append(higher_relevant + equal_relevant * ((k - higher) / equal).clamp(max=1))
    return torch.stack([above, tied, tied_relevant, *found], dim=1)


def _top_of_rows(q: Tensor, x: Tensor, k: int, tile: int) -> tuple[Tensor, Tensor]:
    scores = torch.zeros(len(q), 0, dtype=working_dtype(q, x), device=q.device)
    indices = torch.zeros(len(q), 0, dtype=torch.int64, device=q.device)
    for columns in spans(len(x), tile):
        block = products(q, x[columns])
        values, places = block.topk(min(k, block.shape[1]), dim=1)
        scores, indices = torch.cat([scores, values], dim=1), torch.cat([indices, places + columns.start], dim=1)
        scores, order = scores.topk(min(k, scores.shape[1]), dim=1)
        indices = indices.gather(1, order)
    return scores, indices
