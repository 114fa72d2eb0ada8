"""Target blocks: rectangles of the asked scale and aspect, drawn independently; tubes; complements; small samples."""

from __future__ import annotations

import pytest
import torch

from mmrep.config import ConfigError, component
from mmrep.tokens import Grid, indicator


def boxes(index, shape):
    """Lengths [n, axes] of the boxes around index sets [n, K], and whether each is full."""
    marks = indicator(index, torch.Size(shape).numel()).view(-1, *shape)
    lengths = []
    for axis in range(len(shape)):
        others = [k + 1 for k in range(len(shape)) if k != axis]
        line = marks.sum(others) > 0 if others else marks
        lengths.append(line.sum(1))
    lengths = torch.stack(lengths, 1)
    return lengths, marks.flatten(1).sum(1) == lengths.prod(1)


def test_targets_are_full_rectangles_of_the_asked_scale_and_aspect():
    masker = component("masks", "multi-block").build()
    mask = masker(Grid.regular(200, (40, 40)), torch.arange(200))
    lengths, full = boxes(mask.target.flatten(0, 1), (40, 40))
    assert bool(full.all())
    area, aspect = lengths.prod(1) / 1600, lengths[:, 0] / lengths[:, 1]
    # A side, of 12.6 tokens or more, is rounded by at most half a token: 4 % each.
    assert 0.15 * 0.92 < float(area.min()) < 0.155
    assert 0.195 < float(area.max()) < 0.2 * 1.08
    assert 0.75 * 0.92 < float(aspect.min()) < 0.8
    assert 1.4 < float(aspect.max()) < 1.5 * 1.08
    # 800 independent pairs correlate by chance with a standard error of 0.035; one draw for both gives nearly 1.
    assert abs(float(torch.corrcoef(torch.stack([area, aspect]))[0, 1])) < 0.15


def test_blocks_of_one_sample_are_drawn_apart():
    mask = component("masks", "multi-block").build()(Grid.regular(50, (40, 40)), torch.arange(50))
    sizes = mask.counts("target")
    assert bool((sizes != sizes[:, :1]).any(1).all())


def test_context_is_a_square_block_less_the_targets():
    masker = component("masks", "multi-block", targets=1, scale=[0.01, 0.01], context=[0.25, 0.25]).build()
    mask = masker(Grid.regular(60, (20, 20)), torch.arange(60))
    lengths, _ = boxes(mask.visible[:, 0], (20, 20))
    assert set(lengths.flatten().tolist()) == {10}
    hidden, seen = indicator(mask.target[:, 0], 400), indicator(mask.visible[:, 0], 400)
    assert not bool((hidden & seen).any())
    assert bool((seen.sum(1) >= 96).all())


@pytest.mark.parametrize(("temporal", "frames"), [("full", 8), (0.5, 4), (0.01, 1)])
def test_tubes(temporal, frames):
    masker = component("masks", "multi-block", temporal=temporal).build()
    mask = masker(Grid.regular(30, (8, 10, 10)), torch.arange(30))
    lengths, full = boxes(mask.target.flatten(0, 1), (8, 10, 10))
    assert bool(full.all())
    assert set(lengths[:, 0].tolist()) == {frames}
    if frames < 8:
        marks = indicator(mask.target.flatten(0, 1), 800).view(-1, 8, 100).any(2)
        assert bool(marks.any(0).all())


def test_complement_shows_all_but_the_union_of_the_blocks():
    masker = component("masks", "multi-block", targets=2, blocks=8, scale=[0.15, 0.15], complement=True).build()
    mask = masker(Grid.regular(20, (14, 14)), torch.arange(20))
    assert mask.visible.shape[:2] == mask.target.shape[:2] == (20, 2)
    seen, hidden = (indicator(index.flatten(0, 1), 196) for index in (mask.visible, mask.target))
    assert torch.equal(seen, ~hidden)
    # Eight blocks of 0.15, independently placed, cover well over half; one covers 0.15.
    assert 0.5 < float(hidden.double().mean()) < 0.9


@pytest.mark.parametrize("complement", [False, True])
def test_targets_that_cover_everything_leave_a_random_token(complement):
    masker = component("masks", "multi-block", scale=[1.0, 1.0], complement=complement).build()
    mask = masker(Grid.regular(300, (2, 3)), torch.arange(300))
    assert set(mask.counts("visible").flatten().tolist()) == {1}
    assert set(mask.counts("target").flatten().tolist()) == {5}
    assert set(mask.visible.flatten().tolist()) == set(range(6))


def test_one_axis_has_spans():
    mask = component("masks", "multi-block", scale=[0.2, 0.2]).build()(Grid.regular(40, (50,)), torch.arange(40))
    lengths, full = boxes(mask.target.flatten(0, 1), (50,))
    assert bool(full.all())
    assert set(lengths.flatten().tolist()) == {10}


def test_a_block_as_wide_as_the_grid_keeps_its_area():
    masker = component("masks", "multi-block", targets=1, scale=[0.5, 0.5], aspect=[1.0, 1.0]).build()
    mask = masker(Grid.regular(5, (40, 4)), torch.arange(5))
    assert set(mask.counts("target").flatten().tolist()) == {80}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scale": [0.2, 0.1]}, r"scale=\[0.2, 0.1\] runs from high to low; write \[0.1, 0.2\]"),
        ({"context": [0.0, 1.0]}, "context"),
        ({"targets": 0}, "targets"),
        ({"temporal": "all"}, "temporal"),
    ],
)
def test_wrong_settings_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        component("masks", "multi-block", **fields)
