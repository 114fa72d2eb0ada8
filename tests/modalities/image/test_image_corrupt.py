"""Ruined pictures and what is asked of them: frequencies (MFM), noise (UMD), and readings that share their numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mmrep.config import ConfigError, component
from mmrep.modalities.image.corrupt import signal
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.root import Root
from mmrep.step import Step
from mmrep.targets.target import Reading
from mmrep.world import LocalWorld
from tests.targets.targets_steps import batch, masked

VIT = {"size": 16, "patch": 4, "width": 16, "depth": 1, "heads": 2}
CLEAN = {"type": "image-augment", "rotation": 20, "translate": 0.2}
TRANSFORMER = {"type": "transformer", "width": 16, "depth": 1, "heads": 2}
SEEDS = torch.arange(6) * 977


def pictures(n=6, size=16):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def view(name, **fields):
    return component("views", name, **fields).build()


def readings(*views, **objective):
    """One masked objective on the last of these views of a picture, and a step of it."""
    torch.manual_seed(0)
    model = Model(ModelConfig(dim=8, towers={"image": TowerConfig(encoder=component("encoders", "image-vit", **VIT))}))
    built = [component("views", v["type"], **{k: x for k, x in v.items() if k != "type"}).build() for v in views]
    chosen = component("objectives", "masked", **{"field": "x", "view": len(views) - 1, **objective})
    root = Root(model, [chosen], fields={"x": "image"}, views={"x": built})
    given = batch(root, 4)
    given.inputs["x"] = given.inputs["x"] * len(views)
    given.seeds.copy_(SEEDS[:4])
    step = Step(model, given, fields=root.fields, views=root.views, world=LocalWorld(), memo=root.memo)
    return root, step


def chain(last, **fields):
    return {"type": "chain", "of": [CLEAN, last], **fields}


@pytest.mark.parametrize("size", [8, 9])
def test_removed_frequencies_are_removed_and_the_rest_is_kept(size):
    pixels = pictures(size=size)
    out, params = view("image-frequency", radius=2).batch({"pixels": pixels}, SEEDS)
    kinds = set()
    for i in range(6):
        before, after = (np.fft.fft2(x[i].double().numpy()) for x in (pixels, out["pixels"]))
        low = bool(params["removed"][i, 0, 0])
        kinds.add(low)
        for u in range(size):
            for v in range(size):
                far = math.hypot(min(u, size - u), min(v, size - v)) > 2
                assert bool(params["removed"][i, u, v]) is (far is not low)
                wanted = before[:, u, v] * (far is low)
                np.testing.assert_allclose(after[:, u, v], wanted, atol=2e-5)
    assert kinds == {True, False}
    alone, _ = view("image-frequency", radius=2).batch({"pixels": pixels[3:4]}, SEEDS[3:4])
    torch.testing.assert_close(alone["pixels"], out["pixels"][3:4])
    assert not view("image-frequency", radius=2, low=0).batch({"pixels": pixels}, SEEDS)[1]["removed"][:, 0, 0].any()


@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_the_spectrum_is_compared_where_it_was_removed(gamma):
    how = {"mask": None, "predictor": {"type": "tokenwise"}, "target": {"type": "image-spectrum", "gamma": gamma}}
    root, step = readings(CLEAN, chain({"type": "image-frequency", "radius": 3}, follows=0), target_view=0, **how)
    objective, encoder = masked(root), root.model.tower("image").encoder
    clean = encoder.normalize(step.inputs("x", 0)["pixels"]).double().numpy()
    removed = step.params("x", 1)["removed"].numpy()
    out = objective.predictor.layers(encoder(step.inputs("x", 1)).tokens.values[:, 1:]).detach().double().numpy()
    losses = []
    for i in range(4):
        painted = np.zeros((3, 16, 16))
        for n in range(16):
            r, c = divmod(n, 4)
            painted[:, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4] = out[i, n].reshape(3, 4, 4)
        difference = (np.fft.fft2(painted) - np.fft.fft2(clean[i])) / 16
        each = [
            np.abs(difference[c, u, v]) ** gamma for c in range(3) for u, v in zip(*removed[i].nonzero(), strict=True)
        ]
        losses.append(np.mean(each))
    loss = objective(step)["loss"]
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in objective.predictor.parameters())
    wanted = objective.target(step, "x", 0)
    perfect = wanted.values[:, 1:].clone().requires_grad_()  # at the minimum the gradient stays finite
    index = torch.arange(1, 17).expand(4, -1)
    distance = objective.target.distance(step, perfect, wanted, index, Reading("x", 1))
    distance.sum().backward()
    assert distance.max() < 1e-5
    assert perfect.grad.isfinite().all()


def test_a_view_that_removed_nothing_has_no_spectrum():
    how = {"mask": None, "predictor": {"type": "tokenwise"}, "target": {"type": "image-spectrum"}}
    root, step = readings(CLEAN, **how)
    with pytest.raises(ConfigError, match="none of its views is image-frequency"):
        masked(root)(step)
    root, step = readings({"type": "image-frequency"}, target={"type": "image-spectrum"}, predictor=TRANSFORMER)
    with pytest.raises(ConfigError, match="needs every patch predicted"):
        masked(root)(step)


def test_a_chain_follows_the_reading_that_it_names():
    noise = {"type": "image-noise", "lowest": 500}
    _, step = readings(CLEAN, chain(noise, follows=0), chain(noise))
    clean, noisy, other = (step.params("x", number) for number in range(3))
    assert torch.equal(clean["matrix"], noisy["matrix"])
    assert not torch.equal(clean["matrix"], other["matrix"])
    assert not torch.equal(noisy["level"], other["level"])
    quiet = chain({"type": "image-noise", "lowest": 0, "highest": 0}, follows=0)
    _, step = readings(CLEAN, quiet)
    torch.testing.assert_close(step.inputs("x", 1)["pixels"], step.inputs("x", 0)["pixels"])
    with pytest.raises(ConfigError, match="'text-choice' acts on single samples"):
        view("chain", of=[{"type": "text-choice"}])


def test_noise_is_that_of_a_cosine_diffusion():
    for level in (0.0, 0.25, 0.999, 1.0):
        a, b = (math.cos(math.pi / 2 * (at + 0.008) / 1.008) ** 2 for at in (level, 0.0))
        assert signal(torch.tensor(level, dtype=torch.float64)).item() == pytest.approx(a / b, abs=1e-12)
    assert signal(torch.tensor(1.0)) < 1e-6 < 1 - 1e-6 < signal(torch.tensor(0.0))
    pixels, seeds = pictures(200), torch.arange(200) * 31
    out, params = view("image-noise", lowest=300, highest=700).batch({"pixels": pixels}, seeds)
    assert (params["level"].min(), params["level"].max()) >= (0.3, 0.69)
    assert params["level"].max() <= 0.7
    kept = signal(params["level"])[:, None, None, None]
    noise = (2 * out["pixels"] - 1 - kept.sqrt() * (2 * pixels - 1)) / (1 - kept).sqrt()
    assert abs(noise.mean().item()) < 4 / math.sqrt(noise.numel())
    assert noise.square().mean().item() == pytest.approx(1, abs=4 * math.sqrt(2 / noise.numel()))
    assert noise.pow(4).mean().item() == pytest.approx(3, abs=0.1)  # normal, not uniform
    across = noise.flatten(1).corrcoef().fill_diagonal_(0)
    assert across.abs().max() < 6 / math.sqrt(768)
    alone, _ = view("image-noise", lowest=300, highest=700).batch({"pixels": pixels[7:8]}, seeds[7:8])
    torch.testing.assert_close(alone["pixels"], out["pixels"][7:8])


def test_umd_paints_the_clean_picture_of_visible_and_hidden_patches():
    how = {"mask": {"type": "random", "ratio": 0.5}, "everywhere": True, "condition": {"level": 1}, "target_view": 0}
    root, step = readings(CLEAN, chain({"type": "image-noise"}, follows=0), predictor=TRANSFORMER, **how)
    objective = masked(root)
    seen = []
    inner = objective.predictor.forward

    def spy(context, index, tokens, target, condition):
        seen.append((context.grid.valid.sum(1), target, condition))
        out = inner(context, index, tokens, target, condition)
        seen.append(out)
        return out

    objective.predictor.forward = spy
    loss = objective(step)["loss"]
    (visible, target, condition), out = seen
    assert visible.tolist() == [9] * 4  # the class token, and 8 of 16
    assert torch.equal(target, torch.arange(1, 17).expand(4, -1))
    assert torch.equal(condition[:, 0, 0], step.params("x", 1)["level"])
    torch.testing.assert_close(loss, F.mse_loss(out, step.content("x", 0).values[:, 1:]))


@pytest.mark.parametrize(("fields", "message"), [
    ({"mask": None, "predictor": {"type": "conv"}}, "knows nothing of the places that it predicts"),
    ({"everywhere": True, "predictor": {"type": "conv"}}, "knows nothing of the places that it predicts"),
])  # fmt: skip
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        readings(CLEAN, **fields)


def test_a_target_of_another_geometry_is_refused():
    root, step = readings({"type": "image-crop", "size": 8}, CLEAN, target_view=0, predictor=TRANSFORMER)
    step.batch.inputs["x"][0] = {"pixels": step.batch.inputs["x"][0]["pixels"][..., :8, :8]}
    with pytest.raises(ConfigError, match="keeps every token in its place"):
        masked(root)(step)
