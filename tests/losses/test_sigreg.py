"""SIGReg and LeJEPA: a slow twin, lightly with our slices, the closed form of the integral, slices that are state."""

from __future__ import annotations

import cmath
import math
from unittest import mock

import pytest
import torch
from lightly.loss import lejepa_loss

from tests.losses import view_checks as checks
from tests.losses.view_checks import build, rows, same

SMALL = {"slices": 7}


def twin(x, slices, knots=17, reach=3.0):
    """The statistic as it is written, number by number, over symmetric knots."""
    points = [reach * k / (knots - 1) for k in range(-(knots - 1), knots)]
    h = reach / (knots - 1)
    total = 0.0
    for column in (x.detach() @ slices).T.tolist():
        for k, t in enumerate(points):
            empirical = sum(cmath.exp(1j * t * value) for value in column) / len(column)
            end = 0.5 if k in (0, len(points) - 1) else 1.0
            total += end * h * abs(empirical - math.exp(-t * t / 2)) ** 2 * math.exp(-t * t / 2) * len(column)
    return total / slices.shape[1]


def test_the_statistic_is_that_of_the_slow_twin():
    loss, views = build("sigreg", weight=1.0, **SMALL), rows(9)
    slices = loss.directions(6, views[0])
    assert loss(views)["loss"].item() == pytest.approx(sum(twin(x, slices) for x in views) / 2, rel=1e-6)


def test_the_trapezoid_is_the_integral_in_closed_form():
    """Of many knots and a far range; by Gaussian integrals, as in the test of Epps and Pulley."""
    loss, (x,) = build("sigreg", weight=1.0, slices=3, knots=400, range=12.0), rows(6, views=1)
    projected = (x @ loss.directions(6, x)).T  # [slices, n]
    n = projected.shape[1]
    pairs = (projected[:, :, None] - projected[:, None, :]).square()
    closed = math.sqrt(2 * math.pi) * (-pairs / 2).exp().sum((1, 2)) / n
    closed = closed - 2 * math.sqrt(math.pi) * (-projected.square() / 4).exp().sum(1)
    closed = (closed + n * math.sqrt(2 * math.pi / 3)).mean()
    same(loss([x])["loss"], [x], closed, rtol=1e-7)


@pytest.mark.parametrize("globals_", [1, 2])
def test_trap_f8_it_is_lightlys_lejepa_on_the_same_slices(globals_):
    loss, views = build("sigreg", globals=globals_, **SMALL), rows(9, views=4)
    theirs = lejepa_loss.LeJEPALoss(sigreg_num_vectors=7).double()
    chosen = loss.directions(6, views[0])
    with mock.patch.object(lejepa_loss.SIGReg, "_generate_unit_vectors", return_value=chosen):
        expected = theirs(global_proj=torch.stack(views[:globals_]), local_proj=torch.stack(views[globals_:]))
    out = loss(views)
    same(out["loss"], views, expected, rtol=1e-6)  # their knots are float32
    assert 0.05 * out["sigreg"] + 0.95 * out["invariance"] == pytest.approx(out["loss"].item())


def test_the_factor_n_may_be_left_out():
    views = rows(9)
    a, b = (build("sigreg", weight=1.0, times_n=times, **SMALL)(views)["loss"] for times in (True, False))
    torch.testing.assert_close(a, 9 * b)


def test_a_standard_normal_is_best():
    loss = build("sigreg", weight=1.0, slices=64)
    x = torch.randn(512, 6, generator=torch.Generator().manual_seed(0))
    found = [loss([y])["loss"] for y in (x, 0.5 * x, 2 * x, x + 0.5, x.sign(), 0 * x)]
    assert 4 * found[0] < min(found[1:])


def test_trap_f13_slices_are_those_of_the_step_and_survive():
    loss, x = build("sigreg", **SMALL), torch.zeros(1)
    first = loss.directions(6, x)
    assert torch.equal(first, loss.directions(6, x))  # a second look, or another rank, sees the same
    torch.rand(5)
    loss.after_optimizer_step()
    second = loss.directions(6, x)
    assert not torch.equal(first, second)
    resumed = build("sigreg", **SMALL)
    resumed.load_state_dict(loss.state_dict())
    assert torch.equal(resumed.directions(6, x), second)
    assert not torch.equal(build("sigreg", seed=1, **SMALL).directions(6, x), first)
    torch.testing.assert_close(second.norm(dim=0), torch.ones(7))


def test_a_view_that_a_sample_lacks_is_not_in_its_mean():
    a, b, c = rows(5, views=3)
    everything, some = torch.ones(5, dtype=torch.bool), torch.tensor([True, False, True, True, False])
    loss = build("sigreg", weight=0.0, globals=2, **SMALL)
    out = loss([a, b, c], valid=[some, everything, everything])["loss"]
    total = 0.0
    for i in range(5):
        present = [a[i], b[i]] if some[i] else [b[i]]
        centre = sum(present) / len(present)
        total = total + sum((z - centre).square().sum() for z in [*present, c[i]])
    same(out, [a, b, c], total / (13 * 6))


def test_contract():
    loss = build("sigreg", **SMALL)
    assert loss.paired
    assert not build("sigreg", weight=1.0).paired
    checks.check_invalid_rows_are_never_read(loss)
    checks.check_half_precision(loss)
    checks.check_few_rows(loss, 1)
    checks.check_collapse_is_finite(loss)
    checks.check_refusals(loss)


@pytest.mark.parametrize("wrong", [{"weight": 1.5}, {"knots": 1}, {"slices": 0}, {"globals": 0}, {"range": 0.0}])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="sigreg"):
        build("sigreg", **wrong)
