"""The checks of the tuple-loss contract; `mmrep.testing.check_tuple_loss` runs them."""

# ruff: noqa: PT018 (rules for pytest's own tests, which rewrite their asserts)
from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.config import dump, parse

Gradients = tuple[Tensor, list[Tensor]]


class TupleLossSubject:
    """A tuple loss under test, in eval mode.

    Args:
        loss: see `mmrep.losses._tuples.TupleLoss`; it is copied.
        n: number of tuples, at least 6.
        fields: of a tuple; None = 3, or the nearest number that the loss allows.
        dim: width of the embeddings, at least ``fields``.
        seed: of the embeddings.
        scale: inverse temperature.
    """

    def __init__(
        self,
        loss: nn.Module,
        *,
        n: int = 6,
        fields: int | None = None,
        dim: int = 8,
        seed: int = 0,
        scale: float = 5.0,
    ) -> None:
        self.loss = cast(Any, copy.deepcopy(loss)).eval()
        self.name = type(loss).__name__
        low, high = self.loss.fields
        self.fields = fields or max(low, min(3, high or 3))
        self.n, self.scale = n, scale
        generator = torch.Generator().manual_seed(seed)
        self.x = [F.normalize(torch.randn(n, dim, generator=generator), dim=1) for _ in range(self.fields)]

    def run(self, x: Sequence[Tensor], scale: float | Tensor | None = None, **options: Any) -> dict[str, Tensor]:
        """Call the loss with the subject's scale."""
        return self.loss(x, scale=torch.tensor([self.scale]) if scale is None else scale, **options)

    def gradients(self, x: Sequence[Tensor], **options: Any) -> Gradients:
        """Loss and the gradients of the fields."""
        leaves = [field.clone().requires_grad_() for field in x]
        loss = self.run(leaves, **options)["loss"]
        loss.backward()
        for k, leaf in enumerate(leaves):
            assert leaf.grad is not None, f"no gradient reaches field {k}"
        return loss.detach(), [cast(Tensor, leaf.grad) for leaf in leaves]


def declarations(s: TupleLossSubject) -> None:
    """``fields`` and ``bounds`` make sense, and another number of fields is refused."""
    low, high = s.loss.fields
    assert 1 < low <= (high or low), f"fields is {s.loss.fields}"
    lowest, highest = s.loss.bounds(64, s.fields)
    assert 0 < lowest < highest, f"bounds are {lowest} and {highest}"
    for number in (low - 1, *(() if high is None else (high + 1,))):
        try:
            s.run([s.x[0]] * number)
        except ValueError:
            continue
        raise AssertionError(f"{number} fields are not refused, though fields is {s.loss.fields}")


def output(s: TupleLossSubject) -> None:
    """``loss`` is a finite float32 scalar, ``n`` counts the tuples, the parts are detached scalars."""
    out = s.run([x.requires_grad_() for x in s.x])
    for x in s.x:
        x.requires_grad_(False)
    assert {"loss", "n"} <= set(out), f"the loss returned {sorted(out)}, without 'loss' or 'n'"
    assert out["loss"].shape == () and out["loss"].dtype == torch.float32, f"loss is {out['loss']!r}"
    assert bool(out["loss"].isfinite()), f"loss is {out['loss'].item()}"
    assert int(out["n"]) == s.n, f"n is {int(out['n'])} for {s.n} tuples"
    for name, part in out.items():
        assert part.numel() == 1 and (name == "loss" or not part.requires_grad), f"{name} is {part!r}"


def direction(s: TupleLossSubject) -> None:
    """Tuples that match cost less than tuples of which no two fields do."""
    # In one orthant, where a product of several vectors is largest for equal ones; but not quite equal, since the
    # volume of two equal vectors is that with any third.
    x = [F.normalize(s.x[0].abs() + 0.3 * field.abs(), dim=1) for field in s.x]
    good, bad = s.run(x)["loss"].item(), s.run([field.roll(k, 0) for k, field in enumerate(x)])["loss"].item()
    assert good < bad, f"matching tuples cost {good:.4f}, mismatched ones {bad:.4f}"


