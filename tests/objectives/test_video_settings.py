"""Recipes on video that are settings of what exists: their masks and losses, as the recipes say, against loops."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmrep.config import component
from mmrep.data.batch import Batch
from mmrep.data.sample import stable_hash
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.root import Root
from mmrep.recipe import read_recipe
from mmrep.targets.content import standardize
from mmrep.teacher import TeacherConfig
from mmrep.tokens import Grid, indicator

VIDEO = {"frames": 4, "size": 48, "tubelet": 2, "patch": 8, "width": 24, "depth": 1, "heads": 2}
IMAGE = {"size": 16, "patch": 8, "width": 24, "depth": 1, "heads": 2, "class_token": False}
N = 4


def root(name: str) -> Root:
    """The recipe's objectives on smaller towers."""
    torch.manual_seed(0)
    towers = {
        "video": TowerConfig(encoder=component("encoders", "video-transformer", **VIDEO)),
        "image": TowerConfig(encoder=component("encoders", "image-vit", **IMAGE)),
    }
    model = Model(ModelConfig(dim=12, towers=towers))
    recipe = read_recipe(name)
    return Root(
        model, recipe.objectives, fields={"video": "video", "frame": "image"}, views={}, teacher=TeacherConfig()
    ).train()


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    video = [torch.randint(0, 256, (N, 4, 3, 48, 48), generator=generator, dtype=torch.uint8) for _ in range(2)]
    frame = [torch.randint(0, 256, (N, 3, 16, 16), generator=generator, dtype=torch.uint8) for _ in range(2)]
    rest = {"valid": torch.ones(N, 4, dtype=torch.bool), "times": torch.zeros(N, 4)}
    inputs = {"video": [{"frames": x, **rest} for x in video], "frame": [{"pixels": x} for x in frame]}
    here = torch.ones(N, dtype=torch.bool)
    ids = [str(i) for i in range(N)]
    return Batch(ids=ids, inputs=inputs, present={"video": here, "frame": here}, seeds=torch.arange(N) * 7)


def looped(built: Root, name: str, wanted: torch.Tensor, loss) -> torch.Tensor:
    """The mean over samples of the loss at the hidden tokens, each sample by itself."""
    objective, encoder = built.objectives[name], built.model.tower("video").encoder
    inputs = batch().inputs["video"][0]
    tokens = encoder.tokenize(inputs)
    mask = objective.masker(tokens.grid, batch().seeds + stable_hash("video", 0, "mask", name))
    found = []
    for i in range(N):
        one = encoder.tokenize({key: value[i : i + 1] for key, value in inputs.items()})
        rows = (index[i, 0] for index in (mask.visible, mask.target))
        visible, hidden = (row[row >= 0][None] for row in rows)
        context = encoder.encode(one, visible).tokens
        found.append(loss(objective.predictor(context, visible, one, hidden)[0], wanted[i, hidden[0]]))
    return torch.stack(found).mean()


def test_videomae_hides_whole_tubes_and_paints_their_pixels():
    built = root("videomae")
    masker = built.objectives["videomae"].masker
    mask = masker(Grid.regular(200, (4, 6, 6)), torch.arange(200))  # the recipe's own grid
    hidden = indicator(mask.target[:, 0], 144).view(200, 4, 36)
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden))
    assert set(hidden[:, 0].sum(1).tolist()) == {32}
    apart = hidden[:, 0].double().corrcoef()  # tubes one by one, no two samples alike
    assert float(apart.fill_diagonal_(0).max()) < 0.95
    assert bool((~hidden[:, 0]).any(0).all())
    content = built.model.tower("video").encoder.content(batch().inputs["video"][0]).values
    expected = looped(built, "videomae", standardize(content), F.mse_loss)
    torch.testing.assert_close(built(batch())["loss"], expected)


def test_v_jepa_is_the_l1_of_two_kinds_of_tubes():
    built = root("v-jepa")
    with torch.no_grad():
        for parameter in built.teacher.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    twin = built.teacher.of(built.model.tower("video").encoder)
    for name, low, high in (("short", 0.3, 0.95), ("long", 0.7 * 0.96, 0.999)):
        mask = built.objectives[name].masker(Grid.regular(100, (2, 20, 20)), torch.arange(100))
        assert mask.visible.shape[1] == mask.target.shape[1] == 1
        hidden, seen = (indicator(index[:, 0], 800).view(100, 2, 400) for index in (mask.target, mask.visible))
        assert torch.equal(hidden[:, 0], hidden[:, 1])
        assert torch.equal(seen, ~hidden)
        share = hidden.double().mean((1, 2))
        assert low < float(share.min()) <= float(share.max()) < high
    calls = []
    original = twin.encode
    twin.encode = lambda *args: (calls.append(1), original(*args))[1]
    loss = built(batch())["loss"]
    assert len(calls) == 1  # one pass of the teacher for both
    with torch.no_grad():
        taught = twin(batch().inputs["video"][0]).tokens.values
    taught = F.layer_norm(taught, taught.shape[-1:])
    each = [looped(built, name, taught, F.l1_loss) for name in ("short", "long")]
    torch.testing.assert_close(loss, (each[0] + each[1]) / 2)


def test_crossvideomae_joins_video_and_frame():
    built = root("crossvideomae")
    given = batch()
    out = built(given)
    z = {
        (field, view): F.normalize(built.model.tower(tower)(given.inputs[field][view]), dim=1)
        for field, tower in (("video", "video"), ("frame", "image")) for view in (0, 1)
    }  # fmt: skip
    scale, total = built.model.temperature("default").scale, torch.zeros(())
    for a, b in ((("video", 0), ("video", 1)), (("frame", 0), ("frame", 1)), (("video", 0), ("frame", 0))):
        logits = scale * z[a] @ z[b].T
        own = torch.arange(N)
        total = total + (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(out["agreement/loss"], total.detach())
    summed = sum(out[f"{name}/loss"] for name in ("videomae", "framemae", "agreement"))
    torch.testing.assert_close(out["loss"].detach(), summed)
    out["loss"].backward()
    for name in ("video", "image"):
        assert all(p.grad is not None and p.grad.any() for p in built.model.tower(name).projector.parameters())


@pytest.mark.parametrize("name", ["videomae", "v-jepa", "crossvideomae"])
def test_the_recipes_masks_fit_the_recipes_grids(name):
    """8 frames in tubelets of 2, 48 pixels in patches of 8."""
    recipe = read_recipe(name)
    encoder = recipe.model.towers["video"].encoder.build()
    assert encoder.shape == (4, 6)
