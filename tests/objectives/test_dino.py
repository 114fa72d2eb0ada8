"""DINO and iBOT: lightly's values and gradients, the centre, Sinkhorn, temperatures, what is hidden, what rests."""

from __future__ import annotations

import math

import pytest
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn

from mmrep.config import ConfigError, component
from mmrep.losses.sinkhorn import sinkhorn
from mmrep.objectives._assign import Assign, AssignConfig
from mmrep.objectives._heads import Prototypes
from mmrep.schedules import Clock
from mmrep.world import LocalWorld
from tests.objectives.ssl_toys import batch, build, nudge, reached, step_of

WORLD = LocalWorld()
HEAD = {"prototypes": 11, "hidden": 9, "bottleneck": 5, "layers": 2}
FLAT = {"temperature": 0.0625, "start": 0.0625, "momentum": 0.8}  # lightly rounds it to float32: here exactly
MASK = {"type": "random", "ratio": 0.5}


def dino(**fields):
    return component("objectives", "dino", **{"field": "x", "head": HEAD, "assign": FLAT, **fields})


def root_of(**fields):
    return nudge(build(dino(**fields)).double())


def double(b):
    for readings in b.inputs.values():
        for values in readings:
            values["values"] = values["values"].double()
    return b


def logits(root, b, student=(0, 1), teacher=(0, 1)):
    step, objective = step_of(root, b), root.objectives["dino"]
    twin = root.teacher.of(objective.head)
    s = [objective.head(step.pooled("x", v), WORLD) for v in student]
    return [twin(step.taught_pooled("x", v), WORLD) for v in teacher], s


def same(ours, theirs, root, rtol=1e-9):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-12)
    named = [p for p in root.parameters() if p.requires_grad]
    found = (torch.autograd.grad(x, named, allow_unused=True, retain_graph=True) for x in (ours, theirs))
    for a, b in zip(*found, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("locals_", [(), (2, 3)])
def test_loss_gradient_and_centre_are_lightlys_over_some_steps(locals_):
    """The centre of a step is used before it takes that step in."""
    root = root_of(locals=locals_)
    theirs = DINOLoss(11, teacher_temp=0.0625, student_temp=0.1, center_momentum=0.8).double()
    for number in range(3):
        b = double(batch(views=4, step=number))
        teacher, student = logits(root, b, (0, 1, *locals_))
        expected = theirs(teacher, student)
        before = root.objectives["dino"].assign.centre.clone()
        same(root(b)["loss"], expected, root)
        assert torch.equal(root.objectives["dino"].assign.centre, before)
        root.objectives["dino"].after_optimizer_step()
        torch.testing.assert_close(root.objectives["dino"].assign.centre, theirs.center[0, 0])
    assert theirs.center.abs().max() > 0.01


def test_the_centre_rests_in_evaluation():
    root, b = root_of(), double(batch())
    root.eval()
    root(b)
    root.after_optimizer_step()
    assert not root.objectives["dino"].assign.centre.any()


def ibot(**fields):
    patch = {"mask": MASK, "share": 0.6, "assign": FLAT, **fields}
    return root_of(patch=patch)


@pytest.mark.parametrize("own", [True, False])
def test_the_patch_loss_is_lightlys(own):
    root, b = ibot(head={**HEAD, "prototypes": 6} if own else None), double(batch())
    objective = root.objectives["dino"]
    step, encoder = step_of(root, b), root.model.tower("a").encoder
    head = objective.patch_head if own else objective.head
    seen, unmasked = {}, 0
    original = encoder.encode
    calls = []

    def spy(tokens, *rest):
        calls.append(tokens)
        return original(tokens, *rest)

    encoder.encode = spy
    out = root(b)
    encoder.encode = original
    expected = torch.zeros((), dtype=torch.float64)
    for view in (0, 1):  # which tokens were hidden is read off what the encoder was given
        hidden = ((calls[view].values - step.tokens("x", view).values).abs() > 1e-9).any(-1)
        assert not (hidden & ~step.tokens("x", view).grid.valid).any()
        unmasked += int((hidden.sum(1) == 0).sum())
        student = head(original(calls[view]).tokens.values[hidden], WORLD)
        teacher = root.teacher.of(head)(step.taught("x", view).tokens.values[hidden], WORLD)
        theirs = IBOTPatchLoss(student.shape[1], teacher_temp=0.0625).double()
        expected = expected + theirs(teacher, student, hidden[:, None, :]) / 2
        seen[view] = hidden
    assert 0 < unmasked < 18  # images without hidden tokens are among them
    assert not torch.equal(seen[0], seen[1])
    torch.testing.assert_close(out["dino/patches"], expected.detach(), rtol=1e-7, atol=0)  # their 1/|M| is float32
    pooled = [objective.head(root.model.tower("a").pool(original(calls[v])), WORLD) for v in (0, 1)]
    teacher = [root.teacher.of(objective.head)(step.taught_pooled("x", v), WORLD) for v in (0, 1)]
    views = DINOLoss(11, teacher_temp=0.0625).double()(teacher, pooled)
    same(out["loss"], views + expected, root, rtol=1e-7)
    assert objective.token.grad is None and "objectives.dino.token" in reached(root(b)["loss"], root)  # noqa: PT018


def test_the_centre_of_patches_is_the_mean_of_hidden_tokens():
    root, b = ibot(head=None), double(batch())
    objective, found = root.objectives["dino"], []
    objective.patch_assign.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    root(b)
    objective.after_optimizer_step()
    torch.testing.assert_close(objective.patch_assign.centre, 0.2 * torch.cat(found).mean(0))
    assert len(found) == 2


def test_no_image_may_be_hidden():
    root, b = ibot(share=1e-6, head=None), double(batch())
    out = root(b)
    assert out["dino/patches"] == 0
    out["loss"].backward()
    root.after_optimizer_step()
    assert not root.objectives["dino"].patch_assign.centre.any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in root.parameters() if p.requires_grad)