def reduced_precision(s: TupleLossSubject) -> None:
    """bf16 embeddings, or bf16 autocast, are computed on in float32."""
    x = [field.bfloat16() for field in s.x]
    exact, rough = s.run([field.float() for field in x])["loss"], s.run(x)["loss"]
    assert rough.dtype == torch.float32, f"bf16 embeddings give a {rough.dtype} loss"
    _close(rough, exact, "bf16 embeddings against the same values in float32")
    with torch.autocast("cpu", torch.bfloat16):
        cast_loss, cast_gradients = s.gradients(s.x)
    loss, gradients = s.gradients(s.x)
    _close(cast_loss, loss, "bf16 autocast against none")
    for k, (actual, expected) in enumerate(zip(cast_gradients, gradients, strict=True)):
        _close(actual, expected, f"gradient of field {k} under bf16 autocast against none")


def gradient(s: TupleLossSubject) -> None:
    """Gradients of embeddings and scale equal finite differences."""
    inputs = [x.double().requires_grad_() for x in s.x]
    inputs.append(torch.tensor([s.scale], dtype=torch.float64, requires_grad=True))
    s.run(inputs[:-1], inputs[-1])["loss"].backward()
    generator = torch.Generator().manual_seed(1)
    for k, value in enumerate(inputs):
        name = "scale" if k == s.fields else f"field {k}"
        assert value.grad is not None, f"no gradient reaches {name}"
        step = 1e-4 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            up, down = (
                s.run([*moved[:-1]], moved[-1])["loss"].double()
                for moved in ([*inputs[:k], value + sign * step, *inputs[k + 1 :]] for sign in (1, -1))
            )
        measured, given = ((up - down) / 2).item(), (value.grad * step).sum().item()
        assert abs(measured - given) <= 1e-3 * abs(measured) + 1e-8, (
            f"gradient of {name}: {given:.3e}, measured {measured:.3e}"
        )


def permutation(s: TupleLossSubject) -> None:
    """The order of the tuples does not matter, unless negatives are drawn."""
    if getattr(s.loss, "draws_negatives", False):
        return
    order = torch.arange(s.n).roll(2).flip(0)
    loss, gradients = s.gradients(s.x)
    turned, turned_gradients = s.gradients([x[order] for x in s.x])
    _close(turned, loss, "loss of the tuples in another order")
    for k, (actual, expected) in enumerate(zip(turned_gradients, gradients, strict=True)):
        _close(actual, expected[order], f"gradients of field {k} in another order")


def anchors(s: TupleLossSubject) -> None:
    """Without an anchor each field is it in turn; an anchor that does not exist is refused."""
    loss, gradients = s.gradients(s.x)
    each = [s.gradients(s.x, anchor=k) for k in range(s.fields)]
    _close(torch.stack([one for one, _ in each]).mean(0), loss, "the mean over anchors against none")
    for k, expected in enumerate(gradients):
        _close(torch.stack([one[k] for _, one in each]).mean(0), expected, f"gradient of field {k}, alike")
    try:
        s.run(s.x, anchor=s.fields)
    except ValueError:
        return
    raise AssertionError(f"anchor {s.fields} of {s.fields} fields is not refused")


def absent_fields(s: TupleLossSubject) -> None:
    """A tuple with one field alone has no influence, whatever is in the others, and gets no gradient."""
    keep = torch.arange(s.n) % 3 != 1
    valid = keep.unsqueeze(1) | (torch.arange(s.fields) == 0)
    loss, gradients = s.gradients([x[keep] for x in s.x])
    for trash in (0.0, 7.0, float("nan")):
        dirty = [torch.where(valid[:, k : k + 1], x, torch.tensor(trash)) for k, x in enumerate(s.x)]
        out, found = s.gradients(dirty, valid=valid)
        _close(out, loss, f"loss with {trash} in absent fields against the complete tuples alone")
        for k, (actual, expected) in enumerate(zip(found, gradients, strict=True)):
            _close(actual[keep], expected, f"gradients of field {k} with {trash} in absent fields")
            assert not bool(actual[~keep].any()), f"field {k} of tuples with fields of {trash} gets a gradient"
    count = int(s.run(s.x, valid=valid)["n"])
    assert count == int(keep.sum()), f"n is {count} for {int(keep.sum())} tuples"


