"""Every registered point cloud encoder keeps the contract; what they share; and what is special to our own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import trimesh

from mmrep.config import ConfigError, component, dump, parse
from mmrep.encoder import BadSampleError
from mmrep.modalities.point_cloud._base import thin, unit_sphere
from mmrep.modalities.point_cloud.decode import Cloud, decode
from mmrep.modalities.point_cloud.patch import PatchNet, PointPatch, masked_max
from mmrep.registry import encoders
from mmrep.testing import check_encoder
from mmrep.tokens import Tokens
from mmrep.views import View

SMALL = {"max_points": 64, "groups": 16, "neighbors": 8}
PATCH = {**SMALL, "point_width": 8, "width": 32, "depth": 2, "heads": 2}
PYG = {**SMALL, "width": 32}
CASES = [
    ("point-patch", PATCH),
    ("point-patch", {**PATCH, "features": ["normals", "colors"], "layer_scale": 1e-4, "dropout": 0.1}),
    ("point-patch", {**PATCH, "class_token": False, "groups": 100, "neighbors": 80, "drop_path": 0.1}),
    ("point-patch", {**PATCH, "normalize": "none", "groups": 1, "neighbors": 2}),
    ("point-patch", {"depth": 2, "width": 48}),
    ("pyg-points", {**PYG, "network": "pointnet"}),
    ("pyg-points", {**PYG, "network": "pointnet", "features": ["colors"], "groups": 100}),
    ("pyg-points", {**PYG, "network": "dgcnn"}),
    ("pyg-points", {**PYG, "network": "dgcnn", "features": ["normals"], "neighbors": 80}),
    ("pyg-points", {**PYG, "network": "point-transformer"}),
    ("pyg-points", {**PYG, "network": "point-transformer", "normalize": "none", "features": ["colors", "normals"]}),
]


@pytest.mark.parametrize(("name", "fields"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_contract(name: str, fields: dict):
    torch.manual_seed(0)
    check_encoder(component("encoders", name, **fields).build(), n=6)


def test_every_registered_point_cloud_encoder_is_among_the_cases():
    registered = {name for name, cls in encoders.load_all().items() if getattr(cls, "modality", "") == "point_cloud"}
    assert registered == {name for name, _ in CASES}


def patch(**fields) -> PointPatch:
    torch.manual_seed(0)
    return component("encoders", "point-patch", **{**PATCH, **fields}).build().eval()


def test_which_oddities_are_read_and_which_refused():
    read, causes = set(), {}
    for name, raw in patch().oddities(0).items():
        try:
            item = patch().prepare(raw)
        except BadSampleError as error:
            causes[name] = error.cause
        else:
            read.add(name)
            assert item["points"].isfinite().all()
    assert read == {
        "one point", "two equal points", "all points equal", "collinear", "duplicates", "far from the origin", "tiny",
        "bytes as coordinates", "a ply", "a mesh without faces", "a mesh without area",
    }  # fmt: skip
    assert causes == {
        "huge": "value range", "NaN": "not finite", "infinity": "not finite", "no points": "empty cloud",
        "an empty list": "empty cloud", "text": "missing file", "strings": "unsupported values",
        "two columns": "wrong columns", "four columns": "wrong columns", "a single row": "wrong columns",
        "three axes": "wrong columns", "booleans": "unsupported values", "complex": "unsupported values",
        "ragged rows": "wrong columns", "colours out of range": "value range", "a truncated ply": "damaged cloud",
        "no bytes": "damaged cloud", "an empty mesh": "empty cloud", "a missing vertex": "damaged cloud",
    }  # fmt: skip


def test_examples_are_ragged_and_of_several_kinds():
    examples = patch().examples(10, 0)
    assert {type(raw) for raw in examples} == {np.ndarray, dict, torch.Tensor, bytes}
    lengths = [len(decode(raw).points) for raw in examples]
    assert min(lengths) < 16 < 64 < max(lengths)
    assert len({len(patch().prepare(raw)["points"]) for raw in examples}) >= 3


def test_unit_sphere_centres_and_scales():
    points = np.random.default_rng(0).normal(size=(50, 3)) * [1, 5, 2]
    out = unit_sphere(points + np.array([10, -3, 4]))
    np.testing.assert_allclose(out.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(out, axis=1).max(), 1)
    centred = points - points.mean(0)
    np.testing.assert_allclose(out, centred / np.linalg.norm(centred, axis=1).max(), atol=1e-12)
    for scale in (1e-300, 1e-30, 1e15):
        np.testing.assert_allclose(unit_sphere(points * scale), unit_sphere(points), atol=1e-9)
    assert np.array_equal(unit_sphere(np.full((7, 3), 0.1)), np.zeros((7, 3)))
    assert np.array_equal(unit_sphere(np.array([[3.0, 4, 5]])), [[0, 0, 0]])


def test_a_cloud_a_million_metres_off_loses_nothing():
    points = np.random.default_rng(0).random((40, 3))
    near, far = patch().prepare(points), patch().prepare(points + 1e6)
    torch.testing.assert_close(far["points"], near["points"], atol=1e-6, rtol=0)
    naive = (points + 1e6).astype(np.float32)
    assert np.abs(unit_sphere(naive) - near["points"].numpy()).max() > 0.01


def test_without_normalisation_the_units_stay():
    points = np.random.default_rng(0).random((40, 3)) * 9 + 3
    torch.testing.assert_close(patch(normalize="none").prepare(points)["points"], torch.from_numpy(points).float())
    assert patch(normalize="none").prepare(np.ones((1, 3)))["points"].tolist() == [[1, 1, 1]]
    assert patch().prepare(np.ones((1, 3)))["points"].tolist() == [[0, 0, 0]]


def test_large_clouds_are_thinned_out_alike_each_time():
    points = np.arange(3000.0).reshape(1000, 3)
    colors = np.tile(np.arange(1000)[:, None] / 1000, (1, 3))
    encoder = patch(features=["colors"], normalize="none")
    item, again = (
        encoder.prepare({"points": points, "colors": colors}),
        encoder.prepare({"points": points, "colors": colors}),
    )
    assert item["points"].shape == (64, 3)
    assert torch.equal(item["points"], again["points"])
    rows = (item["points"][:, 0] / 3).round().long()
    assert (rows.diff() > 0).all()
    torch.testing.assert_close(item["colors"][:, 0], rows / 1000)
    counts = sum(
        np.bincount(thin(Cloud(points), 100, seed).points[:, 0].astype(int) // 3, minlength=1000) for seed in range(500)
    )
    assert counts.min() > 15  # 50 expected, with a standard deviation of 7
    assert counts.max() < 90
    assert thin(Cloud(points), 1000, 0).points is points


class Half(View):
    """Keeps the first half of a cloud."""

    def sample(self, decoded: Cloud, seed: int) -> Cloud:
        assert isinstance(decoded, Cloud)
        return decoded.take(np.arange(len(decoded.points) // 2))


def test_a_view_sees_the_decoded_cloud_and_its_seed_chooses_the_points():
    points = np.random.default_rng(0).random((40, 3)) + 5
    torch.testing.assert_close(
        patch().prepare(points, view=Half(None), seed=1)["points"], patch().prepare(points[:20])["points"]
    )
    ball = trimesh.creation.icosphere()
    plain, view = [patch().prepare(ball)["points"] for _ in range(2)], View(None)
    one, two = (patch().prepare(ball, view=view, seed=seed)["points"] for seed in (-(2**63), 2**63 - 1))
    assert torch.equal(*plain)
    assert torch.equal(plain[0], patch().prepare(ball, seed=7)["points"])
    assert not torch.equal(one, two)
    assert torch.equal(one, patch().prepare(ball, view=view, seed=-(2**63))["points"])
    assert len(one) == 64


def test_padding_is_told_by_valid():
    encoder = patch(features=["normals", "colors"])
    items = [encoder.prepare(raw) for raw in encoder.examples(4, 0)]
    inputs = encoder.collate(items)
    assert list(inputs) == ["valid", "points", "colors", "normals"]
    assert (
        inputs["valid"].sum(1).tolist() == [len(item["points"]) for item in items] == [encoder.length(i) for i in items]
    )
    for name in ("points", "colors", "normals"):
        assert (inputs[name][~inputs["valid"]] == 0).all()
        assert torch.equal(inputs[name][1][inputs["valid"][1]], items[1][name])
    assert encoder.collate([])["points"].shape == (0, 1, 3)
    assert (items[0]["colors"] == 0.5).all()
    assert (items[0]["normals"] == 0).all()


def test_features_reach_the_tokens():
    encoder = patch(features=["colors", "normals"])
    points = np.random.default_rng(0).random((40, 3))
    both = {"points": points, "colors": points, "normals": points - 0.5}
    with torch.no_grad():
        first = encoder(encoder.collate([encoder.prepare(both)])).tokens.values
        for changed in ({**both, "colors": 1 - points}, {**both, "normals": 0.5 - points}):
            assert not torch.allclose(
                encoder(encoder.collate([encoder.prepare(changed)])).tokens.values, first, atol=1e-3
            )
    scaled = encoder.point_features(encoder.collate([encoder.prepare(both)]))
    torch.testing.assert_close(scaled[0, :, :3], torch.from_numpy(2 * points - 1).float())
    torch.testing.assert_close(scaled[0, :, 3:].norm(dim=1), torch.ones(40))


def test_configs_that_cannot_be():
    for fields, message in (
        ({"heads": 5}, "heads=5 does not divide width=32"),
        ({"features": ["colors", "colors"]}, "twice"),
        ({"features": ["colours"]}, "colors"),
        ({"max_points": 0}, "greater than or equal to 1"),
        ({"groups": 0}, "greater than or equal to 1"),
        ({"neighbors": 1}, "greater than or equal to 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            component("encoders", "point-patch", **{**PATCH, **fields})
    config = patch(features=["colors"]).config
    assert parse(PointPatch.Config, dump(config)) == config


def test_tokens_are_groups_and_few_points_are_few_tokens():
    encoder = patch()
    clouds = [np.random.default_rng(i).random((n, 3)) for i, n in enumerate((1, 5, 16, 60))]
    grid = encoder.tokenize(encoder.collate([encoder.prepare(cloud) for cloud in clouds])).grid
    assert grid.valid.sum(1).tolist() == [2, 6, 17, 17]
    assert grid.special[:, 0].all()
    assert not grid.special[:, 1:].any()
    assert (grid.coords[:, 0] == 0).all()
    for row, cloud in enumerate(clouds):
        prepared = encoder.prepare(cloud)["points"]
        centres = grid.coords[row, 1:][grid.valid[row, 1:]]
        assert ((centres[:, None] == prepared).all(2)).any(1).all()
        assert len(centres.unique(dim=0)) == len(centres)
    assert grid.coords[1, 1].norm() == pytest.approx(1)  # begins at the farthest from the centroid


def slow_patchnet(net: PatchNet, points: torch.Tensor) -> torch.Tensor:
    """Point-BERT's equation, one group [K, C] at a time."""
    local = torch.stack([net.first(point) for point in points])
    everything = local.max(0).values
    return torch.stack([net.second(torch.cat([everything, one])) for one in local]).max(0).values


