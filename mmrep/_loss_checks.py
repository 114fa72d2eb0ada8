"""The checks of the paired-loss contract; `mmrep.testing.check_loss` runs them."""

# ruff: noqa: PT018 (rules for pytest's own tests, which rewrite their asserts)
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.config import dump, parse


class LossSubject:
    """A paired loss under test.

    Args:
        loss: ``forward(a, b, *, scale, bias=None, negatives=None, group=None, valid=None, world=None)``, returning at
            least ``{"loss": 0-D, "n": number of valid pairs}``.
        n: number of pairs, at least 4.
        dim: width of the embeddings.
        seed: of the embeddings.
        scale: inverse temperature.
        bias: additive bias; None = -1 if the loss has a true ``needs_bias``, else none is given.
    """

    def __init__(
        self, loss: nn.Module, *, n: int = 6, dim: int = 8, seed: int = 0, scale: float = 5.0, bias: float | None = None
    ) -> None:
        self.loss = loss
        self.name = type(loss).__name__
        self.n, self.dim, self.scale = n, dim, scale
        self.bias = -1.0 if bias is None and getattr(loss, "needs_bias", False) else bias
        generator = torch.Generator().manual_seed(seed)
        self.a, self.b = (F.normalize(torch.randn(n, dim, generator=generator), dim=1) for _ in range(2))

    def run(self, a: Tensor, b: Tensor, scale: float | Tensor | None = None, **options: Any) -> dict[str, Tensor]:
        """Call the loss with the subject's scale and bias."""
        scale = torch.tensor([self.scale]) if scale is None else scale
        if self.bias is not None:
            options.setdefault("bias", torch.tensor([self.bias]))
        return self.loss(a, b, scale=scale, **options)

    def gradients(self, a: Tensor, b: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and the gradients of ``a`` and ``b``."""
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        loss = self.run(a, b, **options)["loss"]
        loss.backward()
        assert a.grad is not None and b.grad is not None, "no gradient reaches the embeddings"
        return loss.detach(), a.grad, b.grad


def output(s: LossSubject) -> None:
    """``loss`` is a finite float32 scalar, ``n`` counts the pairs."""
    out = s.run(s.a, s.b)
    assert {"loss", "n"} <= set(out), f"the loss returned {sorted(out)}, without 'loss' or 'n'"
    assert out["loss"].shape == () and out["loss"].dtype == torch.float32, f"loss is {out['loss']!r}"
    assert bool(out["loss"].isfinite()), f"loss is {out['loss'].item()}"
    assert int(out["n"]) == s.n, f"n is {int(out['n'])} for {s.n} pairs"


def direction(s: LossSubject) -> None:
    """Pairs that match cost less than pairs that do not."""
    good, bad = s.run(s.a, s.a)["loss"].item(), s.run(s.a, s.a.roll(1, 0))["loss"].item()
    assert good < bad, f"matching pairs cost {good:.4f}, mismatched ones {bad:.4f}"


def reduced_precision(s: LossSubject) -> None:
    """bf16 embeddings, or bf16 autocast, are computed on in float32."""
    a, b = s.a.bfloat16(), s.b.bfloat16()
    exact = s.run(a.float(), b.float())["loss"]
    rough = s.run(a, b)["loss"]
    assert rough.dtype == torch.float32, f"bf16 embeddings give a {rough.dtype} loss"
    _close(rough, exact, "bf16 embeddings against the same values in float32")
    with torch.autocast("cpu", torch.bfloat16):
        cast = s.run(s.a, s.b)["loss"]
    _close(cast, s.run(s.a, s.b)["loss"], "bf16 autocast against none")


def gradient(s: LossSubject) -> None:
    """Gradients of embeddings, scale and bias equal finite differences."""
    scale = torch.tensor([s.scale], dtype=torch.float64, requires_grad=True)
    inputs: dict[str, Tensor] = {"a": s.a.double().requires_grad_(), "b": s.b.double().requires_grad_(), "scale": scale}
    if s.bias is not None:
        inputs["bias"] = torch.tensor([s.bias], dtype=torch.float64, requires_grad=True)
    s.run(**inputs)["loss"].backward()
    generator = torch.Generator().manual_seed(1)
    for name, value in inputs.items():
        assert value.grad is not None, f"no gradient reaches {name}"
        step = 1e-3 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            up, down = (s.run(**{**inputs, name: value + sign * step})["loss"].double() for sign in (1, -1))
        measured, given = ((up - down) / 2).item(), (value.grad * step).sum().item()
        assert abs(measured - given) <= 1e-2 * abs(measured) + 1e-6, (
            f"gradient of {name}: {given:.3e}, measured {measured:.3e}"
        )


def permutation(s: LossSubject) -> None:
    """The order of the pairs does not matter."""
    order = torch.arange(s.n).roll(2).flip(0)
    loss, a, b = s.gradients(s.a, s.b)
    turned, turned_a, turned_b = s.gradients(s.a[order], s.b[order])
    _close(turned, loss, "loss of the pairs in another order")
    _close(turned_a, a[order], "gradients of a in another order")
    _close(turned_b, b[order], "gradients of b in another order")


def invalid_rows(s: LossSubject) -> None:
    """A row that is not valid has no influence, whatever is in it, and gets no gradient."""
    valid = torch.arange(s.n) % 3 != 1
    loss, a, b = s.gradients(s.a[valid], s.b[valid])
    for trash in (0.0, 7.0, float("nan")):
        dirty_a, dirty_b = (torch.where(valid[:, None], x, torch.tensor(trash)) for x in (s.a, s.b))
        out, grad_a, grad_b = s.gradients(dirty_a, dirty_b, valid=valid)
        _close(out, loss, f"loss with {trash} in invalid rows against the valid rows alone")
        _close(grad_a[valid], a, f"gradients of a with {trash} in invalid rows")
        _close(grad_b[valid], b, f"gradients of b with {trash} in invalid rows")
        assert not bool(grad_a[~valid].any()) and not bool(grad_b[~valid].any()), f"rows of {trash} get a gradient"
    count = int(s.run(s.a, s.b, valid=valid)["n"])
    assert count == int(valid.sum()), f"n is {count} for {int(valid.sum())} valid pairs"


def no_pairs(s: LossSubject) -> None:
    """Without a valid pair, and without any row, the loss is 0 and so are the gradients."""
    none = torch.zeros(s.n, dtype=torch.bool)
    for what, a, b, options in (("no valid pair", s.a, s.b, {"valid": none}), ("no row", s.a[:0], s.b[:0], {})):
        loss, grad_a, grad_b = s.gradients(a, b, **options)
        assert loss.item() == 0, f"{what}: loss is {loss.item()}, not 0"
        assert not bool(grad_a.any()) and not bool(grad_b.any()), f"{what}: a gradient is not 0"


def extremes(s: LossSubject) -> None:
    """A single pair, collapsed embeddings, opposed pairs at a large scale: finite loss and gradients."""
    same = s.a[:1].expand(s.n, -1)
    for what, a, b, scale in (
        ("one pair", s.a[:1], s.b[:1], s.scale),
        ("all embeddings equal", same, same, s.scale),
        ("opposed pairs, scale 1000", s.a, -s.a, 1000.0),
    ):
        for value in s.gradients(a, b, scale=torch.tensor([scale])):
            assert bool(value.isfinite().all()), f"{what}: not finite"


def groups(s: LossSubject) -> None:
    """Pairs of different groups are as pairs without groups; a shared group is not the same and stays finite."""
    plain, *_ = s.gradients(s.a, s.b)
    apart, *_ = s.gradients(s.a, s.b, group=torch.arange(s.n) * 1_000_003 - 17)
    _close(apart, plain, "every pair its own group against no groups")
    shared, grad_a, _ = s.gradients(s.a, s.b, group=torch.arange(s.n) // 2)
    assert bool(shared.isfinite()) and bool(grad_a.isfinite().all()), "shared groups: not finite"
    assert (shared - plain).abs().item() > 1e-6, "a shared group changes nothing: is `group` read?"


def negatives(s: LossSubject) -> None:
    """More negatives never lower the loss, and get a gradient."""
    plain, *_ = s.gradients(s.a, s.b)
    extra = s.a.flip(0).clone().requires_grad_()
    loss = s.run(s.a, s.b, negatives=extra)["loss"]
    loss.backward()
    assert loss.item() > plain.item(), f"hard negatives lower the loss from {plain.item():.4f} to {loss.item():.4f}"
    assert extra.grad is not None and bool(extra.grad.any()), "no gradient reaches the hard negatives"


def config_round_trip(s: LossSubject) -> None:
    """The config survives being written as plain data."""
    config: Any = s.loss.config
    assert parse(type(config), dump(config)) == config, f"config is not read back as {config}"


def _close(a: Tensor, b: Tensor, what: str) -> None:
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    gap = ((a - b).abs() / b.abs().clamp_min(1)).max().item() if a.numel() else 0.0
    assert gap <= 1e-5, f"{what}: differ by {gap:.2e}"


LOSS_CHECKS: dict[str, Callable[[LossSubject], None]] = {
    check.__name__: check
    for check in (
        output,
        direction,
        reduced_precision,
        gradient,
        permutation,
        invalid_rows,
        no_pairs,
        extremes,
        groups,
        negatives,
        config_round_trip,
    )
}