def partial_tuples(s: TupleLossSubject) -> None:
    """A tuple that lacks one of three fields counts if the loss takes such; what is absent is never read."""
    if s.fields < 3:
        return
    valid = torch.ones(s.n, s.fields, dtype=torch.bool)
    valid[0, 0] = valid[1, s.fields - 1] = False
    dirty = [torch.where(valid[:, k : k + 1], x, torch.tensor(float("nan"))) for k, x in enumerate(s.x)]
    loss, gradients = s.gradients(dirty, valid=valid)
    count = int(s.run(dirty, valid=valid)["n"])
    expected = s.n if s.loss.takes_partial else s.n - 2
    assert count == expected, f"n is {count}, not {expected}, though takes_partial is {s.loss.takes_partial}"
    assert bool(loss.isfinite()), "NaN in an absent field reaches the loss"
    for k, found in enumerate(gradients):
        assert bool(found.isfinite().all()), f"NaN in an absent field reaches the gradient of field {k}"
        assert not bool(found[~valid[:, k]].any()), f"absent rows of field {k} get a gradient"
    takes_part = bool(gradients[1][:2].any())
    assert takes_part == s.loss.takes_partial, f"partial tuples get a gradient: {takes_part}"


def no_tuples(s: TupleLossSubject) -> None:
    """Without a valid tuple, and without any row, the loss is 0 and so are the gradients."""
    none = torch.zeros(s.n, s.fields, dtype=torch.bool)
    for what, x, options in (("no valid tuple", s.x, {"valid": none}), ("no row", [x[:0] for x in s.x], {})):
        loss, gradients = s.gradients(x, **options)
        assert loss.item() == 0, f"{what}: loss is {loss.item()}, not 0"
        assert not any(bool(g.any()) for g in gradients), f"{what}: a gradient is not 0"


def extremes(s: TupleLossSubject) -> None:
    """One tuple, fields that coincide or cancel, all embeddings equal, a large scale: finite loss and gradients."""
    same, first = s.x[0][:1].expand(s.n, -1), s.x[0]
    for what, x, scale in (
        ("one tuple", [x[:1] for x in s.x], s.scale),
        ("all embeddings equal", [same] * s.fields, s.scale),
        ("the fields of each tuple equal", [first] * s.fields, s.scale),
        ("the fields but one equal", [first] * (s.fields - 1) + [s.x[-1]], s.scale),
        ("almost equal", [F.normalize(first + 1e-7 * x, dim=1) for x in s.x], s.scale),
        ("opposed fields, scale 1000", [first * (-1) ** k for k in range(s.fields)], 1000.0),
        ("scale 1000", s.x, 1000.0),
    ):
        loss, gradients = s.gradients(x, scale=torch.tensor([scale]))
        assert all(bool(value.isfinite().all()) for value in (loss, *gradients)), f"{what}: not finite"


def groups(s: TupleLossSubject) -> None:
    """Tuples of different groups are as tuples without groups; a shared group is not the same and stays finite."""
    plain, _ = s.gradients(s.x)
    apart, _ = s.gradients(s.x, group=torch.arange(s.n) * 1_000_003 - 17)
    _close(apart, plain, "every tuple its own group against no groups")
    # Groups larger than what a shuffle can miss.
    shared, gradients = s.gradients(s.x, group=torch.arange(s.n) // (s.n - 1))
    assert bool(shared.isfinite()) and all(bool(g.isfinite().all()) for g in gradients), "shared groups: not finite"
    assert (shared - plain).abs().item() > 1e-6, "a shared group changes nothing: is `group` read?"


def config_round_trip(s: TupleLossSubject) -> None:
    """The config survives being written as plain data."""
    config: Any = s.loss.config
    assert parse(type(config), dump(config)) == config, f"config is not read back as {config}"


def _close(a: Tensor, b: Tensor, what: str) -> None:
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    gap = ((a - b).abs() / b.abs().clamp_min(1)).max().item() if a.numel() else 0.0
    assert gap <= 1e-5, f"{what}: differ by {gap:.2e}"


TUPLE_LOSS_CHECKS: dict[str, Callable[[TupleLossSubject], None]] = {
    check.__name__: check
    for check in (
        declarations,
        output,
        direction,
        reduced_precision,
        gradient,
        permutation,
        anchors,
        absent_fields,
        partial_tuples,
        no_tuples,
        extremes,
        groups,
        config_round_trip,
    )
}
