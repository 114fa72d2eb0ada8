"""MixedAE against a loop over mixtures; what each side may see; tokens that are alone; absent fields."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from mmrep.config import ConfigError, component
from mmrep.data.sample import stable_hash
from mmrep.masks.masker import draw
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.mixed import recognise
from mmrep.objectives.root import Root
from mmrep.predictors.predictor import sincos
from mmrep.targets.content import standardize
from tests.targets.targets_steps import batch, step

PREDICTOR = {"type": "transformer", "width": 16, "depth": 1, "heads": 2}


def build(encoder=None, frozen=False, **fields):
    torch.manual_seed(0)
    vit = {"size": 16, "patch": 4, "width": 16, "depth": 1, "heads": 2, **(encoder or {})}
    tower = TowerConfig(encoder=component("encoders", "image-vit", **vit), frozen=frozen)
    model = Model(ModelConfig(dim=8, towers={"image": tower}))
    chosen = component("objectives", "mixed", **{"field": "x", "predictor": PREDICTOR, **fields})
    return Root(model, [chosen], fields={"x": "image"}, views={})


def looped(values, own, temperature):
    """Of one mixture [N, D] and its sides [N]."""
    values, losses = F.normalize(values, dim=1), []
    for i in range(len(values)):
        others = [j for j in range(len(values)) if j != i]
        positives = [j for j in others if own[j] == own[i]]
        if not positives:
            continue
        total = sum(math.e ** (values[i] @ values[j] / temperature) for j in others)
        losses.append(-sum((values[i] @ values[j] / temperature - total.log()) for j in positives) / len(positives))
    return torch.stack(losses).mean()


def test_the_loss_is_a_loop_over_mixtures():
    built, B = build(recognition=0.3, temperature=0.2), 3
    given = batch(built, B)
    objective, encoder = built.objectives["mixed"], built.model.tower("image").encoder
    tokens = encoder.tokenize(given.inputs["x"][0])
    content = standardize(encoder.content(given.inputs["x"][0]).values)
    scores = draw(given.seeds + stable_hash("x", 0, "mixed"), 1, 17)
    expected, first = [], []
    for i in range(B):
        other = (i + 1) % B
        mine = set((scores[i, 1:].argsort()[:8] + 1).tolist())
        first.append(mine)
        rows = [tokens.values[i, 0], *(tokens.values[i if t in mine else other, t] for t in range(1, 17))]
        out = encoder.norm(encoder.transformer(torch.stack(rows)[None], None)[0])[0]
        places, painted = sincos(tokens.grid.coords[i], 16), []
        for sample, seen in ((i, sorted(mine)), (other, sorted(set(range(1, 17)) - mine))):
            hidden = sorted(set(range(1, 17)) - set(seen))
            known = objective.predictor.embed(out[[0, *seen]])
            known = torch.cat([known[:1], known[1:] + places[seen]])
            asked = objective.predictor.token + places[hidden]
            said = objective.predictor.transformer(torch.cat([known, asked])[None], None)[0][0, -len(hidden) :]
            painted.append(
                F.mse_loss(objective.predictor.head(objective.predictor.norm(said)), content[sample, hidden])
            )
        sides = [t in mine for t in range(1, 17)]
        expected.append((painted[0] + painted[1]) / 2 + 0.3 * looped(out[1:], sides, 0.2))
    assert len({frozenset(mine) for mine in first}) == B
    expected, found = torch.stack(expected).mean(), built(given)["loss"]
    torch.testing.assert_close(found, expected)
    named = [p for p in built.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(x, named, allow_unused=True) for x in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_a_token_that_is_alone_of_its_sample_is_left_out():
    values = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    own = torch.tensor([[True, False, False, False]])
    found = recognise(values, own, torch.ones_like(own), 0.5)
    torch.testing.assert_close(found[0], looped(values[0], own[0], 0.5))
    plain = torch.tensor([[True, True, False, False]])
    assert recognise(values, own, plain, 0.5) == 0
    recognise(values, own, plain, 0.5).sum().backward()
    assert values.grad.isfinite().all()


def test_of_one_sample_and_of_none():
    built = build()
    assert built(batch(built, 1))["loss"].isfinite()
    given = batch(built, 2)
    given.inputs, given.present = {}, {"x": torch.zeros(2, dtype=torch.bool)}
    loss = built(given)["loss"]
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None for p in built.objectives.parameters() if p.requires_grad)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"field": "xx"}, "unknown 'xx'"),
    ({"frozen": True}, "is frozen: nothing would learn"),
    ({"predictor": {"type": "tokenwise"}}, "reads what is hidden"),
])  # fmt: skip
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        build(**wrong)


def test_ragged_tokens_are_refused():
    built = build(encoder={"resize": "native", "max_patches": 12, "enlarge": True})
    pictures = built.model.tower("image").encoder.examples(6, 0)
    with pytest.raises(ValueError, match="these are ragged"):
        built.objectives["mixed"](step(built, batch(built, pictures=pictures)))
