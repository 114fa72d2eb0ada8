"""SigLIP's loss against its slow twin and open_clip."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrep.losses import SigLIP, siglip
from tests.losses.test_infonce import assert_same, number, unit
from tests.losses.twins import siglip_twin


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 8),
    extra=st.sampled_from([None, 0, 1, 3]),
    groups=st.sampled_from([None, 1, 2, 4, 100]),
    share_valid=st.sampled_from([None, 0.0, 0.5, 1.0]),
    scale=st.sampled_from([1.0, 14.3, 112.33]),
    bias=st.sampled_from([-16.0, -10.0, 0.0, 3.0]),
    exchange=st.sampled_from(["gather", "ring"]),
    tile=st.tuples(st.integers(1, 10), st.integers(1, 10)),
    seed=st.integers(0, 1000),
)
def test_equals_the_twin(n, extra, groups, share_valid, scale, bias, exchange, tile, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b, s, t = unit(n, seed=seed), unit(n, seed=seed + 1), number(scale), number(bias)
    negatives = None if extra is None else unit(extra, seed=seed + 2)
    group = None if groups is None else torch.randint(-groups, groups, (n,), generator=generator)
    valid = None if share_valid is None else torch.rand(n, generator=generator) < share_valid
    options = {"negatives": negatives, "group": group, "valid": valid}
    leaves = [a, b, s, t] if negatives is None else [a, b, s, t, negatives]
    assert_same(
        siglip(a, b, scale=s, bias=t, exchange=exchange, tile=tile, **options),
        siglip_twin(a, b, s, t, **options),
        leaves,
    )


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (112.33, -16.5), (1.0, 0.0)])
@pytest.mark.parametrize("n", [1, 2, 33])
def test_equals_open_clip(n, scale, bias):
    loss = pytest.importorskip("open_clip.loss").SigLipLoss()
    a, b, s, t = unit(n), unit(n, seed=1), number(scale), number(bias)
    expected = loss(a, b, s, t)
    assert expected.dtype == torch.float64
    assert_same(siglip(a, b, scale=s, bias=t, tile=(8, 16)), expected, [a, b, s, t])


def test_trap_3_3c_the_bias_is_added_once():
    """At scale 0 the loss is known: n matching and n * (n - 1) other pairs, all with the bias as logit."""
    n, bias = 5, -2.0
    expected = (n * math.log1p(math.exp(-bias)) + n * (n - 1) * math.log1p(math.exp(bias))) / n
    assert siglip(unit(n), unit(n, seed=1), scale=0.0, bias=bias).item() == pytest.approx(expected, rel=1e-12)


def test_trap_3_8b_nothing_valid_is_zero_with_zero_gradients():
    leaves = [unit(4), unit(4, seed=1), unit(2, seed=2), number(10.0), number(-10.0)]
    a, b, negatives, s, t = leaves
    loss = siglip(a, b, scale=s, bias=t, negatives=negatives, valid=torch.zeros(4, dtype=torch.bool))
    assert loss.item() == 0.0
    for x, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


def test_trap_3_8d_missing_rows_are_no_negatives_and_are_never_read():
    a, b, s, t = unit(6), unit(6, seed=1), number(10.0), number(-3.0)
    valid = torch.tensor([True, False, True, True, False, True])
    poison = torch.where(valid, 0.0, math.nan).unsqueeze(1)
    loss = siglip(a + poison, b + poison, scale=s, bias=t, valid=valid)
    assert_same(loss, siglip(a[valid], b[valid], scale=s, bias=t), [a, b, s, t])


def test_trap_3_4d_low_precision_is_cast_before_the_product():
    a, b = (unit(64, 32, seed=s, dtype=torch.bfloat16).detach().requires_grad_() for s in (0, 1))
    s, t = number(100.0, torch.float32), number(-10.0, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = siglip(a, b, scale=s, bias=t)
        grads = torch.autograd.grad(loss, (a, b, s, t))
    exact = [x.detach().float().requires_grad_() for x in (a, b, s, t)]
    expected = siglip(exact[0], exact[1], scale=exact[2], bias=exact[3])
    assert loss.dtype == torch.float32
    assert loss.item() == expected.item()
    for grad, x, whole in zip(grads, (a, b, s, t), torch.autograd.grad(expected, exact), strict=True):
        assert torch.equal(grad, whole.to(x.dtype))


def test_component():
    a, b, s, t = unit(6), unit(6, seed=1), number(10.0), number(-10.0)
    group, valid = torch.tensor([0, 0, 1, 1, 2, 3]), torch.tensor([True, True, True, False, True, True])
    for config in (SigLIP.Config(), SigLIP.Config(exchange="ring")):
        parts = SigLIP(config)(a, b, scale=s, bias=t, group=group, valid=valid)
        assert_same(parts["loss"], siglip_twin(a, b, s, t, None, group, valid), [a, b, s, t])
        assert parts["n"].item() == 5
    with pytest.raises(ValueError, match="'gather' or 'ring', got 'rings'"):
        SigLIP.Config(exchange="rings")
    assert SigLIP.needs_bias
    with pytest.raises(ValueError, match="needs a bias"):
        SigLIP(SigLIP.Config())(a, b, scale=s)
