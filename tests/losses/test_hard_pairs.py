"""Supervised contrast and mixed hard pairs against loops over rows and classes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmrep.losses.hard_pairs import mix_hard_pairs, supervised_contrast

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 3])  # 2 and 3 have no other of their class


def rows(seed, n=7, d=5):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def slow_contrast(z, focal, temperature, positive=None, negative=None, found=None):
    losses = []
    for i in range(len(z)):
        near, far = [], []
        for j in range(len(z)):
            if j != i:
                (near if LABELS[j] == LABELS[i] else far).append(torch.exp(z[i] @ z[j] / temperature))
        if positive is not None and (found is None or found[i]):
            near.append(torch.exp(z[i] @ positive[i] / temperature))
            far.append(torch.exp(z[i] @ negative[i] / temperature))
        if near:
            p = [x / sum([*near, *far]) for x in near]
            losses.append(-sum((1 - q if focal else 1) * q.log() for q in p) / len(p))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("focal", [True, False])
@pytest.mark.parametrize("pair", ["none", "all", "some"])
def test_the_contrast_is_a_loop_over_anchors_and_positives(focal, pair):
    given = [rows(seed) for seed in (0, 1, 2)]
    z, positive, negative = (F.normalize(x, dim=1) for x in given)
    found = torch.tensor([True, False, True, True, True, True, False]) if pair == "some" else None
    more = {} if pair == "none" else {"positive": positive, "negative": negative, "found": found}
    ours = supervised_contrast(z, LABELS, focal=focal, temperature=0.3, **more)
    theirs = slow_contrast(z, focal, 0.3, **more)
    torch.testing.assert_close(ours, theirs)
    used = given if more else given[:1]
    gradients = (torch.autograd.grad(loss, used, retain_graph=True) for loss in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 1e-3


def test_without_focus_it_is_the_supervised_contrast_of_pytorch_metric_learning():
    theirs = pytest.importorskip("pytorch_metric_learning.losses").SupConLoss(temperature=0.2)
    z = F.normalize(rows(0), dim=1)
    torch.testing.assert_close(
        supervised_contrast(z, LABELS, focal=False, temperature=0.2), theirs(z, LABELS), rtol=1e-6, atol=1e-6
    )


def test_one_class_alone_and_one_row_alone_give_no_nan():
    x = rows(0, 1)
    loss = supervised_contrast(F.normalize(x, dim=1), LABELS[:1])
    assert loss == 0
    loss.backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_hard_pairs_are_the_farthest_of_the_class_and_the_nearest_of_the_others_mixed():
    x = rows(3)
    shares = torch.rand(7, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    choice = torch.tensor([0.0, 0.999, 0.5, 0.3, 0.1, 0.7, 0.2])
    found = mix_hard_pairs(x, LABELS, shares, choice, floor=0.6)
    unit = F.normalize(x, dim=1)
    assert found.found.all()
    for i in range(7):
        like = [j for j in range(7) if j != i and LABELS[j] == LABELS[i]]
        unlike = [j for j in range(7) if LABELS[j] != LABELS[i]]
        p = min(like, key=lambda j: unit[i] @ unit[j]) if like else i
        q = max(unlike, key=lambda j: unit[i] @ unit[j])
        r, s, t = unlike[int(float(choice[i]) * len(unlike))], shares[i, 0], shares[i, 1].clamp_min(0.6)
        torch.testing.assert_close(found.positive[i], s * x[p] + (1 - s) * x[q])
        torch.testing.assert_close(found.negative[i], t * x[r] + (1 - t) * x[i])
        assert found.positive_kinds[i].tolist() == [LABELS[p], LABELS[q]]
        assert found.negative_kinds[i].tolist() == [LABELS[r], LABELS[i]]
        torch.testing.assert_close(torch.stack([found.positive_share[i], found.negative_share[i]]), torch.stack([s, t]))
    assert set(found.negative_share.tolist()) & {0.6}  # the floor is felt
    (gradient,) = torch.autograd.grad(found.positive.sum(), [x])
    assert gradient.abs().max() > 0


def test_a_batch_of_one_class_has_no_hard_pairs():
    assert not mix_hard_pairs(rows(0, 3), LABELS[[0, 2, 5]], torch.rand(3, 2), torch.rand(3)).found.any()
