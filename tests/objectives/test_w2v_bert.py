"""W2v-BERT: the contrast half way up and the codes at the top, against loops over blocks and transformers' loss."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmrep.config import ConfigError, component
from mmrep.objectives.root import Root
from tests.targets.targets_steps import batch, root, step

GUMBEL = {"type": "gumbel-codes", "groups": 2, "codes": 6, "dim": 8, "width": 5}
FIELDS = {"layer": 2, "target": GUMBEL, "input": "mask-token", "predictor": {"type": "tokenwise"}, "negatives": "all",
          "mask": {"type": "random", "ratio": 0.5}}  # fmt: skip


def built_with(**fields) -> Root:
    model = root().model
    torch.manual_seed(3)
    chosen = component("objectives", "w2v-bert", field="x", **{**FIELDS, **fields})
    return Root(model, [chosen], fields={"x": "image"}, views={}).train()


def test_the_loss_is_that_of_both_levels():
    built = built_with(codes=0.7)
    objective = built.objectives["w2v-bert"]
    s = step(built, batch(built))
    out = objective(s)
    tokens, encoder, target = s.tokens("x"), built.model.tower("image").encoder, objective.target
    from tests.targets.targets_steps import drawn

    built.objectives["masked"] = objective
    hidden = drawn(built, s)
    values = torch.where(hidden[..., None], objective.token + tokens.positions, tokens.values)
    layers = []
    for block in encoder.transformer.blocks:
        values = block(values)
        layers.append(values)
    middle, top = objective.norm(layers[1]), encoder.norm(layers[2])
    vectors = target(s, "x").values
    total = target.parts()["loss"]
    for b in range(4):
        at = hidden[b].nonzero()[:, 0]
        predicted = objective.predictor.layers(middle[b, at])
        scores = F.cosine_similarity(predicted[:, None], vectors[b, at][None], dim=-1) / 0.1
        same = F.cosine_similarity(vectors[b, at][:, None], vectors[b, at][None], dim=-1) > 1 - 1e-6
        scores = scores.masked_fill(same & ~torch.eye(len(at), dtype=torch.bool), -torch.inf)
        total = total + F.cross_entropy(scores, torch.arange(len(at))) / 4
        logits = objective.classify(top[b, at]).view(len(at), 2, 6)
        codes = target.chosen[b, at]
        for g in range(2):
            total = total + 0.7 * F.cross_entropy(logits[:, g], codes[:, g]) / 2 / 4
    torch.testing.assert_close(out["loss"], total)
    for weight in (encoder.patches.weight, target.logits.weight, objective.token):
        (mine,) = torch.autograd.grad(out["loss"], weight, retain_graph=True)
        (his,) = torch.autograd.grad(total, weight, retain_graph=True)
        torch.testing.assert_close(mine, his, atol=1e-5, rtol=1e-4)


def test_every_parameter_has_a_gradient_and_the_contrast_reaches_lower_blocks_alone():
    built = built_with(codes=0.0)
    built(batch(built))["loss"].backward()
    encoder = built.model.tower("image").encoder
    reached = [bool(block.mlp[0].weight.grad.abs().sum() > 0) for block in encoder.transformer.blocks]
    assert reached == [True, True, False]
    assert all(p.grad is not None for p in built.parameters() if p.requires_grad)
    both = built_with()
    both(batch(both))["loss"].backward()
    assert both.model.tower("image").encoder.transformer.blocks[2].mlp[0].weight.grad.abs().sum() > 0


def test_codes_are_those_whose_vectors_are_contrasted():
    built = built_with()
    target = built.objectives["w2v-bert"].target
    out = target(step(built, batch(built)), "x").values
    vectors = torch.cat([target.codebook[g][target.chosen[..., g]] for g in range(2)], -1)
    torch.testing.assert_close(out, target.project(vectors))


@pytest.mark.parametrize(("fields", "message"), [
    ({"layer": 3}, "layer: 3 leaves nothing above it in an encoder of 3 layers"),
    ({"target": {"type": "content"}}, "target: the codes that are predicted are those of `gumbel-codes`"),
    ({"input": "visible", "predictor": {"type": "transformer"}}, "input: mask-token"),
    ({"predictor": {"type": "transformer"}}, "predictor: it reads one token at a time"),
])  # fmt: skip
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        built_with(**fields)
