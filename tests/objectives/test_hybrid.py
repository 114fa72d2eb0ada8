"""Hybrid distillation: both terms written out, which tokens are read, and teachers that are seen and not owned."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmrep.config import ConfigError, component
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.root import Root
from mmrep.schedules import Clock
from tests.objectives import ssl_toys

N = 5


def model(seed=0, width=12, **fields):
    torch.manual_seed(seed)
    chosen = {"size": 8, "patch": 2, "width": width, "depth": 2, "heads": 2, **fields}
    return Model(ModelConfig(dim=5, towers={"a": TowerConfig(encoder=component("encoders", "image-vit", **chosen))},
                             temperatures={}))  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A masked teacher without a class token, a contrastive one with, and two that do not fit."""
    folder = tmp_path_factory.mktemp("teachers")
    model(1, 8, class_token=False, depth=3).save_pretrained(folder / "masked")
    model(2, 16, registers=1).save_pretrained(folder / "contrastive")
    model(3, 8, size=16, patch=4).save_pretrained(folder / "large")
    model(3, 8, patch=4).save_pretrained(folder / "coarse")
    return folder


def root(saved, relations="masked", features="contrastive", **fields):
    layers = fields.pop("layers", {1: 2, 2: 3})
    if relations:
        fields["relations"] = {"model": str(saved / relations), "layers": layers, "temperature": 0.5, "weight": 3.0}
    if features:
        fields["features"] = {"model": str(saved / features), "weight": 0.7}
    chosen = component("objectives", "hybrid", **{"field": "x", **fields})
    return Root(model(), [chosen], fields={"x": "a"}, views={}).double()


def batch(absent=()):
    pixels = torch.randint(0, 256, (N, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    here = [i for i in range(N) if i not in absent]
    made = ssl_toys.batch(range(N), fields="")
    if here:
        made.inputs["x"] = [{"pixels": pixels[here]}]
    made.present["x"] = torch.tensor([i not in absent for i in range(N)])
    return made


def twin(built, made, drop):
    """One sample, one layer, one token at a time."""
    student = built.model.tower("a").encoder
    teachers = built.objectives["hybrid"].outsiders()
    pixels, total, read = made.inputs["x"][0]["pixels"], 0, []
    for i in range(len(pixels)):
        inputs = {"pixels": pixels[i : i + 1]}
        with torch.no_grad():
            masked = teachers["relations"].encoder
            theirs = masked.encode(masked.tokenize(inputs), None, (2, 3)).layers
            contrastive = teachers["features"].encoder(inputs).tokens.values[0, 2:]  # behind class and register
        redundancy = torch.stack([F.cosine_similarity(a[None], contrastive).mean() for a in contrastive])
        kept = sorted(redundancy.argsort()[: 16 - int(drop * 16)].tolist())
        read.append(kept)
        out = student.encode(student.tokenize(inputs), torch.tensor([kept]) + 1, (1, 2))
        divergence = 0
        for s, t in zip(out.layers, theirs, strict=True):
            s, t = s[0, 1:], t[0, kept]
            for a in range(len(kept)):
                q, p = (
                    torch.stack([F.cosine_similarity(x[a], y, dim=0) for y in x]).div(0.5).softmax(0) for x in (s, t)
                )
                divergence = divergence + (p * (p / q).log()).sum() / len(kept) / 2
        said = built.objectives["hybrid"].map(out.tokens.values[0, 1:])
        wanted = contrastive[kept]
        wanted = (wanted - wanted.mean(1, keepdim=True)) / (wanted.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        total = total + (3 * divergence + 0.7 * F.smooth_l1_loss(said, wanted)) / len(pixels)
    return total, read


@pytest.mark.parametrize(("drop", "progress"), [(0.0, 1.0), (0.5, 1.0), (0.5, 0.25)])
def test_it_is_the_divergence_of_relations_and_the_distance_of_features_of_the_tokens_that_are_read(
    saved, drop, progress
):
    built = root(saved, drop=drop)
    built.clock, made = Clock(int(100 * progress), 100), batch(absent=(3,))
    out, (expected, read) = built(made)["loss"], twin(built, made, drop * min(1, 2 * progress))
    assert {len(kept) for kept in read} == {16 - int(16 * drop * min(1, 2 * progress))}
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-9)
    named = {n: p for n, p in built.named_parameters() if p.requires_grad}
    assert not any("teacher" in name or "outside" in name for name in named)
    mine, theirs = (torch.autograd.grad(x, list(named.values()), allow_unused=True, retain_graph=True)
                    for x in (out, expected))  # fmt: skip
    for name, a, b in zip(named, mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8, msg=name)


def test_a_student_learns_both_from_them(saved):
    built = root(saved, drop=0.25)
    made, seen = batch(), []
    optimizer = torch.optim.Adam([p for p in built.parameters() if p.requires_grad], lr=0.01)
    for _ in range(40):
        out = built(made)
        seen.append((out["hybrid/relations"].item(), out["hybrid/features"].item()))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    assert seen[-1][0] < 0.5 * seen[0][0]
    assert seen[-1][1] < 0.7 * seen[0][1]


def test_teachers_are_no_part_of_it_and_a_resumed_run_must_have_the_same(saved):
    built = root(saved)
    assert not any("relations" in name for name in built.state_dict())
    assert not any(p.requires_grad for t in built.objectives["hybrid"].outsiders().values() for p in t.parameters())
    digests = built.outside()
    assert set(digests) == {"hybrid.relations", "hybrid.features"}
    assert root(saved).outside() == digests
    assert root(saved, features="masked").outside()["hybrid.features"] != digests["hybrid.features"]


def test_one_teacher_is_enough_and_a_batch_without_the_field_costs_nothing(saved):
    for one in ({"features": None}, {"relations": None}):
        built = root(saved, **one)
        assert built(batch())["loss"] > 0
        out = built(batch(absent=range(N)))["loss"]
        out.backward()
        assert out == 0
        assert built.model.tower("a").encoder.norm.weight.grad is not None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"field": "y"}, "field: unknown 'y'"),
        ({"relations": None, "features": None}, "name a teacher"),
        ({"relations": "large"}, "relations: it prepares its input otherwise"),
        ({"features": "coarse"}, r"features: its tokens are on a lattice \(2, 2\), the student's on \(4, 4\)"),
        ({"layers": {3: 1}}, "the student has no layer 3; it has 2"),
        ({"layers": {1: 4}}, "the teacher has no layer 4; it has 3"),
        ({"relations": "none"}, r"relations\.model: there is no folder"),
    ],
)
def test_what_cannot_be_is_refused_when_built(saved, fields, words):
    with pytest.raises(ConfigError, match=words):
        root(saved, **fields)
