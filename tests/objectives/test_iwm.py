"""IWM: the clean reading predicted from a changed one, and whether the predictor heeds what it is told."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmrep.config import ConfigError, component
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives._condition import reciprocal_rank
from mmrep.objectives.root import Root
from mmrep.recipe import read_recipe
from mmrep.step import Step
from mmrep.world import LocalWorld
from tests.targets.targets_steps import batch

B = 5


def build(**changes):
    recipe = read_recipe("iwm", [f"objectives[0].{key}={value}" for key, value in changes.items()])
    torch.manual_seed(0)
    encoder = component("encoders", "image-vit", size=16, patch=4, width=24, depth=1, heads=2, class_token=False)
    model = Model(ModelConfig(dim=8, towers={"image": TowerConfig(encoder=encoder)}))
    views = {"image": [view.build() for view in recipe.data.views["image"]]}
    root = Root(model, recipe.objectives, fields={"image": "image"}, views=views)
    with torch.no_grad():
        for parameter in root.teacher.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    given = batch(root, B)
    given.inputs, given.present = {"image": given.inputs["x"] * 2}, {"image": given.present["x"]}
    step = Step(model, given, fields=root.fields, views=views, world=LocalWorld(), memo=root.memo, teacher=root.teacher)
    return root, root.objectives["jepa"], step


def losses(root, objective, step, seen, colours):
    """Of each sample, of what was predicted under these colours, against the teacher's tokens of the clean reading."""
    taught = root.teacher.of(root.model.tower("image").encoder)(step.inputs("image", 1)).tokens.values
    taught = F.layer_norm(taught, taught.shape[-1:])
    context, index, tokens, target = seen
    condition = colours.flatten(1)[:, None].repeat_interleave(4, 0)
    out = objective.predictor(context, index, tokens, target, condition)
    each = []
    for i in range(B):
        rows = range(4 * i, 4 * i + 4)
        each.append(torch.cat([F.smooth_l1_loss(out[r][target[r] >= 0], taught[i, target[r][target[r] >= 0]],
                                                reduction="none").mean(1) for r in rows]).mean())  # fmt: skip
    return torch.stack(each)


def test_the_clean_reading_is_predicted_from_the_changed_one_told_the_change():
    root, objective, step = build()
    changed, clean = (step.params("image", view) for view in (0, 1))
    assert torch.equal(changed["matrix"], clean["matrix"])  # one geometry
    still = torch.eye(3, 4).expand(B, -1, -1)
    torch.testing.assert_close(clean["color"], still, atol=1e-5, rtol=0)
    assert (changed["color"] - still).abs().amax((1, 2)).min() > 1e-3
    seen, inner = [], objective.predictor.forward
    objective.predictor.forward = lambda *args: (seen.append(args[:4]), inner(*args))[1]
    out = objective(step)
    objective.predictor.forward = inner
    each = losses(root, objective, step, seen[0], changed["color"])
    torch.testing.assert_close(out["loss"], each.mean())
    context = seen[0][0].values.detach()
    _, objective2, step2 = build()
    step2.batch.inputs["image"][1] = {"pixels": 255 - step2.batch.inputs["image"][1]["pixels"]}
    seen2, inner2 = [], objective2.predictor.forward
    objective2.predictor.forward = lambda *args: (seen2.append(args[:4]), inner2(*args))[1]
    assert objective2(step2)["loss"] != out["loss"]
    assert torch.equal(seen2[0][0].values, context)  # what is encoded is the changed reading alone


def test_the_reciprocal_rank_is_a_loop_over_conditions():
    root, objective, step = build(alternatives=3)
    seen, inner = [], objective.predictor.forward
    objective.predictor.forward = lambda *args: (seen.append(args[:4]), inner(*args))[1]
    found = objective(step)["mrr"]
    objective.predictor.forward = inner
    assert len(seen) == 4
    colours = step.params("image", 0)["color"]
    with torch.no_grad():
        own = losses(root, objective, step, seen[0], colours)
        ranks = torch.ones(B)
        for i in range(B):
            for k in (1, 2, 3):
                turned = colours.clone()
                turned[i] = colours[(i + k) % B]
                ranks[i] += float(losses(root, objective, step, seen[0], turned)[i] < own[i])
    torch.testing.assert_close(found, (1 / ranks).mean())


def test_ranks_of_known_losses():
    own = torch.tensor([1.0, 1.0, 1.0, 1.0])
    others = {1: torch.tensor([2.0, 0.5, 1.0, 0.0]), 2: torch.tensor([2.0, 2.0, 1.0, 0.5]), 3: torch.full((4,), 9.0)}
    found = reciprocal_rank(own, others.__getitem__, 10)  # no more than there are
    assert float(found) == pytest.approx((1 + 1 / 2 + 1 / 2 + 1 / 3) / 4)


def test_alternatives_need_a_condition():
    with pytest.raises(ConfigError, match="there is no condition to try others of"):
        build(condition="{}")
