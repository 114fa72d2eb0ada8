"""Barlow Twins as a loss of views: lightly's value and gradient, more views, missing rows, half precision."""

from __future__ import annotations

import pytest
import torch
from lightly.loss import BarlowTwinsLoss

from tests.losses import view_checks as checks
from tests.losses.view_checks import build, rows, same


def test_trap_f6_two_views_are_lightlys():
    """Standardised by the biased variance; by the unbiased one it is another number."""
    views = rows(8)
    same(build("barlow")(views)["loss"], views, BarlowTwinsLoss(lambda_param=5e-3)(*views))
    same(build("barlow", redundancy=0.3)(views)["loss"], views, BarlowTwinsLoss(lambda_param=0.3)(*views))


def test_of_three_views_it_is_the_mean_over_pairs():
    views = rows(9, views=3)
    loss = build("barlow")
    pairs = [loss([views[i], views[j]])["loss"] for i, j in ((0, 1), (0, 2), (1, 2))]
    same(loss(views)["loss"], views, torch.stack(pairs).mean())


def test_a_pair_is_of_the_rows_that_both_views_have():
    a, b = rows(9)
    first, last = torch.arange(9) < 7, torch.arange(9) > 1
    out = build("barlow")([a, b], valid=[first, last])["loss"]
    same(out, [a, b], BarlowTwinsLoss()(a[2:7], b[2:7]))


def test_contract():
    loss = build("barlow")
    checks.check_invalid_rows_are_never_read(loss)
    checks.check_half_precision(loss)
    checks.check_few_rows(loss, 2)
    checks.check_collapse_is_finite(loss)
    checks.check_refusals(loss)
    with pytest.raises(ValueError, match="two views or more, got 1"):
        loss(rows(4)[:1])
    with pytest.raises(ValueError, match="barlow"):
        build("barlow", redundancy=-1.0)
