"""VICReg: lightly's value and gradient, the terms alone, more views, missing rows, half precision."""

from __future__ import annotations

import pytest
import torch
from lightly.loss import VICRegLoss

from tests.losses import view_checks as checks
from tests.losses.view_checks import build, rows, same


def test_two_views_are_lightlys():
    """Coefficients of another code (a variance that is not halved, a covariance over D (D - 1)) would differ."""
    views = rows(12)
    views = [(0.5 * x).detach().requires_grad_() for x in views]  # columns below the hinge have a gradient
    same(build("vicreg")(views)["loss"], views, VICRegLoss()(*views))
    theirs = VICRegLoss(lambda_param=2.0, mu_param=3.0, nu_param=4.0)
    same(build("vicreg", invariance=2.0, variance=3.0, covariance=4.0)(views)["loss"], views, theirs(*views))


def test_of_three_views_it_is_the_mean_over_pairs():
    views = rows(9, views=3)
    loss = build("vicreg")
    pairs = [loss([views[i], views[j]])["loss"] for i, j in ((0, 1), (0, 2), (1, 2))]
    same(loss(views)["loss"], views, torch.stack(pairs).mean())


def test_against_collapse_alone_each_view_is_a_set_of_its_own():
    """The term of VJ-VCR: no row is compared, numbers of rows and widths may differ."""
    loss, (a, _) = build("vicreg", invariance=0.0, variance=1.0, covariance=1.0), rows(12)
    assert not loss.paired
    assert build("vicreg").paired
    c = torch.randn(5, 3, dtype=torch.float64)
    parts = [loss([x])["loss"] for x in (a, c)]
    torch.testing.assert_close(loss([a, c])["loss"], torch.stack(parts).mean())
    half = (0.1 * a.detach()).requires_grad_()
    std = (half.var(0) + 1e-4).sqrt()
    C = torch.cov(half.T)
    covariance = 2 * (C.square().sum() - C.diagonal().square().sum()) / 6
    same(loss([half])["loss"], [half], (1 - std).relu().mean() + covariance)


def test_a_row_that_one_view_lacks_still_spreads_the_other():
    a, b = rows(9)
    keep = torch.arange(9) < 6
    out = build("vicreg")([a, b], valid=[torch.ones(9, dtype=torch.bool), keep])
    torch.testing.assert_close(out["invariance"], (a - b)[:6].square().mean().detach())
    alone = build("vicreg", invariance=0.0)
    expected = (alone([a])["loss"] + alone([b[:6]])["loss"]) / 2 + 25 * out["invariance"]
    torch.testing.assert_close(out["loss"], expected)


def test_a_large_mean_costs_no_digit():
    views = rows(12)
    loss = build("vicreg", invariance=0.0)
    far = [(x.detach() + 1000).float() for x in views]
    near = [(x - 1000) for x in far]  # exact
    torch.testing.assert_close(loss(far)["loss"], loss(near)["loss"], rtol=1e-4, atol=0)


def test_contract():
    loss = build("vicreg")
    checks.check_invalid_rows_are_never_read(loss)
    checks.check_half_precision(loss)
    checks.check_few_rows(build("vicreg", invariance=0.0), 2)
    checks.check_few_rows(loss, 1)
    checks.check_collapse_is_finite(loss)
    checks.check_refusals(loss)


@pytest.mark.parametrize("wrong", [{"invariance": -1.0}, {"eps": 0.0}, {"target": 0.0}])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="vicreg"):
        build("vicreg", **wrong)
