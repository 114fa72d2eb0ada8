"""Tuple losses against their slow twins and published code, and each of their traps by name."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mmrep.losses._flats import flats
from mmrep.losses.centroid import Centroid, centroid
from mmrep.losses.gram import GRAM, _span, gram
from mmrep.losses.infonce import info_nce
from mmrep.losses.symile import Symile, shuffles, symile
from mmrep.losses.triangle import Triangle, triangle
from tests.losses.test_infonce import assert_same, number, unit
from tests.losses.tuple_twins import (
    area,
    centroid_twin,
    measure_twin,
    symile_twin,
    twice_squared_area,
    volume,
)

NAN = math.nan


def tuples(n, fields, seed=0, dim=6):
    return [unit(n, dim, seed=100 * seed + k) for k in range(fields)]


def options(n, fields, groups, share, anchored, seed):
    """Groups, presence with NaN in what is absent, an anchor."""
    generator = torch.Generator().manual_seed(seed)
    group = None if groups is None else torch.randint(-groups, groups, (n,), generator=generator)
    valid = None if share is None else torch.rand(n, fields, generator=generator) < share
    return {"group": group, "valid": valid, "anchor": seed % fields if anchored else None}


def holes(x, valid):
    if valid is None:
        return x
    return [torch.where(valid[:, k : k + 1], y, NAN) for k, y in enumerate(x)]


def choices(seed, fields):
    """The members that the library draws, for the twin; one that only plants them could not tell a wrong use."""

    def of(turn, n):
        return torch.stack(shuffles(n, fields - 1, torch.tensor(seed + turn)), 1).tolist()

    return of


LOSSES = {
    "gram": (gram, measure_twin, {}, (2, 3, 4)),
    "triangle": (triangle, lambda *a, **k: measure_twin(*a, **k, measure=area), {}, (3,)),
    "triangle squared": (
        triangle,
        lambda *a, **k: measure_twin(*a, **k, measure=twice_squared_area),
        {"squared": True},
        (3,),
    ),
    "symile all": (symile, symile_twin, {"negatives": "all"}, (2, 3)),
    "symile shuffled": (symile, None, {"negatives": "shuffled", "seed": 5}, (2, 3, 4)),
    "centroid": (centroid, centroid_twin, {}, (2, 3, 4)),
    "centroid masked": (
        centroid,
        lambda *a, **k: centroid_twin(*a, **k, duplicates="mask"),
        {"duplicates": "mask", "exchange": "ring"},
        (2, 3),
    ),
}


def twin_of(name, fields):
    found = LOSSES[name][1]
    return found or (lambda *a, **k: symile_twin(*a, **k, choices=choices(5, fields)))


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_equals_the_twin(name, data):
    loss, _, extra, sizes = LOSSES[name]
    fields, n = data.draw(st.sampled_from(sizes)), data.draw(st.integers(0, 6))
    seed = data.draw(st.integers(0, 1000))
    given_options = options(
        n,
        fields,
        data.draw(st.sampled_from([None, 1, 2, 100])),
        data.draw(st.sampled_from([None, 0.0, 0.6, 0.9])),
        data.draw(st.booleans()),
        seed,
    )
    tile = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    x, s = tuples(n, fields, seed), number(data.draw(st.sampled_from([1.0, 14.3, 100.0])))
    out = loss(holes(x, given_options["valid"]), scale=s, tile=tile, **given_options, **extra)
    # A determinant of cosines has 1e-13 of an angle's square; the twin is what limits this.
    assert_same(out["loss"], twin_of(name, fields)(x, s, **given_options), [*x, s], rtol=1e-7, atol=1e-9)


def test_gram_of_two_is_the_sine():
    leaves, s = tuples(7, 2), number(14.3)
    # Normalised once for each: along its own direction a vector's volume grows, and its cosine not.
    x, again = ([F.normalize(y, dim=1) for y in leaves] for _ in range(2))
    logits = -s * (1 - (x[0] @ x[1].T) ** 2).sqrt()
    target = torch.arange(7)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert_same(gram(again, scale=s)["loss"], expected, [*leaves, s])


@pytest.mark.parametrize("negatives", ["all", "shuffled"])
def test_symile_of_two_is_clip_whatever_the_order(negatives):
    x, s = tuples(7, 2), number(14.3)
    for seed in (0, 1):
        out = symile(x, scale=s, negatives=negatives, seed=seed)["loss"]
        assert_same(out, info_nce(*x, scale=s), [*x, s])


def test_symile_all_equals_the_published_package():
    package = pytest.importorskip("symile")
    x, s = tuples(6, 3), number(20.0)
    reference = package.Symile(negative_sampling="n_squared")
    assert_same(symile(x, scale=s, negatives="all")["loss"], reference(x, s), [*x, s])


@pytest.mark.parametrize("fields", [3, 4])
def test_symile_shuffled_equals_the_published_package(fields):
    """The package puts each positive over one of its negatives, which are N - 1 then; that one is given back to it."""
    package = pytest.importorskip("symile")
    x, s, n = tuples(6, fields), number(20.0), 6
    total = torch.zeros((), dtype=torch.float64)
    for turn in range(fields):
        orders, rest = shuffles(n, fields - 1, torch.tensor(turn)), [y for k, y in enumerate(x) if k != turn]
        with mock.patch.object(torch, "randperm", side_effect=list(orders)):
            logits = package.Symile().compute_logits_n(x[turn], rest)
        lost = x[turn] * math.prod([y[order] for y, order in zip(rest, orders, strict=True)])
        total = total + F.cross_entropy(s * torch.cat([logits, lost.sum(1, keepdim=True)], 1), torch.arange(n)) / fields
    assert_same(symile(x, scale=s)["loss"], total, [*x, s])


@pytest.mark.parametrize("n", [1, 2, 3, 17])
def test_shuffles_are_orders_that_never_agree(n):
    orders = torch.stack(shuffles(n, 3, torch.tensor(4)))
    assert torch.equal(orders.sort(1).values, torch.arange(n).expand(3, n))
    if n > 2:
        assert not any(bool((orders[i] == orders[j]).any()) for i in range(3) for j in range(i))
    if n > 3:
        others = torch.stack(shuffles(n, 3, torch.tensor(5)))
        assert not torch.equal(orders, others)


def test_every_place_meets_every_other_over_the_seeds():
    """The first two fields of a member: each pair of different tuples about as often."""
    met = torch.zeros(5, 5)
    for seed in range(2000):
        first, second = shuffles(5, 2, torch.tensor(seed))
        met[first, second] += 1
    assert met.diagonal().sum() == 0
    rest = met[~torch.eye(5, dtype=torch.bool)]
    assert rest.min() > 400
    assert rest.max() < 600


def test_symile_draws_anew_in_training_goes_on_after_loading_and_rests_in_eval():
    x = tuples(8, 3)
    loss = Symile(Symile.Config(seed=3))
    first, second = (loss(x, scale=20.0)["loss"] for _ in range(2))
    assert first != second
    again = Symile(Symile.Config(seed=3))
    again.load_state_dict({"calls": torch.tensor(1)})
    assert torch.equal(again(x, scale=20.0)["loss"], second)
    loss.eval()
    assert torch.equal(loss(x, scale=20.0)["loss"], loss(x, scale=20.0)["loss"])
    assert Symile(Symile.Config(seed=4))(x, scale=20.0)["loss"] != first


def test_trap_1_8_the_bounds_of_symile_follow_dimension_and_fields():
    """A product of perfectly aligned flat vectors is D^(-(M-2)/2): at `low` its logit is 1."""
    for dim, fields in ((512, 3), (512, 4), (64, 2)):
        flat = torch.full((fields, dim), dim**-0.5, dtype=torch.float64)
        low, high = Symile.bounds(dim, fields)
        assert low * flat.prod(0).sum().item() == pytest.approx(1)
        assert high == pytest.approx(100 * low)
    assert 1 / Symile.bounds(512, 3)[0] == pytest.approx(0.044, abs=5e-4)  # as measured in cross-modal.md
    assert 1 / Symile.bounds(512, 4)[0] == pytest.approx(0.002, abs=5e-5)


@pytest.mark.parametrize("eps", [1e-3, 1e-4, 1e-6])
def test_trap_3_8a_volumes_of_almost_coincident_vectors_keep_their_digits(eps):
    """float32 vectors an angle of eps apart, in 3 fields; the true volume from 50 digits of the same numbers."""
    import mpmath  # of torch

    generator = torch.Generator().manual_seed(0)
    base = F.normalize(torch.randn(4, 64, generator=generator), dim=1)
    x = [F.normalize(base + eps * F.normalize(torch.randn(4, 64, generator=generator), dim=1), dim=1) for _ in range(3)]
    own = flats(_span, x[0], x[1:]).own
    assert own.dtype == torch.float32
    naive = torch.stack([volume([y[i] for y in x]) for i in range(4)])  # what the published code computes
    mpmath.mp.dps = 50
    errors, naive_errors = [], []
    for i in range(4):
        rows = mpmath.matrix([[mpmath.mpf(float(v)) for v in y[i]] for y in x])
        true = float(mpmath.sqrt(mpmath.det(rows * rows.T)))
        errors.append(abs(own[i].item() / true - 1))
        naive_errors.append(abs(naive[i].item() / true - 1))
    assert max(errors) < 1e-5
    assert not max(naive_errors) < 0.01


@pytest.mark.parametrize("loss", [gram, triangle, centroid, symile])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trap_3_8a_gradients_are_finite_and_bounded_where_vectors_coincide(loss, dtype):
    base = unit(5, dtype=dtype)
    for x in ([base, base, base], [base, base, unit(5, seed=1, dtype=dtype)], [base, -base, base]):
        leaves = [y.detach().clone().requires_grad_() for y in x]
        value = loss(leaves, scale=torch.tensor(20.0, dtype=dtype))["loss"]
        grads = torch.autograd.grad(value, leaves)
        assert all(bool(g.isfinite().all()) for g in (value, *grads))
        # Of a logit in a unit vector at most the scale, of a centroid that cancels a thousand times that.
        assert max(float(g.abs().max()) for g in grads) < 20 * (1e3 if loss is centroid else 1.0)


@pytest.mark.parametrize("loss", [gram, triangle])
def test_the_gradient_survives_a_small_angle(loss):
    """In float32, against float64, where the tuple's own vectors are 1e-5 apart."""
    base = unit(6, 16)
    x = [F.normalize(base + 1e-5 * unit(6, 16, seed=k), dim=1).detach().float() for k in range(1, 4)]
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaves = [y.to(dtype).requires_grad_() for y in x]
        value = loss(leaves, scale=torch.tensor(10.0, dtype=dtype))["loss"]
        grads.append([value.detach().double(), *(g.double() for g in torch.autograd.grad(value, leaves))])
    for low, high in zip(*grads, strict=True):
        torch.testing.assert_close(low, high, rtol=1e-3, atol=1e-4)


