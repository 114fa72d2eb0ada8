"""Neighbourhood masks against an independent slow twin; ties, centres and the spared token."""

from __future__ import annotations

import pytest
import torch

from mmrep.config import ConfigError, component
from mmrep.tokens import Grid, indicator


def points(draws, n, seed=0):
    coords = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)).expand(draws, -1, -1)
    valid = torch.ones(draws, n, dtype=torch.bool)
    return Grid(coords, valid, torch.zeros_like(valid))


@pytest.mark.parametrize("centers", [1, 2])
def test_a_target_is_the_nearest_tokens_to_some_centers_but_one_token(centers):
    n, count = 12, 6
    grid = points(80, n)
    mask = component("masks", "neighborhood", ratio=0.5, centers=centers).build()(grid, torch.arange(80))
    distance = torch.cdist(grid.coords[0].double(), grid.coords[0].double())
    balls = set()
    for spared in range(n):
        free = [i for i in range(n) if i != spared]
        pairs = [(i, j) for i in free for j in free if (i == j) == (centers == 1)]
        for i, j in pairs:
            order = sorted(free, key=lambda k: min(float(distance[i, k]), float(distance[j, k])))
            balls.add(frozenset(order[:count]))
    drawn = {frozenset(group) for group in mask.target[:, 0].tolist()}
    assert drawn <= balls
    assert len(drawn) > 15


def test_several_targets_are_drawn_apart_and_what_none_holds_is_visible():
    grid = points(50, 40)
    mask = component("masks", "neighborhood", ratio=0.2, targets=4).build()(grid, torch.arange(50))
    assert mask.visible.shape[1] == 1
    assert set(mask.counts("target").flatten().tolist()) == {8}
    hidden = indicator(mask.target.flatten(1), 40)
    assert torch.equal(indicator(mask.visible[:, 0], 40), ~hidden)
    assert bool((hidden.sum(1) > 8).all())


def test_many_large_targets_leave_the_spared_token():
    mask = component("masks", "neighborhood", ratio=0.9, targets=30).build()(points(300, 10), torch.arange(300))
    assert set(mask.counts("visible").flatten().tolist()) == {1}
    assert set(mask.visible[:, 0, 0].tolist()) == set(range(10))


def test_equal_distances_are_ordered_at_random():
    """Of a token and its 4 neighbours, equally far ones are hidden equally often, whatever their order."""
    valid = torch.ones(3000, 5, dtype=torch.bool)
    cross = torch.tensor([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]]).expand(3000, -1, -1)
    mask = component("masks", "neighborhood", ratio=0.4).build()(Grid(cross, valid, ~valid), torch.arange(3000))
    share = indicator(mask.target[:, 0], 5).double().mean(0)[1:]
    assert float((share - share.mean()).abs().max()) < 5 * 0.5 / 3000**0.5


def test_units_far_from_the_origin_keep_their_order():
    """Coordinates of millions of metres: distances are taken from differences, in double precision."""
    near = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]]) + 16_000_000.0
    valid = torch.ones(200, 6, dtype=torch.bool)
    mask = component("masks", "neighborhood", ratio=0.34).build()(
        Grid(near.expand(200, -1, -1), valid, ~valid), torch.arange(200)
    )
    first, second = mask.target[:, 0].unbind(1)
    assert bool((second - first <= 2).all())  # 2 where the token between is the spared one


def test_wrong_settings_are_refused():
    for field in ("targets", "centers"):
        with pytest.raises(ConfigError, match=field):
            component("masks", "neighborhood", **{field: 0})
