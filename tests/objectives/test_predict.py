"""Prediction of an embedding from others, fusions as fields of objectives, and shapes of edges."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from mmrep.config import ConfigError, component
from mmrep.data.batch import Batch
from mmrep.model import FusionConfig, Model, ModelConfig, TemperatureConfig, TowerConfig
from mmrep.objectives.pairs import EdgesConfig
from mmrep.objectives.root import Root
from mmrep.step import Step
from mmrep.training.cached import forward_backward
from mmrep.training.collectives import world
from mmrep.world import LocalWorld
from tests.objectives import parity
from tests.ranks import run_ranks

FIELDS = {"x": "a", "y": "b", "z": "b"}
FUSIONS = {
    "rest": FusionConfig(of={"x": "a", "y": "b"}, by=component("fusions", "gated", hidden=4)),
    "all": FusionConfig(of={"x": "a", "y": "b", "z": "b"}, by=component("fusions", "transformer", heads=1)),
}
OBJECTIVES = [
    component("objectives", "predict", source="rest", target="z"),
    component("objectives", "predict", source="x", target="y", loss="mse", weight=0.5, name="xy"),
    component("objectives", "contrastive", pairs=[{"between": ["all", "z"]}, {"between": ["rest", "z"]}]),
]
CASES = {
    "present": {},
    "some missing": {"missing": {("x", 2), ("y", 5), ("z", 9), ("y", 2)}},
    "a member missing on a rank": {"missing": {("y", i) for i in parity.FIRST}},
    "the target missing on a rank": {"missing": {("z", i) for i in parity.FIRST}},
    "a sample of which nothing is there to predict from": {"missing": {("x", 3), ("y", 3)}},
    "the target missing everywhere": {"missing": {("z", i) for i in range(parity.N)}},
}


def root(objectives=OBJECTIVES, fusions=FUSIONS, temperatures=("default",)) -> Root:
    torch.manual_seed(3)
    toy = component("encoders", "toy")
    towers = {
        "a": TowerConfig(encoder=toy, projector=component("projectors", "mlp")),
        "b": TowerConfig(encoder=toy),
        "frozen": TowerConfig(encoder=toy, frozen="tower"),
    }
    scales = {name: TemperatureConfig(scale=4.0) for name in temperatures}
    model = Model(ModelConfig(dim=5, towers=towers, fusions=fusions, temperatures=scales))
    for parameter in model.fusions.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return Root(model, objectives, fields=FIELDS, views={})


def step(built: Root, batch) -> Step:
    return Step(built.model, batch, fields=FIELDS, views={}, world=LocalWorld(), memo=built.memo)


def test_the_loss_is_the_mean_over_samples_that_have_source_and_target():
    built = root().eval()
    batch = parity.batch(range(parity.N), CASES["some missing"])
    s = step(built, batch)
    out = built(batch)
    fused, z = s.embedding("rest"), s.embedding("z")
    rows = [i for i in range(parity.N) if i not in (2, 9)]  # of 2 neither x nor y is there, of 9 no z
    cosines = torch.stack([fused[i] @ z[i] / (fused[i].norm() * z[i].norm()) for i in rows])
    torch.testing.assert_close(out["predict/loss"], (1 - cosines).mean())
    torch.testing.assert_close(out["predict/cosine"], cosines.mean())
    assert int(out["predict/n"]) == len(rows)
    x, y = s.embedding("x"), s.embedding("y")
    both = [i for i in range(parity.N) if i not in (2, 5)]
    expected = torch.stack([(x[i] - y[i]).pow(2).sum() for i in both]).mean()
    torch.testing.assert_close(out["xy/loss"], 0.5 * expected)


@pytest.mark.parametrize("detach", [True, False])
def test_the_target_gets_a_gradient_only_if_asked(detach):
    built = root([component("objectives", "predict", source="x", target="z", detach=detach)])
    built(parity.batch(range(6), {}))["loss"].backward()
    b = built.model.tower("b").encoder.embed.weight.grad
    assert b is not None
    assert bool((b != 0).any()) is not detach
    assert bool((built.model.tower("a").encoder.embed.weight.grad != 0).any())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"source": "rset", "target": "z"}, r"source: unknown 'rset'; did you mean 'rest'"),
        ({"source": "rest", "target": "all"}, r"target: unknown 'all'"),
        ({"source": "all", "target": "z"}, r"reads the target 'z', which it would copy; .*of: \{x: a, y: b\}"),
        ({"source": "z", "target": "z"}, "is the target itself"),
    ],
)
def test_a_predictor_that_cannot_be_is_refused_when_built(fields, words):
    with pytest.raises(ConfigError, match=words):
        root([component("objectives", "predict", **fields)])


def test_a_wholly_frozen_tower_keeps_every_bit_and_its_projector_rests():
    built = root()
    frozen = built.model.tower("frozen")
    assert not any(p.requires_grad for p in frozen.parameters())
    built.train()
    assert not any(m.training for m in (frozen.encoder, frozen.pool, frozen.projector))
    half = Model(ModelConfig(dim=5, towers={"a": TowerConfig(encoder=component("encoders", "toy"), frozen=True)}))
    assert all(p.requires_grad for p in half.tower("a").projector.parameters())
    assert half.train().tower("a").projector.training


def gradients(wrap, settings, rows):
    built = root().to(torch.get_default_dtype())
    wrapped = wrap(built)
    loss = wrapped(parity.batch(rows, settings))["loss"]
    loss.backward()
    found = {"loss": world().sum(loss.detach().reshape(1)) / world().size}
    for key, parameter in built.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            found[f"gradient {key}"] = parity._whole(parameter.grad)
    return found


def compare(reference: str) -> dict:
    ranks = world()
    start = sum(parity.SHARDS[ranks.size][: ranks.rank])
    rows = range(start, start + parity.SHARDS[ranks.size][ranks.rank])
    whole = load_file(reference)
    out: dict = {"world": ranks.size}
    for name, settings in CASES.items():
        with parity.in_double():
            found = gradients(parity.ddp, settings, rows)
        out[name] = parity.errors(found, {k: whole[f"{name}/{k}"] for k in found})
    return out


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    found = {}
    for name, settings in CASES.items():
        with parity.in_double():
            got = gradients(lambda r: r, settings, range(parity.N))
        found.update({f"{name}/{k}": v for k, v in got.items()})
        fusion_gradients = [v for k, v in got.items() if k.startswith("gradient model.fusions")]
        assert len(fusion_gradients) > 10
        assert (max(float(v.abs().max()) for v in fusion_gradients) > 1e-4) == ("everywhere" not in name)
    path = tmp_path_factory.mktemp("one") / "reference.safetensors"
    save_file(found, path)
    return path


@pytest.mark.parametrize("size", sorted(parity.SHARDS))
def test_the_gradient_of_many_processes_is_that_of_one(reference, size, tmp_path):
    reports = run_ranks(compare, size, tmp_path, str(reference))
    for report in reports:
        assert report.pop("world") == size
        for name, found in report.items():
            assert max(found.values()) < 1e-9, (name, found)


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    settings = CASES["some missing"]

    def found(batch):
        built = root().double()
        report = forward_backward(built, Accelerator(cpu=True), batch)
        return report["loss"], {name: p.grad for name, p in built.named_parameters() if p.requires_grad}

    with parity.in_double():
        whole = parity.batch(range(parity.N), settings)
        parts = [parity.batch(range(a, b), settings) for a, b in pairwise([0, 3, 7, parity.N])]
        # Drawn anew for each part, the raw values are those of the whole batch: they depend on the sample's number.
        pieces = Batch(ids=whole.ids, present=whole.present, seeds=whole.seeds, parts=parts)
        (loss, once), (again, cached) = found(whole), found(pieces)
    torch.testing.assert_close(again, loss)
    for name, value in once.items():
        torch.testing.assert_close(cached[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_edges_are_all_pairs_a_star_or_a_chain():
    def between(**fields):
        return [pair.between for pair in EdgesConfig(of=["x", "y", "z"], **fields).pairs()]

    assert between() == [("x", "y"), ("x", "z"), ("y", "z")]
    assert between(shape="star") == [("x", "y"), ("x", "z")]
    assert between(shape="chain") == [("x", "y"), ("y", "z")]
    assert [p.temperature for p in EdgesConfig(of=["x", "y", "z"], temperature="own").pairs()] == ["x-y", "x-z", "y-z"]
    with pytest.raises(ValueError, match="named twice"):
        EdgesConfig(of=["x", "x"])


def test_edges_are_the_pairs_written_out_each_with_its_own_temperature():
    names = ("x-y", "x-z", "y-z")
    short = component("objectives", "contrastive", edges={"of": ["x", "y", "z"], "temperature": "own", "weight": 0.5})
    pairs = [{"between": n.split("-"), "temperature": n, "weight": 0.5} for n in names]
    long = component("objectives", "contrastive", pairs=pairs)
    built, written = root([short], temperatures=names), root([long], temperatures=names)
    batch = parity.batch(range(8), CASES["some missing"])
    a, b = built(batch), written(batch)
    torch.testing.assert_close(a["loss"], b["loss"])
    a["loss"].backward()
    for name in names:
        assert built.model.temperature(name).log_scale.grad.abs().item() > 0
    with pytest.raises(ConfigError, match=r"edges x-z: temperature: unknown 'x-z'"):
        root([short], temperatures=("x-y", "y-z"))
    with pytest.raises(ConfigError, match="at least one edge"):
        component("objectives", "contrastive")


def test_a_fusion_is_normalised_and_zero_where_nothing_is_there():
    built = root().eval()
    s = step(built, parity.batch(range(parity.N), CASES["a sample of which nothing is there to predict from"]))
    fused, present = s.embedding("rest"), s.present("rest")
    assert present.tolist() == [i != 3 for i in range(parity.N)]
    assert bool((fused[3] == 0).all())
    torch.testing.assert_close(fused[present].norm(dim=1), torch.ones(parity.N - 1))
    members = {"x": s.embedding("x"), "y": s.embedding("y")}
    again = built.model.fuse("rest", members, {m: s.present(m) for m in members})
    torch.testing.assert_close(fused, again)
    assert F.cosine_similarity(fused[2:3], members["x"][2:3]).item() < 0.999