def test_trap_3_8b_nothing_valid_is_zero_with_zero_gradients():
    for name, (loss, _, extra, sizes) in LOSSES.items():
        x, s = tuples(4, sizes[-1]), number(10.0)
        valid = torch.zeros(4, sizes[-1], dtype=torch.bool)
        valid[:, 0] = True
        out = loss(holes(x, valid), scale=s, valid=valid, **extra)
        assert out["loss"].item() == 0, name
        assert out["n"].item() == 0
        for grad in torch.autograd.grad(out["loss"], [*x, s], allow_unused=True):
            assert grad is None or not grad.any(), name


def test_a_member_of_symile_that_is_all_of_the_anchors_group_is_no_negative():
    """Two tuples in one group, of three: the shuffle of the others' rows that stays in it is left out."""
    x, s = tuples(3, 3), number(20.0)
    group = torch.tensor([7, 7, 1])
    out = symile(x, scale=s, group=group, seed=5)["loss"]
    assert_same(out, symile_twin(x, s, group, choices=choices(5, 3)), [*x, s])


def test_components_give_their_settings_on():
    x, s = tuples(6, 3), number(20.0)
    group, valid = torch.tensor([0, 0, 1, 1, 2, 3]), torch.ones(6, 3, dtype=torch.bool)
    valid[1, 0] = False
    given_options = {"group": group, "valid": valid, "anchor": 1}
    for component, expected in (
        (GRAM(GRAM.Config()), gram(x, scale=s, **given_options)),
        (Triangle(Triangle.Config()), triangle(x, scale=s, **given_options)),
        (Triangle(Triangle.Config(squared=True)), triangle(x, scale=s, squared=True, **given_options)),
        (Symile(Symile.Config(negatives="all")), symile(x, scale=s, negatives="all", **given_options)),
        (Symile(Symile.Config()), symile(x, scale=s, **given_options)),
        (Centroid(Centroid.Config()), centroid(x, scale=s, **given_options)),
        (Centroid(Centroid.Config(duplicates="mask")), centroid(x, scale=s, duplicates="mask", **given_options)),
    ):
        out = component(x, scale=s, **given_options)
        assert torch.equal(out["loss"], expected["loss"])
        assert set(out) == set(expected)
    assert Symile(Symile.Config()).draws_negatives
    assert not Symile(Symile.Config(negatives="all")).draws_negatives


