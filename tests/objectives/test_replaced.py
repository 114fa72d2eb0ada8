"""Replaced token detection against a loop over texts, and its traps."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from mmrep.config import ConfigError, component
from mmrep.data.batch import Batch
from mmrep.data.sample import stable_hash
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.replaced import draw
from mmrep.objectives.root import Root
from mmrep.training.cached import forward_backward

WORDS = ["a bird", None, "an old house", "tree", None, "the cat sat"]
GENERATOR = {"width": 8, "depth": 1, "heads": 2}


def root(found=50.0, **fields) -> Root:
    torch.manual_seed(0)
    encoder = component("encoders", "text-transformer", tokenizer="bytes", width=16, depth=2, heads=2, max_length=16)
    model = Model(ModelConfig(dim=8, towers={"text": TowerConfig(encoder=encoder, **fields)}))
    mask = {"type": "random", "ratio": 0.4}
    chosen = component("objectives", "replaced", field="t", generator=GENERATOR, mask=mask, found=found)
    return Root(model, [chosen], fields={"t": "text"}, views={}).train()


def batch(built, rows=range(6)) -> Batch:
    encoder, rows = built.model.tower("text").encoder, list(rows)
    words = [WORDS[i] for i in rows if WORDS[i] is not None]
    inputs = {"t": [encoder.collate([encoder.prepare(word) for word in words])]} if words else {}
    present = torch.tensor([WORDS[i] is not None for i in rows])
    return Batch(ids=[str(i) for i in rows], inputs=inputs, present={"t": present}, seeds=torch.tensor(rows) * 7 + 1)


def test_the_loss_is_that_of_a_loop_over_texts():
    built = root()
    given = batch(built)
    out = built(given)
    objective, encoder = built.objectives["replaced"], built.model.tower("text").encoder
    total, shares, right = torch.zeros(()), [], []
    for i in (0, 2, 3, 5):
        inputs = encoder.collate([encoder.prepare(WORDS[i])])
        seeds = given.seeds[i : i + 1] + stable_hash("t", 0, "replaced", None)
        tokens, ids = encoder.tokenize(inputs), inputs["ids"][0]
        hidden = objective.masker(tokens.grid, seeds).target[0, 0]
        values = tokens.values.clone()
        values[0, hidden] = objective.token + tokens.positions[0, hidden]
        logits = objective.guess(objective.norm(objective.transformer(objective.embed(values))[0]))
        generator = F.cross_entropy(logits[0, hidden], ids[hidden])
        changed = ids.clone()
        changed[hidden] = draw(logits.detach(), seeds)[0, hidden]
        again = encoder({**inputs, "ids": changed[None]}).tokens.values[0, 1:-1]  # begin and end are not asked
        said = objective.head(again)[:, 0]
        other = (changed != ids)[1:-1].float()
        total = total + (generator + 50 * F.binary_cross_entropy_with_logits(said, other)) / 4
        shares.append(other.mean())
        right.append(((said > 0) == other.bool()).float().mean())
    torch.testing.assert_close(out["loss"], total)
    torch.testing.assert_close(out["replaced/replaced"], torch.stack(shares).mean())
    torch.testing.assert_close(out["replaced/accuracy"], torch.stack(right).mean())
    assert 0 < float(out["replaced/replaced"]) < 0.5
    for weight in (encoder.embedding.weight, objective.guess.weight, objective.head[0].weight):
        (mine,) = torch.autograd.grad(out["loss"], weight, retain_graph=True)
        (his,) = torch.autograd.grad(total, weight, retain_graph=True)
        torch.testing.assert_close(mine, his)


def test_what_is_drawn_follows_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(4000, 5, 3)
    drawn = draw(logits, torch.arange(4000))
    share = torch.bincount(drawn.flatten(), minlength=3) / drawn.numel()
    torch.testing.assert_close(share, torch.tensor([0.5, 0.3, 0.2]), atol=0.01, rtol=0)
    longer = torch.cat([logits, logits], 1)
    assert torch.equal(draw(longer, torch.arange(4000))[:, :5], drawn)  # padding changes nothing


def test_a_drawn_original_counts_as_original():
    built = root()
    objective = built.objectives["replaced"]
    given = batch(built)
    ids = given.inputs["t"][0]["ids"]
    objective.guesses = lambda tokens: 50.0 * F.one_hot(ids, objective.vocabulary).float()
    assert built(given)["replaced/replaced"] == 0


def test_the_generator_learns_from_its_own_loss_alone():
    built = root()
    objective = built.objectives["replaced"]
    out = built(batch(built))
    loss = out["loss"]
    (whole,) = torch.autograd.grad(loss, objective.guess.weight)
    alone = root(found=0.0)
    (own,) = torch.autograd.grad(alone(batch(alone))["loss"], alone.objectives["replaced"].guess.weight)
    torch.testing.assert_close(whole, own)


def test_micro_batches_and_missing_fields_have_the_gradient_of_the_whole():
    built = root()
    twin = copy.deepcopy(built)
    whole = batch(built)
    forward_backward(built, Accelerator(cpu=True), whole)
    parts = [batch(twin, rows) for rows in ((0, 1, 2), (3, 5), (4,))]
    order = [0, 1, 2, 3, 5, 4]
    cut = Batch(ids=[whole.ids[i] for i in order], present={"t": whole.present["t"][order]}, seeds=whole.seeds[order],
                parts=parts)  # fmt: skip
    forward_backward(twin, Accelerator(cpu=True), cut)
    for (name, a), (_, b) in zip(built.named_parameters(), twin.named_parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, msg=name)
    none = built(batch(built, [1, 4]))["loss"]
    none.backward()
    assert none == 0


def test_a_tiny_model_learns_to_find_what_was_replaced():
    built = root()
    optimizer = torch.optim.AdamW([p for p in built.parameters() if p.requires_grad], lr=5e-3)
    given, late = batch(built), []
    for number in range(150):
        given.seeds = torch.arange(len(WORDS)) + 100 * number
        out = built(given)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        if number >= 130:
            late.append([float(out[f"replaced/{part}"].detach()) for part in ("accuracy", "replaced", "generator")])
    accuracy, share, generator = torch.tensor(late).mean(0).tolist()
    assert accuracy > 1 - 0.6 * share  # who says that nothing was replaced is right in 1 - share
    assert generator < 3


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="is frozen"):
        root(frozen=True)
    vit = component("encoders", "image-vit", size=8, patch=4, width=16, depth=1, heads=2)
    model = Model(ModelConfig(dim=8, towers={"image": TowerConfig(encoder=vit)}))
    for field, message in (("t", "unknown 't'"), ("x", "image tokens are no codes")):
        with pytest.raises(ConfigError, match=message):
            Root(model, [component("objectives", "replaced", field=field)], fields={"x": "image"}, views={})
