"""The checks of the masker contract; `mmrep.testing.check_mask` runs them."""

# ruff: noqa: PT017 (a rule for pytest's own tests, which have `pytest.raises`)
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmrep.config import dump, parse
from mmrep.masks._lattice import kinds
from mmrep.masks.masker import Masker, share
from mmrep.tokens import Grid, Mask, indicator

_COUNTS = ((4, 5), (3, 3), (2, 1), (1, 1), (0, 0))  # rows and columns of ragged samples; their products elsewhere


class MaskSubject:
    """A masker under test.

    Args:
        masker: built; it says in ``grids`` what it takes.
        draws: masks that are drawn to see which positions can be visible and which target.
        seed: of the coordinates of points, and the first of the samples' seeds.
    """

    def __init__(self, masker: Masker, *, draws: int = 1000, seed: int = 0) -> None:
        self.masker, self.draws, self.seed = masker, draws, seed
        self.name = type(masker).__name__
        self.grids = _grids(seed)
        self._many: dict[str, tuple[Tensor, Tensor]] = {}

    def taken(self) -> dict[str, Grid]:
        """The grids that the masker takes, by name."""
        return {name: grid for name, grid in self.grids.items() if kinds(grid) & self.masker.grids}

    def seeds(self, n: int, first: int = 0) -> Tensor:
        """Seeds of ``n`` samples, far from one another."""
        return (torch.arange(n) + self.seed + first) * 0x5DEECE66D + 11

    def many(self, name: str) -> tuple[Tensor, Tensor]:
        """Whether each token of a grid's first sample is visible, and target, in any group of each draw: [draws, N]."""
        if name not in self._many:
            grid = self.grids[name]
            N = grid.valid.shape[1]
            mask = self.masker(_sample(grid, 0, N, grid.shape).repeat(self.draws), self.seeds(self.draws), 1.0)
            self._many[name] = (_marks(mask.visible, N).any(1).double(), _marks(mask.target, N).any(1).double())
        return self._many[name]


def takes(s: MaskSubject) -> None:
    """What is not among ``grids`` is refused by a ValueError that names those that are."""
    assert s.masker.grids, "grids is empty: the masker takes nothing"
    for name, grid in s.grids.items():
        if kinds(grid) & s.masker.grids:
            continue
        try:
            s.masker(grid, s.seeds(len(grid.valid)))
        except ValueError as error:
            missing = [kind for kind in s.masker.grids if kind not in str(error)]
            assert not missing, f"{name} is refused without naming {', '.join(missing)}: {error}"
        else:
            raise AssertionError(f"{name} is taken, though grids is {sorted(s.masker.grids)}")


def form(s: MaskSubject) -> None:
    """Index sets of maskable tokens, none twice; one visible group or one per target; none visible and target."""
    for name, grid in s.taken().items():
        B, N = grid.valid.shape
        for progress in (0.0, 0.5, 1.0):
            mask = s.masker(grid, s.seeds(B), progress)
            for part in ("visible", "target"):
                index: Tensor = getattr(mask, part)
                assert index.shape[0] == B, f"{name}: {part} is {tuple(index.shape)} for {B} samples"
                assert not index.numel() or -1 <= int(index.min()), f"{name}: {part} holds {int(index.min())}"
                assert not index.numel() or int(index.max()) < N, f"{name}: {part} past the last of {N} tokens"
                marks = _marks(index, N)
                assert torch.equal(marks.sum(2), mask.counts(part)), f"{name}: a token is twice in a {part} group"
                assert not bool((marks & grid.special[:, None]).any()), f"{name}: a special token is {part}"
                assert not bool((marks & ~grid.valid[:, None]).any()), f"{name}: padding is {part}"
            groups = (mask.visible.shape[1], mask.target.shape[1])
            assert groups[0] in (1, groups[1]), f"{name}: {groups[0]} visible groups for {groups[1]} target groups"
            both = _marks(mask.visible, N) & _marks(mask.target, N)
            assert not bool(both.any()), f"{name}: a token is visible and target"


