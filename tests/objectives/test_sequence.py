"""seq-JEPA: the next view from those before and the actions between them, against a loop; gradients; absent fields."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from mmrep.config import ConfigError, component
from mmrep.training.cached import forward_backward
from mmrep.world import LocalWorld
from tests.objectives.ssl_toys import batch, build, in_parts, nudge, step_of

HOW = {"field": "x", "views": [0, 1, 2], "condition": {"angle": 1, "box": 2}, "action": 4, "heads": 2, "depth": 1,
       "hidden": 7}  # fmt: skip


def actions(b, views=3):
    """Parameters of each view, a function of the sample."""
    n = int(b.present["x"].sum())
    rows = torch.tensor([int(i) for i in b.ids])[b.present["x"]].float()
    b.params = {"x": [
        {"angle": (v + 1) ** 2 * rows / 9, "box": torch.stack([rows - v**2, rows * v], 1).view(n, 2, 1) / 9}
        for v in range(views)
    ]}  # fmt: skip
    return b


def root_of(**fields):
    root = build(component("objectives", "sequence", **{**HOW, **fields}))
    return root if root.teacher is None else nudge(root)


@pytest.mark.parametrize("target", ["teacher", "stop-gradient"])
def test_the_loss_is_the_formula(target):
    root, b = root_of(target=target), actions(batch(views=3, missing={("x", 2)}))
    step, objective, expected = step_of(root, b), root.objectives["sequence"], []
    tower = root.model.tower("a")
    assert step.params("x", 1)["box"].shape == (8, 2, 1)
    for row, i in enumerate(i for i in range(9) if i != 2):
        one = actions(batch([i], views=3))
        z = [tower.pool(tower.encoder(one.inputs["x"][v]))[0] for v in (0, 1)]
        figures = [torch.cat([b.params["x"][v][name][row].flatten() for name in ("angle", "box")]) for v in range(3)]
        a = [objective.action(figures[t + 1] - figures[t]) for t in (0, 1)]
        tokens = torch.stack([objective.query, torch.cat([z[0], a[0]]), torch.cat([z[1], a[1]])])[None]
        g = objective.norm(objective.transformer(tokens)[0][0, 0])
        p = objective.predictor(torch.cat([g, a[1]])[None], LocalWorld())[0]
        twin = tower if target == "stop-gradient" else None
        if twin is None:
            encoder, pool = (root.teacher.of(part) for part in (tower.encoder, tower.pool))
            wanted = pool(encoder(one.inputs["x"][2]))[0]
        else:
            wanted = tower.pool(tower.encoder(one.inputs["x"][2]))[0].detach()
        expected.append(1 - F.cosine_similarity(p, wanted.detach(), dim=0))
    expected = torch.stack(expected).mean()
    out = root(b)
    torch.testing.assert_close(out["loss"], expected)
    assert float(out["sequence/cosine"]) == pytest.approx(1 - float(expected), abs=1e-5)
    named = [p for p in root.parameters() if p.requires_grad]
    found = [torch.autograd.grad(x, named, allow_unused=True) for x in (out["loss"], expected)]
    for ours, theirs in zip(*found, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_no_gradient_comes_through_the_view_that_is_predicted():
    for target in ("teacher", "stop-gradient"):
        root, b = root_of(target=target), actions(batch(views=3))
        values = [b.inputs["x"][v]["values"].requires_grad_() for v in range(3)]
        root(b)["loss"].backward()
        assert values[0].grad.any()
        assert values[1].grad.any()
        assert values[2].grad is None or not values[2].grad.any()


def test_the_last_action_is_told_and_the_first_view_has_none_before():
    """Moving all parameters together changes no action; moving the last view's alone changes the last."""
    root, b = root_of(), actions(batch(views=3))
    base = root(b)["loss"]
    for views, same in (((0, 1, 2), True), ((2,), False), ((0,), False)):
        moved = actions(batch(views=3))
        for v in views:
            moved.params["x"][v]["angle"] = moved.params["x"][v]["angle"] + 1
        assert torch.allclose(root(moved)["loss"], base, atol=1e-6) is same


def test_without_actions_and_where_no_sample_has_the_field():
    root = root_of(condition={})
    assert root(batch(views=3))["loss"].isfinite()
    out = root(batch(views=3, missing={("x", i) for i in range(9)}))
    out["loss"].backward()
    assert out["loss"] == 0
    assert all(p.grad is not None for p in root.objectives.parameters())


def test_micro_batches_have_the_gradient_of_the_whole():
    found, missing = [], {("x", 2)}
    cut = in_parts([0, 3, 9], views=3, missing=missing)
    for part in cut.parts:
        actions(part)
    for b in (cut, actions(batch(views=3, missing=missing))):
        root = root_of()
        report = forward_backward(root, Accelerator(cpu=True), b)
        found.append([report["loss"].detach(), *(p.grad for p in root.parameters() if p.requires_grad)])
    for parts, whole in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"field": "xx"}, "unknown 'xx'"),
    ({"views": [0, 0]}, "names one twice"),
    ({"heads": 5}, "heads: 5 does not divide 12"),
])  # fmt: skip
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        root_of(**wrong)


def test_a_parameter_that_the_view_lacks_is_named():
    with pytest.raises(ConfigError, match=r"objectives.sequence.condition.turn: 1, but view 0 of 'x' has no such"):
        root_of(condition={"turn": 1}, action=2)(actions(batch(views=3)))
