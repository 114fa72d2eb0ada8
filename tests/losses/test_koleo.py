"""KoLeo: lightly's value and gradient, views by themselves, duplicates in half precision, missing rows."""

from __future__ import annotations

import pytest
import torch
from lightly.loss import KoLeoLoss

from tests.losses import view_checks as checks
from tests.losses.view_checks import build, gradients, rows, same


def test_one_view_is_lightlys():
    (x,) = rows(12, views=1)
    same(build("koleo")([x])["loss"], [x], KoLeoLoss()(x))


def test_views_are_looked_at_one_by_one():
    """Over both at once, the nearest neighbour of a row would be its own other view."""
    views = rows(12)
    out = build("koleo")(views)["loss"]
    same(out, views, (KoLeoLoss()(views[0]) + KoLeoLoss()(views[1])) / 2)
    assert abs(out - KoLeoLoss()(torch.cat(views))) > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_trap_f10_duplicates_are_finite(dtype):
    x = rows(8, views=1)[0].detach().to(dtype)
    x[[3, 7]] = x[5].clone()  # of two the slopes would cancel
    x.requires_grad_()
    out = build("koleo")([x])["loss"]
    (gradient,) = gradients(out, [x])
    assert out.isfinite()
    assert gradient.isfinite().all()
    alone = gradient.float().abs().amax(1)
    assert alone[0] > 0
    assert float(gradient.float().abs().max()) < 100  # 1e8 with the formula as published


def test_near_duplicates_keep_their_slope():
    x = rows(8, views=1)[0].detach()
    x[3] = x[5] * 1.01 + 1e-3 * torch.arange(6)
    x.requires_grad_()
    same(build("koleo")([x])["loss"], [x], KoLeoLoss()(x), rtol=1e-6)


def test_contract():
    loss = build("koleo")
    assert not loss.paired
    checks.check_invalid_rows_are_never_read(loss)
    checks.check_half_precision(loss)
    checks.check_few_rows(loss, 2)
    checks.check_collapse_is_finite(loss)
    checks.check_refusals(loss)
    with pytest.raises(ValueError, match="koleo"):
        build("koleo", closest=0.0)
