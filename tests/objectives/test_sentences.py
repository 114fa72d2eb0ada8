"""Label-free objectives of sentence encoders: SCT, self-guided contrast, miCSE's attention, averaged positives."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from mmrep._gradients_measure import in_double
from mmrep.config import ConfigError, component
from mmrep.data.batch import Batch
from mmrep.losses.attention import attention_information
from mmrep.losses.cross_view import cross_view
from mmrep.losses.layerwise import layerwise
from mmrep.model import Model, ModelConfig, TemperatureConfig, TowerConfig
from mmrep.objectives.root import Root
from mmrep.registry import encoders
from mmrep.training.cached import forward_backward
from tests.modalities.text import tiny_hf
from tests.objectives import ssl_toys
from tests.toys import ToyEncoder

SCT = {"field": "x", "queue": 5, "head": {"hidden": 7}, "reference_temperature": 0.2, "temperature": 0.3}
GUIDED = {"field": "x", "hidden": 7, "temperature": 0.5}


@encoders.register("toy-blind")
class Blind(ToyEncoder):
    supports = frozenset({"tokens"})


def one(kind, **fields):
    return ssl_toys.build(component("objectives", kind, **fields))


def same_gradients(root, mine, theirs):
    torch.testing.assert_close(mine, theirs)
    parameters = [p for p in root.parameters() if p.requires_grad]
    found = [
        torch.autograd.grad(x, parameters, materialize_grads=True, retain_graph=True) for x in (mine, theirs)
    ]  # fmt: skip
    assert sum(bool(a.abs().max() > 1e-5) for a in found[0]) > 4
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_sct_compares_each_view_with_what_the_other_sees_in_the_queue():
    root = one("cross-view", **SCT)
    objective, tower = root.objectives["cross-view"], root.model.tower("a")
    queues = [torch.zeros(0, 6)] * 2
    for number in range(3):
        batch = ssl_toys.batch(range(4), step=number)
        views = [tower(inputs) for inputs in batch.inputs["x"]]
        out = root(batch)
        assert out["cross-view/queue"] == min(4 * number, 5)
        expected = 0
        for own, other in ((0, 1), (1, 0)):
            keys = torch.cat([queues[own], views[own]])
            head = objective.head.maps
            student = head[1](head[0](views[other]).relu())
            options = {"reference_temperature": 0.2, "temperature": 0.3}
            expected = expected + cross_view(views[own], student, keys, **options).mean()
        same_gradients(root, out["loss"], expected)
        root.after_optimizer_step()
        queues = [torch.cat([v.detach(), q])[:5] for v, q in zip(views, queues, strict=True)]
        for q, stored in zip(queues, objective.queue, strict=True):
            torch.testing.assert_close(F.normalize(q, dim=1), stored[: len(q)])


def test_sct_looks_at_the_queue_when_it_evaluates_and_leaves_it():
    root = one("cross-view", **SCT).eval()
    root(ssl_toys.batch(range(4)))
    root.after_optimizer_step()
    assert root.objectives["cross-view"].filled == 0


def test_sct_learns_from_a_teacher_of_another_width():
    teacher = ssl_toys.build(fields={"x": "a"}, dim=9, seed=8).model.eval()
    with mock.patch("mmrep.objectives.distill.load", return_value=teacher):
        root = one("cross-view", **SCT, teacher={"model": "saved", "column": "x"})
        with pytest.raises(ConfigError, match="teacher's embeddings have 9 figures and the model's 6"):
            one("cross-view", **{**SCT, "head": None}, teacher={"model": "saved", "column": "x"})
    (name, guest), batch = next(iter(root.guests.items())), ssl_toys.batch(range(4))
    batch.items[name] = [guest.tower.encoder.prepare(ssl_toys.raw("x", i)) for i in range(4)]
    batch.keys[name] = [bytes([i]) for i in range(4)]
    batch.present[name] = torch.ones(4, dtype=torch.bool)
    wanted = guest.tower(guest.tower.encoder.collate(batch.items[name]))
    head, expected = root.objectives["cross-view"].head.maps, 0
    for inputs in batch.inputs["x"]:
        student = head[1](head[0](root.model.tower("a")(inputs)).relu())
        expected = expected + cross_view(wanted, student, wanted, reference_temperature=0.2, temperature=0.3).mean()
    same_gradients(root, root(batch)["loss"], expected)


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_self_guided_contrasts_the_pooled_vector_with_layers_of_the_past(pool):
    root = one("self-guided", **GUIDED, pool=pool)
    past = ssl_toys.build().model.tower("a").encoder
    tower, head = root.model.tower("a"), root.objectives["self-guided"].head.maps
    with torch.no_grad():
        for p in tower.encoder.parameters():
            p += 0.3 * torch.randn_like(p)
    batch = ssl_toys.batch(range(4))
    inputs = batch.inputs["x"][0]
    encoding = past.encode(past.tokenize(inputs), None, (1, 2))
    keys = []
    for layer in encoding.layers:
        alone = [layer[i][inputs["valid"][i]] for i in range(4)]
        keys.append(torch.stack([x.amax(0) if pool == "max" else x.mean(0) for x in alone]))

    def project(x):
        return F.gelu(head[1](F.gelu(head[0](x))))

    expected = layerwise(
        project(tower.pool(tower.encoder(inputs))), project(torch.stack(keys, 1).detach()), temperature=0.5
    )
    same_gradients(root, root(batch)["loss"], expected)


def test_the_past_is_at_rest_in_checkpoints_and_not_in_the_model_and_layers_are_drawn_by_the_seed():
    root = ssl_toys.build(component("objectives", "self-guided", **GUIDED, sampled=1), dropout=0.5).train()
    objective = root.objectives["self-guided"]
    assert not any(m.training for m in objective.past.modules())
    assert not any(p.requires_grad for p in objective.past.parameters())
    assert any("past" in name for name in root.state_dict())
    assert not any("past" in name for name in root.model.state_dict())
    chosen = objective._chosen(torch.arange(200))
    assert (chosen.sum(1) == 1).all()
    assert 60 < int(chosen[:, 0].sum()) < 140
    assert torch.equal(objective._chosen(torch.arange(100, 200)), chosen[100:])


def attention_and_contrast(order, dropout=0.4):
    torch.manual_seed(0)
    tower = TowerConfig(encoder=component("encoders", "toy-ssl", dropout=dropout))
    scale = {"default": TemperatureConfig(scale=20, learned=False)}
    model = Model(ModelConfig(dim=5, towers={"a": tower}, temperatures=scale))
    both = [
        component("objectives", "contrastive", pairs=[{"between": ["x", "x"], "views": [0, 1]}], use_group=False),
        component("objectives", "attention", field="x"),
    ]
    return Root(model, both[::order], fields={"x": "a"}, views={}).train()


def batch_twice(rows=range(5)):
    batch = ssl_toys.batch(rows, views=1)
    batch.inputs["x"] = [batch.inputs["x"][0]] * 2
    return batch


@pytest.mark.parametrize("order", [1, -1])
def test_attention_is_of_the_pass_that_gave_the_embeddings_whoever_asks_first(order):
    root = attention_and_contrast(order)
    batch = batch_twice()
    torch.manual_seed(3)
    out = root(batch)
    torch.manual_seed(3)
    encoder = root.model.tower("a").encoder
    encodings = [encoder.attended(encoder.tokenize(inputs)) for inputs in batch.inputs["x"]]
    a, b = (e.extra["attention"] for e in encodings)
    assert (a - b).abs().max() > 1e-3
    information = attention_information(a, b, batch.inputs["x"][0]["valid"]).mean()
    torch.testing.assert_close(out["attention/loss"], -information.detach())
    torch.testing.assert_close(out["attention/information"], information.detach())
    tower = root.model.tower("a")
    x, y = (tower.project(tower.pool(e)) for e in encodings)
    scores = 20 * x @ y.T
    rows = torch.arange(5)
    nce = (F.cross_entropy(scores, rows) + F.cross_entropy(scores.T, rows)) / 2
    torch.testing.assert_close(out["contrastive/loss"], nce.detach())
    same_gradients(root, out["loss"], nce - information)


def test_attention_of_micro_batches_is_that_of_the_whole_batch():
    """Without dropout, so that the two readings are not the same, noise apart."""

    def found(batch):
        root = attention_and_contrast(1, dropout=0.0).double()
        report = forward_backward(root, Accelerator(cpu=True), batch)
        return report["loss"], [p.grad for p in root.model.parameters() if p.requires_grad]

    with in_double():
        (loss, once), (again, parts) = found(ssl_toys.batch(range(9))), found(ssl_toys.in_parts([0, 4, 6, 9]))
    torch.testing.assert_close(loss, again)
    for a, b in zip(once, parts, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("order", [1, -1])
def test_computed_again_in_the_backward_pass_attention_has_the_same_gradient(order, tmp_path):
    """With a second field of the same encoder, whose attention nobody asks for, read before and after."""
    for part in tiny_hf.make("bert"):
        part.save_pretrained(tmp_path)
    chosen = component("encoders", "hf-text", path=str(tmp_path))

    def found(again):
        torch.manual_seed(0)
        model = Model(ModelConfig(dim=5, towers={"a": TowerConfig(encoder=chosen)}))
        objectives = [
            component("objectives", "attention", field="x"),
            component("objectives", "contrastive", pairs=[{"between": ["y", "x"]}], use_group=False),
        ]
        root = Root(model, objectives[::order], fields={"x": "a", "y": "a"}, views={}).train()
        if again:
            root.checkpoint_encoders()
        read = model.tower("a").encoder
        raws = [read.collate([read.prepare(raw) for raw in read.examples(4, seed)]) for seed in (0, 1)]
        present = {field: torch.ones(4, dtype=torch.bool) for field in "xy"}
        batch = Batch(ids=list("0123"), inputs={"x": [raws[0]] * 2, "y": [raws[1]]}, present=present,
                      seeds=torch.arange(4))  # fmt: skip
        torch.manual_seed(3)
        out = root(batch)
        out["loss"].backward()
        return out, {name: p.grad for name, p in root.named_parameters() if p.grad is not None}

    (plain, gradients), (computed, again) = found(False), found(True)
    assert abs(plain["attention/information"]) > 1e-3
    torch.testing.assert_close(computed["loss"], plain["loss"])
    assert gradients.keys() == again.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_agreement_of_attention_can_be_learned():
    root = one("attention", field="x", layers=[2])
    batch = ssl_toys.batch(range(6))
    optimizer = torch.optim.Adam([p for p in root.parameters() if p.requires_grad], lr=0.03)
    first = root(batch)["attention/information"]
    encoder = root.model.tower("a").encoder
    second = [encoder.attended(encoder.tokenize(x)).extra["attention"][:, 1:] for x in batch.inputs["x"]]
    expected = attention_information(*second, batch.inputs["x"][0]["valid"]).mean()
    torch.testing.assert_close(first, expected.detach())
    for _ in range(15):
        out = root(batch)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    assert out["attention/information"] > 1.5 * first


@pytest.mark.parametrize("normalize", [True, False])
def test_several_positives_are_one_on_average(normalize):
    scale = {"default": TemperatureConfig(scale=3, learned=False)}
    tower = TowerConfig(encoder=component("encoders", "toy-ssl"))
    model = Model(ModelConfig(dim=5, towers={"a": tower}, temperatures=scale, normalize=normalize))
    pair = {"between": ["x", "x"], "views": [0, 1], "averaged": [2]}
    root = Root(model, [component("objectives", "contrastive", pairs=[pair])], fields={"x": "a"}, views={})
    batch = ssl_toys.batch(range(5), views=3)
    anchor, *positives = (model.tower("a")(inputs) for inputs in batch.inputs["x"])
    mean = (positives[0] + positives[1]) / 2
    scores = 3 * anchor @ (mean / mean.norm(dim=1, keepdim=True) if normalize else mean).T
    rows = torch.arange(5)
    same_gradients(root, root(batch)["loss"], (F.cross_entropy(scores, rows) + F.cross_entropy(scores.T, rows)) / 2)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("cross-view", {**SCT, "field": "xx"}, r"unknown 'xx'; did you mean 'x'"),
        ("cross-view", {**SCT, "views": [1, 1]}, "is one view"),
        ("self-guided", {**GUIDED, "field": "xx"}, r"unknown 'xx'; did you mean 'x'"),
        ("self-guided", {**GUIDED, "layers": [3]}, "layers 1 to 2"),
        ("self-guided", {**GUIDED, "sampled": 3}, "3 of 2 layers"),
        ("attention", {"field": "xx"}, r"unknown 'xx'; did you mean 'x'"),
        ("attention", {"field": "x", "views": [0, 0]}, "agrees with itself"),
        ("attention", {"field": "x", "layers": [9]}, "layers 1 to 2"),
        ("contrastive", {"pairs": [{"between": ["x", "x"], "views": [0, 1], "averaged": [1]}]}, "name one twice"),
    ],
)
def test_what_makes_no_sense_is_refused_when_built(kind, fields, words):
    toy = TowerConfig(encoder=component("encoders", "toy-ssl"))
    with pytest.raises(ConfigError, match=words):
        Root(Model(ModelConfig(dim=5, towers={"a": toy})), [component("objectives", kind, **fields)],
             fields={"x": "a"}, views={})  # fmt: skip


@pytest.mark.parametrize("kind", ["cross-view", "self-guided", "attention"])
def test_a_frozen_tower_and_an_encoder_without_what_is_needed_are_refused(kind):
    for tower, words in (
        (TowerConfig(encoder=component("encoders", "toy-ssl"), frozen=True), "is frozen"),
        (TowerConfig(encoder=component("encoders", "toy-blind")), "does not support"),
    ):
        if kind == "cross-view" and not tower.frozen:
            continue
        fields = {"cross-view": SCT, "self-guided": GUIDED, "attention": {"field": "x"}}[kind]
        with pytest.raises(ConfigError, match=words):
            Root(Model(ModelConfig(dim=5, towers={"a": tower})), [component("objectives", kind, **fields)],
                 fields={"x": "a"}, views={})  # fmt: skip
