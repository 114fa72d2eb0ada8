"""Which cells a sampler of several blocks reaches: a naive one, as it is often written, and ours."""

from __future__ import annotations

import pytest
import torch

from mmrep.config import component
from mmrep.tokens import Grid, indicator

SIDE, BATCH, BATCHES = 14, 64, 6


def naive(generator, height=SIDE, width=SIDE):
    """Offsets short of the last row and column, one draw for scale and aspect, all cut to the smallest in raster order.

    Returns:
        Bool [BATCH, cells]: visible, and target.
    """

    def size(scale, aspect):
        u = torch.rand(1, generator=generator).item()
        area = height * width * (scale[0] + u * (scale[1] - scale[0]))
        ratio = aspect[0] + u * (aspect[1] - aspect[0])
        return min(round((area * ratio) ** 0.5), height - 1), min(round((area / ratio) ** 0.5), width - 1)

    def block(h, w):
        top = int(torch.randint(0, height - h, (1,), generator=generator))
        left = int(torch.randint(0, width - w, (1,), generator=generator))
        marks = torch.zeros(height, width, dtype=torch.bool)
        marks[top : top + h, left : left + w] = True
        return marks.flatten()

    small, large = size((0.15, 0.2), (0.75, 1.5)), size((0.85, 1.0), (1.0, 1.0))
    targets = torch.stack([torch.stack([block(*small) for _ in range(4)]) for _ in range(BATCH)])
    visible = torch.stack([block(*large) for _ in range(BATCH)]) & ~targets.any(1)
    keep = visible.sum(1).min()
    return visible & (visible.long().cumsum(1) <= keep), targets.any(1)


def shares(sample):
    """How often each cell is visible, and target: float [SIDE, SIDE] each."""
    drawn = [sample(batch) for batch in range(BATCHES)]
    return [torch.cat([part[k] for part in drawn]).double().mean(0).view(SIDE, SIDE) for k in (0, 1)]


def ours(batch, **fields):
    mask = component("masks", "multi-block", **fields).build()(
        Grid.regular(BATCH, (SIDE, SIDE)), torch.arange(BATCH) + BATCH * batch
    )
    return [
        indicator(index.flatten(0, 1), SIDE * SIDE).view(BATCH, -1, SIDE * SIDE).any(1)
        for index in (mask.visible, mask.target)
    ]


@pytest.fixture(scope="module")
def naive_shares():
    generator = torch.Generator().manual_seed(0)
    return shares(lambda batch: naive(generator))


def test_the_naive_sampler_has_the_trap(naive_shares):
    visible, target = naive_shares
    assert int(((visible == 0) & (target == 0)).sum()) >= 2 * SIDE - 1  # 27: the last row and the last column
    assert float(visible[-1].sum()) == float(visible[:, -1].sum()) == 0
    assert float(visible[:3].mean()) > 2 * float(visible[-4:-1].mean())


def test_ours_reaches_every_cell_and_leans_to_no_side():
    visible, target = shares(ours)
    assert float(visible.min()) > 0
    assert float(target.min()) > 0
    for share in (visible, target):
        rows, columns = share.mean(1), share.mean(0)
        for ends in (rows, columns):
            # A row's share over 384 draws has a standard error below 0.5 / sqrt(384) = 0.026.
            assert float((ends - ends.flip(0)).abs().max()) < 4 * 2**0.5 * 0.026
        assert abs(float(share[: SIDE // 2].mean() - share[SIDE // 2 :].mean())) < 0.05


def test_last_offsets_are_as_likely_as_first_ones():
    """The corner cells are target equally often: offsets include the last row and column."""
    _, target = shares(lambda batch: ours(batch, targets=1, scale=[0.15, 0.15], aspect=[1.0, 1.0]))
    corners = torch.stack([target[0, 0], target[0, -1], target[-1, 0], target[-1, -1]])
    # A 5 by 5 block on a side of 14 has 10 offsets along each axis: a corner is hidden once in 100.
    assert float(corners.min()) > 0
    assert float(corners.sum()) == pytest.approx(4 / 100, abs=4 * (0.04 / (BATCH * BATCHES)) ** 0.5)


def test_nothing_is_cut_to_the_smallest_of_the_batch():
    """A context holds every cell of its block that no target has: a block of the whole grid leaves none out."""
    grid = Grid.regular(BATCH, (SIDE, SIDE))
    mask = component("masks", "multi-block", context=[1.0, 1.0]).build()(grid, torch.arange(BATCH))
    hidden = indicator(mask.target.flatten(1), SIDE * SIDE)
    visible = indicator(mask.visible[:, 0], SIDE * SIDE)
    assert torch.equal(visible, ~hidden)
    assert len(set(mask.counts("visible")[:, 0].tolist())) > 5
