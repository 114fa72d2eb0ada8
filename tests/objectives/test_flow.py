"""The flow objective of MC-JEPA: its terms against loops, a planted motion that it recovers, absent fields."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mmrep.config import ConfigError, component
from mmrep.data.batch import Batch
from mmrep.losses.warping import cost_volume, resize_flow, warp
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.root import Root
from mmrep.training.collectives import world
from tests.objectives.ssl_toys import step_of
from tests.ranks import run_ranks

SMALL = {"frames": 3, "size": 8, "tubelet": 1, "patch": 2, "width": 8, "depth": 1, "heads": 2}
HOW = {"field": "video", "cells": 2, "hidden": 6, "levels": 2, "l2": 0.5, "smoothness": 0.3, "cycle": 0.7, "edge": 2.0}
WEIGHTS = {"regression": 1.0, "reconstruction": 1.0, "smoothness": 0.3, "cycle": 0.7, "variance": 1, "covariance": 0.04}


def root_of(encoder=None, **fields) -> Root:
    torch.manual_seed(0)
    tower = TowerConfig(encoder=component("encoders", "video-transformer", **{**SMALL, **(encoder or {})}))
    model = Model(ModelConfig(dim=4, towers={"video": tower}))
    return Root(model, [component("objectives", "flow", **{**HOW, **fields})], fields={"video": "video"}, views={})


def batch_of(frames: torch.Tensor, here: list[bool] | None = None) -> Batch:
    """Frames [n, T, 3, size, size] in 0..1 of the samples that are here."""
    B, T = frames.shape[:2]
    present = torch.tensor([True] * B if here is None else here)
    inputs = {"frames": frames, "valid": torch.ones(B, T, dtype=torch.bool), "times": torch.zeros(B, T)}
    return Batch(
        ids=[str(i) for i in range(len(present))],
        inputs={"video": [inputs]} if B else {},
        present={"video": present},
        seeds=torch.arange(len(present)),
    )


def random_frames(n=3, T=3, size=8, dtype=torch.float64):
    return torch.rand(n, T, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def moved(root: Root, size=0.5) -> Root:
    """The estimator away from its start, where nothing moves."""
    with torch.no_grad():
        root.objectives["flow"].estimator.last.weight.mul_(30)
        root.objectives["flow"].estimator.last.bias.copy_(torch.tensor([size, -0.7 * size]))
    return root


def read(x, p):
    """``x`` [C, rows, columns] at a point, bilinear, from the four cells around it."""
    rows, columns = x.shape[1:]
    y, z = p[0].clamp(0, rows - 1), p[1].clamp(0, columns - 1)
    y0, z0 = math.floor(y.item()), math.floor(z.item())
    total = 0
    for i, j in itertools.product((0, 1), (0, 1)):
        weight = (1 - (y - y0 - i).abs()) * (1 - (z - z0 - j).abs())
        total = total + weight * x[:, min(y0 + i, rows - 1), min(z0 + j, columns - 1)]
    return total


def warped(x, flow):
    rows, columns = flow.shape[1:]
    cells = [[read(x, torch.stack([flow[0, i, j] + i, flow[1, i, j] + j])) for j in range(columns)]
             for i in range(rows)]  # fmt: skip
    return torch.stack([torch.stack(row, 1) for row in cells], 1)


def halved(x):
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


def similar(a, b):
    """1 - SSIM over 2, of windows of 3 x 3, each by itself."""
    found = []
    for c, i, j in itertools.product(range(len(a)), range(a.shape[1] - 2), range(a.shape[2] - 2)):
        x, y = a[c, i : i + 3, j : j + 3].flatten(), b[c, i : i + 3, j : j + 3].flatten()
        s = (2 * x.mean() * y.mean() + 1e-4) / (x.mean() ** 2 + y.mean() ** 2 + 1e-4)
        covariance = ((x - x.mean()) * (y - y.mean())).mean()
        s = s * (2 * covariance + 9e-4) / (x.var(unbiased=False) + y.var(unbiased=False) + 9e-4)
        found.append((1 - s) / 2)
    return torch.stack(found).mean()


def smooth(flow, picture, edge):
    rows, columns = [], []
    for i, j in itertools.product(*map(range, picture.shape[1:])):
        if i:
            still = torch.exp(-edge * (picture[:, i, j] - picture[:, i - 1, j]).abs().mean())
            rows.append(still * (flow[:, i, j] - flow[:, i - 1, j]).abs().mean())
        if j:
            still = torch.exp(-edge * (picture[:, i, j] - picture[:, i, j - 1]).abs().mean())
            columns.append(still * (flow[:, i, j] - flow[:, i, j - 1]).abs().mean())
    return torch.stack(rows).mean() + torch.stack(columns).mean()


def twin(root: Root, frames) -> dict[str, torch.Tensor]:
    """Every term, sample by sample, pair by pair, cell by cell; of the parts it takes the estimator's layers."""
    objective, encoder = root.objectives["flow"], root.model.tower("video").encoder
    est, terms = objective.estimator, {name: [] for name in ("regression", "reconstruction", "smoothness", "cycle")}
    everything: list[list[torch.Tensor]] = [[], []]
    for clip in frames:
        inputs = {"frames": clip[None], "valid": torch.ones(1, len(clip), dtype=torch.bool)}
        inputs["times"] = torch.zeros(1, len(clip))
        tokens = encoder.tokenize(inputs)
        fine = []
        for t in range(len(clip)):  # each moment alone: its sixteen tokens
            alone = encoder.encode(tokens, torch.arange(16 * t, 16 * t + 16)[None]).tokens.values[0]
            fine.append(alone.T.reshape(-1, 4, 4))
        pictures = list(encoder.normalize(clip[None])[0])
        coarse = [halved(x) for x in fine]
        for level, maps in enumerate((coarse, fine)):
            everything[level] += [x.flatten(1).T for x in maps]

        def flows(s, t, coarse=coarse, fine=fine):
            found, flow = [], None
            for maps in (coarse, fine):
                a, b = maps[s], maps[t]
                flow = torch.zeros(2, *a.shape[1:], dtype=a.dtype) if flow is None else 2 * F.interpolate(
                    flow[None], a.shape[1:], mode="bilinear", align_corners=False)[0]  # fmt: skip
                there, costs = warped(b, flow), []
                for dy, dx in itertools.product((-1, 0, 1), (-1, 0, 1)):
                    cost = torch.zeros(a.shape[1:], dtype=a.dtype)
                    for i, j in itertools.product(*map(range, a.shape[1:])):
                        if 0 <= i + dy < a.shape[1] and 0 <= j + dx < a.shape[2]:
                            cost[i, j] = F.cosine_similarity(a[:, i, j], there[:, i + dy, j + dx], dim=0)
                    costs.append(cost)
                x = torch.cat([est.reduce(a[None])[0], torch.stack(costs), flow])[None]
                x = F.leaky_relu(est.second(F.leaky_relu(est.first(x), 0.1)), 0.1)
                flow = flow + est.last(x)[0]
                found.append(flow)
            return found

        for s, t in [(0, 1), (1, 2), (1, 0), (2, 1)]:
            f, b = flows(s, t), flows(t, s)
            levels = list(zip((coarse, fine), f, b, strict=True))
            regression = [(m[s] - warped(m[t], flow)).square().mean() for m, flow, _ in levels]
            cycle = [(m[s] - warped(warped(m[s], back), flow)).square().mean() for m, flow, back in levels]
            up = 2 * F.interpolate(f[-1][None], (8, 8), mode="bilinear", align_corners=False)[0]
            other = warped(pictures[t], up)
            apart = pictures[s] - other
            terms["regression"].append(sum(regression) / 2)
            terms["cycle"].append(sum(cycle) / 2)
            terms["reconstruction"].append(
                apart.abs().mean() + 0.5 * apart.square().mean() + similar(pictures[s], other)
            )
            terms["smoothness"].append(smooth(up, pictures[s], 2.0))
    found = {name: torch.stack(each).mean() for name, each in terms.items()}
    variances, covariances = [], []
    for level in everything:
        x = torch.cat(level)
        C = torch.cov(x.T)
        variances.append((1 - (C.diagonal() + 1e-4).sqrt()).relu().mean())
        covariances.append(2 * (C.square().sum() - C.diagonal().square().sum()) / len(C))
    return {**found, "variance": sum(variances) / 2, "covariance": sum(covariances) / 2}