def test_the_small_pointnet_is_point_berts():
    torch.manual_seed(0)
    net = PatchNet(5, 4, 6).double()
    points = torch.randn(2, 3, 7, 5, dtype=torch.double, requires_grad=True)
    valid = torch.rand(2, 3, 7) < 0.6
    valid[0, 0], valid[1, 1] = False, True
    out = net(points, valid)
    want = torch.stack([
        torch.stack([slow_patchnet(net, points[b, g][valid[b, g]]) if valid[b, g].any() else points.new_zeros(6)
                     for g in range(3)]) for b in range(2)
    ])  # fmt: skip
    torch.testing.assert_close(out, want)
    weights = torch.randn_like(out)
    for got, slow in zip(*(torch.autograd.grad((x * weights).sum(), [points, *net.parameters()], retain_graph=True)
                           for x in (out, want)), strict=True):  # fmt: skip
        torch.testing.assert_close(got, slow)
    assert net.first[-1].out_features == 8
    assert masked_max(torch.tensor([[[-5.0], [3.0]]]), torch.tensor([[True, False]])).item() == -5


def test_a_token_is_its_patch_relative_to_its_centre_and_a_position():
    """Moved as a whole, without normalisation, a cloud changes by its positions alone."""
    encoder = patch(normalize="none", class_token=False).double()
    points = torch.rand(1, 40, 3, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    valid, shift = torch.ones(1, 40, dtype=torch.bool), torch.tensor([2.0, 0, -1])
    here, there = (encoder.tokenize({"points": p, "valid": valid}) for p in (points, points + shift))
    torch.testing.assert_close(there.grid.coords, here.grid.coords + shift, atol=1e-5, rtol=0)
    bare = [tokens.values - encoder.positions(tokens.grid.coords.double()) for tokens in (here, there)]
    torch.testing.assert_close(*bare, atol=1e-5, rtol=0)
    assert (here.values - there.values).abs().max() > 0.01


def test_the_order_of_points_does_not_matter():
    encoder = patch()
    points = np.random.default_rng(0).random((50, 3))
    order = np.random.default_rng(1).permutation(50)
    with torch.no_grad():
        values = [encoder(encoder.collate([encoder.prepare(p)])).tokens.values for p in (points, points[order])]
    torch.testing.assert_close(*values, atol=1e-5, rtol=0)


def test_dropped_tokens_do_not_matter():
    encoder = patch()
    tokens = encoder.tokenize(encoder.collate([encoder.prepare(raw) for raw in encoder.examples(2, 0)]))
    keep = torch.tensor([[3, 1, 7], [2, 9, -1]])
    with torch.no_grad():
        out = encoder.encode(tokens, keep).tokens
        spoiled = tokens.values.clone()
        spoiled[0, [2, 4, 9]] = 50.0
        again = encoder.encode(Tokens(spoiled, tokens.grid), keep).tokens
    assert out.values.shape == (2, 4, 32)
    torch.testing.assert_close(again.values[0], out.values[0])
    assert torch.equal(out.grid.coords[0, 1:], tokens.grid.coords[0, [3, 1, 7]])


def test_previews_show_the_cloud():
    encoder = patch()
    cube = np.array([[x, y, z] for x in (0.0, 1) for y in (0.0, 1) for z in (0.0, 1)])
    red = {"points": cube, "colors": np.tile([1.0, 0, 0], (8, 1))}
    pictures = {
        name: np.asarray(encoder.preview(raw)) for name, raw in (("red", red), ("blue", cube), ("one", cube[:1]))
    }
    for picture in pictures.values():
        assert picture.shape == (224, 224, 3)
        assert (picture[0] == 255).all()
    drawn = {name: (picture < 250).any(2) for name, picture in pictures.items()}
    assert drawn["one"].sum() == 25
    assert drawn["one"][110:115, 110:115].all()
    assert 8 * 25 * 0.8 < drawn["red"].sum() <= 8 * 25
    red_shades = pictures["red"][drawn["red"]].astype(int)
    assert (red_shades[:, 0] > red_shades[:, 2]).all()
    assert len(np.unique(red_shades, axis=0)) > 3  # the farther, the paler
    above = np.asarray(encoder.preview(cube * [1, 5, 1]))
    rows, columns = (above < 250).any(2).nonzero()
    assert np.ptp(rows) > 2 * np.ptp(columns)  # y is up


def test_previews_are_upright_and_the_near_hides_the_far():
    encoder = patch()
    tilt, turn = math.radians(20), math.radians(35)
    towards = np.array([-math.sin(turn) * math.cos(tilt), math.sin(tilt), math.cos(turn) * math.cos(tilt)])
    red, blue = [1.0, 0, 0], [0, 0, 1.0]
    for order in (1, -1):
        picture = np.asarray(encoder.preview({"points": [towards, -towards][::order], "colors": [red, blue][::order]}))
        shown = picture[(picture < 250).any(2)].astype(int)
        assert (shown[:, 0] > shown[:, 2]).all()  # red is nearer
    pole = np.asarray(encoder.preview({"points": [[0.0, 1, 0], [0, -1, 0]], "colors": [red, blue]})).astype(int)
    rows = {name: (pole[..., c] - pole[..., 2 - c] > 50).nonzero()[0].mean() for name, c in (("red", 0), ("blue", 2))}
    assert rows["red"] < 30
    assert rows["blue"] > 194
    black = {"points": [towards + np.array([0, 1, 0]), -towards], "colors": [[0.0] * 3] * 2}
    grey = np.asarray(encoder.preview(black)).astype(int)
    rows, columns = (grey < 250).any(2).nonzero()
    assert grey[rows.min(), columns].min() < grey[rows.max(), columns].min() - 50  # the far one is paler
