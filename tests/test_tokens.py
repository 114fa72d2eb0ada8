"""Tokens, Grid, Mask: named index sets, special tokens, induced edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrep.tokens import Grid, Mask, Tokens, keep_special


def tokens(B=2, shape=(2, 3), special=1, D=4):
    grid = Grid.regular(B, shape, special=special)
    N = grid.valid.shape[1]
    values = torch.arange(B * N * D, dtype=torch.float32).view(B, N, D)
    return Tokens(values, grid)


def test_regular_grid_is_in_raster_order_behind_special_tokens():
    grid = Grid.regular(1, (2, 3), special=1)
    assert grid.coords[0].tolist() == [[0, 0], [0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert grid.special[0].tolist() == [True] + [False] * 6
    assert grid.shape == (2, 3)


def test_keep_takes_the_named_tokens_and_every_special_one():
    t = tokens()
    kept = t.keep(torch.tensor([[3, 1], [6, 2]]))
    assert torch.equal(kept.values[0], t.values[0, [0, 3, 1]])
    assert torch.equal(kept.values[1], t.values[1, [0, 6, 2]])
    assert kept.grid.special.tolist() == [[True, False, False]] * 2
    assert torch.equal(kept.grid.coords[1], t.grid.coords[1, [0, 6, 2]])
    assert kept.grid.shape is None


def test_special_tokens_named_in_keep_are_not_taken_twice():
    t = tokens()
    assert torch.equal(t.keep(torch.tensor([[0, 3], [0, 5]])).values[1], t.values[1, [0, 5]])


def test_empty_slots_become_invalid_tokens():
    kept = tokens(special=0).keep(torch.tensor([[2, -1], [1, 4]]))
    assert kept.grid.valid.tolist() == [[True, False], [True, True]]


def test_padding_stays_padding():
    grid = Grid.sequence(torch.tensor([[True, True, False]]))
    kept = Tokens(torch.zeros(1, 3, 2), grid).keep(torch.tensor([[2, 0]]))
    assert kept.grid.valid.tolist() == [[False, True]]


def test_an_index_past_the_end_is_refused():
    with pytest.raises(ValueError, match="past the last of 7 tokens"):
        tokens().keep(torch.tensor([[7], [0]]))


def test_differing_numbers_of_special_tokens_are_refused():
    special = torch.tensor([[True, False], [False, False]])
    grid = Grid.sequence(torch.ones(2, 2, dtype=torch.bool), special)
    with pytest.raises(ValueError, match="different numbers of special tokens"):
        keep_special(torch.tensor([[1], [1]]), grid)


def test_edges_are_induced_and_renumbered():
    grid = Grid.sequence(torch.ones(2, 3, dtype=torch.bool))
    grid = Grid(grid.coords, grid.valid, grid.special, edges=torch.tensor([[0, 1, 3, 5], [1, 2, 5, 4]]))
    kept = grid.select(torch.tensor([[1, 2], [2, 0]]))
    # sample 0 keeps nodes 1, 2 (edge 1→2); sample 1 keeps its nodes 2, 0 (edge 0→2, now 3→2)
    assert kept.edges.tolist() == [[0, 3], [1, 2]]


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not match a grid"):
        Tokens(torch.zeros(2, 5, 3), Grid.regular(2, (2, 2)))
    with pytest.raises(ValueError, match="a Grid needs"):
        Grid(torch.zeros(2, 3, 1), torch.ones(2, 4, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool))


def test_mask_holds_index_sets_and_counts_filled_slots():
    mask = Mask(visible=torch.tensor([[[0, 1, -1]]]), target=torch.tensor([[[2], [3]]]))
    assert mask.counts("visible").tolist() == [[2]]
    assert mask.counts("target").tolist() == [[1, 1]]
    with pytest.raises(ValueError, match=r"Mask\.target must be int64"):
        Mask(visible=mask.visible, target=torch.zeros(1, 1, 2))


@given(st.data())
def test_keep_equals_plain_indexing(data):
    B, N, special = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6)), data.draw(st.integers(0, 2))
    K = data.draw(st.integers(0, N))
    t = tokens(B, (N,), special)
    picks = [data.draw(st.permutations(range(special, special + N)))[:K] for _ in range(B)]
    kept = t.keep(torch.tensor(picks, dtype=torch.long).view(B, K))
    for b in range(B):
        assert torch.equal(kept.values[b], t.values[b, [*range(special), *picks[b]]])
