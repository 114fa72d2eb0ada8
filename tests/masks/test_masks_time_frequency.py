"""Masks by time and frequency: whole columns and rows, the curriculum, the axes."""

from __future__ import annotations

import pytest
import torch

from mmrep.config import ConfigError, component
from mmrep.tokens import Grid, indicator

T, F, DRAWS = 20, 10, 400


def hidden(progress=1.0, **fields):
    """Bool [DRAWS, T, F]."""
    masker = component("masks", "time-frequency", **fields).build()
    mask = masker(Grid.regular(DRAWS, (T, F)), torch.arange(DRAWS), progress)
    return indicator(mask.target[:, 0], T * F).view(DRAWS, T, F)


def structured(marks):
    """Whether a sample has a whole column or row: at random one in 8,000 does. Bool [DRAWS]."""
    return marks.all(2).any(1) | marks.all(1).any(1)


def test_whole_stretches_and_bands_up_to_the_trimmed_one():
    for marks in hidden(ratio=0.5):
        rest = marks & ~marks.all(1, keepdim=True) & ~marks.all(0, keepdim=True)
        # What no whole column or row explains is the one that was trimmed: at most 0.25 of the time, 0.3 of the bands.
        times, bands = rest.any(1).sum(), rest.any(0).sum()
        assert int(times) <= 5 or int(bands) <= 3


@pytest.mark.parametrize(("balance", "axis"), [(1.0, 2), (0.0, 1)])
def test_balance_says_which_axis(balance, axis):
    """Only time: columns are whole, rows are not; only frequency: the other way round."""
    marks = hidden(ratio=0.5, balance=balance)
    assert bool(marks.all(axis).any(1).all())
    assert not bool(marks.all(3 - axis).any())


def test_lengths_of_stretches_and_bands():
    """20 of 200 tokens at a balance of 1 and a time of 0.1 are exactly two frames, side by side."""
    marks = hidden(ratio=0.1, balance=1.0, time=[0.1, 0.1]).all(2)
    assert set(marks.sum(1).tolist()) == {2}
    assert bool((marks[:, 1:] & marks[:, :-1]).any(1).all())
    bands = hidden(ratio=0.3, balance=0.0, frequency=[0.3, 0.3]).all(1)
    assert set(bands.sum(1).tolist()) == {3}


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.2), (0.5, 0.5), (1.0, 0.8)])
def test_curriculum_moves_the_probability(progress, share):
    found = float(structured(hidden(progress, ratio=0.3, curriculum=[0.2, 0.8])).double().mean())
    assert found == pytest.approx(share, abs=4 * 0.5 / DRAWS**0.5)


def test_the_default_curriculum_begins_at_random():
    assert not bool(structured(hidden(0.0, ratio=0.3)).any())
    assert bool(structured(hidden(1.0, ratio=0.3)).all())


def test_padded_clips_are_masked_like_whole_ones():
    """The shorter clip of a padded batch, where the grid has no shape, is masked over its own length."""
    coords = Grid.regular(2, (T, F)).coords
    valid = torch.ones(2, T, F, dtype=torch.bool)
    valid[1, 6:] = False
    valid = valid.flatten(1)
    masker = component("masks", "time-frequency", ratio=0.5, balance=1.0).build()
    grid = Grid(coords, valid, torch.zeros_like(valid))
    for seed in range(20):
        index = masker(grid, torch.tensor([seed, seed + 100]), 1.0).target[1, 0]
        marks = indicator(index[None], T * F).view(T, F)
        assert int(marks.sum()) == 30
        assert int(marks.all(1).sum()) >= 2


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match=r"time=\[0.5, 0.1\] runs from high to low"):
        component("masks", "time-frequency", time=[0.5, 0.1])
    with pytest.raises(ConfigError, match="curriculum"):
        component("masks", "time-frequency", curriculum=[0.0, 2.0])
