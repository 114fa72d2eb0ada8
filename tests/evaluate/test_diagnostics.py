"""Diagnostics against plain loops, closed forms, and the traps they are known for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmrep.evaluate import alignment, dimension_spread, effective_rank, modality_gap, uniformity


def rows(seed, n, d):
    return np.random.default_rng(seed).normal(size=(n, d))


def unit(x):
    return np.stack([row / math.sqrt(sum(v * v for v in row)) for row in x])


def slow_rank(x, eps):
    sigma = np.sqrt(np.clip(np.linalg.eigvalsh(x.T @ x), 0, None))
    total = 0.0
    for s in sigma:
        p = s / sigma.sum() + eps
        total -= p * math.log(p)
    return math.exp(total)


@pytest.mark.parametrize("eps", [1e-7, 1e-3])
def test_effective_rank_is_the_exponential_of_the_entropy(eps):
    x = rows(0, 50, 7) * np.array([5, 3, 1, 1, 1, 0.1, 0.01]) + 2
    assert effective_rank(x, center=False, eps=eps) == pytest.approx(slow_rank(x, eps), rel=1e-9)
    assert effective_rank(x, eps=eps) == pytest.approx(slow_rank(x - x.mean(0), eps), rel=1e-9)


def test_effective_rank_of_known_spectra():
    assert effective_rank(np.eye(8), center=False) == pytest.approx(8, rel=1e-4)
    line = np.outer(np.arange(10.0), np.ones(6))
    assert effective_rank(line) == pytest.approx(1, rel=1e-4)


def test_a_constant_offset_does_not_hide_the_rank_unless_asked():
    basis = np.linalg.qr(rows(1, 128, 16))[0].T
    x = rows(2, 2000, 16) @ basis
    assert 15.5 < effective_rank(x) < 16.5
    assert effective_rank(x + 50) == pytest.approx(effective_rank(x), rel=1e-9)
    assert effective_rank(x + 50, center=False) < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_collapse_with_rounding_noise_has_rank_zero(dtype):
    g = torch.Generator().manual_seed(0)
    row = torch.randn(1, 32, generator=g)
    noise = 1 + torch.finfo(dtype).eps * (torch.rand(200, 32, generator=g) - 0.5)
    assert effective_rank((row * noise).to(dtype)) == 0.0
    assert effective_rank((row + 0.3 * torch.randn(200, 32, generator=g)).to(dtype)) > 20


def test_modality_gap_is_the_distance_of_the_centroids():
    x, y = rows(0, 20, 5), rows(1, 31, 5) + 1
    a, b = unit(x), unit(y)
    want = math.dist([sum(a[:, j]) / 20 for j in range(5)], [sum(b[:, j]) / 31 for j in range(5)])
    assert modality_gap(x, y) == pytest.approx(want, abs=1e-12)
    assert modality_gap(x, 7 * x) == pytest.approx(0, abs=1e-12)
    assert modality_gap([[1.0, 0.0]], [[-3.0, 0.0]]) == pytest.approx(2)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_alignment_is_the_mean_distance_of_pairs(alpha):
    x, y = rows(0, 20, 5), rows(1, 20, 5)
    want = np.mean([math.dist(a, b) ** alpha for a, b in zip(unit(x), unit(y), strict=True)])
    assert alignment(x, y, alpha=alpha) == pytest.approx(want, rel=1e-12)
    assert alignment(x, x * 3) == pytest.approx(0, abs=1e-20)
    with pytest.raises(ValueError, match="20 and 19 rows"):
        alignment(x, y[:19])


@pytest.mark.parametrize(("t", "tile"), [(2.0, 4), (2.0, 100), (0.5, 7), (500.0, 7)])
def test_uniformity_is_the_log_mean_over_distinct_rows(t, tile):
    x = rows(0, 23, 4)
    u = unit(x)
    terms = [-t * math.dist(u[i], u[j]) ** 2 for i in range(23) for j in range(i)]
    want = max(terms) + math.log(sum(math.exp(v - max(terms)) for v in terms) / len(terms))
    assert uniformity(x, t=t, tile=tile) == pytest.approx(want, rel=1e-9)


def test_uniformity_of_a_collapse_and_of_the_sphere():
    assert uniformity(np.ones((9, 3))) == pytest.approx(0, abs=1e-6)
    assert uniformity(rows(0, 400, 512)) == pytest.approx(-4, abs=0.05)


def test_spread_is_one_on_the_sphere_and_zero_in_a_collapse():
    x = rows(0, 40, 6)
    u = unit(x)
    want = [math.sqrt(sum((v - sum(c) / 40) ** 2 for v in c) / 40) * math.sqrt(6) for c in u.T]
    got = dimension_spread(x)
    assert got == pytest.approx({"mean": np.mean(want), "min": min(want), "max": max(want), "dead": 0.0})
    assert dimension_spread(rows(0, 5000, 64))["mean"] == pytest.approx(1, abs=0.02)
    assert dimension_spread(np.ones((9, 4))) == pytest.approx({"mean": 0, "min": 0, "max": 0, "dead": 1}, abs=1e-7)
    x[:, 2] = 0
    assert dimension_spread(x)["dead"] == pytest.approx(1 / 6)


@pytest.mark.parametrize("measure", [effective_rank, uniformity, dimension_spread])
def test_too_few_rows_are_refused(measure):
    with pytest.raises(ValueError, match="needs 2 rows"):
        measure(np.ones((1, 3)))
