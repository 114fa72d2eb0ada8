"""Gradient maps against scikit-image, and the mask that two decoders share."""

from __future__ import annotations

import pytest
import torch

from mmrep.config import component
from mmrep.modalities.image.edges import sobel
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.root import Root
from mmrep.recipe import read_recipe
from mmrep.step import Step
from mmrep.world import LocalWorld
from tests.targets.targets_steps import batch, masked, root, step


def test_gradient_maps_equal_scikit_image():
    filters = pytest.importorskip("skimage.filters")
    pixels = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = sobel(pixels)
    for b in range(2):
        for c in range(3):
            image = pixels[b, c].numpy()
            theirs = [4 * filters.sobel(image, axis=axis, mode="nearest") for axis in (0, 1)]
            twin = torch.hypot(*(torch.from_numpy(part) for part in theirs))
            torch.testing.assert_close(out[b, c], twin)


def test_they_are_cut_into_patches():
    built = root(target={"type": "image-edges"})
    s = step(built, batch(built))
    whole = sobel(built.model.tower("image").encoder.normalize(s.inputs("x")["pixels"]))
    content = masked(built).target(s, "x").values
    for token in (1, 6, 16):
        r, c = divmod(token - 1, 4)
        patch = whole[:, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].permute(0, 2, 3, 1).flatten(1)
        torch.testing.assert_close(content[:, token], patch)


def test_both_decoders_have_one_mask():
    recipe = read_recipe("uni4eye")
    encoder = component("encoders", "image-vit", size=8, patch=2, width=24, depth=1, heads=2, positions="sincos")
    model = Model(ModelConfig(dim=8, towers={"image": TowerConfig(encoder=encoder)}))
    built = Root(model, recipe.objectives, fields={"image": "image"}, views={})
    given = batch(built, 3)
    given.inputs = {"image": [{"pixels": given.inputs["x"][0]["pixels"][..., :8, :8]}]}
    given.present = {"image": given.present["x"]}
    seen = []
    for objective in built.objectives.values():
        inner = objective.masker
        objective.masker = lambda *args, inner=inner: (seen.append(inner(*args)), seen[-1])[1]
    s = Step(model, given, fields=built.fields, views={}, world=LocalWorld(), memo=built.memo)
    losses = [objective(s)["loss"] for objective in built.objectives.values()]
    assert len(seen) == 2
    assert torch.equal(seen[0].target, seen[1].target)
    assert torch.equal(seen[0].visible, seen[1].visible)
    assert losses[0] != losses[1]
