"""Redundancy: what each setting gives to the loss of views, what rests, what is refused, micro-batches."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from mmrep.config import ConfigError, component
from mmrep.training.cached import forward_backward
from tests.objectives.ssl_toys import batch, build, in_parts, reached, step_of

TWO = {"x": "a", "y": "b"}


def redundancy(loss, **fields):
    loss = {"type": loss} if isinstance(loss, str) else loss
    return component("objectives", "redundancy", **{"fields": ["x"], "loss": loss, **fields})


@pytest.mark.parametrize("name", ["vicreg", "barlow", "sigreg", "koleo"])
def test_it_is_the_loss_of_the_embeddings_of_all_views(name):
    root, b = build(redundancy(name, views=[0, 1, 2])), batch(views=3)
    step = step_of(root, b)
    expected = component("view_losses", name).build()([step.embedding("x", v) for v in range(3)])
    out = root(b)
    torch.testing.assert_close(out["loss"], expected["loss"])
    assert set(out) == {"loss", *(f"redundancy/{part}" for part in expected)}


def test_fields_of_a_sample_are_views_of_it():
    missing = {("x", 1), ("y", 4)}
    root = build(redundancy("vicreg", fields=["x", "y"], views=[0]), fields=TWO)
    b = batch(fields="xy", views=1, missing=missing)
    step = step_of(root, b)
    valid = [step.present(f) for f in "xy"]
    loss = component("view_losses", "vicreg").build()
    expected = loss([step.embedding("x"), step.embedding("y")], valid=valid)["loss"]
    out = root(b)
    torch.testing.assert_close(out["loss"], expected)
    keep = [0, 2, 3, 5, 6, 7, 8]
    apart = (step.embedding("x")[keep] - step.embedding("y")[keep]).square().mean()
    torch.testing.assert_close(out["redundancy/invariance"], apart.detach())


def test_tokens_are_rows_without_padding():
    root, b = build(redundancy({"type": "vicreg", "invariance": 0.0}, of="tokens", views=[0])), batch()
    encoding = step_of(root, b).encoding("x")
    valid = encoding.tokens.grid.valid
    assert not valid.all()
    loss = component("view_losses", "vicreg", invariance=0.0).build()
    out = root(b)["loss"]
    torch.testing.assert_close(out, loss([encoding.tokens.values[valid]])["loss"])
    assert {n.split(".")[3] for n in reached(out, root)} == {"encoder"}


def test_pooled_features_train_the_pool_and_let_the_projector_rest():
    root = build(redundancy("vicreg", of="pooled"))
    b = batch()
    step, tower = step_of(root, b), root.model.tower("a")
    expected = component("view_losses", "vicreg").build()([tower.pool(step.encoding("x", v)) for v in range(2)])
    out = root(b)["loss"]
    torch.testing.assert_close(out, expected["loss"])
    assert not any(p.requires_grad for p in tower.projector.parameters())
    assert {n.split(".")[3] for n in reached(out, root)} == {"encoder", "pool"}


@pytest.mark.parametrize("of", ["embedding", "pooled", "tokens"])
def test_an_absent_field_costs_nothing_and_leaves_a_path_to_every_parameter(of):
    root = build(redundancy({"type": "vicreg", "invariance": 0.0}, of=of))
    out = root(batch(missing={("x", i) for i in range(9)}))
    out["loss"].backward()
    assert out["loss"] == 0
    assert all(p.grad is not None and not p.grad.any() for p in root.parameters() if p.requires_grad)


def test_slices_are_drawn_anew_once_per_optimizer_step():
    root, b = build(redundancy({"type": "sigreg", "slices": 3})), batch()
    first = root(b)["loss"]
    assert root(b)["loss"] == first
    root.after_optimizer_step()
    assert root(b)["loss"] != first
    assert "objectives.redundancy.loss.step" in root.state_dict()


@pytest.mark.parametrize("name", ["vicreg", "barlow", "sigreg", "koleo"])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(name):
    found, missing = [], {("x", 2), ("x", 8)}
    for b in (in_parts([0, 4, 9, 11], missing=missing), batch(range(11), missing=missing)):
        for part in b.parts or [b]:
            for values in part.inputs["x"]:
                values["values"] = values["values"].double()
        root = build(redundancy(name)).double()
        report = forward_backward(root, Accelerator(cpu=True), b)
        found.append([report["loss"].detach(), *(p.grad for p in root.parameters())])
    for parts, whole in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("loss", "wrong", "message"),
    [
        ("vicreg", {"fields": ["xx"]}, "unknown 'xx'"),
        ("vicreg", {"views": [0]}, "is one view"),
        ("vicreg", {"of": "tokens"}, "are not pairs"),
        ("barlow", {"views": [1, 1]}, "names one twice"),
    ],
)
def test_what_cannot_be_is_refused(loss, wrong, message):
    with pytest.raises(ConfigError, match=message):
        build(redundancy(loss, **wrong))
