"""Augmentation: seeded per cloud, neutral where told so, exact in what it keeps, and torch_geometric's geometry."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch_geometric import transforms as pyg
from torch_geometric.data import Data

from mmrep.config import ConfigError, component
from mmrep.modalities.point_cloud.views import PointAugment, about_axis, any_rotation
from mmrep.views import View

NEUTRAL = {"rotate": "none", "scale": (1.0, 1.0), "translate": 0.0, "mirror": 0.0, "jitter": 0.0, "drop": 0.0}
STRONG = {"rotate": "so3", "scale": (0.5, 2.0), "translate": 0.3, "mirror": 0.5, "jitter": 0.05, "jitter_clip": 0.1,
          "crop": (0.4, 0.9), "drop": 0.5}  # fmt: skip
SEEDS = torch.tensor([3, -(2**62), 5, 2**63 - 1, 11, 12])
LENGTHS = (1, 2, 7, 30, 50, 50)


def view(**fields) -> PointAugment:
    return component("views", "point-augment", **{**NEUTRAL, **fields}).build()


def clouds(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(len(lengths), max(lengths), 3, generator=generator)
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    blank = ~valid[..., None]
    colors = torch.rand(points.shape, generator=generator)
    normals = torch.nn.functional.normalize(torch.randn(points.shape, generator=generator), dim=2)
    return {"valid": valid, "points": points.masked_fill(blank, 0), "colors": colors.masked_fill(blank, 0),
            "normals": normals.masked_fill(blank, 0)}  # fmt: skip


def test_it_is_a_view_with_a_role():
    assert isinstance(view(), View)
    assert view(role="local").role == "local"
    with pytest.raises(ConfigError, match="lowest, 2"):
        view(scale=(2.0, 1.0))
    with pytest.raises(ConfigError, match=r"lowest, 0\.9"):
        view(crop=(0.9, 0.4))


def test_neutral_ranges_change_nothing():
    inputs = clouds()
    out, params = view().batch(inputs, SEEDS)
    assert out.keys() == inputs.keys()
    assert all(torch.equal(out[name], inputs[name]) for name in inputs)
    assert torch.equal(params["kept"], inputs["valid"])


def test_a_cloud_is_changed_alike_alone_and_in_any_batch():
    v, inputs = view(**STRONG), clouds()
    together, params = v.batch(inputs, SEEDS)
    again, _ = v.batch(inputs, SEEDS)
    assert all(torch.equal(together[name], again[name]) for name in inputs)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    turned, _ = v.batch({name: x[order] for name, x in inputs.items()}, SEEDS[order])
    assert all(torch.equal(turned[name], together[name][order]) for name in inputs)
    for i, n in enumerate(LENGTHS):  # alone, without padding
        alone, own = v.batch({name: x[i : i + 1, :n] for name, x in inputs.items()}, SEEDS[i : i + 1])
        for name in inputs:
            assert torch.equal(alone[name][0], together[name][i, :n])
        for name, value in own.items():
            assert torch.equal(value[0], params[name][i, :n] if name in ("kept", "jitter") else params[name][i])
    other, _ = v.batch(inputs, SEEDS + 1)
    assert all((other["points"][i] - together["points"][i]).abs().max() > 0.05 for i in range(6))


def test_parameters_reproduce_the_change():
    v, inputs = view(**STRONG), clouds()
    out, p = v.batch(inputs, SEEDS)
    assert all(torch.equal(v.apply(inputs, p)[name], out[name]) for name in inputs)
    assert all(len(value) == 6 for value in p.values())
    for i in range(6):
        want = p["scale"][i] * inputs["points"][i] @ p["matrix"][i].T + p["translation"][i] + p["jitter"][i]
        left = out["valid"][i]
        torch.testing.assert_close(out["points"][i][left], want[left], atol=1e-5, rtol=0)
        torch.testing.assert_close(out["normals"][i][left], (inputs["normals"][i] @ p["matrix"][i].T)[left])
        assert torch.equal(out["colors"][i], inputs["colors"][i])


def test_a_change_repeated_on_fewer_points_makes_none_valid():
    v, inputs = view(**STRONG), clouds()
    _, params = v.batch(inputs, SEEDS)
    fewer = inputs["valid"] & (torch.arange(50) % 2 == 0)
    assert torch.equal(v.apply({**inputs, "valid": fewer}, params)["valid"], fewer & params["kept"])


def test_what_is_not_valid_stays_so_and_zero():
    out, _ = view(**STRONG).batch(clouds(), SEEDS)
    assert not (out["valid"] & ~clouds()["valid"]).any()
    assert out["valid"].any(1).all()
    assert (out["points"][~out["valid"]] == 0).all()
    assert (out["normals"][~out["valid"]] == 0).all()


def test_the_inputs_are_not_changed_in_place():
    inputs = clouds()
    view(**STRONG).batch(inputs, SEEDS)
    assert all(torch.equal(x, clouds()[name]) for name, x in inputs.items())


def test_rotations_are_rotations():
    for matrix in (
        view(rotate="so3").batch(*many(4000))[1]["matrix"],
        view(rotate="up").batch(*many(100))[1]["matrix"],
    ):
        eye = torch.eye(3).expand_as(matrix)
        torch.testing.assert_close(matrix @ matrix.mT, eye, atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.linalg.det(matrix), torch.ones(len(matrix)), atol=1e-5, rtol=0)


def many(n: int) -> tuple[dict[str, Tensor], Tensor]:
    return {"points": torch.zeros(n, 1, 3), "valid": torch.ones(n, 1, dtype=torch.bool)}, torch.arange(n)


def test_so3_is_covered_uniformly():
    """The angle has density (1 - cos) / pi, any image of a vector is uniform on the sphere, and all moments fit."""
    matrix = view(rotate="so3").batch(*many(20000))[1]["matrix"].double()
    angle = ((matrix.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1).acos().sort().values
    expected = (angle - angle.sin()) / math.pi
    assert (expected - torch.arange(20000) / 20000).abs().max() < 0.015  # Kolmogorov, 1.6 / sqrt(n) = 0.011
    for column in matrix.unbind(2):
        heights = column.sort(0).values  # each coordinate of a uniform point of the sphere is uniform in -1..1
        assert ((heights + 1) / 2 - torch.arange(20000)[:, None] / 20000).abs().max() < 0.015
    assert matrix.mean(0).abs().max() < 0.015
    assert (torch.einsum("nij,nkl->ijkl", matrix, matrix) / 20000 - _second_moment()).abs().max() < 0.015


def _second_moment() -> Tensor:
    eye = torch.eye(3, dtype=torch.double)
    return torch.einsum("ik,jl->ijkl", eye, eye) / 3


def test_a_quaternion_rotates_as_hamilton_says():
    u = torch.tensor([[0.3, 0.1, 0.7]])
    a, b = math.sqrt(0.7), math.sqrt(0.3)
    q = [
        b * math.cos(2 * math.pi * 0.7),
        a * math.sin(0.2 * math.pi),
        a * math.cos(0.2 * math.pi),
        b * math.sin(1.4 * math.pi),
    ]

    def product(p, q):
        return [
            p[0] * q[0] - p[1] * q[1] - p[2] * q[2] - p[3] * q[3],
            p[0] * q[1] + p[1] * q[0] + p[2] * q[3] - p[3] * q[2],
            p[0] * q[2] - p[1] * q[3] + p[2] * q[0] + p[3] * q[1],
            p[0] * q[3] + p[1] * q[2] - p[2] * q[1] + p[3] * q[0],
        ]

    for axis in range(3):
        vector = [0.0, *(float(axis == i) for i in range(3))]
        turned = product(product(q, vector), [q[0], -q[1], -q[2], -q[3]])
        torch.testing.assert_close(any_rotation(u)[0, :, axis], torch.tensor(turned[1:]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("up", ["x", "y", "z"])
def test_rotation_about_the_up_axis(up: str):
    axis = "xyz".index(up)
    matrix = view(rotate="up", up=up).batch(*many(4000))[1]["matrix"]
    fixed = torch.eye(3)[axis]
    assert torch.equal(matrix[:, axis], fixed.expand(4000, 3))
    assert torch.equal(matrix[:, :, axis], fixed.expand(4000, 3))
    a, b = (axis + 1) % 3, (axis + 2) % 3
    angle = torch.atan2(matrix[:, b, a], matrix[:, a, a]).sort().values
    assert ((angle + math.pi) / (2 * math.pi) - torch.arange(4000) / 4000).abs().max() < 0.03
    narrow = view(rotate="up", up=up, angle=30.0).batch(*many(1000))[1]["matrix"]
    degrees = torch.rad2deg(torch.atan2(narrow[:, b, a], narrow[:, a, a]))
    assert 29 < degrees.max() <= 30
    assert -30 <= degrees.min() < -29


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rotation_and_scale_and_mirror_are_torch_geometrics(axis: int):
    points = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    theirs = pyg.RandomRotate((37.0, 37.0), axis)(Data(pos=points)).pos
    ours = points @ about_axis(torch.deg2rad(torch.tensor([-37.0])), axis)[0].T  # it turns clockwise
    torch.testing.assert_close(ours, theirs)
    inputs = {"points": points[None], "valid": torch.ones(1, 20, dtype=torch.bool)}
    out, params = view(scale=(0.5, 2.0)).batch(inputs, SEEDS[:1])
    factor = params["scale"].item()
    torch.testing.assert_close(out["points"][0], pyg.RandomScale((factor, factor))(Data(pos=points)).pos)
    out, params = view(mirror=1.0, up="xyz"[axis]).batch(inputs, SEEDS[:1])
    flipped = int((params["matrix"][0].diagonal() < 0).nonzero())
    assert flipped != axis
    assert torch.equal(out["points"][0], pyg.RandomFlip(flipped, p=1.0)(Data(pos=points)).pos)


def test_ranges_hold_and_are_used():
    inputs, seeds = many(4000)
    p = view(scale=(0.5, 2.0), translate=0.3, mirror=0.25, up="z").batch(inputs, seeds)[1]
    assert 0.5 <= p["scale"].min() < 0.51
    assert 1.96 < p["scale"].max() <= 2
    assert abs(p["scale"].log().mean()) < 0.02
    assert -0.3 <= p["translation"].min() < -0.297
    assert 0.297 < p["translation"].max() <= 0.3
    assert abs(p["mirror"].float().mean() - 0.25) < 0.03
    signs = p["matrix"].diagonal(dim1=1, dim2=2)
    assert (signs[:, 2] == 1).all()
    assert torch.equal(signs.prod(1) < 0, p["mirror"])
    assert ((signs < 0).float().mean(0)[:2] - 0.125).abs().max() < 0.03
    draws = torch.cat([p["scale"].log()[:, None], p["translation"], signs[:, :2]], 1)
    assert (torch.corrcoef(draws.T) - torch.eye(6)).abs().fill_diagonal_(0)[:4].max() < 0.06


def test_jitter_is_normal_clipped_and_independent():
    inputs = {"points": torch.zeros(50, 400, 3), "valid": torch.ones(50, 400, dtype=torch.bool)}
    noise = view(jitter=0.02, jitter_clip=1.0).batch(inputs, torch.arange(50))[1]["jitter"].double() / 0.02
    flat = noise.flatten().sort().values
    normal = torch.special.ndtr(flat)
    assert (normal - torch.arange(len(flat)) / len(flat)).abs().max() < 0.01
    assert (torch.corrcoef(noise.flatten(0, 1).T) - torch.eye(3)).abs().max() < 0.03
    assert (torch.corrcoef(noise[:, :, 0]) - torch.eye(50)).abs().max() < 0.3
    clipped = view(jitter=0.02, jitter_clip=0.03).batch(inputs, torch.arange(50))[1]["jitter"]
    assert clipped.abs().max() == pytest.approx(0.03)
    torch.testing.assert_close(clipped.double(), (noise * 0.02).clamp(-0.03, 0.03), atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 1.0])
def test_crop_keeps_the_nearest_and_their_exact_number(share: float):
    inputs = clouds()
    out, p = view(crop=(share, share)).batch(inputs, SEEDS)
    assert out["valid"].sum(1).tolist() == [max(1, round(share * n)) for n in LENGTHS]
    for i, n in enumerate(LENGTHS):
        centre = int(p["centre"][i])
        assert centre < n
        gaps = (inputs["points"][i, :n] - inputs["points"][i, centre]).norm(dim=1)
        nearest = gaps.argsort()[: max(1, round(share * n))]
        assert set(out["valid"][i].nonzero()[:, 0].tolist()) == set(nearest.tolist())


def test_any_valid_point_may_be_the_centre():
    valid = torch.ones(3000, 5, dtype=torch.bool)
    valid[:, 1] = False
    inputs = {"points": torch.zeros(3000, 5, 3), "valid": valid}
    centre = view(crop=(0.5, 0.5)).batch(inputs, torch.arange(3000))[1]["centre"]
    counts = torch.bincount(centre, minlength=5)
    assert counts[1] == 0
    assert (counts[[0, 2, 3, 4]] - 750).abs().max() < 100


def test_drop_loses_up_to_its_share():
    inputs = {"points": torch.zeros(2000, 40, 3), "valid": torch.ones(2000, 40, dtype=torch.bool)}
    valid = view(drop=0.5).batch(inputs, torch.arange(2000))[0]["valid"]
    counts = valid.sum(1)
    assert counts.min() == 20
    assert counts.max() == 40
    assert abs(counts.float().mean() - 30) < 0.5
    assert (valid.float().mean(0) - 0.75).abs().max() < 0.05
    both = view(drop=0.5, crop=(0.5, 0.5)).batch(inputs, torch.arange(2000))[0]["valid"].sum(1)
    assert both.min() == 10
    assert both.max() == 20


def test_no_clouds():
    empty = {name: x[:0] for name, x in clouds().items()}
    out, params = view(**STRONG).batch(empty, SEEDS[:0])
    assert out["points"].shape == (0, 50, 3)
    assert params["matrix"].shape == (0, 3, 3)


@pytest.mark.parametrize("name", ["point-patch", "pyg-points"])
def test_encoders_read_what_it_leaves(name: str):
    fields = {"max_points": 64, "groups": 8, "neighbors": 4, "width": 30, "features": ["normals"]}
    encoder = component("encoders", name, **fields).build().eval()
    inputs = encoder.collate([encoder.prepare(raw) for raw in encoder.examples(5, 0)])
    out, _ = view(**STRONG).batch(inputs, SEEDS[:5])
    grid = encoder(out).tokens.grid
    tokens = (grid.valid & ~grid.special).sum(1)
    assert tokens.tolist() == out["valid"].sum(1).clamp_max(8).tolist()