def test_value_and_gradient_are_those_of_loops():
    root, frames = moved(root_of()).double(), random_frames(2)
    out = root(batch_of(frames))
    expected = twin(root, frames)
    for name, value in expected.items():
        torch.testing.assert_close(out[f"flow/{name}"], value.detach(), rtol=1e-9, atol=1e-12)
        assert float(value) > 1e-4, name
    loss = sum(WEIGHTS[name] * value for name, value in expected.items())
    torch.testing.assert_close(out["loss"], loss, rtol=1e-9, atol=0)
    named = {n: p for n, p in root.named_parameters() if p.requires_grad}
    found = [torch.autograd.grad(x, list(named.values()), allow_unused=True) for x in (out["loss"], loss)]
    reached = 0
    for name, ours, theirs in zip(named, *found, strict=True):
        if theirs is None:  # temperatures
            assert not ours.any(), name
            continue
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10, msg=name)
        reached += bool(ours.abs().max() > 1e-6)
    assert reached > 15


def test_a_warp_reads_where_the_flow_points():
    x = torch.arange(12.0).view(1, 1, 3, 4)
    flow = torch.zeros(1, 2, 3, 4)
    flow[:, 0] = 1  # a row further down
    assert torch.equal(warp(x, flow)[0, 0, 0], x[0, 0, 1])
    assert torch.equal(warp(x, flow)[0, 0, 2], x[0, 0, 2])  # beyond the edge: the nearest cell
    flow[:, 0], flow[:, 1] = 0, 0.5
    torch.testing.assert_close(warp(x, flow)[0, 0, 0], torch.tensor([0.5, 1.5, 2.5, 3.0]))
    finer = torch.tensor([2.0, 3.0]).view(1, 2, 1, 1).expand(1, 2, 4, 9)
    assert torch.equal(resize_flow(torch.ones(1, 2, 2, 3), (4, 9)), finer)


