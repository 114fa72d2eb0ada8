"""Losses of points and relations: value and gradient against loops, on one process and on several, and their traps."""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn import functional as F

from mmrep.losses import distillation
from mmrep.losses._dominance import violations
from mmrep.losses.distillation import pointwise, relational
from mmrep.training.collectives import world
from tests.ranks import run_ranks

N = 7
SHARES = {2: [4, 3], 3: [5, 0, 2]}
KINDS = ("similarity", "similarity-mse", "distance", "angle", "rank")


def huber(a, b):
    gap = (a - b).abs()
    return 0.5 * gap**2 if gap < 1 else gap - 0.5


def twin(student, teacher, kind, temperature=0.1, margin=0.015):
    """Written out, one term at a time."""
    n = len(student)
    s, t = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    total = student.sum() * 0
    if kind == "cosine":
        return sum(1 - s[i] @ t[i] for i in range(n)) / n
    if kind == "mse":
        return sum(((student[i] - teacher[i]) ** 2).sum() for i in range(n)) / n
    if kind == "similarity":
        for i in range(n):
            others = [j for j in range(n) if j != i]
            q = torch.stack([s[i] @ s[j] for j in others]).div(temperature).softmax(0)
            p = torch.stack([t[i] @ t[j] for j in others]).div(temperature).softmax(0)
            total = total + (p * (p / q).log()).sum() / n
    elif kind == "similarity-mse":
        total = sum((s[i] @ s[j] - t[i] @ t[j]) ** 2 for i in range(n) for j in range(n)) / n**2
    elif kind == "distance":
        pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
        ds = torch.stack([(student[i] - student[j]).norm() for i, j in pairs])
        dt = torch.stack([(teacher[i] - teacher[j]).norm() for i, j in pairs])
        total = sum(huber(a, b) for a, b in zip(ds / ds.mean(), dt / dt.mean(), strict=True)) / n**2
    elif kind == "angle":

        def cosine(x, i, j, k):
            return F.normalize(x[i] - x[j], dim=0) @ F.normalize(x[k] - x[j], dim=0)

        triples = [(i, j, k) for i in range(n) for j in range(n) for k in range(n) if j not in (i, k)]
        total = sum(huber(cosine(student, *x), cosine(teacher, *x)) for x in triples) / n**3
    elif kind == "rank":
        pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
        terms = [
            (margin - torch.sign(t[i] @ t[j] - t[k] @ t[m]) * (s[i] @ s[j] - s[k] @ s[m])).clamp_min(0)
            for i, j in pairs for k, m in pairs if (i, j) != (k, m)
        ]  # fmt: skip
        total = torch.stack(terms).mean()
    return total


def pair(seed=0, width=4):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(N, 4, generator=generator, dtype=torch.float64).requires_grad_()
    return student, torch.randn(N, width, generator=generator, dtype=torch.float64).requires_grad_()


def loss(kind, student, teacher, **options):
    function = pointwise if kind in ("cosine", "mse") else relational
    return function(student, teacher, kind, **options)


@pytest.mark.parametrize("kind", ["cosine", "mse", *KINDS])
def test_value_and_gradient_equal_the_loops(kind):
    student, teacher = pair(width=4 if kind in ("cosine", "mse") else 6)
    found, expected = loss(kind, student, teacher), twin(student, teacher.detach(), kind)
    torch.testing.assert_close(found, expected)
    mine, theirs = (torch.autograd.grad(x, student)[0] for x in (found, expected))
    torch.testing.assert_close(mine, theirs)
    assert mine.abs().max() > 1e-3
    with pytest.raises(RuntimeError, match="to not have been used"):
        torch.autograd.grad(loss(kind, student, teacher), teacher)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_zero_for_the_same_relations_whatever_the_width(kind):
    student, _ = pair()
    turned = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64))[0].T  # isometric into six dimensions
    teacher = 3.0 * student.detach() @ turned
    found = relational(student, teacher, kind, margin=0.0)
    assert found.abs().item() < 1e-12


def test_blocks_change_nothing(monkeypatch):
    student, teacher = pair(width=6)
    whole = torch.autograd.grad(relational(student, teacher, "angle"), student)[0]
    monkeypatch.setattr(distillation, "_BLOCK", 60)
    parts = torch.autograd.grad(relational(student, teacher, "angle"), student)[0]
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.7])
def test_ranks_with_ties_of_the_teacher_equal_the_loops_at_any_margin(margin):
    student, _ = pair(seed=3)
    teacher = torch.eye(4, dtype=torch.float64)[[0, 1, 2, 0, 1, 0, 3]]  # of some, products are rounded to nothing else
    found, expected = relational(student, teacher, "rank", margin=margin), twin(student, teacher, "rank", margin=margin)
    torch.testing.assert_close(found, expected)
    mine, theirs = (torch.autograd.grad(x, student)[0] for x in (found, expected))
    torch.testing.assert_close(mine, theirs)


