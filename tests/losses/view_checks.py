"""What every loss of views must do: read no invalid row, be fp32 inside, be finite where nothing is left."""

from __future__ import annotations

import torch

from mmrep.config import component


def build(name, **fields):
    return component("view_losses", name, **fields).build()


def rows(n, width=6, *, seed=0, views=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, width, generator=generator, dtype=torch.float64)
    made = [base + 0.3 * torch.randn(n, width, generator=generator, dtype=torch.float64) for _ in range(views)]
    return [x.to(dtype).requires_grad_() for x in made]


def gradients(loss, views):
    return torch.autograd.grad(loss, views, allow_unused=True)


def same(ours, views, theirs, *, rtol=1e-9):
    """Value and gradient of two scalars on the same leaves."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-10)
    pairs = zip(gradients(ours, views), gradients(theirs, views), strict=True)
    for a, b in pairs:
        assert a.abs().max() > 1e-8
        torch.testing.assert_close(a, b, rtol=1e-7 if rtol < 1e-7 else rtol, atol=1e-10)


def check_invalid_rows_are_never_read(loss):
    """Equal to the loss of the valid rows alone, though the others are NaN; and no gradient reaches those."""
    views, keep = rows(9), torch.tensor([True, False, True, True, True, False, True, True, True])
    poisoned = [x.detach().masked_fill(~keep[:, None], torch.nan).requires_grad_() for x in views]
    out = loss(poisoned, valid=[keep, keep])["loss"]
    expected = loss([x[keep] for x in views])["loss"]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=0)
    for found, whole in zip(gradients(out, poisoned), gradients(expected, views), strict=True):
        torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-12)
        assert not found[~keep].any()


def check_half_precision(loss, least=1e-3):
    """Of bf16 inputs, under autocast, forward and backward: what fp32 inputs of these values give."""
    views = [x.detach().bfloat16().requires_grad_() for x in rows(16)]
    plain = [x.detach().float().requires_grad_() for x in views]
    with torch.autocast("cpu", torch.bfloat16):
        out = loss(views)["loss"]
        found = gradients(out, views)
    expected = loss(plain)["loss"]
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(found, gradients(expected, plain), strict=True):
        torch.testing.assert_close(a, b.bfloat16(), rtol=1e-2, atol=1e-5)


def check_few_rows(loss, fewest):
    """With fewer rows than a statistic needs, exactly 0 with zero gradients; none is an empty tensor."""
    for n in range(fewest):
        views = rows(n)
        out = loss(views)["loss"]
        assert out == 0
        assert not any(g.any() for g in gradients(out, views))


def check_collapse_is_finite(loss):
    """All rows equal: value and gradient are finite, in fp32."""
    views = [torch.ones(8, 6).requires_grad_() for _ in range(2)]
    out = loss(views)["loss"]
    assert out.isfinite()
    assert all(g.isfinite().all() for g in gradients(out, views))


def check_refusals(loss):
    import pytest

    with pytest.raises(ValueError, match="valid must be one bool"):
        loss(rows(4), valid=[torch.ones(4, dtype=torch.bool)])
    with pytest.raises(ValueError, match="valid must be one bool"):
        loss(rows(4), valid=[torch.ones(4)] * 2)
    with pytest.raises(ValueError, match=r"floating-point rows \[B, D\]"):
        loss([torch.zeros(4, 2, dtype=torch.long)] * 2)
    if loss.paired:
        with pytest.raises(ValueError, match="one shape"):
            loss([torch.zeros(4, 2), torch.zeros(4, 3)])
