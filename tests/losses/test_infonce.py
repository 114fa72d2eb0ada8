"""InfoNCE against its slow twin, open_clip and pytorch-metric-learning; each trap of the losses by name."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mmrep.losses import InfoNCE, info_nce
from tests.losses.twins import info_nce_twin


def unit(n: int, dim: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=1)
    return rows.to(dtype).requires_grad_()


def number(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype).requires_grad_()


def assert_same(
    actual: Tensor, expected: Tensor, leaves: list[Tensor], rtol: float = 1e-10, atol: float = 1e-12
) -> None:
    """Value and gradient."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
    expected_grads = torch.autograd.grad(expected, leaves, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves), expected_grads, rtol=rtol, atol=atol)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 8),
    extra=st.sampled_from([None, 0, 1, 3]),
    groups=st.sampled_from([None, 1, 2, 4, 100]),
    share_valid=st.sampled_from([None, 0.0, 0.5, 1.0]),
    symmetric=st.booleans(),
    duplicates=st.sampled_from(["positive", "mask"]),
    scale=st.sampled_from([1.0, 14.3, 100.0]),
    exchange=st.sampled_from(["gather", "ring"]),
    tile=st.tuples(st.integers(1, 10), st.integers(1, 10)),
    seed=st.integers(0, 1000),
)
def test_equals_the_twin(n, extra, groups, share_valid, symmetric, duplicates, scale, exchange, tile, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b, s = unit(n, seed=seed), unit(n, seed=seed + 1), number(scale)
    negatives = None if extra is None else unit(extra, seed=seed + 2)
    group = None if groups is None else torch.randint(-groups, groups, (n,), generator=generator)
    valid = None if share_valid is None else torch.rand(n, generator=generator) < share_valid
    options = {"negatives": negatives, "group": group, "valid": valid, "symmetric": symmetric, "duplicates": duplicates}
    leaves = [a, b, s] if negatives is None else [a, b, s, negatives]
    assert_same(
        info_nce(a, b, scale=s, exchange=exchange, tile=tile, **options), info_nce_twin(a, b, s, **options), leaves
    )


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("n", [1, 2, 33])
def test_equals_open_clip(n, scale):
    loss = pytest.importorskip("open_clip.loss").ClipLoss()
    a, b, s = unit(n), unit(n, seed=1), number(scale)
    expected = loss(a, b, s)
    assert expected.dtype == torch.float64  # or the comparison would be no stricter than float32
    assert_same(info_nce(a, b, scale=s, tile=(8, 16)), expected, [a, b, s])


@pytest.mark.parametrize("classes", [3, 1000], ids=["groups", "all differ"])
def test_groups_equal_pytorch_metric_learning_supcon(classes):
    """arXiv:2004.11362, equation 2 (L_out), between two sets."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    a, b = unit(12), unit(12, seed=1)
    group = torch.randint(classes, (12,), generator=torch.Generator().manual_seed(0))
    expected = losses.SupConLoss(temperature=0.07)(
        F.normalize(a, dim=1), group, ref_emb=F.normalize(b, dim=1), ref_labels=group.clone()
    )
    actual = info_nce(
        F.normalize(a, dim=1), F.normalize(b, dim=1), scale=1 / 0.07, group=group, symmetric=False, tile=(5, 7)
    )
    # That library adds the smallest normal number inside its logarithms and divisions.
    assert_same(actual, expected, [a, b], rtol=1e-9)


def test_unique_groups_equal_pytorch_metric_learning_ntxent():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    a, b, group = unit(12), unit(12, seed=1), torch.arange(12)
    expected = losses.NTXentLoss(temperature=0.1)(
        F.normalize(a, dim=1), group, ref_emb=F.normalize(b, dim=1), ref_labels=group.clone()
    )
    actual = info_nce(F.normalize(a, dim=1), F.normalize(b, dim=1), scale=10.0, symmetric=False, tile=(5, 7))
    assert_same(actual, expected, [a, b], rtol=1e-9)


@pytest.mark.parametrize("duplicates", ["positive", "mask"])
def test_unique_groups_are_no_groups(duplicates):
    a, b, s = unit(9), unit(9, seed=1), number(20.0)
    group = torch.tensor([5, -3, 2**60, 0, 1, -7, 8, 99, 4])
    assert_same(info_nce(a, b, scale=s, group=group, duplicates=duplicates), info_nce(a, b, scale=s), [a, b, s])


def test_identical_rows():
    """A collapsed batch: every denominator is n equal terms, and nothing is NaN."""
    a = unit(1).expand(7, -1)
    s = number(100.0)
    loss = info_nce(a, a, scale=s)
    assert loss.item() == pytest.approx(math.log(7), rel=1e-12)
    assert torch.autograd.grad(loss, s)[0].abs() < 1e-12


@pytest.mark.parametrize("options", [{}, {"group": torch.zeros(4, dtype=torch.int64)}], ids=["pairs", "groups"])
def test_trap_3_8b_nothing_valid_is_zero_with_zero_gradients(options):
    leaves = [unit(4), unit(4, seed=1), unit(2, seed=2), number(10.0)]
    a, b, negatives, s = leaves
    loss = info_nce(a, b, scale=s, negatives=negatives, valid=torch.zeros(4, dtype=torch.bool), **options)
    assert loss.item() == 0.0
    for x, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


def test_trap_3_8d_missing_rows_are_no_negatives_and_are_never_read():
    a, b, s = unit(6), unit(6, seed=1), number(10.0)
    valid = torch.tensor([True, False, True, True, False, True])
    poison = torch.where(valid, 0.0, math.nan).unsqueeze(1)
    loss = info_nce(a + poison, b + poison, scale=s, valid=valid)
    assert_same(loss, info_nce(a[valid], b[valid], scale=s), [a, b, s])


@pytest.mark.parametrize("duplicates", ["positive", "mask"])
def test_trap_3_8e_duplicates_do_not_repel(duplicates):
    """Two pairs with the same caption: as plain pairs they push each other apart, as a group they do not."""
    b = unit(3, seed=1).detach()
    b[1] = b[0]
    a, group = b.clone().requires_grad_(), torch.tensor([7, 7, 8])
    plain, grouped = info_nce(a, b, scale=50.0), info_nce(a, b, scale=50.0, group=group, duplicates=duplicates)
    assert plain.item() > 0.4
    assert grouped.item() < (0.4 + plain.item() if duplicates == "positive" else 1e-3)
    repulsion = torch.autograd.grad(grouped, a)[0][0] @ (b[0] - b[2])
    assert repulsion.abs() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_trap_3_4d_low_precision_is_cast_before_the_product(dtype, autocast):
    a, b = (
        unit(64, 32, dtype=dtype).detach().requires_grad_(),
        unit(64, 32, seed=1, dtype=dtype).detach().requires_grad_(),
    )
    s = number(100.0, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = info_nce(a, b, scale=s)
        grads = torch.autograd.grad(loss, (a, b, s))
    assert loss.dtype == torch.float32
    exact = [x.detach().float().requires_grad_() for x in (a, b, s)]
    expected = info_nce(exact[0], exact[1], scale=exact[2])
    assert loss.item() == expected.item()
    for grad, x, whole in zip(grads, (a, b, s), torch.autograd.grad(expected, exact), strict=True):
        assert torch.equal(grad, whole.to(x.dtype))
    # What rounding the logits to bf16 would have done; otherwise the equality above would prove little.
    rounded = F.cross_entropy((100 * a.bfloat16() @ b.bfloat16().T).float(), torch.arange(64))
    assert abs(info_nce(a, b, scale=s, symmetric=False).item() - rounded.item()) > 1e-3


def test_float32_is_as_good_as_open_clips():
    loss = pytest.importorskip("open_clip.loss").ClipLoss()
    a, b, s = unit(300, 64), unit(300, 64, seed=1), number(100.0)
    exact = torch.autograd.grad(info_nce(a, b, scale=s), (a, b, s))
    single = [x.detach().float().requires_grad_() for x in (a, b, s)]
    ours = torch.autograd.grad(info_nce(single[0], single[1], scale=single[2]), single)
    theirs = torch.autograd.grad(loss(*single), single)
    for x, y, z in zip(exact, ours, theirs, strict=True):
        assert (y - x).norm() <= 2 * (z - x).norm() + 1e-6 * x.norm()


def test_trap_3_4e_a_scale_of_one_element_keeps_its_shape():
    a, b = unit(4), unit(4, seed=1)
    flat = torch.tensor([10.0], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(info_nce(a, b, scale=flat), flat)
    assert grad.shape == (1,)
    s = number(10.0)
    assert_same(info_nce(a, b, scale=10.0), info_nce(a, b, scale=s), [a, b])
    assert grad.item() == torch.autograd.grad(info_nce(a, b, scale=s), s)[0].item()


def test_trap_3_4h_a_bias_is_refused():
    with pytest.raises(ValueError, match="takes no bias"):
        InfoNCE(InfoNCE.Config())(unit(2), unit(2), scale=10.0, bias=number(-10.0))


def test_component():
    a, b, s, group = unit(6), unit(6, seed=1), number(10.0), torch.tensor([0, 0, 1, 1, 2, 3])
    valid = torch.tensor([True, True, True, False, True, True])
    configs = (InfoNCE.Config(), InfoNCE.Config(exchange="ring"), InfoNCE.Config(symmetric=False, duplicates="mask"))
    for config in configs:
        parts = InfoNCE(config)(a, b, scale=s, group=group, valid=valid)
        options = {"symmetric": config.symmetric, "duplicates": config.duplicates}
        assert_same(parts["loss"], info_nce_twin(a, b, s, None, group, valid, **options), [a, b, s])
        assert parts["n"].item() == 5
        assert not parts["n"].requires_grad
    assert not InfoNCE.needs_bias


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": torch.zeros(3, 6)}, r"paired rows of one shape.*\(4, 6\) and \(3, 6\)"),
        ({"a": torch.zeros(4, 6, dtype=torch.int64)}, "a must hold floating-point embeddings, got torch.int64"),
        ({"negatives": torch.zeros(3, 5)}, r"negatives must be \[h, 6\].*\(3, 5\)"),
        ({"group": torch.zeros(4)}, r"group must be \[4\] integers"),
        ({"group": torch.zeros(3, dtype=torch.int64)}, r"group must be \[4\] integers"),
        ({"valid": torch.ones(4)}, r"valid must be \[4\] booleans"),
        ({"scale": torch.ones(4)}, r"single numbers, got a tensor of shape \(4,\)"),
        ({"duplicates": "drop"}, "'positive' or 'mask', got 'drop'"),
        ({"exchange": "rings"}, "'gather' or 'ring', got 'rings'"),
    ],
)
def test_errors_say_what_is_wrong(changes, message):
    arguments = {"a": torch.zeros(4, 6), "b": torch.zeros(4, 6), "scale": 10.0, **changes}
    with pytest.raises(ValueError, match=message):
        info_nce(arguments.pop("a"), arguments.pop("b"), **arguments)


def test_soft_targets_equal_the_twin_for_any_weight_and_reach_no_feature():
    generator = torch.Generator().manual_seed(5)
    a, b = (F.normalize(torch.randn(9, 4, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    soft = torch.randn(9, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    for weight, temperature in ((0.0, 0.1), (0.3, 0.05), (1.0, 0.5)):
        options = {"soft_weight": weight, "soft_temperature": temperature}
        a_, b_, scale = (
            a.clone().requires_grad_(),
            b.clone().requires_grad_(),
            torch.tensor(7.0).double().requires_grad_(),
        )
        ours = info_nce(a_, b_, scale=scale, soft=soft, **options)
        twin = info_nce_twin(a_, b_, scale, soft=soft.detach(), **options)
        torch.testing.assert_close(ours, twin)
        for x, y in zip(*(torch.autograd.grad(loss, [a_, b_, scale]) for loss in (ours, twin)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
        ours = info_nce(a_, b_, scale=scale, soft=soft, **options)
        ours.backward()
        assert soft.grad is None


def test_soft_weight_zero_is_the_plain_loss_and_a_sharp_temperature_nearly_so():
    a, b = (F.normalize(torch.randn(7, 4, generator=torch.Generator().manual_seed(i)), dim=1) for i in range(2))
    plain = info_nce(a, b, scale=5.0)
    torch.testing.assert_close(info_nce(a, b, scale=5.0, soft=a, soft_weight=0.0), plain)
    torch.testing.assert_close(info_nce(a, b, scale=5.0, soft=a, soft_temperature=1e-4), plain)


def test_soft_targets_are_refused_with_the_wrong_rows_range_or_company():
    a = F.normalize(torch.randn(4, 3), dim=1)
    with pytest.raises(ValueError, match=r"soft must be \[4, F\]"):
        info_nce(a, a, scale=1.0, soft=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="from 0 to 1"):
        info_nce(a, a, scale=1.0, soft=a, soft_weight=1.5)
    with pytest.raises(ValueError, match="choose one"):
        info_nce(a, a, scale=1.0, soft=a, duplicates="mask")
