"""What a cloud's tokens are made from: points around centres; a hidden group keeps its centre."""

from __future__ import annotations

import torch

from mmrep.config import component
from mmrep.recipe import read_recipe


def small(**fields):
    torch.manual_seed(0)
    how = {"max_points": 64, "groups": 12, "neighbors": 8, "width": 32, "depth": 2, "heads": 2, **fields}
    return component("encoders", "point-patch", **how).build().eval()


def batch(encoder, n: int = 4):
    return encoder.collate([encoder.prepare(raw) for raw in encoder.examples(n, 0)])


def test_a_group_and_its_centre_are_points_of_the_cloud():
    encoder = small()
    inputs = batch(encoder)
    content, grid = encoder.content(inputs), encoder.tokenize(inputs).grid
    assert content.points == 3
    groups = content.values.unflatten(2, (8, 3)) + grid.coords[:, :, None]
    seen = content.observed.unflatten(2, (8, 3))
    assert torch.equal(seen.all(-1), seen.any(-1))
    plain = grid.valid & ~grid.special
    for i in range(4):
        cloud = inputs["points"][i][inputs["valid"][i]]
        members = groups[i][plain[i]][seen[i][plain[i]].all(-1)]
        assert (members[:, None] - cloud).abs().amax(2).min(1).values.max() < 1e-6
        # The nearest of a group is the centre itself, and a group has as many points as it can.
        assert torch.equal(content.values[i][plain[i]][:, :3], torch.zeros(int(plain[i].sum()), 3))
        assert (seen[i][plain[i]].all(-1).sum(1) == min(8, len(cloud))).all()
    assert not seen[plain].all()  # a cloud is smaller than a group


def test_a_batch_of_small_clouds_has_groups_of_the_usual_width():
    encoder = small()
    few = encoder.collate([encoder.prepare(torch.randn(3, 3).numpy())])
    content = encoder.content(few)
    assert content.values.shape == (1, 1 + 3, 24)
    assert content.observed[0, 1:].sum(1).tolist() == [9, 9, 9]
    assert not content.values[~content.observed].any()


def test_positions_come_from_the_centres_alone():
    encoder = small()
    inputs = batch(encoder)
    tokens = encoder.tokenize(inputs)
    assert torch.equal(tokens.positions[:, 1:], encoder.positions(tokens.grid.coords[:, 1:]))
    assert torch.equal(tokens.positions[:, 0], encoder.special[0].expand(4, -1))


def test_a_hidden_group_shows_its_centre_only():
    encoder, token = small(features=["colors"]), torch.randn(32)
    inputs = batch(encoder)
    tokens = encoder.tokenize(inputs)
    painted = encoder.tokenize({**inputs, "colors": 1 - 0.7 * inputs["colors"]})
    plain = tokens.grid.valid & ~tokens.grid.special
    everything = torch.arange(plain.shape[1]).expand_as(plain).masked_fill(~plain, -1)
    assert not torch.allclose(tokens.values[plain], painted.values[plain])
    a, b = (encoder.encode(t.hide(everything, token)).tokens.values for t in (tokens, painted))
    assert torch.equal(a[tokens.grid.valid], b[tokens.grid.valid])
    # Another cloud has other centres, and they show.
    turned = encoder.encode(encoder.tokenize({**inputs, "points": -inputs["points"]}).hide(everything, token))
    assert not torch.allclose(a[plain], turned.tokens.values[plain])


def test_views_that_turn_and_scale_keep_every_group_in_its_place():
    # What masked-scene stands on: a token of one view is the same points as that token of the other.
    recipe = read_recipe("masked-scene")
    views = [view.build() for view in recipe.data.views["shape"]]
    encoder = small()
    clouds = torch.randn(5, 64, 3, generator=torch.Generator().manual_seed(3)) * torch.tensor([1.0, 0.6, 1.7])
    plain = encoder.collate([encoder.prepare(cloud.numpy()) for cloud in clouds])
    chosen, _, members, _ = encoder._groups(plain)
    turned = [view.batch(plain, torch.arange(5) + 100 * number) for number, view in enumerate(views)]
    assert (turned[0][0]["points"] - turned[1][0]["points"]).abs().amax((1, 2)).min() > 0.1
    for inputs, _ in turned:
        again, _, near, _ = encoder._groups(inputs)
        assert torch.equal(again, chosen)
        assert torch.equal(near, members)
    across = [(objective.config.view, objective.config.target_view) for objective in recipe.objectives]
    assert across == [(0, 1), (1, 0)]