def something(s: MaskSubject) -> None:
    """A sample of two tokens or more has a visible token and a target in every group."""
    for name, grid in s.taken().items():
        many = grid.repeat(100)
        several = (many.valid & ~many.special).sum(1) > 1
        mask = s.masker(many, s.seeds(len(several)))
        for part in ("visible", "target"):
            found = mask.counts(part)[several]
            assert bool((found > 0).all()), f"{name}: nothing is {part} in a sample of two tokens or more"


def counts(s: MaskSubject) -> None:
    """A target group holds exactly ``ratio`` of the tokens, if the config has one, wherever there are two tokens."""
    ratio = getattr(s.masker.config, "ratio", None)
    if ratio is None:
        return
    low, high = ratio if isinstance(ratio, Sequence) else (ratio, ratio)
    for name, grid in s.taken().items():
        many = grid.repeat(20)
        n = (many.valid & ~many.special).sum(1)
        for progress in (0.0, 1.0):
            found = s.masker(many, s.seeds(len(n)), progress).counts("target")
            wrong = ((found < share(low, n)[:, None]) | (found > share(high, n)[:, None])).any(1)
            assert not bool(wrong.any()), (
                f"{name}: {found[wrong][0].tolist()} of {int(n[wrong][0])} tokens are target at ratio={ratio}"
            )


def reach(s: MaskSubject) -> None:
    """Every maskable position is visible in some draws and target in some."""
    for name, grid in s.taken().items():
        among = (grid.valid & ~grid.special)[0]
        for part, marks in zip(("visible", "target"), s.many(name), strict=True):
            never = ((marks.sum(0) == 0) & among).nonzero()[:, 0].tolist()
            assert not never, f"{name}: positions {never} are never {part} in {s.draws} draws"


def even(s: MaskSubject) -> None:
    """The first half of a full lattice, in raster order, is visible and target as often as the second."""
    for name, grid in s.taken().items():
        if grid.shape is None:
            continue
        for part, marks in zip(("visible", "target"), s.many(name), strict=True):
            marks = marks[:, ~grid.special[0]]
            half = marks.shape[1] // 2
            lean = marks[:, :half].sum(1) - marks[:, -half:].sum(1)
            # Five standard errors of the mean: once in 2 million for a masker that is even.
            error = float(lean.std() / s.draws**0.5)
            assert abs(float(lean.mean())) <= 5 * error + 1e-9, (
                f"{name}: the first half of the tokens is {part} {float(lean.mean()):+.3f} tokens more often than the "
                f"second, {error:.3f} would be chance; are masks cut off in raster order, or offsets short of the end?"
            )


def alone(s: MaskSubject) -> None:
    """A sample's mask is the same alone, in a padded batch, and in a batch in another order."""
    for name, grid in s.taken().items():
        B, N = grid.valid.shape
        seeds = s.seeds(B)
        together = s.masker(grid, seeds)
        for i in range(B):
            n = int(grid.valid[i].nonzero().max()) + 1 if bool(grid.valid[i].any()) else N
            shape = _COUNTS[i] if name == "ragged lattice" and min(_COUNTS[i]) > 0 else grid.shape
            one = s.masker(_sample(grid, i, n, shape), seeds[i : i + 1])
            for part in ("visible", "target"):
                here, there = _listed(getattr(together, part)[i]), _listed(getattr(one, part)[0])
                assert here == there, f"{name}: sample {i} has {part} {there} alone and {here} in a batch of {B}"


def seeded(s: MaskSubject) -> None:
    """The same seeds draw the same mask, others another; nothing is drawn from the global generator."""
    for name, grid in s.taken().items():
        B = len(grid.valid)
        state = torch.get_rng_state()
        first, again, other = (s.masker(grid, s.seeds(B, shift)) for shift in (0, 0, 1000))
        assert torch.equal(state, torch.get_rng_state()), f"{name}: the global random generator was used"
        assert _same(first, again), f"{name}: the same seeds drew two masks"
        assert not _same(first, other), f"{name}: other seeds drew the same mask"


