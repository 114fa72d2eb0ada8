"""Pools and projectors: masks, positions, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from mmrep.config import component
from mmrep.tokens import Encoding, Grid, Tokens


def encoding(valid, special=None, pooled=None):
    valid = torch.tensor(valid)
    special = torch.zeros_like(valid) if special is None else torch.tensor(special)
    B, N = valid.shape
    values = torch.arange(1.0, B * N * 2 + 1).view(B, N, 2)
    return Encoding(Tokens(values, Grid.sequence(valid, special)), pooled=pooled)


def pool(name, width=2, **fields):
    return component("pools", name, **fields).build(width)


def test_mean_pool_ignores_padding():
    e = encoding([[True, True, False], [True, False, False]])
    v = e.tokens.values
    assert torch.equal(pool("mean")(e), torch.stack([v[0, :2].mean(0), v[1, 0]]))


def test_mean_pool_leaves_special_tokens_out_when_asked():
    e = encoding([[True, True, True]], [[True, False, False]])
    assert torch.equal(pool("mean", special=False)(e)[0], e.tokens.values[0, 1:].mean(0))
    assert torch.equal(pool("mean")(e)[0], e.tokens.values[0].mean(0))


def test_mean_pool_of_nothing_is_zero_not_nan():
    assert torch.equal(pool("mean")(encoding([[False, False]])), torch.zeros(1, 2))


def test_cls_pool_takes_the_class_token_and_refuses_an_encoder_without_one():
    e = encoding([[True, True]], [[True, False]])
    assert torch.equal(pool("cls")(e)[0], e.tokens.values[0, 0])
    with pytest.raises(ValueError, match="use pool 'mean'"):
        pool("cls")(encoding([[True, True]]))


def test_last_pool_takes_the_last_valid_token():
    e = encoding([[True, True, False], [True, True, True]])
    assert torch.equal(pool("last")(e), torch.stack([e.tokens.values[0, 1], e.tokens.values[1, 2]]))


def test_eos_pool_takes_the_last_special_token_and_never_position_zero_without_one():
    # cross-modal.md 3.6c: a search by token id silently returned position 0
    e = encoding([[True, True, True, False], [True, True, True, False]], [[True, False, True, False], [False] * 4])
    assert torch.equal(pool("eos")(e), torch.stack([e.tokens.values[0, 2], e.tokens.values[1, 2]]))


def test_native_pool_returns_the_encoders_own_and_refuses_its_absence():
    own = torch.ones(1, 2)
    assert pool("native")(encoding([[True]], pooled=own)) is own
    with pytest.raises(ValueError, match="no pooled output of its own"):
        pool("native")(encoding([[True]]))


def test_attention_pool_ignores_padding():
    torch.manual_seed(0)
    head = pool("attention", heads=1)
    e = encoding([[True, True, False]])
    changed = Encoding(Tokens(e.tokens.values.clone().index_fill(1, torch.tensor([2]), 99.0), e.tokens.grid))
    assert torch.allclose(head(e), head(changed))
    with pytest.raises(ValueError, match="does not divide"):
        pool("attention", heads=3)


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_projectors_map_width_to_dim_and_reach_every_parameter(name):
    made = component("projectors", name).build(5, 3)
    made(torch.randn(4, 5)).sum().backward()
    assert made(torch.randn(4, 5)).shape == (4, 3)
    assert all(p.grad is not None for p in made.parameters())


def test_identity_projector_refuses_another_width():
    x = torch.randn(2, 3)
    assert component("projectors", "identity").build(3, 3)(x) is x
    with pytest.raises(ValueError, match=r"width \(4\) to equal model.dim \(3\)"):
        component("projectors", "identity").build(4, 3)


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_a_standardised_projection_is_centred_and_uses_every_dimension(name):
    torch.manual_seed(0)
    projector = component("projectors", name, standardize=True).build(6, 4)
    features = torch.randn(64, 6) * 3 + 10
    out = projector(features)
    torch.testing.assert_close(out.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.std(0, correction=0), torch.ones(4), rtol=1e-3, atol=0)
    for _ in range(200):
        projector(features)
    torch.testing.assert_close(projector.eval()(features), out, rtol=0.05, atol=0.05)
