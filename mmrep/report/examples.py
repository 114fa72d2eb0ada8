"""Retrievals to look at: right and wrong ones, drawn at random and not picked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmrep.evaluate.retrieval import Relevance, retrieval_ranks, top_k
from mmrep.report.data import PairSet
from mmrep.report.thumbnails import Shown, Viewer

EACH = 4
DEPTH = 5


@dataclass(frozen=True)
class Hit:
    """One retrieved item: its place from 1 on, dot product (as in the evaluation), and whether it answers the query."""

    place: int
    score: float
    right: bool
    shown: Shown


@dataclass(frozen=True)
class Example:
    """A query, its five best items, and the answer: the best relevant item, its score and expected rank."""

    query: Shown
    hits: list[Hit]
    answer: Shown
    score: float
    rank: float
    right: bool


@dataclass(frozen=True)
class Direction:
    """Examples from one field to another.

    Attributes:
        query_field: what is asked with.
        item_field: what is searched.
        right: examples whose first item is relevant. wrong: examples whose first item is not.
        queries: number of queries. items: number of items searched. first: number of queries answered at rank 1.
    """

    query_field: str
    item_field: str
    right: list[Example]
    wrong: list[Example]
    queries: int
    items: int
    first: int

    @property
    def groups(self) -> list[tuple[str, str, list[Example]]]:
        """Key, heading and examples of the right and the wrong ones."""
        return [("right", "Right: the first item answers the query", self.right),
                ("wrong", "Wrong: another item comes first", self.wrong)]  # fmt: skip


def examples(pairs: PairSet, viewer: Viewer, seed: int = 0) -> list[Direction]:
    """Examples in both directions. An item is relevant if it has the query's group (or is of the same sample)."""
    left, right = pairs.fields
    return [_direction(pairs, viewer, left, right, seed), _direction(pairs, viewer, right, left, seed)]


def _direction(pairs: PairSet, viewer: Viewer, query_field: str, item_field: str, seed: int) -> Direction:
    encoded = pairs.encoded
    groups = np.array(encoded.groups(), dtype=object)
    items = np.flatnonzero(encoded.present[item_field])
    asked = np.flatnonzero(encoded.present[query_field])
    known = set(groups[items])
    asked = asked[[group in known for group in groups[asked]]]
    x, y = encoded.embeddings[query_field][asked], encoded.embeddings[item_field][items]
    ranks = retrieval_ranks(x, y, Relevance.from_groups(list(groups[asked]), list(groups[items])))
    order = np.random.default_rng(seed).permutation(len(asked))
    right = _distinct([int(n) for n in order if ranks[n] == 1], groups[asked])
    wrong = _distinct([int(n) for n in order if ranks[n] > 1], groups[asked])

    def made(query: int) -> Example:
        scores = y @ x[query]
        relevant = groups[items] == groups[asked[query]]
        best = int(np.argmax(np.where(relevant, scores, -np.inf)))
        return Example(
            query=viewer.show(int(asked[query]), query_field),
            hits=_hits(x[query], y, relevant, items, viewer, item_field),
            answer=viewer.show(int(items[best]), item_field),
            score=float(scores[best]),
            rank=float(ranks[query]),
            right=bool(ranks[query] == 1),
        )

    return Direction(
        query_field=query_field,
        item_field=item_field,
        right=[made(n) for n in right],
        wrong=[made(n) for n in wrong],
        queries=len(asked),
        items=len(items),
        first=int((ranks == 1).sum()),
    )


def _hits(
    query: NDArray[np.float32], items: NDArray[np.float32], relevant: NDArray[np.bool_], index: NDArray[np.int64],
    viewer: Viewer, field: str,
) -> list[Hit]:  # fmt: skip
    scores, places = top_k(query[None], items, DEPTH)
    return [
        Hit(place, float(score), bool(relevant[n]), viewer.show(int(index[n]), field))
        for place, (score, n) in enumerate(zip(scores[0].tolist(), places[0].tolist(), strict=True), 1)
    ]


def _distinct(queries: list[int], groups: NDArray[np.object_]) -> list[int]:
    """The first few, no two of one group."""
    seen: dict[object, int] = {}
    for query in queries:
        seen.setdefault(groups[query], query)
        if len(seen) == EACH:
            break
    return list(seen.values())
