"""The tuples objective: what it gives to the loss, partial tuples, micro-batches, refusal at build time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from accelerate import Accelerator

from mmrep.config import ConfigError, component
from mmrep.losses.centroid import centroid
from mmrep.losses.gram import gram
from mmrep.losses.symile import symile
from mmrep.model import Model, ModelConfig, TemperatureConfig, TowerConfig
from mmrep.objectives.root import Root
from mmrep.training.cached import forward_backward
from tests.objectives.test_contrastive import FIELDS, batch, step_of
from tests.test_cached import in_parts, rows

XYZ = {"of": ["x", "y", "z"]}


def tuples(chosen, loss="gram", **fields):
    return component("objectives", "tuples", tuples=chosen, loss=loss, **fields)


def build(objectives=None, *, dim=5, dropout=0.0, **temperature):
    torch.manual_seed(0)
    toy = component("encoders", "toy", dropout=dropout)
    scales = {
        "default": TemperatureConfig(**{"scale": 5.0, **temperature}),
        "other": TemperatureConfig(scale=7.0, max_scale=None),
    }
    towers = {name: TowerConfig(encoder=toy) for name in "ab"}
    model = Model(ModelConfig(dim=dim, towers=towers, temperatures=scales))
    return Root(model, objectives or [tuples([XYZ])], fields=FIELDS, views={})


def embedded(root, b, fields="xyz"):
    step = step_of(root, b)
    return [step.embedding(f) for f in fields]


def test_it_is_the_loss_of_the_towers_embeddings():
    root, b = build([tuples([{**XYZ, "anchor": "y"}])]), batch()
    out = root(b)
    expected = gram(embedded(root, b), scale=5.0, anchor=1)
    torch.testing.assert_close(out["loss"], expected["loss"])
    assert set(out) == {"loss", "tuples/loss", "tuples/x+y+z", "tuples/x+y+z.volume"}
    torch.testing.assert_close(out["tuples/x+y+z.volume"], expected["volume"])


def test_tuples_add_up_with_their_weights_and_temperatures():
    chosen = [{**XYZ, "weight": 2.0}, {"of": ["z", "x"], "temperature": "other"}]
    root, b = build([tuples(chosen, weight=0.5)]), batch()
    x, y, z = embedded(root, b)
    expected = 0.5 * (2 * gram([x, y, z], scale=5.0)["loss"] + gram([z, x], scale=7.0)["loss"])
    torch.testing.assert_close(root(b)["loss"], expected)


def test_groups_can_be_turned_off():
    b = batch(4, group=torch.tensor([1, 1, 2, 3]))
    with_groups, without = (build([tuples([XYZ], use_group=use)])(b)["loss"] for use in (True, False))
    torch.testing.assert_close(without, build()(batch(4))["loss"])
    assert not torch.allclose(with_groups, without)


def test_views_are_read_and_named():
    b = batch()
    second = [{**v, "values": v["values"] + 1} for (v,) in [b.inputs["x"]]]
    b = dataclasses.replace(b, inputs={**b.inputs, "x": [*b.inputs["x"], *second]})
    root = build([tuples([{"of": ["x", "x", "y"], "views": [0, 1, 0]}])])
    step = step_of(root, b)
    expected = gram([step.embedding("x"), step.embedding("x", 1), step.embedding("y")], scale=5.0)["loss"]
    out = root(b)
    torch.testing.assert_close(out["loss"], expected)
    assert "tuples/x.0+x.1+y.0" in out


MISSING = {("y", 1), ("x", 3), ("z", 4), ("z", 6)}


@pytest.mark.parametrize("loss", ["gram", "symile", "centroid"])
def test_dropped_tuples_take_no_part(loss):
    """Of the centroid too, which could take them."""
    root, b = build([tuples([XYZ], loss)]).eval(), batch(8, missing=MISSING)
    keep = [0, 2, 5, 7]
    x = [e[keep] for e in embedded(root, b)]
    expected = {"gram": gram, "symile": symile, "centroid": centroid}[loss](x, scale=5.0)["loss"]
    torch.testing.assert_close(root(b)["loss"], expected)


def test_subsets_of_a_loss_of_complete_tuples_are_contrasted_among_themselves():
    root = build([tuples([{**XYZ, "partial": "subsets"}])])
    b = batch(12, missing={("y", 1), ("y", 2), ("y", 3), ("z", 4), ("z", 6), ("x", 7), ("y", 7)})
    x, y, z = embedded(root, b)
    whole, xz, xy = [0, 5, 8, 9, 10, 11], [1, 2, 3], [4, 6]  # sample 7 has z alone
    terms = [
        gram([e[whole] for e in (x, y, z)], scale=5.0),
        gram([e[xz] for e in (x, z)], scale=5.0),
        gram([e[xy] for e in (x, y)], scale=5.0),
    ]
    out = root(b)
    for key, part in (("tuples/loss", "loss"), ("tuples/x+y+z.volume", "volume")):
        expected = sum(n * term[part] for n, term in zip((6, 3, 2), terms, strict=True)) / 11
        torch.testing.assert_close(out[key], expected.detach())


def test_subsets_hold_the_anchor():
    root = build([tuples([{**XYZ, "anchor": "z", "partial": "subsets"}])])
    b = batch(8, missing={("y", 1), ("y", 2), ("z", 4), ("z", 6)})
    x, y, z = embedded(root, b)
    whole, xz = [0, 3, 5, 7], [1, 2]
    first = gram([e[whole] for e in (x, y, z)], scale=5.0, anchor=2)["loss"]
    second = gram([e[xz] for e in (x, z)], scale=5.0, anchor=1)["loss"]
    torch.testing.assert_close(root(b)["loss"], (4 * first + 2 * second) / 6)


def test_subsets_of_a_loss_that_takes_them_are_left_to_it():
    root, b = build([tuples([{**XYZ, "partial": "subsets"}], "centroid")]), batch(8, missing=MISSING)
    valid = torch.stack([b.present[f] for f in "xyz"], 1)
    expected = centroid(embedded(root, b), scale=5.0, valid=valid)["loss"]
    torch.testing.assert_close(root(b)["loss"], expected)


@pytest.mark.parametrize("partial", ["drop", "subsets"])
@pytest.mark.parametrize("loss", ["gram", "centroid"])
def test_a_batch_without_tuples_gives_zero_loss_and_a_gradient_path_to_every_parameter(loss, partial):
    root = build([tuples([{**XYZ, "partial": partial}], loss)])
    out = root(batch(3, missing={(f, i) for f in "yz" for i in range(3)}))
    out["loss"].backward()
    assert out["loss"].item() == 0
    for name, p in root.named_parameters():
        assert p.grad is not None, name
        assert not p.grad.any(), name


@pytest.mark.parametrize(
    ("loss", "partial"), [("gram", "subsets"), ("symile", "drop"), ("triangle", "drop"), ("centroid", "subsets")]
)
def test_a_batch_in_parts_has_the_gradient_of_the_whole(loss, partial):
    """The loss is asked once, of leaves; the negatives that it draws are the same."""
    missing, double = {("y", 2), ("z", 7), ("x", 8), ("y", 8)}, torch.float64
    found = []
    for b in (in_parts([0, 4, 9, 11], missing, double), rows(0, 11, missing, double)):
        assert len(b.parts) in (0, 3)
        root = build([tuples([{**XYZ, "partial": partial}], loss)]).double()
        report = forward_backward(root, Accelerator(cpu=True), b)
        found.append([report["loss"].detach(), *(p.grad for p in root.parameters())])
    for parts, whole in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)
    assert found[0][0] > 0.1


@pytest.mark.parametrize(
    ("chosen", "loss", "message"),
    [
        ({"of": ["x", "yy", "z"]}, "gram", r"tuples\[0\].of: unknown field 'yy'; did you mean 'y'"),
        ({"of": ["x", "y"]}, "triangle", "'triangle' takes 3 fields, got 2: x, y"),
        (
            {"of": ["x", "y", "z", "x"], "views": [0, 0, 0, 1]},
            {"type": "symile", "negatives": "all"},
            "takes 2 to 3 fields",
        ),
        ({**XYZ, "anchor": "yy"}, "gram", "anchor: one of x, y, z; 'yy' is not; did you mean 'y'"),
        ({"of": ["x", "x"], "views": [0, 1], "anchor": "x"}, "gram", "'x' is in it twice"),
        ({**XYZ, "views": [0, 1]}, "gram", r"3 fields need 3 views, got \[0, 1\]"),
        ({"of": ["x", "x"]}, "gram", "x, x has a field twice"),
        ({**XYZ, "partial": "subsets"}, "triangle", "takes 3 fields, so that no subset is left"),
        ({**XYZ, "partial": "subsets"}, "symile", r"1 to 100 for 2 fields, 2.24 to 224 for 3 fields"),
        ({**XYZ, "temperature": "defualt"}, "gram", "unknown 'defualt'; did you mean 'default'"),
    ],
)
def test_a_wrong_tuple_is_refused_at_build_time(chosen, loss, message):
    with pytest.raises(ConfigError, match=message):
        build([tuples([chosen], loss)])


def test_no_tuples_and_a_bias_are_refused():
    with pytest.raises(ConfigError, match=r"objectives.tuples.tuples: none is given"):
        build([tuples([])])
    with pytest.raises(ConfigError, match=r"'gram' does not use a bias; remove model.temperatures.default.bias"):
        build(bias=-3.0)


@pytest.mark.parametrize(
    ("temperature", "limits"),
    [
        ({"scale": 1 / 0.07}, r"from 14.3, at most 100"),
        ({"scale": 4000.0, "max_scale": None}, r"from 4e\+03, at most any"),
        ({"scale": 14.3, "learned": False}, "fixed at 14.3"),
    ],
)
def test_trap_1_8_a_temperature_that_symile_cannot_use_is_refused_with_the_lines_to_write(temperature, limits):
    with pytest.raises(ConfigError, match=r"3 fields in 512 dimensions needs scales of 22.6 to 2.26e\+03") as error:
        build([tuples([XYZ], "symile")], dim=512, **temperature)
    text = str(error.value)
    assert limits.replace("\\", "") in text
    wanted = "model:\n  temperatures:\n    default: {scale: 323.2, min_scale: 22.63, max_scale: 2263}"
    assert wanted in text
    build([tuples([XYZ], "symile")], dim=512, scale=323.2, min_scale=22.63, max_scale=2263.0)


def test_a_temperature_of_pairs_is_fine_where_it_reaches_far_enough():
    build([tuples([XYZ], "symile")], dim=64)  # a logit of 12 at the default bound of 100
    build([tuples([XYZ], "gram")], dim=512, scale=5.0, learned=False)
    with pytest.raises(ConfigError, match="needs scales"):
        build([tuples([XYZ], "symile")], dim=128)
