"""Distance correlation: value and gradient against loops, on one process and on several, and what it is for."""

from __future__ import annotations

import pytest
import torch

from mmrep.losses.distance_correlation import distance_correlation
from mmrep.training.collectives import world
from tests.ranks import run_ranks

N = 7
SHARES = {2: [4, 3], 3: [5, 0, 2]}


def pair(n=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    z = torch.randn(n, 3, generator=generator, dtype=torch.float64) + x[:, :3] ** 2
    return x, z.requires_grad_()


def twin(x, z):
    """Written out from the definition."""
    n, centred = len(x), []
    for v in (x, z):
        d = [[(v[i] - v[j]).norm() if i != j else v.new_zeros(()) for j in range(n)] for i in range(n)]
        rows = [sum(d[i]) / n for i in range(n)]
        columns = [sum(d[i][j] for i in range(n)) / n for j in range(n)]
        whole = sum(rows) / n
        centred.append([[d[i][j] - rows[i] - columns[j] + whole for j in range(n)] for i in range(n)])
    a, b = centred
    both, of_x, of_z = (
        sum(p[i][j] * q[i][j] for i in range(n) for j in range(n)) / n**2 for p, q in ((a, b), (a, a), (b, b))
    )
    return (both / (of_x * of_z).sqrt()).sqrt()


def test_value_and_gradient_equal_the_definition():
    x, z = pair()
    found, expected = distance_correlation(x, z), twin(x, z)
    torch.testing.assert_close(found, expected)
    mine, theirs = (torch.autograd.grad(value, z)[0] for value in (found, expected))
    torch.testing.assert_close(mine, theirs)
    assert mine.abs().max() > 1e-3


def test_it_is_one_of_the_same_up_to_scale_and_rotation_and_sees_what_no_line_does():
    x, _ = pair(40)
    turned = torch.linalg.qr(torch.randn(6, 5, dtype=torch.float64))[0].T
    assert distance_correlation(x, 3 * x @ turned - 1).item() == pytest.approx(1)
    line = torch.linspace(-1, 1, 60, dtype=torch.float64)[:, None]
    assert torch.corrcoef(torch.cat([line, line**2], 1).T)[0, 1].abs() < 1e-9
    noise = torch.rand(60, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert distance_correlation(line, line**2) > 1.3 * distance_correlation(line, noise)


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_rows_that_are_all_alike_or_few_have_none_and_no_nan(n):
    for x, z in ((torch.randn(n, 4), torch.ones(n, 3)), (torch.ones(n, 4), torch.randn(n, 3)),
                 (torch.randn(n, 4), torch.randn(n, 3)[: n // 2].repeat_interleave(2, 0))):  # fmt: skip
        if len(x) != len(z):
            continue
        z.requires_grad_()
        found = distance_correlation(x, z)
        found.backward()
        assert found.isfinite()
        assert z.grad.isfinite().all()
    same = distance_correlation(torch.randn(n, 4), torch.ones(n, 3))
    assert same == 0
    assert distance_correlation(torch.randn(4, 2).bfloat16(), torch.randn(4, 2).bfloat16()).dtype == torch.float32


def test_other_rows_are_refused():
    with pytest.raises(ValueError, match=r"of the same samples, got \(3, 2\) and \(4, 2\)"):
        distance_correlation(torch.ones(3, 2), torch.ones(4, 2))


def on_ranks():
    here = world()
    start = sum(SHARES[here.size][: here.rank])
    rows = slice(start, start + SHARES[here.size][here.rank])
    x, z = pair()
    found = distance_correlation(x[rows], z[rows], world=here)
    (gradient,) = torch.autograd.grad(found, z)
    return [found.item(), (here.sum(gradient) / here.size).tolist()]


@pytest.mark.parametrize("size", sorted(SHARES))
def test_many_processes_find_what_one_finds(size, tmp_path):
    x, z = pair()
    expected = distance_correlation(x, z)
    (wanted,) = torch.autograd.grad(expected, z)
    for value, gradient in run_ranks(on_ranks, size, tmp_path):
        assert value == pytest.approx(expected.item(), rel=1e-12)
        torch.testing.assert_close(torch.tensor(gradient, dtype=torch.float64), wanted)
