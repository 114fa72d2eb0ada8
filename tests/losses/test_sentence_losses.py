"""Losses of sentence encoders: similarities to a queue, contrast with layers, information of attention."""

from __future__ import annotations

import math

import pytest
import torch

from mmrep.losses.attention import attention_information
from mmrep.losses.cross_view import cross_view
from mmrep.losses.layerwise import layerwise


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(mine, theirs, *inputs):
    torch.testing.assert_close(mine, theirs)
    for a, b in zip(torch.autograd.grad(mine, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 1e-6


def cosine(a, b):
    return a @ b / (a.norm() * b.norm())


def test_similarities_to_keys_are_compared_as_distributions():
    reference, keys = rows(4, 3), rows(5, 3, seed=1)
    student = rows(4, 3, seed=2).requires_grad_()
    mine = cross_view(reference, student, keys, reference_temperature=0.3, temperature=0.5)
    each = []
    for i in range(4):
        p = torch.stack([torch.exp(cosine(reference[i], k) / 0.3) for k in keys])
        q = torch.stack([torch.exp(cosine(student[i], k) / 0.5) for k in keys])
        p, q = p / p.sum(), q / q.sum()
        each.append(sum(p[k] * math.log(p[k]) - p[k] * torch.log(q[k]) for k in range(5)))
    same(mine.sum(), torch.stack(each).sum(), student)
    assert mine.shape == (4,)


def test_agreement_is_zero_and_the_reference_is_a_constant():
    reference = rows(4, 3).requires_grad_()
    keys = rows(5, 3, seed=1).requires_grad_()
    loss = cross_view(reference, reference.detach(), keys, reference_temperature=0.1, temperature=0.1)
    torch.testing.assert_close(loss, torch.zeros(4, dtype=torch.float64))
    assert not loss.requires_grad
    with pytest.raises(ValueError, match="m > 0"):
        cross_view(reference, reference, keys[:0], reference_temperature=0.1, temperature=0.1)


@pytest.mark.parametrize("some", [False, True])
def test_layers_of_other_samples_are_negatives_and_those_of_the_own_are_not(some):
    q, h = rows(4, 3).requires_grad_(), rows(4, 2, 3, seed=1).requires_grad_()
    chosen = torch.tensor([[1, 1], [0, 1], [1, 0], [1, 1]]).bool() if some else torch.ones(4, 2).bool()
    mine = layerwise(q, h, temperature=0.4, chosen=chosen if some else None)
    e = [[[torch.exp(cosine(q[i], h[m, k]) / 0.4) for k in range(2)] for m in range(4)] for i in range(4)]
    each = []
    for i in range(4):
        others = sum(e[i][m][k] for m in range(4) for k in range(2) if m != i and chosen[m, k])
        own = [-torch.log(e[i][i][k] / (e[i][i][k] + others)) for k in range(2) if chosen[i, k]]
        each.append(sum(own) / len(own))
    same(mine, sum(each) / 4, q, h)


def test_one_sample_has_nothing_to_be_told_from_and_none_is_no_loss():
    for n in (0, 1):
        q = rows(n, 3).requires_grad_()
        loss = layerwise(q, rows(n, 2, 3, seed=1), temperature=0.4)
        assert loss == 0
        (gradient,) = torch.autograd.grad(loss, q)
        assert not gradient.any()
    with pytest.raises(ValueError, match="keys"):
        layerwise(rows(3, 3), rows(3, 3), temperature=1.0)


def maps(seed):
    weights = rows(3, 2, 2, 4, 4, seed=seed).softmax(-1)
    weights[0, 0, 0, 1, 2] = weights[2, :, :, 0, 1] = weights[2, :, :, 1, 0] = 0  # dropped
    return weights


def test_the_information_is_that_of_the_correlation_of_log_attention():
    a, b = maps(0).requires_grad_(), maps(1).requires_grad_()
    valid = torch.ones(3, 4).bool()
    valid[1, 3] = False
    valid[2, 2:] = False  # two weights are left: always on a line
    mine = attention_information(a, b, valid)
    each = []
    for i in range(2):
        found = []
        for layer in range(2):
            for head in range(2):
                x, y = [], []
                for s in range(4):
                    for t in range(4):
                        u, v = a[i, layer, head, s, t], b[i, layer, head, s, t]
                        if valid[i, s] and valid[i, t] and u > 0 and v > 0:
                            x.append(u.log())
                            y.append(v.log())
                rho = torch.corrcoef(torch.stack([torch.stack(x), torch.stack(y)]))[0, 1]
                found.append(-0.5 * torch.log(1 - rho**2))
        each.append(sum(found) / 4)
    assert mine[2] == 0
    same(mine.sum(), sum(each), a, b)


def test_equal_maps_and_flat_ones_are_finite():
    a = maps(0).requires_grad_()
    valid = torch.ones(3, 4).bool()
    loss = attention_information(a, a.detach(), valid)
    assert loss.min() > 5
    assert loss.isfinite().all()
    flat = torch.full((3, 2, 2, 4, 4), 0.25, dtype=torch.float64, requires_grad=True)
    found = attention_information(flat, a.detach(), valid)
    assert not found.any()
    for x, out in ((a, loss), (flat, found)):
        assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()
    with pytest.raises(ValueError, match="attention is"):
        attention_information(a, a[..., :2], valid)
