"""DeCUR: its terms, missing samples, micro-batches, what it learns, refusal at build time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from accelerate import Accelerator

from mmrep.config import ConfigError, component
from mmrep.data.batch import Batch
from mmrep.losses.cross_correlation import cross_correlation_loss
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.root import Root
from mmrep.training.cached import forward_backward
from tests.objectives.test_contrastive import FIELDS, batch, step_of
from tests.test_cached import in_parts, rows


def decur(**fields):
    return component("objectives", "decur", **{"between": ["x", "y"], **fields})


def build(*objectives):
    torch.manual_seed(0)
    towers = {name: TowerConfig(encoder=component("encoders", "toy")) for name in "ab"}
    model = Model(ModelConfig(dim=8, towers=towers, temperatures={}))
    return Root(model, list(objectives) or [decur()], fields=FIELDS, views={})


def twice(b: Batch) -> Batch:
    """With a second reading of every value, a bit other than the first."""
    inputs = {f: [v, {**v, "values": v["values"] * 0.8 + 0.3 * v["valid"]}] for f, (v,) in b.inputs.items()}
    return dataclasses.replace(b, inputs=inputs, parts=[twice(part) for part in b.parts])


def test_it_is_the_sum_of_the_terms_of_the_paper():
    root, b = build(decur(common=0.5, redundancy=0.3, within=2.0, weight=1 / 6)), twice(batch(9))
    step = step_of(root, b)
    x, x1, y, y1 = (step.embedding(f, v) for f in "xy" for v in (0, 1))
    across = cross_correlation_loss(x, y, common=4, redundancy=0.3)
    within = {"x": (x, x1), "y": (y, y1)}
    within = {f: cross_correlation_loss(*pair, redundancy=0.3)["common"] for f, pair in within.items()}
    out = root(b)
    # As in the authors' code: a third of the terms within, and of half those across.
    expected = (within["x"] + within["y"] + (across["common"] + across["unique"]) / 2) / 3
    torch.testing.assert_close(out["loss"], expected)
    torch.testing.assert_close(out["decur/x-y.common"], across["common"].detach())
    torch.testing.assert_close(out["decur/x-y.unique"], across["unique"].detach())
    torch.testing.assert_close(out["decur/x"], within["x"].detach())
    assert set(out) == {"loss", "decur/loss", "decur/x-y.common", "decur/x-y.unique", "decur/x", "decur/y"}


def test_every_two_of_three_modalities_make_a_term_and_within_may_be_left_out():
    root, b = build(decur(between=["x", "y", "z"], within=0.0)), batch(9)
    out = root(b)
    step = step_of(root, b)
    pairs = [cross_correlation_loss(step.embedding(p), step.embedding(q), common=7, redundancy=0.0051)
             for p, q in ("xy", "xz", "yz")]  # fmt: skip
    torch.testing.assert_close(out["loss"], sum(p["common"] + p["unique"] for p in pairs))
    assert "decur/x" not in out


def test_a_sample_that_lacks_a_modality_takes_part_in_the_other():
    missing = {("y", 1), ("y", 4)}
    root, b = build(), twice(batch(9, missing=missing))
    step, keep = step_of(root, b), [0, 2, 3, 5, 6, 7, 8]
    out = root(b)
    across = cross_correlation_loss(step.embedding("x")[keep], step.embedding("y")[keep], common=7, redundancy=0.0051)
    torch.testing.assert_close(out["decur/x-y.common"], across["common"].detach())
    within = cross_correlation_loss(step.embedding("x"), step.embedding("x", 1), redundancy=0.0051)
    torch.testing.assert_close(out["decur/x"], within["common"].detach())


def test_a_field_absent_from_the_whole_batch_leaves_a_gradient_path_to_every_parameter():
    root = build()
    out = root(twice(batch(5, missing={("y", i) for i in range(5)})))
    out["loss"].backward()
    assert out["decur/y"] == out["decur/x-y.common"] == 0
    for name, p in root.named_parameters():
        assert p.grad is not None, name


def test_a_batch_in_parts_has_the_gradient_of_the_whole():
    missing, found = {("y", 2), ("x", 8)}, []
    for b in (in_parts([0, 4, 9, 11], missing, torch.float64), rows(0, 11, missing, torch.float64)):
        root = build().double()
        report = forward_backward(root, Accelerator(cpu=True), twice(b))
        found.append([report["loss"].detach(), *(p.grad for p in root.parameters())])
    for parts, whole in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)


def test_common_columns_learn_to_correlate_and_unique_ones_not_to():
    """x and y share half of what they are, which the columns to be common find."""
    common = next(iter(build(decur(common=0.5)).objectives.values())).common
    generator = torch.Generator().manual_seed(0)
    shared, own = (torch.randn(2, 64, 8, generator=generator) for _ in range(2))
    values = [torch.cat([shared[0], own[k]], 1) for k in range(2)]
    layers = torch.nn.ModuleList(torch.nn.Linear(16, 8) for _ in range(2))
    optimizer = torch.optim.Adam(layers.parameters(), lr=1e-2)

    def correlations():
        a, b = (layer(value) for layer, value in zip(layers, values, strict=True))
        a, b = ((z - z.mean(0)) / z.std(0) for z in (a, b))
        return (a * b).mean(0)

    for _ in range(300):
        a, b = (layer(value) for layer, value in zip(layers, values, strict=True))
        out = cross_correlation_loss(a, b, common=common, redundancy=0.1)
        optimizer.zero_grad()
        (out["common"] + out["unique"]).backward()
        optimizer.step()
    found = correlations()
    assert found[:4].min() > 0.95
    assert found[4:].abs().max() < 0.05


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"between": ["x", "yy"]}, "between: unknown field 'yy'; did you mean 'y'"),
        ({"between": ["x", "x"]}, "x, x has a field twice"),
        ({"views": [1, 1]}, r"views: \[1, 1\] is one view"),
        ({"common": 1.5}, "common"),
    ],
)
def test_what_cannot_be_is_refused_at_build_time(fields, message):
    with pytest.raises(ConfigError, match=message):
        build(decur(**fields))
