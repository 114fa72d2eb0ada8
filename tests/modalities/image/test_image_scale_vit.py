"""The encoder of any resolution: a token against a loop over its patch's cells; one grid for all; a JEPA across."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from mmrep.config import ConfigError, component
from mmrep.modalities.image.vit import sincos_2d
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.root import Root
from mmrep.recipe import read_recipe
from tests.targets.targets_steps import batch

HOW = {"size": 16, "cell": 2, "grid": 4, "width": 16, "depth": 1, "inner": 1, "heads": 2}


def small(**fields):
    torch.manual_seed(0)
    return component("encoders", "image-scale-vit", **{**HOW, **fields}).build().eval()


def pictures(side, n=2):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(side))


@pytest.mark.parametrize(("side", "cells"), [(8, 1), (16, 2), (24, 3)])
def test_a_token_is_a_transformer_over_the_cells_of_its_patch(side, cells):
    encoder, pixels = small(), pictures(side)
    tokens = encoder.tokenize({"pixels": pixels})
    assert tokens.grid.shape == (4, 4)
    normal = encoder.normalize(pixels)
    for row, column in ((0, 0), (1, 3), (3, 2)):
        rows = [encoder.patch_token]
        for i in range(cells):
            for j in range(cells):
                r, c = 2 * (row * cells + i), 2 * (column * cells + j)
                value = (
                    encoder.cells.weight.flatten(1) @ normal[1, :, r : r + 2, c : c + 2].flatten() + encoder.cells.bias
                )
                place = []
                for at in ((i + 0.5) * 16 / cells, (j + 0.5) * 16 / cells):
                    angles = [at * 10000 ** (-k / 4) for k in range(4)]
                    place += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
                rows.append(value + torch.tensor(place))
        read = encoder.within(torch.stack(rows)[None])[0][0, 0]
        wanted = encoder.patch_norm(read) + sincos_2d(4, 4, 16)[0, 4 * row + column]
        torch.testing.assert_close(tokens.values[1, 4 * row + column], wanted, atol=1e-5, rtol=1e-4)


def test_a_picture_of_another_size_needs_whole_cells():
    with pytest.raises(ValueError, match="no 4 x 4 patches of whole cells of 2 pixels"):
        small().tokenize({"pixels": pictures(12)})
    with pytest.raises(ConfigError, match="grid \\* cell = 8 does not divide size=12"):
        small(size=12)


def test_the_fine_reading_is_predicted_from_the_coarse_one():
    recipe = read_recipe("anysat")
    torch.manual_seed(0)
    tower = TowerConfig(encoder=component("encoders", "image-scale-vit", **{**HOW, "size": 8}))
    root = Root(
        Model(ModelConfig(dim=8, towers={"image": tower})), recipe.objectives, fields={"image": "image"}, views={}
    )
    with torch.no_grad():
        for parameter in root.teacher.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    given = batch(root, 2)
    readings = [{"pixels": pictures(side)} for side in (8, 16)]
    given.inputs, given.present = {"image": readings}, {"image": given.present["x"]}
    encoder = root.model.tower("image").encoder
    twin, out = root.teacher.of(encoder), {}
    for name, view in (("coarse", 0), ("fine", 1)):
        objective, seen = root.objectives[name], []
        inner = objective.predictor.forward
        objective.predictor.forward = lambda *args, inner=inner, seen=seen: (
            seen.append((args, inner(*args))),
            seen[-1][1],
        )[1]
        out[name] = (objective, view, seen)
    report = root(given)
    for name, (_, view, seen) in out.items():
        (_, _, tokens, target, _), said = seen[0]
        assert torch.equal(tokens.values, encoder.tokenize(readings[view]).values)
        taught = twin(readings[1 - view]).tokens.values
        taught = F.layer_norm(taught, taught.shape[-1:])
        wanted = torch.stack([taught[i, target[i]] for i in range(2)])
        torch.testing.assert_close(report[f"{name}/loss"], F.smooth_l1_loss(said, wanted).detach() / 2)