@pytest.mark.parametrize("more", [{}, {"patch": {"mask": MASK, "head": HEAD}}, {"assign": {"by": "sinkhorn"}}])
def test_an_absent_field_costs_nothing_and_leaves_a_path_to_every_parameter(more):
    root = root_of(**more)
    out = root(double(batch(missing={("x", i) for i in range(9)})))
    out["loss"].backward()
    root.after_optimizer_step()
    assert out["loss"] == 0
    assert all(p.grad is not None and not p.grad.any() for p in root.parameters() if p.requires_grad)
    assert not root.objectives["dino"].assign.centre.any()


def test_gradients_reach_the_student_alone_and_the_projector_rests():
    root = root_of(patch={"mask": MASK, "head": HEAD})
    b = double(batch())
    names = reached(root(b)["loss"], root)
    trained = {n for n, p in root.named_parameters() if p.requires_grad}
    assert trained - names <= {"model.towers.a.pool.attention.in_proj_bias"}
    assert not any("projector" in n or n.startswith("teacher") for n in trained)


def test_prototypes_are_frozen_first():
    root, b = root_of(head={**HEAD, "freeze": 2}), double(batch())
    for step, frozen in ((0, True), (1, True), (2, False)):
        root.clock = Clock(step=step)
        root.zero_grad()
        root(b)["loss"].backward()
        gradient = root.objectives["dino"].head.prototypes.weight.grad
        assert bool(gradient.any()) is not frozen


def test_prototypes_are_directions():
    prototypes, x = Prototypes(5, 7), torch.randn(3, 5)
    out = prototypes(x)
    assert out.abs().max() <= 1
    with torch.no_grad():
        prototypes.weight *= 0.5  # as weight decay would
    torch.testing.assert_close(prototypes(3 * x), out)


def test_the_teachers_temperature_warms_up():
    assign = Assign(AssignConfig(temperature=0.07, start=0.04, warmup=0.5), 3)
    found = [assign.temperature(Clock(step, 20)) for step in (0, 5, 10, 20)]
    assert found == pytest.approx([0.04, 0.055, 0.07, 0.07])
    steps = Assign(AssignConfig(temperature=0.07, start=0.04, warmup=30), 3)
    assert steps.temperature(Clock(15)) == pytest.approx(0.055)


def test_a_collapse_shows():
    """All prototypes alike: the loss stands at log K. All samples at one: no usage."""
    root, b = root_of(), double(batch())
    fine = root(b)
    head, copy = root.objectives["dino"].head, root.teacher.of(root.objectives["dino"].head)
    with torch.no_grad():
        for h in (head, copy):
            h.prototypes.weight.copy_(h.prototypes.weight[:1].clone().expand_as(h.prototypes.weight))
    flat = root(b)
    assert flat["loss"].item() == pytest.approx(math.log(11))
    for part in ("plateau", "entropy", "usage"):
        assert flat[f"dino/{part}"].item() == pytest.approx(1.0)
    assert fine["dino/entropy"] < 0.95
    root.objectives["dino"].assign.centre[0] = -100.0
    one = root(b)
    assert one["dino/usage"] < 1e-6
    assert one["dino/entropy"] < 1e-6


def test_sinkhorn_is_lightlys():
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(x, 0.5), lightly_sinkhorn(x, epsilon=0.5), rtol=1e-10, atol=1e-12)
    many = sinkhorn(x, 0.5, iterations=50)
    torch.testing.assert_close(many.sum(0), torch.full((5,), 12 / 5, dtype=torch.float64))
    torch.testing.assert_close(many.sum(1), torch.ones(12, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_trap_f9_large_logits_are_finite(dtype):
    x = 10 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    x[3] -= 500  # a row far below the others vanishes where only the largest of all is subtracted
    found = sinkhorn(x.to(dtype), 0.05)
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(1), torch.ones(64))


def test_trap_f7_sinkhorn_is_run_view_by_view():
    root, b = root_of(assign={"by": "sinkhorn", "temperature": 0.1, "start": 0.1}), double(batch())
    teacher, student = logits(root, b)
    q = [lightly_sinkhorn(t, epsilon=0.1) for t in teacher]
    log = [(s / 0.1).log_softmax(1) for s in student]
    expected = -((q[0] * log[1]).sum(1).mean() + (q[1] * log[0]).sum(1).mean()) / 2
    same(root(b)["loss"], expected, root)
    together = lightly_sinkhorn(torch.cat(teacher), epsilon=0.1).split(9)
    assert abs(-(together[0] * log[1]).sum(1).mean() + (q[0] * log[1]).sum(1).mean()) > 1e-4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"field": "xx"}, "unknown 'xx'"),
        ({"globals": [0]}, "is one view"),
        ({"locals": [1]}, "name a view twice"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        build(dino(**wrong))
