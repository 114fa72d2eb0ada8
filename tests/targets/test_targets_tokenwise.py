"""The losses of one token against torch's, or against loops."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmrep.losses.tokenwise import LOSSES

N, K = 5, 6


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow(name, p, t, o):
    """One token at a time, the observed figures alone."""
    p, t = p[o], t[o]
    if not len(p):
        return p.sum()
    if name == "mse":
        return F.mse_loss(p, t)
    if name == "l1":
        return F.l1_loss(p, t)
    if name == "smooth-l1":
        return F.smooth_l1_loss(p, t)
    cosine = 1 - (p @ t) / (p.norm() * t.norm())
    return cosine if name == "cosine" else cosine**3


def both(value, other, *leaves):
    """The same value, and the same gradient in each leaf."""
    torch.testing.assert_close(value, other)
    weights = torch.arange(1.0, value.numel() + 1, dtype=value.dtype).view(value.shape)
    mine = torch.autograd.grad((value * weights).sum(), leaves, retain_graph=True)
    twins = torch.autograd.grad((other * weights).sum(), leaves)
    for a, b in zip(mine, twins, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["mse", "l1", "smooth-l1", "cosine", "sce"])
@pytest.mark.parametrize("gaps", [False, True])
def test_losses_of_figures_equal_a_loop_over_what_was_observed(name, gaps):
    p, t = (2 * numbers(N, K)).requires_grad_(), (2 * numbers(N, K, seed=1)).requires_grad_()
    observed = torch.ones(N, K, dtype=torch.bool)
    if gaps:
        observed = numbers(N, K, seed=2) > -0.5
        observed[2] = False
    twin = torch.stack([slow(name, p[i], t[i], observed[i]) for i in range(N)])
    both(LOSSES[name](p, t, observed if gaps else None), twin, p, t)


@pytest.mark.parametrize("name", ["mse", "l1", "smooth-l1", "cosine", "sce"])
def test_what_was_not_observed_may_be_anything_and_a_token_of_nothing_costs_nothing(name):
    p, t = numbers(3, K).requires_grad_(), numbers(3, K, seed=1)
    observed = torch.ones(3, K, dtype=torch.bool)
    observed[0, 2:4], observed[1] = False, False
    loss = LOSSES[name](p, t.masked_fill(~observed, torch.nan), observed)
    torch.testing.assert_close(loss, LOSSES[name](p, t, observed))
    assert loss[1] == 0
    (gradient,) = torch.autograd.grad(loss.sum(), p)
    assert gradient.isfinite().all()
    assert (gradient[~observed] == 0).all()


@pytest.mark.parametrize("name", ["mse", "l1", "smooth-l1", "cosine", "sce", "chamfer"])
@pytest.mark.parametrize("target", ["equal", "zero", "both zero"])
def test_gradients_are_finite_where_vectors_or_points_coincide(name, target):
    p = numbers(3, K).float()
    p = torch.zeros_like(p) if target == "both zero" else p
    t = p.clone() if target == "equal" else torch.zeros_like(p)
    p.requires_grad_()
    loss = LOSSES[name](p, t, None)
    (gradient,) = torch.autograd.grad(loss.sum(), p)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    if target == "equal":
        torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["sce", "cosine"])
def test_cosines_with_codes_are_those_with_one_hot_vectors(name):
    p, codes = numbers(N, K).requires_grad_(), torch.tensor([0, 5, 2, 2, 1])
    vectors = F.one_hot(codes, K).double()
    both(LOSSES[name](p, codes), torch.stack([slow(name, p[i], vectors[i], ...) for i in range(N)]), p)
    observed = torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(LOSSES[name](p, codes, observed), LOSSES[name](p, codes) * observed)


def test_cross_entropy_takes_codes_several_codebooks_and_probabilities():
    logits = numbers(N, 4).requires_grad_()
    codes = torch.tensor([0, 3, 2, 1, 1])
    both(LOSSES["cross-entropy"](logits, codes, None), F.cross_entropy(logits, codes, reduction="none"), logits)
    observed = torch.tensor([True, False, True, True, False])
    twin = torch.stack([-logits[i].log_softmax(0)[codes[i]] * observed[i] for i in range(N)])
    both(LOSSES["cross-entropy"](logits, codes, observed), twin, logits)

    wide = numbers(N, 3 * 4, seed=3).requires_grad_()  # three codebooks of four codes, codebook by codebook
    several = torch.randint(0, 4, (N, 3), generator=torch.Generator().manual_seed(0))
    twin = torch.stack([
        sum(-wide[i, 4 * c : 4 * c + 4].log_softmax(0)[several[i, c]] for c in range(3)) / 3 for i in range(N)
    ])  # fmt: skip
    both(LOSSES["cross-entropy"](wide, several, None), twin, wide)
    seen = torch.tensor([[True, True, False]] * (N - 1) + [[False] * 3])
    twin = torch.stack([
        sum(-wide[i, 4 * c : 4 * c + 4].log_softmax(0)[several[i, c]] * seen[i, c] for c in range(3))
        / max(int(seen[i].sum()), 1)
        for i in range(N)
    ])  # fmt: skip
    both(LOSSES["cross-entropy"](wide, several, seen), twin, wide)

    soft = numbers(N, 4, seed=4).softmax(-1)
    both(LOSSES["cross-entropy"](logits, soft, None), -(soft * logits.log_softmax(-1)).sum(-1), logits)


@pytest.mark.parametrize("count", [4, 2, 0])
def test_chamfer_equals_a_loop_over_points(count):
    p, t = numbers(2, 9).requires_grad_(), numbers(2, 12, seed=1)
    observed = (torch.arange(4) < count).repeat_interleave(3).expand(2, 12)

    def one(a, b):
        if not len(b):
            return a.sum() * 0
        forth = sum(min(((x - y) ** 2).sum() for y in b) for x in a) / len(a)
        return forth + sum(min(((x - y) ** 2).sum() for x in a) for y in b) / len(b)

    twin = torch.stack([one(p[i].view(3, 3), t[i].view(4, 3)[:count]) for i in range(2)])
    both(LOSSES["chamfer"](p, t, observed), twin, p)
    if count == 4:
        torch.testing.assert_close(LOSSES["chamfer"](p, t, None), twin)


def test_no_token_is_no_loss():
    for name, loss in LOSSES.items():
        target = torch.zeros(0, dtype=torch.long) if name == "cross-entropy" else torch.zeros(0, K)
        assert loss(torch.zeros(0, K), target, None).shape == (0,)
