"""Block-wise and inverse block masks: exact counts, blocks of the asked sizes, even coverage, fresh trims."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import avg_pool2d, max_pool2d

from mmrep.config import ConfigError, component
from mmrep.masks._blocks import fill, lengths
from mmrep.masks._lattice import lattice
from mmrep.masks.masker import maskable
from mmrep.tokens import Grid, indicator


def marks(index, shape):
    """Index sets [B, 1, K] as float [B, *shape]."""
    return indicator(index[:, 0], torch.Size(shape).numel()).view(-1, *shape).double()


def agreement(grid):
    """How often two neighbours along the last axis are both hidden or both not: [B]."""
    return (grid[..., 1:] == grid[..., :-1]).double().flatten(1).mean(1)


def test_hidden_places_hang_together():
    grid, seeds = Grid.regular(100, (14, 14)), torch.arange(100)
    block = marks(component("masks", "block").build()(grid, seeds).target, (14, 14))
    single = marks(component("masks", "random", ratio=0.4).build()(grid, seeds).target, (14, 14))
    assert float(block.sum((1, 2)).min()) == float(block.sum((1, 2)).max()) == 78
    assert float(agreement(block).mean()) > 0.8 > 0.6 > float(agreement(single).mean())


def test_a_range_of_ratios_is_drawn_for_each_sample():
    masker = component("masks", "block", ratio=[0.1, 0.5]).build()
    counts = masker(Grid.regular(500, (14, 14)), torch.arange(500)).counts("target")[:, 0].double() / 196
    assert 0.095 < float(counts.min()) < 0.11
    assert 0.49 < float(counts.max()) < 0.505
    assert float(counts.mean()) == pytest.approx(0.3, abs=4 * 0.4 / 12**0.5 / 500**0.5)


def test_one_block_has_the_asked_scale_and_aspect_drawn_apart():
    """The area of one block is what is asked, so one block is all there is."""
    places, sizes = lattice(Grid.regular(1, (60, 60)))
    area, aspect = torch.tensor([400.0]), torch.tensor([4.0])
    assert lengths(area, aspect, sizes).tolist() == [[40, 10]]
    assert lengths(area, 1 / aspect, sizes).tolist() == [[10, 40]]
    assert lengths(torch.tensor([1800.0]), torch.tensor([0.01]), sizes).tolist() == [[30, 60]]
    assert int(places.max()) == 59


@pytest.mark.parametrize("name", ["block", "inverse-block"])
def test_coverage_is_even_up_to_the_corners(name):
    """Corners are hidden (block) or kept (inverse block) a third as often as the mean of 0.3, or more.

    Squares of 3 at uniformly random offsets, 64 of them, would reach a corner 0.17 times as often as the mean.
    """
    masker = component("masks", name, ratio=0.3 if name == "block" else 0.7).build()
    mask = masker(Grid.regular(2000, (10, 10)), torch.arange(2000))
    share = marks(mask.target if name == "block" else mask.visible, (10, 10)).mean(0)
    corners = share[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert float(corners.min()) > 0.1
    assert float(share.max()) < 0.55
    # Reflected and turned grids are alike: a share of 0.3 of 2,000 draws has a standard error of 0.0103.
    for other in (share.flip(0), share.flip(1), share.T):
        assert float((share - other).abs().max()) < 5 * 2**0.5 * 0.0103


def test_the_last_block_is_trimmed_at_random():
    """One block of 16 by 16 for 128 tokens: what is left out of it is spread over it, and not its last rows."""
    grid, seeds = Grid.regular(300, (16, 16)), torch.arange(300)
    places, sizes = lattice(grid)
    among = maskable(grid)
    covered = fill(places, sizes, among, among.sum(1) // 2, seeds, lambda box, missing: sizes)
    assert set(covered.sum(1).tolist()) == {128}
    by_row = covered.view(300, 16, 16).double().mean((0, 2))
    assert float((by_row - 0.5).abs().max()) < 5 * 0.5 / (300 * 16) ** 0.5


def test_inverse_block_keeps_squares():
    masker = component("masks", "inverse-block", ratio=1 - 9 / 196).build()
    kept = marks(masker(Grid.regular(200, (14, 14)), torch.arange(200)).visible, (14, 14))
    pooled = max_pool2d(avg_pool2d(kept[:, None], 3, stride=1), 12).flatten()
    assert bool((pooled > 1 - 1e-9).all())


def test_inverse_block_of_several_masks():
    mask = component("masks", "inverse-block", masks=4).build()(Grid.regular(3, (14, 14)), torch.arange(3))
    assert mask.visible.shape[:2] == mask.target.shape[:2] == (3, 4)
    assert set(mask.counts("target").flatten().tolist()) == {157}
    assert len({tuple(group) for group in mask.visible.flatten(0, 1).tolist()}) == 12


def test_blocks_of_a_video_are_tubes():
    mask = component("masks", "inverse-block", ratio=0.8).build()(Grid.regular(20, (4, 9, 10)), torch.arange(20))
    kept = marks(mask.visible, (4, 9, 10))
    # 72 of 360 tokens are two squares of 3 by 3 over all frames, or a little more where they overlap and are trimmed.
    whole = (kept.sum(1) == 4).sum((1, 2))
    assert bool((whole >= 9).all())
    assert float(whole.double().mean()) > 15


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match=r"ratio=\[0.5, 0.1\] runs from high to low"):
        component("masks", "block", ratio=[0.5, 0.1])
    with pytest.raises(ConfigError, match="ratio"):
        component("masks", "block", ratio=1.0)
    with pytest.raises(ConfigError, match="length"):
        component("masks", "inverse-block", length=0)
