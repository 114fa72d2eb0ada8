"""Every registered masker keeps to the contract, and each check of it fails on a masker that breaks just that."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmrep.config import component
from mmrep.masks._lattice import kinds, lattice
from mmrep.masks.masker import lowest, maskable
from mmrep.masks.random import RandomMask, RandomMaskConfig
from mmrep.registry import REGISTRIES
from mmrep.testing import MASK_CHECKS, check_mask
from mmrep.tokens import Grid, Mask, index_set

SETTINGS = [
    ("random", {"masks": 3}),
    ("block", {"ratio": [0.1, 0.5], "masks": 2}),
    ("block", {"ratio": 0.75, "temporal": 0.5}),
    ("inverse-block", {"masks": 3, "length": 2}),
    ("multi-block", {"complement": True, "blocks": 3, "targets": 2, "temporal": 0.5}),
    ("multi-block", {"targets": 8, "scale": [0.3, 0.6]}),
    ("span", {"lengths": "geometric", "length": 3, "masks": 2}),
    ("time-frequency", {"curriculum": [1.0, 0.0], "masks": 2}),
    ("neighborhood", {"targets": 4, "ratio": 0.3, "centers": 3}),
    ("subgraph", {"grow": "walk", "ratio": 0.6}),
]


@pytest.mark.parametrize("name", REGISTRIES["masks"].names())
def test_every_registered_masker(name):
    check_mask(component("masks", name).build())


@pytest.mark.parametrize(("name", "fields"), SETTINGS)
def test_settings(name, fields):
    check_mask(component("masks", name, **fields).build(), draws=300)


@pytest.mark.parametrize("name", REGISTRIES["masks"].names())
def test_a_batch_without_any_token(name):
    masker = component("masks", name).build()
    none = torch.zeros(2, 0, dtype=torch.bool)
    edges = torch.zeros(2, 0, dtype=torch.long) if masker.grids == {"graph"} else None
    axes = 2 if "regular" in masker.grids else 1
    mask = masker(Grid(torch.zeros(2, 0, axes), none, none, edges=edges), torch.arange(2))
    assert int(mask.counts("visible").sum()) == int(mask.counts("target").sum()) == 0


class Takes(RandomMask):
    """Does not refuse what it does not take."""

    grids = frozenset({"graph"})

    def accept(self, grid):
        pass


class Silent(RandomMask):
    """Refuses without saying what it takes."""

    grids = frozenset({"graph"})

    def accept(self, grid):
        if not kinds(grid) & self.grids:
            raise ValueError("no")


class Edited(RandomMask):
    """Changes the mask."""

    def edit(self, mask, grid, seeds):
        raise NotImplementedError

    def __call__(self, grid, seeds, progress=0.0):
        return self.edit(super().__call__(grid, seeds, progress), grid, seeds)


class Special(Edited):
    def edit(self, mask, grid, seeds):
        marks = torch.zeros_like(grid.valid).scatter_(1, mask.target[:, 0].clamp_min(0), True)
        return Mask(index_set(grid.special)[:, None], index_set(marks & maskable(grid))[:, None])


class Padding(Edited):
    def edit(self, mask, grid, seeds):
        return Mask(index_set(~grid.valid)[:, None], mask.target)


class Twice(Edited):
    def edit(self, mask, grid, seeds):
        return replace(mask, target=torch.cat([mask.target, mask.target], 2))


class Both(Edited):
    def edit(self, mask, grid, seeds):
        return replace(mask, visible=mask.target)


class Groups(Edited):
    def edit(self, mask, grid, seeds):
        return replace(mask, visible=mask.visible.repeat(1, 2, 1), target=mask.target.repeat(1, 3, 1))


class Nothing(Edited):
    """Every hundredth seed has no target."""

    def edit(self, mask, grid, seeds):
        return replace(mask, target=mask.target.masked_fill((seeds // 0x5DEECE66D % 100 == 0)[:, None, None], -1))


class Average(RandomMask):
    """Hides each token by its own coin: the ratio holds on average only."""

    def __call__(self, grid, seeds, progress=0.0):
        coins = torch.stack([torch.rand(grid.valid.shape[1], generator=_generator(seed)) for seed in seeds])
        hidden = maskable(grid) & (coins < self.config.ratio)
        return Mask(index_set(maskable(grid) & ~hidden)[:, None], index_set(hidden)[:, None])


class NeverLast(Edited):
    """The last token of a sample is always visible."""

    def edit(self, mask, grid, seeds):
        at = torch.arange(grid.valid.shape[1])
        last = (at * maskable(grid)).amax(1)[:, None, None]
        return replace(mask, target=mask.target.masked_fill(mask.target == last, -1))


class Truncated(Edited):
    """Visible sets are cut off in raster order."""

    def edit(self, mask, grid, seeds):
        return replace(mask, visible=mask.visible[:, :, : 1 + mask.visible.shape[2] // 2])


class InBatch(Edited):
    """Groups are all cut to the size of the smallest."""

    def edit(self, mask, grid, seeds):
        return replace(mask, target=mask.target[:, :, : int(mask.counts("target").clamp_min(1).min())])


class Global(RandomMask):
    """Draws from torch's own generator."""

    def __call__(self, grid, seeds, progress=0.0):
        hidden = lowest(torch.rand(grid.valid.shape), maskable(grid), maskable(grid).sum(1) // 2)
        return Mask(index_set(maskable(grid) & ~hidden)[:, None], index_set(hidden)[:, None])


class Constant(RandomMask):
    """Does not look at the seeds."""

    def __call__(self, grid, seeds, progress=0.0):
        return super().__call__(grid, torch.zeros_like(seeds), progress)


class NoEmpty(RandomMask):
    def __call__(self, grid, seeds, progress=0.0):
        mask = super().__call__(grid, seeds, progress)
        return mask if len(seeds) else Mask(mask.visible[:, :0], mask.target[:, :0])


def _generator(seed):
    return torch.Generator().manual_seed(int(seed))


@pytest.mark.parametrize(
    ("broken", "check", "words"),
    [
        (Takes, "takes", "is taken"),
        (Silent, "takes", "without naming graph"),
        (Special, "form", "special token is visible"),
        (Padding, "form", "padding is visible"),
        (Twice, "form", "twice in a target group"),
        (Both, "form", "visible and target"),
        (Groups, "form", "2 visible groups for 3"),
        (Nothing, "something", "nothing is target"),
        (Average, "counts", "tokens are target at ratio=0.75"),
        (NeverLast, "reach", "never target"),
        (Truncated, "even", "the first half of the tokens is visible"),
        (InBatch, "alone", "alone and"),
        (Global, "seeded", "global random generator"),
        (Constant, "seeded", "other seeds drew the same mask"),
        (NoEmpty, "empty", "empty batch"),
    ],
)
def test_each_check_fails_on_what_it_is_for(broken, check, words):
    with pytest.raises(AssertionError, match=f"check '{check}': .*{words}"):
        check_mask(broken(RandomMaskConfig()), only=[check])


def test_the_broken_maskers_are_otherwise_right():
    check_mask(NeverLast(RandomMaskConfig()), only=["takes", "seeded", "alone", "empty"])
    check_mask(Truncated(RandomMaskConfig()), only=["takes", "form", "counts", "seeded", "empty"])


def test_check_names():
    assert {"takes", "form", "counts", "reach", "even", "alone"} <= set(MASK_CHECKS)
    with pytest.raises(ValueError, match=r"no check 'from'.*form"):
        check_mask(RandomMask(RandomMaskConfig()), only=["from"])


def test_the_lattice_is_read_from_coordinates():
    """Padded, behind special tokens, transposed and in other units: places count distinct coordinates."""
    coords = torch.tensor([[0.0, 0], [0.25, 9], [0.5, 9], [0.25, 7], [0.5, 7], [0.75, 7], [9.0, 9]])[None]
    valid = torch.tensor([[True] * 6 + [False]])
    special = torch.tensor([[True] + [False] * 6])
    places, sizes = lattice(Grid(coords, valid, special))
    assert places[0, 1:6].tolist() == [[0, 1], [1, 1], [0, 0], [1, 0], [2, 0]]
    assert sizes.tolist() == [[3, 2]]


def test_kinds_of_grids():
    generator = torch.Generator().manual_seed(0)
    valid = torch.ones(2, 30, dtype=torch.bool)
    points = Grid(torch.randn(2, 30, 3, generator=generator), valid, ~valid)
    assert kinds(points) == {"points"}
    assert kinds(Grid.regular(2, (3, 4))) == {"points", "regular"}
    assert kinds(Grid.sequence(valid)) == {"points", "sequence"}
    assert kinds(replace(points, edges=torch.zeros(2, 0, dtype=torch.long))) == {"graph"}
    # Channels of a series that are observed at random: a lattice with holes, though no encoder gives it a shape.
    holes = torch.rand(2, 60, generator=generator) < 0.4
    lattice_of = Grid.regular(2, (20, 3)).coords
    assert kinds(Grid(lattice_of, holes, torch.zeros_like(holes))) == {"points", "regular"}
    assert "regular" not in kinds(replace(points, coords=points.coords[..., :2]))


def test_a_refusal_says_what_is_taken_and_what_was_given():
    masker = component("masks", "span").build()
    with pytest.raises(ValueError, match=r"SpanMask takes tokens of the kind sequence; these are points and regular"):
        masker(Grid.regular(1, (3, 4)), torch.arange(1))