def test_parts_are_means_over_the_tuples():
    x = tuples(4, 3)
    valid = torch.ones(4, 3, dtype=torch.bool)
    valid[3, 1] = False
    out = {f.__name__: f(x, scale=10.0, valid=valid) for f in (gram, triangle, symile)}
    own = [[y[i] for y in x] for i in range(3)]
    torch.testing.assert_close(out["gram"]["volume"], torch.stack([volume(t) for t in own]).mean().detach())
    torch.testing.assert_close(out["triangle"]["area"], torch.stack([area(t) for t in own]).mean().detach())
    products = torch.stack([torch.stack(t).prod(0).sum() for t in own]).mean()
    torch.testing.assert_close(out["symile"]["product"], products.detach())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: gram(x[:1], scale=1.0), "GRAM takes 2 or more fields, got 1"),
        (lambda x: triangle(x, scale=1.0), "TRIANGLE takes 3 fields, got 4"),
        (lambda x: symile(x, scale=1.0, negatives="all"), "all combinations of 4 fields are too many"),
        (lambda x: symile(x, scale=1.0, negatives="some"), "'shuffled' or 'all', got 'some'"),
        (lambda x: Symile.Config(negatives="some"), "'shuffled' or 'all', got 'some'"),
        (lambda x: Centroid.Config(duplicates="no"), "'positive' or 'mask', got 'no'"),
        (lambda x: gram(x, scale=1.0, anchor=4), "0 to 3, or None for each in turn; got 4"),
        (lambda x: gram([*x[:3], x[3][:2]], scale=1.0), r"one shape \[n, D\], got"),
        (lambda x: gram([y.long() for y in x], scale=1.0), "floating-point embeddings, got torch.int64"),
        (lambda x: gram(x, scale=1.0, group=torch.zeros(5)), r"group must be \[5\] integers"),
        (lambda x: centroid(x, scale=1.0, valid=torch.ones(5, dtype=torch.bool)), r"valid must be \[5, 4\] booleans"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(tuples(5, 4))
