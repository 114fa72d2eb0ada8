"""Each check of the tuple-loss contract fails on a loss that breaks just that, and all of ours pass all of them."""

from __future__ import annotations

from typing import Annotated

import pytest
import torch
from pydantic import Field
from torch import nn

from mmrep import check
from mmrep.config import ConfigError, config
from mmrep.losses.centroid import Centroid
from mmrep.losses.gram import GRAM
from mmrep.losses.symile import Symile
from mmrep.losses.triangle import Triangle
from mmrep.registry import tuple_losses
from mmrep.testing import TUPLE_LOSS_CHECKS, check_tuple_loss

OURS = [name for name in tuple_losses.names() if tuple_losses.get(name).__module__.startswith("mmrep.")]


@pytest.mark.parametrize("name", OURS)
def test_our_losses_pass(name):
    cls = tuple_losses.get(name)
    assert list(check.check(name)) == [f"tuple loss {name}: keeps the contract ({cls.__module__}.{cls.__qualname__})"]


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (GRAM(GRAM.Config()), {"fields": 2}),
        (GRAM(GRAM.Config()), {"fields": 4, "seed": 1}),
        (Triangle(Triangle.Config(squared=True)), {}),
        (Symile(Symile.Config()), {"fields": 4}),
        (Symile(Symile.Config(negatives="all")), {}),
        (Centroid(Centroid.Config(duplicates="mask", exchange="ring")), {"fields": 4}),
    ],
)
def test_so_do_their_other_settings(loss, options):
    check_tuple_loss(loss, **options)


def test_pair_losses_are_found_too_and_an_unknown_name_has_a_near_match():
    assert list(check.check("info-nce")) == ["loss info-nce: keeps the contract (mmrep.losses.infonce.InfoNCE)"]
    with pytest.raises(ConfigError, match=r"is no encoder, loss, recipe.*did you mean 'symile'"):
        list(check.check("symille"))


class Contrast(nn.Module):
    """Right in every way: InfoNCE of the anchor with the sum of the others, written out."""

    fields = (2, 4)
    takes_partial = False
    draws_negatives = False

    @config
    class Config:
        pass

    def __init__(self):
        super().__init__()
        self.config = type(self).Config()

    @staticmethod
    def bounds(dim, fields):
        return 1.0, 100.0

    def cast(self, x):
        return x if x.dtype == torch.float64 else x.float()

    def rows(self, x, valid):
        keep = torch.ones(len(x[0]), dtype=torch.bool) if valid is None else valid.all(1)
        return [y[keep] for y in x], keep

    def logits(self, a, b, scale):
        return scale * (a.unsqueeze(1) * b).sum(2)  # no product, which autocast would round

    def total(self, each, count):
        return each.sum() / max(count, 1)

    def forward(self, x, *, scale, group=None, valid=None, anchor=None, world=None):
        if not 2 <= len(x) <= 4 or (anchor is not None and anchor >= len(x)):
            raise ValueError("fields or anchor")
        x, keep = self.rows([self.cast(y) for y in x], valid)
        group = torch.arange(len(keep)) if group is None else group
        same = group[keep][:, None] == group[keep]
        same = same & ~torch.eye(len(same), dtype=torch.bool)
        turns = range(len(x)) if anchor is None else [anchor]
        loss = 0 * sum(y.sum() for y in x) + 0 * scale.sum()
        for k in turns:
            logits = self.logits(x[k], sum(y for j, y in enumerate(x) if j != k), scale)
            each = logits.masked_fill(same, -torch.inf).logsumexp(1) - logits.diagonal()
            loss = loss + self.total(each, len(each)) / len(turns)
        return {"loss": loss, "n": torch.tensor(len(x[0]))}


def test_a_plain_right_loss_passes():
    check_tuple_loss(Contrast())


class Changed(Contrast):
    def __init__(self, change, **attributes):
        super().__init__()
        self.change = change
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x, **options):
        return self.change(super().forward, x, options)


class Half(Contrast):
    def cast(self, x):
        return x


class Autocast(Contrast):
    """Only its gradient and value under autocast are rough."""

    def logits(self, a, b, scale):
        return scale * (a @ b.T)


