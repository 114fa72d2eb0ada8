"""Retrieval against enumeration of every order of the tied, Monte Carlo, torchmetrics, and a collapsed model."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrep.evaluate import Relevance, retrieval_metrics, retrieval_ranks, top_k
from mmrep.evaluate.retrieval import hit_probability

KS = (1, 2, 4)
KEYS = ("median_rank", "mean_reciprocal_rank", *(f"{name}@{k}" for name in ("R", "true_recall") for k in KS))


def orders(scores: np.ndarray, relevant: set[int]) -> list[list[bool]]:
    """Relevance down the ranking, for every order of the items that the scores allow."""
    permutations = itertools.permutations(range(len(scores)))
    return [[i in relevant for i in p] for p in permutations if all(np.diff(scores[list(p)]) <= 0)]


def slow(scores: np.ndarray, relevant: list[set[int]]) -> dict[str, float]:
    """Every figure, by writing down all rankings. Each query has the same weight whatever its number of orders."""
    out: dict[str, list[float]] = {key: [] for key in KEYS}
    ranks, weights = [], []
    for row, wanted in zip(scores, relevant, strict=True):
        if not wanted:
            continue
        rankings = orders(row, wanted)
        first = [ranking.index(True) + 1 for ranking in rankings]
        ranks += first
        weights += [math.factorial(len(row)) // len(first)] * len(first)  # whole numbers: n! / orders always is one
        out["mean_reciprocal_rank"].append(float(np.mean([1 / r for r in first])))
        for k in KS:
            out[f"R@{k}"].append(float(np.mean([any(ranking[:k]) for ranking in rankings])))
            out[f"true_recall@{k}"].append(float(np.mean([sum(ranking[:k]) / len(wanted) for ranking in rankings])))
    out["median_rank"] = [float(np.median(np.repeat(ranks, weights)))]
    return {key: float(np.mean(values)) for key, values in out.items()}


def fast(scores: np.ndarray, relevant: list[set[int]], tile: int = 2) -> dict[str, float]:
    """Scores as given: the items are the axes."""
    return retrieval_metrics(scores, np.eye(scores.shape[1]), relevant, ks=KS, true_recall=True, tile=tile)


@st.composite
def tied_problems(draw):
    n = draw(st.integers(1, 6))
    levels = draw(st.integers(1, 4))
    rows = draw(st.lists(st.lists(st.integers(0, levels - 1), min_size=n, max_size=n), min_size=1, max_size=4))
    wanted = [draw(st.sets(st.integers(0, n - 1), min_size=row == 0)) for row in range(len(rows))]
    return np.array(rows, dtype=np.float32), wanted, draw(st.integers(1, 7))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tied_problems())
def test_every_figure_is_the_mean_over_all_orders_of_the_tied(problem):
    scores, relevant, tile = problem
    got, want = fast(scores, relevant, tile), slow(scores, relevant)
    assert {key: got[key] for key in KEYS} == pytest.approx(want, abs=1e-12)
    assert got["excluded"] == sum(not wanted for wanted in relevant)
    assert got["queries"] == sum(bool(wanted) for wanted in relevant)
    # a random ranking is the same problem with all scores equal
    chance = slow(np.zeros_like(scores), relevant)
    assert {key: got[f"chance_{key}"] for key in KEYS} == pytest.approx(chance, abs=1e-12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tied_problems())
def test_ranks_are_expected_first_ranks_and_ties_are_counted(problem):
    scores, relevant, tile = problem
    got = retrieval_ranks(scores, np.eye(scores.shape[1]), relevant, tile=tile)
    ties = 0
    for rank, row, wanted in zip(got, scores, relevant, strict=True):
        if not wanted:
            assert np.isnan(rank)
            continue
        first = [ranking.index(True) + 1 for ranking in orders(row, wanted)]
        assert rank == pytest.approx(np.mean(first), abs=1e-12)
        ties += any(row[i] == max(row[list(wanted)]) for i in range(len(row)) if i not in wanted)
    assert fast(scores, relevant, tile)["ties"] == ties


def test_quantised_scores_agree_with_random_tie_breaking():
    rng = np.random.default_rng(0)
    queries, items = rng.integers(-1, 2, (60, 6)).astype(np.float32), rng.integers(-1, 2, (90, 6)).astype(np.float32)
    relevant = [set(rng.choice(90, size=rng.integers(1, 5), replace=False).tolist()) for _ in range(60)]
    scores, rounds = queries @ items.T, 400
    hits = np.zeros((rounds, len(KS)))
    reciprocal = np.zeros(rounds)
    for r in range(rounds):
        for row, wanted in zip(scores, relevant, strict=True):
            order = np.lexsort((rng.random(90), -row))
            first = int(np.flatnonzero(np.isin(order, list(wanted)))[0]) + 1
            hits[r] += [first <= k for k in KS]
            reciprocal[r] += 1 / first
    got = retrieval_metrics(queries, items, relevant, ks=KS, tile=32)
    assert got["ties"] > 40
    for i, k in enumerate(KS):  # four standard errors
        assert abs(got[f"R@{k}"] - hits[:, i].mean() / 60) < 4 * hits[:, i].std() / 60 / math.sqrt(rounds)
    assert abs(got["mean_reciprocal_rank"] - reciprocal.mean() / 60) < 4 * reciprocal.std() / 60 / math.sqrt(rounds)


def test_a_collapsed_model_scores_chance():
    same = np.ones((50, 4))
    for relevant in (Relevance.paired(50), Relevance.from_groups(np.arange(50) % 7, np.arange(50) % 7)):
        got = retrieval_metrics(same, same, relevant, true_recall=True, tile=16)
        for key in [key for key in got if f"chance_{key}" in got]:
            assert got[key] == pytest.approx(got[f"chance_{key}"], rel=1e-12), key
        assert got["ties"] == 50
    paired = retrieval_metrics(same, same, Relevance.paired(50), tile=16)
    assert paired["R@1"] == pytest.approx(1 / 50)
    assert paired["R@10"] == pytest.approx(10 / 50)
    assert paired["median_rank"] == 25.5


def test_a_collapsed_model_with_rounding_noise_in_the_product_still_scores_chance():
    """The edge of a tile may be rounded otherwise than its middle; then the equal are not quite equal."""
    same = torch.randn(1, 129, generator=torch.Generator().manual_seed(0)).expand(203, -1)
    got = retrieval_metrics(same, same, Relevance.paired(203), tile=48)
    assert got["R@1"] == pytest.approx(1 / 203, rel=1e-9)
    assert got["R@10"] == pytest.approx(10 / 203, rel=1e-9)


@pytest.mark.parametrize("tile", [1, 7, 64, 4096])
def test_tiles_do_not_change_the_figures(tile):
    rng = np.random.default_rng(1)
    queries, items = rng.integers(-2, 3, (33, 5)).astype(np.float32), rng.integers(-2, 3, (71, 5)).astype(np.float32)
    groups = rng.integers(0, 9, 33), rng.integers(0, 9, 71)
    whole = retrieval_metrics(queries, items, Relevance.from_groups(*groups), true_recall=True, tile=100)
    assert retrieval_metrics(queries, items, Relevance.from_groups(*groups), true_recall=True, tile=tile) == whole


def test_the_forms_of_relevance_agree():
    rng = np.random.default_rng(2)
    queries, items = rng.normal(size=(20, 4)), rng.normal(size=(30, 4))
    left, right = rng.integers(0, 6, 20), rng.integers(0, 5, 30)
    sets = [np.flatnonzero(right == g).tolist() for g in left]
    flat = np.cumsum([0] + [len(s) for s in sets]), np.concatenate(sets)
    forms = [
        Relevance.from_groups(left, right),
        Relevance.from_groups(torch.from_numpy(left), torch.from_numpy(right)),
        Relevance.from_groups([f"g{g}" for g in left], [f"g{g}" for g in right]),
        Relevance.from_groups([None if g == 5 else int(g) for g in left], [int(g) for g in right]),
        Relevance.from_sets([[*s, *s] for s in sets], 30),
        Relevance.from_csr(*flat, 30),
        sets,
    ]
    results = [retrieval_metrics(queries, items, form, true_recall=True, tile=8) for form in forms]
    assert all(result == results[0] for result in results)
    assert results[0]["excluded"] == sum(not s for s in sets) > 0
    unknown = Relevance.from_groups([None, "a"], [None, "a"])
    assert unknown.counts.tolist() == [0, 1]
    assert unknown.block(slice(0, 2), slice(0, 2), torch.device("cpu")).tolist() == [[False, False], [False, True]]


def test_any_positive_and_true_recall_differ_as_soon_as_there_are_several():
    got = fast(np.array([[4.0, 3.0, 2.0, 1.0]]), [{0, 3}])
    assert (got["R@1"], got["true_recall@1"], got["true_recall@2"], got["true_recall@4"]) == (1.0, 0.5, 0.5, 1.0)


def test_torchmetrics_agrees_where_nothing_ties():
    retrieval = pytest.importorskip("torchmetrics.functional.retrieval")
    g = torch.Generator().manual_seed(3)
    queries, items = torch.randn(12, 6, generator=g), torch.randn(25, 6, generator=g)
    target = torch.rand(12, 25, generator=g) < 0.15
    target[:, 4] = True
    got = retrieval_metrics(queries, items, [row.nonzero().flatten().tolist() for row in target], true_recall=True)
    scores = queries @ items.T
    # torchmetrics' reciprocal rank takes no item of score 0 or less for relevant: lift them all above
    rows = list(zip(scores - scores.min() + 1, target, strict=True))

    def mean(function, **kwargs):
        return float(torch.stack([function(s, t, **kwargs) for s, t in rows]).mean())

    assert got["ties"] == 0
    for k in (1, 5, 10):
        assert got[f"R@{k}"] == pytest.approx(mean(retrieval.retrieval_hit_rate, top_k=k), abs=1e-6)
        assert got[f"true_recall@{k}"] == pytest.approx(mean(retrieval.retrieval_recall, top_k=k), abs=1e-6)
    assert got["mean_reciprocal_rank"] == pytest.approx(mean(retrieval.retrieval_reciprocal_rank), abs=1e-6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 30), st.integers(1, 60), st.data())
def test_hit_probability_is_the_hypergeometric(g, e, data):
    p, k = data.draw(st.integers(1, e)), data.draw(st.integers(1, 100))
    draws = min(max(k - g, 0), e)
    want = 1 - math.comb(e - p, draws) / math.comb(e, draws)
    got = hit_probability(k, np.array([g]), np.array([e]), np.array([p]))[0]
    assert got == pytest.approx(want, abs=1e-13)


def test_hit_probability_keeps_its_digits_among_millions():
    got = hit_probability(3, np.array([0, 2, 0]), np.array([10**7, 10**7, 10**7]), np.array([1, 1, 4 * 10**6]))
    assert got == pytest.approx([3e-7, 1e-7, 1 - 0.6**3], rel=1e-6)
    assert got[:2] == pytest.approx([3e-7, 1e-7], rel=1e-12)


def test_half_precision_is_cast_before_the_product_and_autocast_is_kept_out():
    """In bf16 the two items tie (1 + 1/256 rounds to 1); their fp32 products do not."""
    queries = torch.tensor([[1.0, 2**-8]], dtype=torch.bfloat16)
    items = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = retrieval_metrics(queries, items, [[0]])
        scores, _ = top_k(queries.float(), items.float(), 1)
    assert (got["R@1"], got["ties"]) == (1.0, 0.0)
    assert scores.dtype == torch.float32
    assert scores.item() == 1 + 2**-8


def test_the_whole_matrix_is_never_built(monkeypatch):
    from mmrep.evaluate import retrieval

    sizes = []
    real = retrieval.products
    monkeypatch.setattr(retrieval, "products", lambda a, b: sizes.append(real(a, b).numel()) or real(a, b))
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    retrieval_metrics(x, x, Relevance.paired(300), true_recall=True, tile=32)
    top_k(x, x, 5, tile=32)
    assert max(sizes) == 32 * 32


@pytest.mark.parametrize(("k", "tile"), [(1, 7), (5, 3), (40, 7), (100, 16)])
def test_top_k_is_the_sorted_full_product(k, tile):
    rng = np.random.default_rng(4)
    queries, items = rng.normal(size=(11, 6)), rng.normal(size=(40, 6))
    scores, indices = top_k(queries, items, k, tile=tile)
    full = queries @ items.T
    want = np.argsort(-full, axis=1)[:, :k]
    np.testing.assert_array_equal(indices.numpy(), want)
    np.testing.assert_allclose(scores.numpy(), np.take_along_axis(full, want, axis=1))
    assert [t.shape for t in top_k(queries[:0], items, k)] == [(0, min(k, 40))] * 2


@pytest.mark.parametrize(
    ("queries", "items", "relevant", "kwargs", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), [[0], [1]], {}, "queries have 3 dimensions and items 4"),
        (np.ones((2, 3)), np.ones((2, 3)), [[0], [2]], {}, "relevant item 2 does not exist: there are 2 items"),
        (np.ones((2, 3)), np.ones((2, 3)), [[0]], {}, "1 queries and 2 items, but there are 2 queries"),
        (np.ones((2, 3)), np.ones((2, 3)), [[], []], {}, "none of the 2 queries has a relevant item"),
        (np.array([[1.0], [np.nan]]), np.ones((2, 1)), [[0], [1]], {}, "queries has NaN .* first at row 1"),
        (np.ones(3), np.ones((2, 3)), [[0]], {}, r"shape \[rows, dim\]"),
        (np.ones((1, 3)), np.ones((2, 3)), [[0]], {"ks": (0,)}, "ks must be at least 1"),
        (np.ones((1, 3)), np.ones((2, 3)), [[0]], {"tile": 0}, "tile must be at least 1"),
    ],
)
def test_mistakes_are_named(queries, items, relevant, kwargs, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(queries, items, relevant, **kwargs)


def test_bad_csr_is_named():
    with pytest.raises(ValueError, match="indptr must rise from 0 to 2"):
        Relevance.from_csr([0, 2, 1], [0, 1], 3)
