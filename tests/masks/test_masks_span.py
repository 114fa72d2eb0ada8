"""Span masks: the ratio is what ends up hidden, spans have the asked lengths, and no position is favoured."""

from __future__ import annotations

import pytest
import torch

from mmrep.config import ConfigError, component
from mmrep.tokens import Grid, indicator


def runs(row):
    """Lengths of the runs of True in a list."""
    found, length = [], 0
    for value in [*row, False]:
        if value:
            length += 1
        elif length:
            found.append(length)
            length = 0
    return found


def hidden(n, draws, **fields):
    mask = component("masks", "span", **fields).build()(Grid.regular(draws, (n,)), torch.arange(draws))
    return indicator(mask.target[:, 0], n)


def test_the_ratio_is_the_share_that_is_hidden():
    """65 % in spans of 10, of which a sampler that draws starts with overlaps hides 49 %."""
    assert set(hidden(1500, 20, ratio=0.65).sum(1).tolist()) == {975}


def test_spans_do_not_overlap_and_one_is_shorter():
    """Runs are sums of whole spans, but for the remainder and a span that is split between the ends."""
    for row in hidden(103, 100, ratio=0.4, length=7).tolist():
        on_circle = runs(row[row.index(False) :] + row[: row.index(False)])
        assert sum(on_circle) == 41
        assert sum(length % 7 != 0 for length in on_circle) == 1  # 41 = 5 * 7 + 6
        assert len(on_circle) <= 6


def test_every_position_is_hidden_equally_often():
    share = hidden(60, 4000, ratio=0.5).double().mean(0)
    assert float((share - 0.5).abs().max()) < 5 * 0.5 / 4000**0.5


def test_spans_are_shuffled():
    """The rotation alone would do for even counts: which tokens lie between two spans differs too."""
    gaps = {tuple(runs([not value for value in row])) for row in hidden(60, 200, ratio=0.5, length=5).tolist()}
    assert len(gaps) > 150


def test_geometric_lengths():
    """Runs of few spans among many tokens are single spans: their lengths have the asked mean and spread."""
    found = [n for row in hidden(2000, 100, ratio=0.05, length=5, lengths="geometric").tolist() for n in runs(row)]
    lengths = torch.tensor(found, dtype=torch.double)
    # About 2,000 spans of mean 5 and deviation sqrt(20); 1 in 100 touches another, and the ends cut a few.
    assert float(lengths.mean()) == pytest.approx(5, abs=0.45)
    assert float((lengths == 1).double().mean()) == pytest.approx(0.2, abs=0.04)
    assert float(lengths.std()) == pytest.approx(20**0.5, abs=0.5)


def test_geometric_of_length_one_is_single_tokens():
    share = hidden(50, 50, ratio=0.5, length=1, lengths="geometric")
    assert set(share.sum(1).tolist()) == {25}


def test_tokens_are_ordered_by_coordinate():
    """Tokens that an encoder gives in another order are masked in spans of their coordinate."""
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    plain = Grid.regular(5, (80,))
    mixed = Grid(plain.coords[:, order], plain.valid, plain.special)
    masker, seeds = component("masks", "span").build(), torch.arange(5)
    straight = indicator(masker(plain, seeds).target[:, 0], 80)
    assert torch.equal(indicator(masker(mixed, seeds).target[:, 0], 80), straight[:, order])


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match=r"lengths.*geometrc"):
        component("masks", "span", lengths="geometrc")
    with pytest.raises(ConfigError, match="length"):
        component("masks", "span", length=0)
