"""Complement masks: what one objective shows is what the other hides."""

from __future__ import annotations

import pytest
import torch

from mmrep.config import component
from mmrep.testing import check_mask
from mmrep.tokens import Grid

INNER = {"type": "random", "ratio": 0.6}


def both(inner, grid=None, draws=6):
    grid = Grid.regular(draws, (4, 5)) if grid is None else grid
    seeds = torch.arange(draws)
    turned = component("masks", "complement", of=inner).build()(grid, seeds)
    name, fields = inner["type"], {k: v for k, v in inner.items() if k != "type"}
    return component("masks", name, **fields).build()(grid, seeds), turned


@pytest.mark.parametrize("inner", [INNER, {"type": "multi-block", "targets": 3}, {"type": "random", "masks": 2}])
def test_it_keeps_the_contract_of_masks(inner):
    check_mask(component("masks", "complement", of=inner).build(), draws=300)


def test_what_is_hidden_is_shown_and_the_other_way_round():
    plain, turned = both(INNER)
    assert torch.equal(turned.visible, plain.target)
    assert torch.equal(turned.target, plain.visible)
    assert turned.target.shape == (6, 1, 8)  # 40 % of 20


def test_each_of_several_targets_predicts_what_was_seen():
    plain, turned = both({"type": "multi-block", "targets": 3})
    assert torch.equal(turned.visible, plain.target)
    assert torch.equal(turned.target, plain.visible.expand(-1, 3, -1))


def test_it_takes_what_the_inner_mask_takes():
    with pytest.raises(ValueError, match="SubgraphMask takes tokens of the kind graph"):
        both({"type": "subgraph"})
