"""Labels by a linear classifier: against a loop, what hard pairs add, and that it learns."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import beta, kstest
from torch.nn import functional as F

from mmrep.config import ConfigError, component
from mmrep.losses.hard_pairs import mix_hard_pairs, supervised_contrast
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.root import Root
from mmrep.objectives.supervised import _beta
from tests.objectives import ssl_toys

CLASSES = ("red", "blue", "green")
LABELS = ["red", "blue", None, "red", "green", "blue"]


def build(**fields):
    return ssl_toys.build(component("objectives", "supervised", field="x", classes=CLASSES, **fields)).double()


def batch(rows=range(6), missing=frozenset()):
    made = ssl_toys.batch(rows, views=1, missing=missing)
    made.labels = [LABELS[i] for i in rows]
    return made


def double(made):
    for reading in made.inputs.values():
        for values in reading:
            values["values"] = values["values"].double()
    return made


@pytest.mark.parametrize("of", ["pooled", "embedding"])
def test_plain_it_is_the_cross_entropy_of_a_linear_classifier(of):
    root, given = build(of=of), double(batch(missing={("x", 3)}))
    (objective,) = root.objectives.values()
    tower = root.model.tower("a")
    features = tower.features(given.inputs["x"][0])
    features = features if of == "pooled" else tower.project(features)
    kept = [(0, 0), (1, 1), (3, 2), (4, 1)]  # row among those that have the field, class
    losses = [-objective.classifier(features[row]).log_softmax(0)[kind] for row, kind in kept]
    out = root(given)
    torch.testing.assert_close(out["loss"], sum(losses) / 4)
    right = sum(int(objective.classifier(features[row]).argmax()) == kind for row, kind in kept) / 4
    assert float(out["supervised/accuracy"]) == pytest.approx(right)


@pytest.mark.parametrize("mix", [False, True])
def test_core_tuning_is_the_classifier_on_three_kinds_of_rows_and_the_contrast(mix):
    root, given = build(contrast=3.0, mix=mix, temperature=0.4, dim=4), double(batch())
    (objective,) = root.objectives.values()
    kept = [0, 1, 3, 4, 5]
    x, y = root.model.tower("a").features(given.inputs["x"][0])[kept], torch.tensor([0, 1, 0, 2, 1])
    losses = [-objective.classifier(x[i]).log_softmax(0)[y[i]] for i in range(5)]
    z, more = [F.normalize(objective.contrastor(x), dim=1)], {}
    if mix:
        from mmrep.data.sample import stable_hash
        from mmrep.views.view import uniform

        drawn = uniform(given.seeds[kept] + stable_hash("supervised"), 3)
        pair = mix_hard_pairs(x, y, drawn[:, :2], drawn[:, 2], floor=0.8)
        for rows, share, kinds in (
            (pair.positive, pair.positive_share, pair.positive_kinds),
            (pair.negative, pair.negative_share, pair.negative_kinds),
        ):
            for i in range(5):
                target = share[i] * F.one_hot(kinds[i, 0], 3) + (1 - share[i]) * F.one_hot(kinds[i, 1], 3)
                losses.append(-(target * objective.classifier(rows[i]).log_softmax(0)).sum())
            z.append(F.normalize(objective.contrastor(rows), dim=1))
        more = {"positive": z[1], "negative": z[2], "found": pair.found}
    wanted = sum(losses) / len(losses) + 3 * supervised_contrast(z[0], y, temperature=0.4, **more)
    found = root(given)["loss"]
    torch.testing.assert_close(found, wanted)
    names, parameters = zip(*((k, p) for k, p in root.named_parameters() if "projector" not in k), strict=True)
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (found, wanted))
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_the_shares_are_of_a_beta_distribution():
    points = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    assert kstest(_beta(points, 0.4).numpy(), beta(0.4, 0.4).cdf).statistic < 1e-3
    assert torch.equal(_beta(points, 1.0), points)


def test_it_learns():
    root, given, told = build(contrast=1.0, mix=True).float(), batch(), []
    optimizer = torch.optim.Adam([p for p in root.parameters() if p.requires_grad], lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        out = root(given)
        out["loss"].backward()
        optimizer.step()
        told.append(float(out["supervised/contrast"]))
    assert told[-1] < 0.7 * told[0]
    assert out["supervised/accuracy"] >= 0.8


def test_a_batch_without_labels_or_without_the_field_is_zero_and_keeps_the_graph():
    for given in (batch(range(2, 3)), batch(missing={("x", i) for i in range(6)})):
        root = build(contrast=1.0, mix=True)
        out = root(double(given))
        assert out["loss"] == 0
        out["loss"].backward()
        assert all(p.grad is not None for k, p in root.named_parameters() if "encoder" in k or "classifier" in k)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"field": "xx"}, "unknown 'xx'; did you mean 'x'"),
    ({"classes": ("a", "a")}, "one is named twice"),
])  # fmt: skip
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        ssl_toys.build(component("objectives", "supervised", **{"field": "x", "classes": CLASSES, **wrong}))


def test_a_frozen_encoder_and_an_unknown_label_are_told():
    frozen = TowerConfig(encoder=component("encoders", "toy-ssl"), frozen=True)
    model = Model(ModelConfig(dim=4, towers={"a": frozen}))
    with pytest.raises(ConfigError, match="of: the encoder of 'x' is frozen"):
        Root(model, [component("objectives", "supervised", field="x", classes=CLASSES)], fields={"x": "a"}, views={})
    root = ssl_toys.build(component("objectives", "supervised", field="x", classes=("red", "blues", "green")))
    with pytest.raises(ValueError, match=r"label 'blue' is none of .*did you mean 'blues'"):
        root(batch())
