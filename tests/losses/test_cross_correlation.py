"""Cross-correlation: its slow twin, lightly's Barlow Twins, blocks, missing rows, too few rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrep.losses.cross_correlation import cross_correlation_loss
from tests.losses.test_infonce import assert_same, unit
from tests.losses.tuple_twins import cross_correlation_twin


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 9),
    common=st.integers(0, 6),
    share=st.sampled_from([None, 0.0, 0.5, 0.9]),
    redundancy=st.sampled_from([5e-3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_twin(n, common, share, redundancy, seed):
    a, b = unit(n, seed=seed), unit(n, seed=seed + 1)
    valid = None if share is None else torch.rand(n, generator=torch.Generator().manual_seed(seed)) < share
    poison = 0 if valid is None else torch.where(valid, 0.0, math.nan).unsqueeze(1)
    out = cross_correlation_loss(a + poison, b + poison, common=common, redundancy=redundancy, valid=valid)
    expected = cross_correlation_twin(a, b, common, redundancy, valid)
    assert_same(out["common"] + 3 * out["unique"], expected[0] + 3 * expected[1], [a, b], rtol=1e-9)
    assert out["n"].item() == (n if valid is None else valid.sum())


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_all_columns_common_is_lightlys_barlow_twins(shift):
    losses = pytest.importorskip("lightly.loss")
    a, b = unit(32, 8), unit(32, 8, seed=1)
    expected = losses.BarlowTwinsLoss(lambda_param=5e-3)(a + shift, 2 * b)
    out = cross_correlation_loss(a + shift, 2 * b)
    assert out["unique"] == 0
    assert_same(out["common"], expected, [a, b], rtol=1e-9)


def test_trap_f6_the_variance_is_the_biased_one():
    """Of two rows, standardised columns are +1 and -1, so that the correlations are too."""
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    out = cross_correlation_loss(a, a, redundancy=1.0, eps=0.0)
    assert out["common"].item() == pytest.approx(2.0)  # no error on the diagonal; -1 beside it, twice


@pytest.mark.parametrize("rows", [0, 1])
def test_of_fewer_than_two_rows_there_is_no_correlation(rows):
    a, b = unit(4), unit(4, seed=1)
    out = cross_correlation_loss(a, b, common=3, valid=torch.arange(4) < rows)
    total = out["common"] + out["unique"]
    assert total.item() == 0
    assert out["n"].item() == rows
    for grad in torch.autograd.grad(total, [a, b]):
        assert torch.equal(grad, torch.zeros_like(a))


def test_unique_columns_are_pushed_apart_and_the_mixed_blocks_left_alone():
    a = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    same = cross_correlation_loss(a, a, common=2, redundancy=1e-9)
    assert same["common"].item() == pytest.approx(0, abs=1e-6)
    assert same["unique"].item() == pytest.approx(2, rel=1e-4)
    swapped = cross_correlation_loss(a, a[:, [2, 3, 0, 1]], common=2, redundancy=1.0)
    assert swapped["unique"] < 0.3  # what correlates is common here and unique there


def test_a_constant_column_and_a_large_mean_stay_finite():
    a = unit(16, 4, dtype=torch.float32)
    b = a.detach() + 1000.0
    b[:, 0] = 7.0
    out = cross_correlation_loss(a, b)
    (grad,) = torch.autograd.grad(out["common"], [a])
    assert out["common"].isfinite()
    assert grad.isfinite().all()
    exact = cross_correlation_loss(a.detach().double(), b.double())["common"]
    assert out["common"].item() == pytest.approx(exact.item(), rel=1e-4)


def test_trap_3_4d_low_precision_is_cast_before_the_product():
    a, b = (unit(32, 8, seed=s, dtype=torch.bfloat16).detach().requires_grad_() for s in (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = cross_correlation_loss(a, b)["common"]
        grads = torch.autograd.grad(out, (a, b))
    exact = [x.detach().float().requires_grad_() for x in (a, b)]
    expected = cross_correlation_loss(*exact)["common"]
    assert out.dtype == torch.float32
    assert out.item() == expected.item()
    for grad, whole in zip(grads, torch.autograd.grad(expected, exact), strict=True):
        assert torch.equal(grad, whole.to(torch.bfloat16))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="number of the 6 columns, got 7"):
        cross_correlation_loss(unit(3), unit(3), common=7)
    with pytest.raises(ValueError, match="paired rows of one shape"):
        cross_correlation_loss(unit(3), unit(4))