def empty(s: MaskSubject) -> None:
    """A batch of no samples has a mask of no samples, with the usual groups."""
    for name, grid in s.taken().items():
        full = s.masker(grid, s.seeds(len(grid.valid)))
        edges = None if grid.edges is None else grid.edges[:, :0]
        none = s.masker(Grid(grid.coords[:0], grid.valid[:0], grid.special[:0], grid.shape, edges), s.seeds(0))
        for part in ("visible", "target"):
            found, groups = getattr(none, part), getattr(full, part).shape[1]
            assert found.shape[:2] == (0, groups), f"{name}: {part} of an empty batch is {tuple(found.shape)}"


def config_round_trip(s: MaskSubject) -> None:
    """The config survives being written as plain data."""
    config: Any = s.masker.config
    assert parse(type(config), dump(config)) == config, f"config is not read back as {config}"


def _grids(seed: int) -> dict[str, Grid]:
    """Grids of every kind; the ragged ones hold samples of 20, 9, 2, 1 and no tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([rows * columns for rows, columns in _COUNTS])
    B, N = len(lengths), int(lengths.max())
    valid = torch.arange(N) < lengths[:, None]
    none = torch.zeros_like(valid)
    # A class token in front of each sample and a separator behind it.
    whole = torch.arange(N + 2) < lengths[:, None] + 2
    special = whole & ((torch.arange(N + 2) == 0) | (torch.arange(N + 2) == lengths[:, None] + 1))
    lattice = torch.zeros(B, N, 2)
    for i, (rows, columns) in enumerate(_COUNTS):
        places = torch.cartesian_prod(0.5 * torch.arange(rows), torch.arange(columns) * 16.0 + 7.5)
        lattice[i, : rows * columns] = places.view(-1, 2)
    ends = [_edges(int(n)) + i * N for i, n in enumerate(lengths)]
    edges = torch.cat(ends, 1)
    points = torch.randn(B, N, 3, generator=generator)
    return {
        "lattice of two axes": Grid.regular(3, (4, 6), special=1),
        "lattice of three axes": Grid.regular(2, (3, 4, 4), special=1),
        "lattice of two tokens": Grid.regular(3, (1, 2)),
        "ragged lattice": Grid(lattice, valid, none),
        "sequence": Grid.regular(3, (16,), special=1),
        "ragged sequence": Grid.sequence(whole, special),
        "points": Grid(points, valid, none),
        "graphs": Grid(points[..., :1], valid, none, edges=edges),
        "graphs without edges": Grid(points[..., :1], valid, none, edges=edges[:, :0]),
    }


def _edges(n: int) -> Tensor:
    """A star of the first half of ``n`` nodes and a path of most of the others, each edge once: int64 [2, E]."""
    half = n // 2
    star = [(0, i) for i in range(1, half)]
    path = [(i, i + 1) for i in range(half, n - 2)]
    return torch.tensor(star + path, dtype=torch.long).view(-1, 2).T


def _sample(grid: Grid, i: int, n: int, shape: tuple[int, ...] | None) -> Grid:
    """The first ``n`` tokens of sample ``i`` as a batch of one."""
    rows, edges = slice(i, i + 1), grid.edges
    if edges is not None:
        N = grid.valid.shape[1]
        edges = edges[:, (edges[0] >= i * N) & (edges[0] < (i + 1) * N)] - i * N
    return Grid(grid.coords[rows, :n], grid.valid[rows, :n], grid.special[rows, :n], shape, edges)


def _marks(index: Tensor, n: int) -> Tensor:
    """Index sets int64 [B, groups, K] as bool [B, groups, n]."""
    return indicator(index.flatten(0, 1), n).view(*index.shape[:2], n)


def _listed(index: Tensor) -> list[list[int]]:
    return [sorted(at for at in group if at >= 0) for group in index.tolist()]


def _same(a: Mask, b: Mask) -> bool:
    return torch.equal(a.visible, b.visible) and torch.equal(a.target, b.target)


MASK_CHECKS: dict[str, Callable[[MaskSubject], None]] = {
    check.__name__: check
    for check in (takes, form, something, counts, reach, even, alone, seeded, empty, config_round_trip)
}
