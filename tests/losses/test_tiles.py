"""The tiled primitives against the whole matrix."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mmrep.losses import _logsumexp, info_nce, siglip
from mmrep.losses._logsumexp import tiled_logsumexp
from mmrep.losses._sigmoid import tiled_sigmoid_sum

SIZES = st.integers(0, 9)
TILES = st.tuples(st.integers(1, 12), st.integers(1, 12))


def leaf(*shape: int, seed: int = 0, factor: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * factor).to(dtype).requires_grad_()


def whole_logsumexp(q: Tensor, k: Tensor, scale: Tensor, same: Tensor | None = None) -> tuple[Tensor, Tensor]:
    logits = scale * q @ k.T
    logits = logits if same is None else logits.masked_fill(same, -math.inf)
    empty = logits.new_full((1,), -math.inf)  # so that an empty sum is -inf rather than an error
    rows = torch.logsumexp(torch.cat([logits, empty.expand(len(q), 1)], 1), 1)
    columns = torch.logsumexp(torch.cat([logits, empty.expand(1, len(k))], 0), 0)
    return rows, columns


def weighted(rows: Tensor, columns: Tensor) -> Tensor:
    """A scalar that weighs every finite entry differently."""
    row_weights = torch.linspace(0.3, 1.7, len(rows), dtype=rows.dtype)
    column_weights = torch.linspace(-1.1, 0.9, len(columns), dtype=columns.dtype)
    return (rows * row_weights)[rows.isfinite()].sum() + (columns * column_weights)[columns.isfinite()].sum()


@settings(max_examples=80, deadline=None)
@given(
    n=SIZES,
    m=SIZES,
    dim=st.integers(1, 5),
    tile=TILES,
    grouped=st.booleans(),
    factor=st.sampled_from([0.1, 1.0, 1000.0]),
)
def test_logsumexp_equals_the_whole_matrix(n, m, dim, tile, grouped, factor):
    q, k, scale = (
        leaf(n, dim, factor=factor),
        leaf(m, dim, seed=1),
        torch.tensor(2.5, dtype=torch.float64).requires_grad_(),
    )
    query_groups, key_groups = torch.arange(n) % 3, torch.arange(m) % 2
    groups = {"query_groups": query_groups, "key_groups": key_groups} if grouped else {}
    same = query_groups.unsqueeze(1) == key_groups if grouped else None
    expected, actual = whole_logsumexp(q, k, scale, same), tiled_logsumexp(q, k, scale, tile=tile, **groups)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    expected_grads = torch.autograd.grad(weighted(*expected), (q, k, scale), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(
        torch.autograd.grad(weighted(*actual), (q, k, scale)), expected_grads, rtol=1e-10, atol=1e-10
    )


@settings(max_examples=50, deadline=None)
@given(n=SIZES, m=SIZES, dim=st.integers(1, 5), tile=TILES, factor=st.sampled_from([0.1, 1.0, 1000.0]))
def test_sigmoid_sum_equals_the_whole_matrix(n, m, dim, tile, factor):
    q, k = leaf(n, dim, factor=factor), leaf(m, dim, seed=1)
    scale, bias = (torch.tensor(x, dtype=torch.float64).requires_grad_() for x in (2.5, -1.5))
    query_groups, key_groups = torch.arange(n) % 3, torch.arange(m) % 4
    z = 2.0 * (query_groups.unsqueeze(1) == key_groups) - 1
    expected = -F.logsigmoid(z * (scale * q @ k.T + bias)).sum()
    actual = tiled_sigmoid_sum(q, k, scale, bias, query_groups, key_groups, tile=tile)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    leaves = (q, k, scale, bias)
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("way", ["shared shift", "online"])
def test_gradcheck(way, monkeypatch):
    if way == "online":
        monkeypatch.setattr(_logsumexp, "_shared_shift", lambda logits, shift: None)
    q, k, scale = leaf(5, 3), leaf(7, 3, seed=1), leaf(seed=2)
    assert gradcheck(lambda *x: tiled_logsumexp(*x, tile=(2, 3)), (q, k, scale))
    groups = torch.arange(5) % 3, torch.arange(7) % 3
    assert gradcheck(lambda *x: tiled_sigmoid_sum(*x, *groups, tile=(2, 3)), (q, k, scale, leaf(seed=3)))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (3,)])
def test_only_some_inputs_want_a_gradient(wanted):
    q, k, scale, bias = leaf(5, 3), leaf(7, 3, seed=1), leaf(seed=2), leaf(seed=3)
    groups = torch.arange(5), torch.arange(7)
    whole = (
        torch.autograd.grad(tiled_sigmoid_sum(q, k, scale, bias, *groups, tile=(2, 3)), (q, k, scale, bias)),
        torch.autograd.grad(weighted(*tiled_logsumexp(q, k, scale, tile=(2, 3))), (q, k, scale)),
    )
    some = [x if i in wanted else x.detach() for i, x in enumerate((q, k, scale, bias))]
    leaves = [some[i] for i in wanted]
    grads = torch.autograd.grad(tiled_sigmoid_sum(*some, *groups, tile=(2, 3)), leaves)
    torch.testing.assert_close(grads, tuple(whole[0][i] for i in wanted))
    if wanted != (3,):
        grads = torch.autograd.grad(weighted(*tiled_logsumexp(*some[:3], tile=(2, 3))), leaves)
        torch.testing.assert_close(grads, tuple(whole[1][i] for i in wanted))


def test_which_way_is_taken_and_that_both_agree(monkeypatch):
    """Unit vectors at scale 100 take the shared shift, long vectors the online way; the results do not depend on it."""
    taken: list[bool] = []
    shared = _logsumexp._shared_shift

    def spy(logits, shift):
        result = shared(logits, shift)
        taken.append(result is not None)
        return result

    monkeypatch.setattr(_logsumexp, "_shared_shift", spy)
    q, k = (F.normalize(leaf(40, 8, seed=s), dim=1).float().detach().requires_grad_() for s in (0, 1))
    scale = torch.tensor(100.0)
    fast = tiled_logsumexp(q, k, scale, tile=(16, 16))
    fast_grads = torch.autograd.grad(weighted(*fast), (q, k))
    assert taken == [True]
    monkeypatch.setattr(_logsumexp, "_shared_shift", lambda logits, shift: None)
    slow = tiled_logsumexp(q, k, scale, tile=(16, 16))
    torch.testing.assert_close(fast, slow, rtol=3e-7, atol=1e-5)
    torch.testing.assert_close(fast_grads, torch.autograd.grad(weighted(*slow), (q, k)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spread", [50.0, 90.0, 120.0, 400.0, 3000.0])
def test_rows_far_apart_lose_no_digit(spread):
    """One row's logits are ``spread`` above, another's below: a shared shift would underflow one of them to -inf."""
    q = torch.tensor([[spread, 1.0], [-spread, 0.5], [0.0, 0.25]], requires_grad=True)
    k = torch.tensor([[1.0, 0.1], [1.0, 0.7], [1.0, -0.4], [-0.2, 0.3]], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    exact = [x.detach().double().requires_grad_() for x in (q, k, scale)]
    actual, expected = tiled_logsumexp(q, k, scale, tile=(2, 2)), whole_logsumexp(*exact)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=1e-6)
    grads, exact_grads = (
        torch.autograd.grad(weighted(*actual), (q, k)),
        torch.autograd.grad(weighted(*expected), exact[:2]),
    )
    for x, y in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-3, atol=2e-4 * spread)


def test_overflowing_and_nan_inputs_are_not_hidden():
    bad = torch.tensor([[float("nan"), 0.0], [1.0, 0.0]])
    assert tiled_logsumexp(bad, bad, torch.tensor(1.0))[0][0].isnan()
    zeros = torch.arange(2)
    assert tiled_sigmoid_sum(bad, bad, torch.tensor(1.0), torch.tensor(0.0), zeros, zeros).isnan()


@pytest.mark.parametrize("bias", [-60.0, -30.0, -16.0, -10.0])
def test_sigmoid_terms_far_below_one_keep_their_digits(bias):
    """softplus(-30) is 9e-14: log(1 + e^x) in float32 would give 0, and log(sigmoid) noise."""
    q, k = torch.zeros(3, 2), torch.zeros(5, 2)
    groups = torch.zeros(3, dtype=torch.int64), torch.ones(5, dtype=torch.int64)
    total = tiled_sigmoid_sum(q, k, torch.tensor(1.0), torch.tensor(bias), *groups)
    assert float(total) == pytest.approx(15 * math.log1p(math.exp(bias)), rel=1e-6)


def test_matching_pairs_far_above_one_keep_their_digits():
    """softplus(t) - t would be 0 or noise for t = 30; the sign must be applied before the softplus."""
    q, k, groups = torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    total = tiled_sigmoid_sum(q, k, torch.tensor(1.0), torch.tensor(30.0), groups, groups)
    assert float(total) == pytest.approx(9 * math.log1p(math.exp(-30)), rel=1e-6)


def test_second_derivative_is_refused():
    q, k, scale, bias = leaf(3, 2), leaf(4, 2, seed=1), leaf(seed=2), leaf(seed=3)
    for total in (
        tiled_logsumexp(q, k, scale)[0].sum(),
        tiled_sigmoid_sum(q, k, scale, bias, torch.arange(3), torch.arange(4)),
    ):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(total, q, create_graph=True)


def test_backward_twice_gives_the_same():
    q, k, scale, bias = leaf(5, 3), leaf(7, 3, seed=1), leaf(seed=2), leaf(seed=3)
    loss = tiled_sigmoid_sum(q, k, scale, bias, torch.arange(5), torch.arange(7)) + weighted(
        *tiled_logsumexp(q, k, scale)
    )
    first = torch.autograd.grad(loss, (q, k, scale), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (q, k, scale)), first, rtol=0, atol=0)


class _LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns, forward or backward."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("factor", [1.0, 1000.0], ids=["shared-shift", "online"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("loss", ["info_nce", "info_nce mask", "siglip"])
def test_no_tensor_is_larger_than_the_inputs(loss, grouped, factor):
    n, dim, tile = 512, 8, (64, 64)
    a, b = leaf(n, dim, factor=factor, dtype=torch.float32), leaf(n, dim, seed=1, factor=factor, dtype=torch.float32)
    scale, bias = torch.tensor(1.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    group = torch.arange(n) // 3 if grouped else None
    with _LargestTensor() as largest:
        if loss == "siglip":
            siglip(a, b, scale=scale, bias=bias, group=group, tile=tile).backward()
        else:
            duplicates = "mask" if "mask" in loss else "positive"
            info_nce(a, b, scale=scale, group=group, duplicates=duplicates, tile=tile).backward()
    assert a.grad is not None
    assert largest.numel <= n * dim == tile[0] * tile[1]
