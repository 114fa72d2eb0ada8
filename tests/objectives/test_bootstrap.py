"""Bootstrap: lightly's values and gradients, where gradients go, groups, missing samples, micro-batches, batch norm."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from accelerate import Accelerator
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from torch.nn import functional as F

from mmrep.config import ConfigError, component
from mmrep.objectives._heads import BatchNorm
from mmrep.training.cached import forward_backward
from mmrep.world import LocalWorld
from tests.objectives.ssl_toys import batch, build, in_parts, nudge, reached, step_of

WORLD = LocalWorld()


def bootstrap(**fields):
    chosen = {"fields": ["x"], "predictor": {"hidden": 7, "norm": "none"}, **fields}
    return component("objectives", "bootstrap", **chosen)


def root_of(**fields):
    root = build(bootstrap(**fields)).double()
    return nudge(root) if root.teacher is not None else root


def double(b):
    for readings in b.inputs.values():
        for values in readings:
            values["values"] = values["values"].double()
    return b


def slots(root, b, field="x", views=(0, 1)):
    """Predictions and targets, computed apart from the objective."""
    step, objective = step_of(root, b), root.objectives["bootstrap"]
    z = [step.embedding(field, v) for v in views]
    p = [objective.predictors[field](x, WORLD) if field in objective.predictors else x for x in z]
    if root.teacher is None:
        return p, [x.detach() for x in z]
    return p, [step.taught_embedding(field, v) for v in views]


def equal(ours, theirs, root):
    """Value and gradient of two scalars of one root."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    named = [p for p in root.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad(x, named, allow_unused=True) for x in (ours, theirs)), strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("target", ["teacher", "stop-gradient"])
def test_cosine_is_lightlys_in_both_directions(target):
    root, b = root_of(target=target), double(batch())
    (p0, p1), (t0, t1) = slots(root, b)
    theirs = NegativeCosineSimilarity()
    expected = ((2 + 2 * theirs(p0, t1)) + (2 + 2 * theirs(p1, t0))) / 2
    out = root(b)
    equal(out["loss"], expected, root)
    assert out["bootstrap/cosine"] == pytest.approx(1 - expected.item() / 2)


def test_moco_is_the_cross_entropy_of_its_algorithm_and_near_lightlys():
    root, b = root_of(loss="info-nce", temperature=0.3), double(batch())
    (p0, p1), (t0, t1) = slots(root, b)
    expected = torch.zeros(())
    for p, t in ((p0, t1), (p1, t0)):
        logits = F.normalize(p, dim=1) @ F.normalize(t, dim=1).T / 0.3
        expected = expected + 0.6 * F.cross_entropy(logits, torch.arange(9)) / 2
    equal(root(b)["loss"], expected, root)
    plain = root_of(loss="info-nce", temperature=0.3, scaled=False)
    torch.testing.assert_close(plain(b)["loss"], expected / 0.6)


def test_moco_against_lightlys_memory_bank():
    """Lightly's contrast with a bank: one positive, the bank's rows are negatives; with the others' targets in it."""
    root, b = root_of(loss="info-nce", temperature=0.3, scaled=False, symmetric=False), double(batch())
    (p0, _), (_, t1) = slots(root, b)
    each = []
    for i in range(9):
        rest = [j for j in range(9) if j != i]
        theirs = NTXentLoss(temperature=0.3, memory_bank_size=(8, 6))
        theirs.memory_bank.bank = F.normalize(t1[rest], dim=1)
        theirs.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.long)
        theirs.memory_bank.size = (8, 6)
        each.append(theirs(p0[i : i + 1], t1[i : i + 1]))
    equal(root(b)["loss"], torch.stack(each).mean(), root)


def test_tribyol_is_all_ordered_pairs_of_three_views():
    root, b = root_of(views=[0, 1, 2], loss="mse"), double(batch(views=3))
    p, t = slots(root, b, views=(0, 1, 2))
    pairs = [(p[i] - t[j]).square().sum(1).mean() for i, j in permutations(range(3), 2)]
    assert len(pairs) == 6
    equal(root(b)["loss"], torch.stack(pairs).mean(), root)
    half = root_of(views=[0, 1, 2], loss="mse", symmetric=False)
    torch.testing.assert_close(half(b)["loss"], torch.stack([pairs[0], pairs[1], pairs[3]]).mean())


