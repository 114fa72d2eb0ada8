"""Sampling and neighbours against slow Python twins, index by index."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmrep.modalities.point_cloud import grouping
from mmrep.modalities.point_cloud.grouping import farthest_points, gather, nearest

LENGTHS = (1, 2, 5, 17, 40, 64)


def ragged(lattice: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clouds of `LENGTHS` points, with duplicates; on a lattice distances are exact and ties are many."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(len(LENGTHS), max(LENGTHS), 3, generator=generator)
    if lattice:
        points = (points * 4).floor()
    points[:, 10:14] = points[:, 3:4]
    valid = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return points.masked_fill(~valid[..., None], torch.nan), valid


def slow_farthest(points: list[list[float]], count: int) -> list[int]:
    centroid = [math.fsum(axis) / len(points) for axis in zip(*points, strict=True)]
    gaps = [sum((a - b) ** 2 for a, b in zip(p, centroid, strict=True)) for p in points]
    chosen: list[int] = []
    while len(chosen) < min(count, len(points)):
        best = max((i for i in range(len(points)) if i not in chosen), key=lambda i: (gaps[i], -i))
        chosen.append(best)
        gaps = [
            min(sum((a - b) ** 2 for a, b in zip(p, points[c], strict=True)) for c in chosen) for p in points
        ]  # fmt: skip
    return chosen


def slow_nearest(query: list[float], points: list[list[float]], k: int) -> list[int]:
    gaps = [sum((a - b) ** 2 for a, b in zip(p, query, strict=True)) for p in points]
    return sorted(range(len(points)), key=lambda i: (gaps[i], i))[:k]


def filled(index: list[int], count: int) -> list[int]:
    return index + [-1] * (count - len(index))


@pytest.mark.parametrize("lattice", [True, False])
@pytest.mark.parametrize("count", [1, 8, 64, 100])
def test_farthest_points(lattice: bool, count: int):
    points, valid = ragged(lattice)
    found = farthest_points(points, valid, count)
    assert found.shape == (len(LENGTHS), min(count, 64))
    for row, n in enumerate(LENGTHS):
        want = slow_farthest(points[row, :n].double().tolist(), count)
        assert found[row].tolist() == filled(want, min(count, 64))


@pytest.mark.parametrize("lattice", [True, False])
@pytest.mark.parametrize("k", [1, 6, 64, 100])
@pytest.mark.parametrize("chunk", [1, 100, 1 << 22])
def test_nearest(lattice: bool, k: int, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grouping, "_CHUNK", chunk)
    points, valid = ragged(lattice)
    queries = torch.rand(len(LENGTHS), 7, 3, generator=torch.Generator().manual_seed(1)) * 4
    queries[:, :2] = points[:, :1]
    queries = queries.floor() if lattice else queries
    found = nearest(queries, points, valid, k)
    assert found.shape == (len(LENGTHS), 7, min(k, 64))
    for row, n in enumerate(LENGTHS):
        for q in range(7):
            want = slow_nearest(queries[row, q].double().tolist(), points[row, :n].double().tolist(), k)
            assert found[row, q].tolist() == filled(want, min(k, 64))


def test_nearest_in_a_space_of_features():
    features = torch.randn(2, 30, 9, generator=torch.Generator().manual_seed(0))
    found = nearest(features, features, torch.ones(2, 30, dtype=torch.bool), 4)
    for row in range(2):
        for q in range(30):
            assert found[row, q].tolist() == slow_nearest(features[row, q].tolist(), features[row].tolist(), 4)


def test_holes_among_the_points_are_skipped():
    points, _ = ragged(True)
    points = points[-1:]
    valid = torch.rand(1, 64, generator=torch.Generator().manual_seed(3)) < 0.5
    places = valid[0].nonzero()[:, 0]
    dense = points[:, places]
    full = torch.ones(1, len(places), dtype=torch.bool)
    holed = points.masked_fill(~valid[..., None], torch.nan)
    assert torch.equal(farthest_points(holed, valid, 9), places[farthest_points(dense, full, 9)])
    assert torch.equal(nearest(dense, holed, valid, 9), places[nearest(dense, dense, full, 9)])


@pytest.mark.parametrize("seed", range(5))
def test_the_same_indices_alone_and_in_any_batch(seed: int):
    """Far off and symmetric about a point: distances are exact ties, sums of coordinates need more than 24 bits."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(-(1 << 12), 1 << 12, (6, 75, 3), generator=generator)
    middle = torch.randint(1 << 20, 1 << 21, (6, 1, 3), generator=generator)
    points = torch.cat([middle + half, middle - half], 1) / 4096
    valid = torch.ones(6, 150, dtype=torch.bool)
    wide = torch.cat([points, torch.full((6, 61, 3), 7.0)], 1)
    mask = torch.cat([valid, torch.zeros(6, 61, dtype=torch.bool)], 1)
    centres = farthest_points(wide, mask, 20)
    members = nearest(gather(wide, centres), wide, mask, 10)
    for i in range(6):
        alone = farthest_points(points[i : i + 1], valid[i : i + 1], 20)
        assert torch.equal(alone[0], centres[i])
        near = nearest(gather(points[i : i + 1], alone), points[i : i + 1], valid[i : i + 1], 10)
        assert torch.equal(near[0], members[i])
    for place, found in zip(alone[0, :5].tolist(), near[0].tolist(), strict=False):
        assert found == slow_nearest(points[5, place].double().tolist(), points[5].double().tolist(), 10)


def test_no_clouds_and_clouds_without_points():
    none, mask = torch.zeros(0, 5, 3), torch.zeros(0, 5, dtype=torch.bool)
    assert farthest_points(none, mask, 3).shape == (0, 3)
    assert nearest(none, none, mask, 3).shape == (0, 5, 3)
    empty, mask = torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.bool)
    assert (farthest_points(empty, mask, 3) == -1).all()
    assert (nearest(empty, empty, mask, 3) == -1).all()
    assert gather(empty, torch.full((2, 4, 3), -1)).shape == (2, 4, 3, 3)


def test_memory_is_not_queries_times_points():
    held = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            held.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor))
            return out

    points = torch.rand(1, 5000, 3)
    with Watch():
        nearest(points, points, torch.ones(1, 5000, dtype=torch.bool), 4)
    assert max(held) <= grouping._CHUNK < 5000 * 5000


def test_gather_is_zero_at_empty_slots_and_passes_gradients():
    values = torch.arange(12.0).view(1, 4, 3).requires_grad_()
    out = gather(values, torch.tensor([[[2, -1], [0, 2]]]))
    assert out.tolist() == [[[[6, 7, 8], [0, 0, 0]], [[0, 1, 2], [6, 7, 8]]]]
    out.sum().backward()
    assert values.grad[0, :, 0].tolist() == [1, 0, 2, 0]