def test_a_cost_is_highest_where_the_cell_went():
    a = torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    b = a.roll((1, -1), (2, 3))  # one down, one to the left
    costs = cost_volume(a, b, 1)[0, :, 1:-1, 1:-1]
    assert (costs.argmax(0) == 2 * 3 + 0).all()  # displacements in raster order: row +1, column -1
    torch.testing.assert_close(costs.amax(0), torch.ones(4, 4))


def sliding(n: int, T: int, size: int, pixels: int, seed: int) -> torch.Tensor:
    """Smooth noise that moves to the right by so many pixels a frame."""
    wide = torch.rand(n, 3, size // 4 + 2, size // 2 + 2, generator=torch.Generator().manual_seed(seed))
    wide = F.interpolate(wide, (size, 3 * size), mode="bicubic", align_corners=False).clamp(0, 1)
    return torch.stack([wide[..., size - t * pixels : 2 * size - t * pixels] for t in range(T)], 1)


def test_a_planted_motion_is_recovered_with_its_sign():
    """To the right by one token: the flow to the next moment is (0, 1), that back (0, -1), on clips not trained on."""
    root = root_of({"frames": 2, "size": 32, "patch": 4, "width": 16}, cells=4, hidden=16, l2=0.0, edge=10.0)
    optimizer = torch.optim.AdamW([p for p in root.parameters() if p.requires_grad], lr=3e-3)
    for step in range(100):
        loss = root(batch_of(sliding(8, 2, 32, 4, step)))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seen = batch_of(sliding(16, 2, 32, 4, 10_000))
    objective = root.objectives["flow"]
    with torch.no_grad():
        x, _ = objective.moments(step_of(root, seen))
        forth = objective.estimator(*(objective.levels(x[:, t]) for t in (0, 1)))[-1][..., 1:-1, 1:-1]
        back = objective.estimator(*(objective.levels(x[:, t]) for t in (1, 0)))[-1][..., 1:-1, 1:-1]
        report = root(seen)
    assert forth.mean((0, 2, 3)).tolist() == pytest.approx([0, 1], abs=0.15)
    assert back.mean((0, 2, 3)).tolist() == pytest.approx([0, -1], abs=0.15)
    assert report["flow/reconstruction"] < 0.6 * report["flow/still"]


def test_a_moment_does_not_know_the_next():
    root, frames = root_of().double(), random_frames()
    other = frames.clone()
    other[:, 1] = 0
    before, after = (root.objectives["flow"].moments(step_of(root, batch_of(x))) for x in (frames, other))
    for part in (0, 1):
        assert torch.equal(before[part][:, [0, 2]], after[part][:, [0, 2]])
        assert not torch.equal(before[part][:, 1], after[part][:, 1])
    assert torch.equal(before[1], root.model.tower("video").encoder.normalize(frames))


def test_absent_samples_do_not_count_and_an_absent_field_costs_nothing():
    root, frames = moved(root_of()).double(), random_frames(3)
    whole = root(batch_of(frames))
    some = root(batch_of(frames, [True, False, True, False, True]))
    torch.testing.assert_close(some["loss"], whole["loss"])
    none = root(batch_of(frames[:0], [False, False]))
    none["loss"].backward()
    assert none["loss"] == 0
    assert all(p.grad is not None for p in root.objectives.parameters())


ABSENT = {"all": (), "a rank without": (0, 1, 2)}


def found_of(name: str, rows: range, wrap) -> dict[str, torch.Tensor]:
    """Loss and gradients of the samples ``rows`` of five, in double."""
    frames, here = random_frames(5), [i not in ABSENT[name] for i in rows]
    root = moved(root_of()).double()
    wrapped = wrap(root)  # kept: what reduces the gradients lives as long as it does
    loss = wrapped(batch_of(frames[[i for i in rows if i not in ABSENT[name]]], here))["loss"]
    loss.backward()
    found = {n: p.grad.clone() for n, p in root.named_parameters() if p.grad is not None}
    return {**found, "loss": world().sum(loss.detach().reshape(1)) / world().size}


def compare_shards(reference: str) -> dict[str, float]:
    """On each of two ranks: the largest error of each case, relative to the largest entry of each tensor."""
    rows = (range(3), range(3, 5))[world().rank]
    whole, errors = load_file(reference), {}
    for name in ABSENT:
        found = found_of(name, rows, lambda root: DistributedDataParallel(root, gradient_as_bucket_view=True))
        expected = {key: whole[f"{name}/{key}"] for key in found}
        size = max(float(value.abs().max()) for value in expected.values())
        errors[name] = max(float((found[key] - value).abs().max()) / size for key, value in expected.items())
    return errors


def test_two_processes_with_different_shards_have_the_gradient_of_one(tmp_path):
    whole = {f"{n}/{k}": v for n in ABSENT for k, v in found_of(n, range(5), lambda root: root).items()}
    save_file(whole, tmp_path / "one.safetensors")
    (tmp_path / "ranks").mkdir()
    for report in run_ranks(compare_shards, 2, tmp_path / "ranks", str(tmp_path / "one.safetensors")):
        assert set(report) == set(ABSENT)
        assert max(report.values()) < 1e-9, report
    assert all(whole[f"{name}/loss"] > 0.1 for name in ABSENT)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"field": "vidio"}, "unknown 'vidio'"),
    ({"cells": 5}, r"cells: a token of 'video' is made from 12 figures, not from blocks of 5\^2"),
    ({"levels": 4}, "levels: 4 levels need 8 rows and columns, not 4 x 4"),
])  # fmt: skip
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        root_of(**wrong)


def test_one_moment_has_no_flow():
    root = root_of({"tubelet": 3})
    with pytest.raises(ConfigError, match=r"a flow needs a full grid \(time, row, column\) of 2 moments or more"):
        root(batch_of(random_frames(dtype=torch.float32)))