@pytest.mark.parametrize("target", ["teacher", "stop-gradient"])
@pytest.mark.parametrize("loss", ["cosine", "mse", "info-nce"])
def test_no_gradient_reaches_a_target(target, loss):
    """Moving the second view by its gradient would have to go through the prediction, which reads the first alone."""
    root, b = root_of(target=target, loss=loss, symmetric=False), double(batch())
    first, second = (b.inputs["x"][v]["values"].requires_grad_() for v in (0, 1))
    root(b)["loss"].backward()
    assert first.grad.abs().max() > 1e-6
    assert second.grad is None or not second.grad.any()
    if root.teacher is not None:
        assert all(p.grad is None for p in root.teacher.parameters())


def test_gradients_reach_tower_and_predictor():
    root = root_of()
    names = reached(root(double(batch()))["loss"], root)
    assert {n for n, p in root.named_parameters() if p.requires_grad} - names <= {
        "model.towers.a.pool.attention.in_proj_bias"
    }
    assert any(n.startswith("objectives.bootstrap.predictors.x") for n in names)
    assert not any(n.startswith("teacher") for n in names)


def test_across_fields_each_predicts_the_other_where_both_are():
    missing = {("x", 1), ("y", 4), ("y", 5)}
    chosen = bootstrap(fields=["x", "y"], views=[0])
    root = nudge(build(chosen, fields={"x": "a", "y": "b"}).double())
    b, keep = double(batch(fields="xy", views=1, missing=missing)), [0, 2, 3, 6, 7, 8]
    step, predictors = step_of(root, b), root.objectives["bootstrap"].predictors
    expected = torch.zeros(())
    for a, o in (("x", "y"), ("y", "x")):
        p, t = predictors[a](step.embedding(a)[keep], WORLD), step.taught_embedding(o)[keep]
        expected = expected + (1 - F.cosine_similarity(p, t)).mean()
    equal(root(b)["loss"], expected, root)


def test_samples_of_one_group_are_no_negatives():
    group = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7])
    root = root_of(loss="info-nce", symmetric=False, temperature=0.5, scaled=False)
    b = double(batch(group=group))
    (p0, _), (_, t1) = slots(root, b)
    logits = F.normalize(p0, dim=1) @ F.normalize(t1, dim=1).T / 0.5
    logits = logits.masked_fill((group[:, None] == group) & ~torch.eye(9, dtype=torch.bool), -torch.inf)
    equal(root(b)["loss"], F.cross_entropy(logits, torch.arange(9)), root)
    free = root_of(loss="info-nce", symmetric=False, temperature=0.5, scaled=False, use_group=False)
    assert free(b)["loss"] > root(b)["loss"]


def test_an_absent_field_costs_nothing_and_leaves_a_path_to_every_parameter():
    root = root_of(predictor={"hidden": 7})
    out = root(double(batch(missing={("x", i) for i in range(9)})))
    out["loss"].backward()
    assert out["loss"] == 0
    assert all(p.grad is not None and not p.grad.any() for p in root.parameters() if p.requires_grad)


@pytest.mark.parametrize("loss", ["cosine", "info-nce"])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(loss, norm):
    """Without batch norm in the towers; that of the predictor is over the whole batch either way."""
    found, missing = [], {("x", 2), ("x", 8)}
    for b in (in_parts([0, 4, 9, 11], missing=missing), batch(range(11), missing=missing)):
        root = root_of(loss=loss, predictor={"hidden": 7, "norm": norm})
        for part in b.parts or [b]:
            double(part)
        report = forward_backward(root, Accelerator(cpu=True), b)
        found.append([report["loss"].detach(), *(p.grad for p in root.parameters() if p.requires_grad)])
    for parts, whole in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)


def test_batch_norm_is_torchs():
    ours, theirs = BatchNorm(5).double(), torch.nn.BatchNorm1d(5).double()
    for x in torch.randn(3, 7, 5, dtype=torch.float64):
        torch.testing.assert_close(ours(x, WORLD), theirs(x))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x, WORLD), theirs.eval()(x))
    before = ours.train().running_mean.clone()
    assert ours(x[:1], WORLD).isfinite().all()  # torch's refuses one row
    assert torch.equal(ours.running_mean, before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fields": ["xx"]}, "unknown 'xx'"),
        ({"views": [0]}, "has nothing to predict"),
        ({"views": [0, 0]}, "names one twice"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        build(bootstrap(**wrong))


def test_an_online_target_has_its_gradient():
    root, b = root_of(target="online", loss="mse", symmetric=False), double(batch())
    assert root.teacher is None
    step, predictor = step_of(root, b), root.objectives["bootstrap"].predictors["x"]
    past, future = (step.embedding("x", view) for view in (0, 1))
    equal(root(b)["loss"], (predictor(past, WORLD) - future).square().sum(1).mean(), root)
    values = b.inputs["x"][1]["values"].requires_grad_()
    root(b)["loss"].backward()
    assert values.grad.any()