class AsZeros(Contrast):
    """Keeps incomplete tuples as zeros: they are still negatives."""

    def rows(self, x, valid):
        valid = torch.ones(len(x[0]), len(x), dtype=torch.bool) if valid is None else valid
        return [y.masked_fill(~valid[:, k : k + 1], 0) for k, y in enumerate(x)], torch.ones(
            len(valid), dtype=torch.bool
        )


class TakesNaN(Contrast):
    """Says that it takes partial tuples, and reads what is absent."""

    takes_partial = True

    def rows(self, x, valid):
        keep = torch.ones(len(x[0]), dtype=torch.bool) if valid is None else valid.sum(1) > 1
        return [y[keep] for y in x], keep


class MeanOfNothing(Contrast):
    def total(self, each, count):
        return each.mean()


class Picky(Contrast):
    @config
    class Config:
        smooth: Annotated[float, Field(ge=0, le=1)] = 3.0


def anything(run, x, o):
    try:
        return run(x, **o)
    except ValueError:
        return {"loss": torch.zeros(()), "n": torch.tensor(len(x[0]) if x else 0)}


def weighted(run, x, o):
    return run([y * torch.arange(1, len(y) + 1, dtype=y.dtype)[:, None] for y in x], **o)


def doubled(run, x, o):
    return run([2 * x[0] - x[0].detach(), *x[1:]], **o)


def overflowing(run, x, o):
    return {**(out := run(x, **o)), "loss": (100 * out["loss"]).exp().log() / 100}


def unit_vectors(run, x, o):
    """NaN where two fields are opposed."""
    out = run(x, **o)
    return {**out, "loss": out["loss"] + 0 * (x[0] + x[1]).norm(dim=1).log().sum()}


def no_group(run, x, o):
    return run(x, **{**o, "group": None})


BROKEN = [
    ("declarations", Changed(lambda run, x, o: run(x, **o), fields=(1, 3))),
    ("declarations", Changed(anything)),
    ("declarations", Changed(lambda run, x, o: run(x, **o), bounds=lambda dim, fields: (2.0, 1.0))),
    ("output", Changed(lambda run, x, o: {"loss": run(x, **o)["loss"]})),
    ("output", Changed(lambda run, x, o: {**run(x, **o), "n": torch.tensor(3)})),
    ("output", Changed(lambda run, x, o: {**run(x, **o), "part": x[0].sum()})),
    ("direction", Changed(lambda run, x, o: {**(out := run(x, **o)), "loss": -out["loss"]})),
    ("reduced_precision", Half()),
    ("reduced_precision", Autocast()),
    ("gradient", Changed(doubled)),
    ("gradient", Changed(lambda run, x, o: run(x, **{**o, "scale": o["scale"].detach()}))),
    ("permutation", Changed(weighted)),
    ("anchors", Changed(lambda run, x, o: run(x, **{**o, "anchor": o.get("anchor") or 0}))),
    ("anchors", Changed(lambda run, x, o: run(x, **{**o, "anchor": None}))),
    ("absent_fields", AsZeros()),
    ("absent_fields", Changed(lambda run, x, o: run(x, **{**o, "valid": None}))),
    ("partial_tuples", TakesNaN()),
    ("partial_tuples", Changed(lambda run, x, o: run(x, **o), takes_partial=True)),
    ("no_tuples", MeanOfNothing()),
    ("extremes", Changed(overflowing)),
    ("extremes", Changed(unit_vectors)),
    ("groups", Changed(no_group)),
    ("config_round_trip", Picky()),
]


@pytest.mark.parametrize(("name", "broken"), BROKEN)
def test_each_check_fails_on_what_it_is_for(name, broken):
    with pytest.raises(AssertionError, match=rf"{type(broken).__name__}, check '{name}': .+"):
        check_tuple_loss(broken, only=[name])


def test_every_check_has_a_broken_loss():
    assert {name for name, _ in BROKEN} == set(TUPLE_LOSS_CHECKS)


def test_a_loss_that_draws_its_negatives_is_not_asked_for_any_order():
    check_tuple_loss(Changed(weighted, draws_negatives=True), only=["permutation"])


def test_the_loss_itself_is_left_as_it_was():
    loss = Symile(Symile.Config())
    check_tuple_loss(loss)
    assert loss.training
    assert loss.calls == 0
