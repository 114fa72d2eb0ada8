"""Dependence on fixed representations: the sum written out, what is read of which samples, and what is refused."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import pytest
import torch

from mmrep.config import ConfigError, component
from mmrep.modalities.image.hog import hog
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.root import Root
from mmrep.registry import view_losses
from tests.losses.test_distance_correlation import twin
from tests.objectives import ssl_toys

N = 6
HOG = {"target": {"type": "image-hog"}}


def root(*representations, normalize=False, **fields):
    torch.manual_seed(0)
    vit = component("encoders", "image-vit", size=8, patch=4, width=12, depth=1, heads=2)
    model = Model(ModelConfig(dim=5, towers={"a": TowerConfig(encoder=vit)}, temperatures={}, normalize=normalize))
    chosen = component("objectives", "dependence", **{"field": "x", "representations": list(representations), **fields})
    return Root(model, [chosen], fields={"x": "a"}, views={}).double()


def batch(built, absent=()):
    """Three readings of pictures, paler and paler."""
    here = [i for i in range(N) if i not in absent]
    pixels = torch.rand(N, 3, 8, 8, generator=torch.Generator().manual_seed(1))[here]
    readings = [(255 * x).to(torch.uint8) for x in (pixels, 0.8 * pixels + 0.1, 0.5 * pixels)]
    made = ssl_toys.batch(range(N), fields="")
    made.inputs["x"] = [{"pixels": x} for x in readings]
    made.present["x"] = torch.tensor([i not in absent for i in range(N)])
    return made


def test_it_is_the_loss_of_views_and_what_is_missing_of_each_dependence():
    mean = {**HOG, "of": "mean", "weight": 0.5}
    built = root(HOG, mean, across=2.0, views=[0, 1, 2])
    made = batch(built, absent=(2,))
    out = built(made)
    tower = built.model.tower("a")
    views = [tower(made.inputs["x"][v]) for v in (0, 1, 2)]
    histograms = hog(made.inputs["x"][0]["pixels"].float(), 9, 4).double()  # [B, 3, 9, 2, 2], of what view 0 shows
    patches = histograms.flatten(1, 2).flatten(2).movedim(1, 2)
    fixed = [patches.flatten(1), patches.mean(1)]
    own = view_losses.get("vicreg")(view_losses.get("vicreg").Config(invariance=1.0, variance=1.0, covariance=0.04))
    expected = own(views)["loss"] + 2 * sum(1 - twin(a, b) for a, b in combinations(views, 2))
    for weight, r in zip((1.0, 0.5), fixed, strict=True):
        expected = expected + weight * sum(1 - twin(r, z) for z in views) / 3
    torch.testing.assert_close(out["loss"], expected, rtol=1e-6, atol=1e-9)
    assert out["dependence/dependence-1"] == pytest.approx(sum(twin(fixed[1], z).item() for z in views) / 3, rel=1e-6)
    trained = [p for p in built.parameters() if p.requires_grad]
    mine, theirs = (torch.autograd.grad(x, trained, retain_graph=True) for x in (out["loss"], expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_an_embedding_learns_to_depend_on_a_representation():
    built = root(HOG, across=0.0, normalize=True)
    made, optimizer = batch(built), torch.optim.Adam(built.parameters(), lr=0.01)
    seen = []
    for _ in range(40):
        out = built(made)
        seen.append(out["dependence/dependence-0"].item())
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    assert seen[-1] > seen[0] + 0.3 * (1 - seen[0])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"field": "y"}, "field: unknown 'y'"),
        ({"representations": []}, "representations: none, and no teachers"),
        ({"views": [0, 0]}, "names one twice"),
        ({"views": [0]}, r"the loss compares views.*invariance: 0"),
        ({"representations": [{"target": {"type": "random-projection"}}]}, "'random-projection' gives codes"),
        ({"representations": [{"target": {"type": "image-hog", "cell": 3}}]}, r"representations\[0\].*cell=3"),
    ],
)
def test_what_cannot_be_is_refused_when_built(fields, words):
    chosen = {"representations": [HOG], **fields}
    with pytest.raises(ConfigError, match=words):
        root(*chosen.pop("representations"), **chosen)


def test_what_is_said_of_padding_and_class_tokens_is_not_read(monkeypatch):
    chosen = component(
        "objectives", "dependence", field="x", representations=[{"target": {"type": "content"}, "of": "mean"}]
    )
    built, made = ssl_toys.build(chosen).eval(), ssl_toys.batch(range(6))
    expected = built(made)["dependence/dependence-0"]
    content = ssl_toys.SSLToy.content

    def noisy(self, inputs):
        found = content(self, inputs)
        return dataclasses.replace(found, values=found.values + 50 * ~inputs["valid"][..., None])

    monkeypatch.setattr(ssl_toys.SSLToy, "content", noisy)
    assert not made.inputs["x"][0]["valid"].all()
    torch.testing.assert_close(built(made)["dependence/dependence-0"], expected)


def test_tokens_of_different_numbers_do_not_stand_side_by_side():
    beside = component("objectives", "dependence", field="x", representations=[{"target": {"type": "content"}}])
    with pytest.raises(ConfigError, match="say `of: mean`"):
        ssl_toys.build(beside)(ssl_toys.batch(range(5)))
