"""The sparse convolutional encoder: against a loop over visible cells; no trace of a hidden patch; CNN-JEPA."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mmrep.config import component
from mmrep.losses.tokenwise import cosine
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.root import Root
from mmrep.recipe import read_recipe
from mmrep.tokens import indicator
from tests.targets.targets_steps import batch, masked, step


def small(**fields):
    torch.manual_seed(0)
    how = {"size": 16, "widths": [6, 10], "depths": [1, 1], "stem": 2, "kernel": 3, **fields}
    return component("encoders", "image-sparse-cnn", **how).build().eval()


def pictures(n: int = 2):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def looped(encoder, pixels, visible):
    """One picture [C, H, W] by cells in a dictionary; only cells of ``visible`` patches (row, column) ever exist."""
    pixels = encoder.normalize(pixels[None])[0]
    side, cells, before = encoder.patch, {}, None
    for shrink, norm, blocks in zip(encoder.shrink, encoder.norms, encoder.stages, strict=True):
        kernel = shrink.kernel_size[0]
        side //= kernel
        fresh = {}
        for row, column in visible:
            for r in range(row * side, (row + 1) * side):
                for c in range(column * side, (column + 1) * side):
                    total = shrink.bias.clone()
                    for i in range(kernel):
                        for j in range(kernel):
                            at = (r * kernel + i, c * kernel + j)
                            source = pixels[:, at[0], at[1]] if before is None else before[at]
                            total = total + shrink.weight[:, :, i, j] @ source
                    fresh[r, c] = norm(total)
        cells = fresh
        for block in blocks:
            moved = {}
            for r, c in cells:
                total = block.depthwise.bias.clone()
                for i in range(3):
                    for j in range(3):
                        neighbour = cells.get((r + i - 1, c + j - 1))
                        if neighbour is not None:
                            total = total + block.depthwise.weight[:, 0, i, j] * neighbour
                hidden = F.gelu(block.mlp[0].weight[:, :, 0, 0] @ block.norm(total) + block.mlp[0].bias)
                out = block.mlp[2].weight[:, :, 0, 0] @ hidden + block.mlp[2].bias
                moved[r, c] = cells[r, c] + block.scale[:, 0, 0] * out
            cells = moved
        before = cells
    return torch.stack([cells[place] for place in visible])


def test_it_is_a_loop_over_visible_cells():
    encoder, pixels = small(depths=[2, 1]), pictures()
    tokens = encoder.tokenize({"pixels": pixels})
    keep = torch.tensor([[0, 1, 5, 10], [3, 6, 7, -1]])
    out = encoder.encode(tokens, keep).tokens
    for i, row in enumerate(keep):
        visible = [divmod(int(token), 4) for token in row if token >= 0]
        torch.testing.assert_close(out.values[i, : len(visible)], looped(encoder, pixels[i], visible))
    whole = encoder.encode(tokens).tokens.values
    torch.testing.assert_close(whole[0], looped(encoder, pixels[0], [divmod(n, 4) for n in range(16)]))


def test_nothing_of_a_hidden_patch_reaches_what_is_visible():
    encoder, pixels = small(), pictures()
    keep = torch.tensor([[0, 1, 5], [2, 3, 9]])
    base = encoder.encode(encoder.tokenize({"pixels": pixels}), keep).tokens.values
    hidden = ~indicator(keep, 16).view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    changed = pixels.masked_fill(hidden, float("nan")).requires_grad_()
    out = encoder.encode(encoder.tokenize({"pixels": changed}), keep).tokens.values
    assert torch.equal(out, base)
    out.square().sum().backward()
    assert changed.grad.isfinite().all()
    assert not changed.grad[hidden.expand_as(changed)].any()
    shown = encoder.encode(encoder.tokenize({"pixels": pixels}), torch.tensor([[0, 1, 5, 4], [2, 3, 9, 8]]))
    assert not torch.equal(shown.tokens.values[:, :3], base)


def test_cnn_jepas_loss_is_the_smooth_l1_of_unit_vectors_times_their_width():
    """It compares vectors of length 1, whose figures differ by less than 1: half the square, which is the cosine."""
    a, b = torch.randn(50, 24, dtype=torch.float64), torch.randn(50, 24, dtype=torch.float64)
    a.requires_grad_()
    theirs = F.smooth_l1_loss(F.normalize(a, dim=1), F.normalize(b, dim=1), reduction="none")
    assert (F.normalize(a, dim=1) - F.normalize(b, dim=1)).abs().max() < 1
    ours = cosine(a, b)
    torch.testing.assert_close(theirs.mean(1) * 24, ours)
    for x, y in zip(*(torch.autograd.grad(z.sum(), a, retain_graph=True) for z in (theirs, ours)), strict=True):
        torch.testing.assert_close(x, y)


def test_the_recipe_predicts_the_teachers_cells_from_visible_ones():
    torch.manual_seed(0)
    recipe = read_recipe("cnn-jepa")
    fields = {"size": 16, "widths": [6, 10], "depths": [1, 1], "stem": 2}
    tower = TowerConfig(encoder=component("encoders", "image-sparse-cnn", **fields))
    objective = component("objectives", "masked", **{**vars(recipe.objectives[0].config), "field": "x", "name": None})
    built = Root(Model(ModelConfig(dim=8, towers={"image": tower})), [objective], fields={"x": "image"}, views={})
    given = batch(built, 3)
    loss = built(given)["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.any() for p in masked(built).predictor.parameters())
    twin = built.teacher.of(built.model.tower("image").encoder)
    taught = twin(given.inputs["x"][0]).tokens.values
    torch.testing.assert_close(masked(built).target(step(built, given), "x").values, taught)