def test_trap_equal_rows_of_the_teacher_are_ties_however_their_products_are_rounded():
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):  # products of so few rows are rounded by their place
        teacher = torch.randn(3, 384, generator=generator)[torch.arange(9) // 3]
        student = torch.randn(9, 8, generator=generator)
        swapped = student.reshape(3, 3, 8).flip(1).reshape(9, 8)  # among those that have one teacher
        found, same = (relational(x, teacher, "rank", margin=0.0) for x in (student, swapped))
        torch.testing.assert_close(found, same, rtol=1e-5, atol=0)


def test_pairs_of_pairs_are_counted_as_a_loop_counts_them_whatever_ties():
    """Also where `own - margin` and `own + margin` round to different sides: a pair counts for both members."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(20):
        own = (torch.randint(0, 12, (40,), generator=generator) / 10).float()
        wanted = torch.randint(0, 3 + 2 * trial, (40,), generator=generator).float()
        mine = torch.arange(40)[trial % 3 :: 2]
        found = violations(own, wanted, 0.1, mine)
        bad = (wanted[:, None] > wanted) & (own > (own - 0.1)[:, None])
        ties = (wanted[:, None] == wanted).sum(1) - 1
        for one, expected in zip(found, (bad.sum(1), bad.sum(0), ties), strict=True):
            assert one.tolist() == expected[mine].tolist()


def test_ranks_of_five_hundred_rows_take_no_time():
    """All 4e9 pairs of pairs: a loop over them is minutes."""
    teacher = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    begin = time.process_time()
    found = relational(teacher, teacher, "rank", margin=0.0)
    assert time.process_time() - begin < 5
    assert found < 1e-7


@pytest.mark.parametrize("kind", ["cosine", "mse", *KINDS])
def test_few_rows_equal_rows_and_short_formats_give_no_nan(kind):
    for n in (0, 1, 2):
        student = torch.randn(n, 4).requires_grad_()
        found = loss(kind, student, torch.randn(n, 4))
        found.backward()
        assert found.isfinite()
        assert found.ndim == 0
    same = torch.ones(5, 4).requires_grad_()
    loss(kind, same, torch.ones(5, 4)).backward()
    assert same.grad.isfinite().all()
    half = torch.randn(5, 4).bfloat16()
    assert loss(kind, half, half).dtype == torch.float32


def test_trap_the_direction_between_equal_points_is_not_the_noise_of_rounding():
    student = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    teacher = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    teacher[3] = teacher[1]
    exact = relational(student, teacher, "angle")
    teacher[3] += 3e-7 * torch.randn(6, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(relational(student, teacher, "angle"), exact, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="in one space"):
        pointwise(torch.ones(3, 4), torch.ones(3, 5), "cosine")
    with pytest.raises(ValueError, match="the same rows"):
        relational(torch.ones(3, 4), torch.ones(2, 4), "angle")


def on_ranks():
    here = world()
    start = sum(SHARES[here.size][: here.rank])
    rows = slice(start, start + SHARES[here.size][here.rank])
    out = {}
    for kind in ("cosine", "mse", *KINDS):
        student, teacher = pair()
        found = loss(kind, student[rows], teacher[rows], world=here)
        (gradient,) = torch.autograd.grad(found, student, allow_unused=True)
        gradient = torch.zeros_like(student) if gradient is None else gradient
        total = here.sum(found.detach().reshape(1)) / here.size
        out[kind] = [total.tolist(), (here.sum(gradient) / here.size).tolist()]
    return out


@pytest.mark.parametrize("size", sorted(SHARES))
def test_many_processes_with_unequal_shares_find_what_one_finds(size, tmp_path):
    for report in run_ranks(on_ranks, size, tmp_path):
        for kind, (value, gradient) in report.items():
            student, teacher = pair()
            expected = loss(kind, student, teacher)
            torch.testing.assert_close(torch.tensor(value, dtype=torch.float64)[0], expected.detach())
            (wanted,) = torch.autograd.grad(expected, student)
            torch.testing.assert_close(torch.tensor(gradient, dtype=torch.float64), wanted, msg=kind)
