"""Anchors: of embeddings and of parameters, to the model as it was when the run began."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from accelerate import Accelerator

import mmrep
from mmrep.config import ConfigError, component
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.root import Root
from mmrep.recipe import read_recipe
from mmrep.run import Run
from mmrep.training.cached import forward_backward
from tests.losses.test_distillation import twin
from tests.objectives import ssl_toys
from tests.objectives.ssl_parity import _moved
from tests.world import make_world, write_recipe

FIELDS = {"x": "a", "y": "b"}


def anchor(**fields):
    return component("objectives", "anchor", **{"fields": ["x", "y"], **fields})


@pytest.mark.parametrize("by", ["cosine", "mse", "similarity"])
def test_the_loss_is_the_distance_from_what_the_embeddings_were(by):
    missing = frozenset({("x", 3), ("y", 0)})
    before = ssl_toys.build(fields=FIELDS).model.eval()
    root, batch = _moved(anchor(by=by, temperature=0.3), missing=missing)
    root.train()
    out = root(batch(range(8), 0))
    values = batch(range(8), 0)
    expected = []
    for field, tower in FIELDS.items():
        inputs = values.inputs[field][0]
        now, then = (m.tower(tower)(inputs) for m in (root.model, before))
        expected.append(twin(now, then.detach(), by, temperature=0.3))
        torch.testing.assert_close(out[f"anchor/{field}"], expected[-1].detach())
    torch.testing.assert_close(out["loss"], sum(expected))
    parameters = [p for p in root.model.parameters() if p.requires_grad]
    mine, theirs = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (out["loss"], sum(expected)))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert min(float(g.abs().max()) for g in mine if g.ndim > 1) > 1e-5


def test_the_copy_is_frozen_at_rest_in_checkpoints_and_not_in_the_model():
    root = ssl_toys.build(anchor(), fields=FIELDS, dropout=0.5)
    root.train()
    copies = root.objectives["anchor"].copies
    assert not any(p.requires_grad for p in copies.parameters())
    assert not any(m.training for m in copies.modules())
    assert root.model.tower("a").encoder.training
    assert any(name.startswith("objectives.anchor.copies.a.encoder") for name in root.state_dict())
    assert not any("copies" in name for name in root.model.state_dict())


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    def found(batch):
        root, _ = _moved(anchor(by="similarity"))
        report = forward_backward(root, Accelerator(cpu=True), batch)
        return report["loss"], [p.grad for p in root.model.parameters() if p.requires_grad]

    (loss, once), (again, parts) = (
        found(b) for b in (ssl_toys.batch(range(9), fields="xy", views=1),
                           ssl_toys.in_parts([0, 4, 6, 9], fields="xy", views=1))
    )  # fmt: skip
    torch.testing.assert_close(loss, again)
    for a, b in zip(once, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_frozen_encoder_is_shared_and_its_kept_features_are_projected():
    toy = component("encoders", "toy-ssl")
    torch.manual_seed(0)
    model = Model(ModelConfig(dim=5, towers={"a": TowerConfig(encoder=toy, frozen=True)}, temperatures={}))
    root = Root(model, [anchor(fields=["x"])], fields={"x": "a"}, views={})
    copied = root.objectives["anchor"].copies["a"]
    assert copied.encoder is model.tower("a").encoder
    assert copied.projector is not model.tower("a").projector
    before = {k: v.clone() for k, v in model.tower("a").projector.state_dict().items()}
    with torch.no_grad():
        for p in model.tower("a").projector.parameters():
            p += 0.5
    plain = ssl_toys.batch(range(6), views=1)
    kept = ssl_toys.batch(range(6), views=1)
    encoder = model.tower("a").encoder
    items = [encoder.prepare(ssl_toys.raw("x", i), view=ssl_toys.Noise(), seed=7 * i) for i in range(6)]
    kept.items, kept.keys, kept.inputs = {"x": items}, {"x": [bytes([i]) for i in range(6)]}, {}
    torch.testing.assert_close(root(kept)["loss"], root(plain)["loss"])
    assert root(kept)["loss"] > 1e-3
    assert all(torch.equal(v, copied.projector.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"fields": ["xx"]}, r"unknown 'xx'; did you mean 'x'"),
        ({"fields": ["x", "x"]}, "names one twice"),
        ({"fields": ["x"], "frozen": "tower"}, "frozen whole"),
    ],
)
def test_what_cannot_be_anchored_is_refused_when_built(fields, words):
    frozen = fields.pop("frozen", False)
    toy = component("encoders", "toy-ssl")
    model = Model(ModelConfig(dim=5, towers={"a": TowerConfig(encoder=toy, frozen=frozen)}, temperatures={}))
    with pytest.raises(ConfigError, match=words):
        Root(model, [anchor(**fields)], fields={"x": "a"}, views={})


def l2_sp_by_hand(root, start, alpha, beta, new=lambda name: ".encoder." not in name):
    total = torch.zeros(())
    for name, p in root.model.named_parameters():
        if new(name):
            total = total + (beta / 2 * (p**2).sum() if p.ndim > 1 else 0)
        else:
            total = total + alpha / 2 * ((p - start[name]) ** 2).sum()
    return total


def test_l2_sp_pulls_the_old_to_where_they_were_and_new_matrices_to_zero():
    start = {k: v.clone() for k, v in ssl_toys.build(fields=FIELDS).model.state_dict().items()}
    root, batch = _moved(component("objectives", "l2-sp", alpha=0.3, beta=0.2), began="encoder")
    for p in root.model.parameters():
        p.requires_grad_()
    loss = root(batch(range(4), 0))["loss"]
    expected = l2_sp_by_hand(root, start, 0.3, 0.2)
    torch.testing.assert_close(loss, expected)
    for name, p in root.model.named_parameters():
        (grad,) = torch.autograd.grad(loss, p, retain_graph=True, allow_unused=True)
        if ".encoder." in name:
            torch.testing.assert_close(grad, 0.3 * (p - start[name]).detach())
            assert grad.abs().max() > 1e-3
        elif p.ndim > 1:
            torch.testing.assert_close(grad, 0.2 * p.detach())
        else:
            assert grad is None


def test_without_a_start_the_encoders_are_what_is_kept_and_more_can_be_called_new():
    root, _ = _moved(component("objectives", "l2-sp"))
    objective = root.objectives["l2-sp"]
    assert all(".encoder." in name for name in objective._old)
    root, _ = _moved(component("objectives", "l2-sp", new=["towers.a.encoder.blocks.*"]))
    assert not any("a.encoder.blocks" in name for name in root.objectives["l2-sp"]._old)
    with pytest.raises(ConfigError, match="matches no trained parameter"):
        _moved(component("objectives", "l2-sp", new=["towers.c.*"]))
    with pytest.raises(ConfigError, match="none can be kept"):
        _moved(component("objectives", "l2-sp", new=["*"]))


def test_a_run_is_anchored_to_the_model_that_it_starts_from(tmp_path):
    """The trap: a copy that is made before the start's weights are there."""
    folder = make_world(tmp_path / "world")
    path = write_recipe(folder)
    short = ["train.steps=3", "evaluations={}", "train.log_every=1"]
    Run(read_recipe(str(path), short), folder / "first").train()
    data = yaml.safe_load(path.read_text())
    data["start"] = str(folder / "first")
    data["objectives"] += [
        {"type": "anchor", "fields": ["image", "caption"], "by": "mse"},
        {"type": "l2-sp", "alpha": 1.0, "beta": 0.0},
    ]
    (folder / "second.yaml").write_text(yaml.safe_dump(data))
    Run(read_recipe(str(folder / "second.yaml"), short), folder / "second").train()
    lines = [json.loads(line) for line in (folder / "second/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["anchor/loss"] < 1e-9
    assert lines[0]["l2-sp/distance"] == 0
    assert lines[-1]["anchor/loss"] > 1e-5
    assert lines[-1]["l2-sp/distance"] > 1e-3
    names = mmrep.load(folder / "second/model").state_dict()
    assert names.keys() == mmrep.load(folder / "first/model").state_dict().keys()
