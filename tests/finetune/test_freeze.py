"""What of a tower rests, by part, depth and name; and that what rests rests entirely."""

from __future__ import annotations

import pytest
import torch

from mmrep.config import ConfigError, component, dump, parse
from mmrep.data.batch import Batch
from mmrep.layers import parameter_layers
from mmrep.model import Model, ModelConfig
from mmrep.objectives.root import Root
from mmrep.tower import TowerConfig
from tests import toys  # noqa: F401

VIT = {"type": "image-vit", "size": 8, "patch": 4, "width": 16, "depth": 3, "heads": 2, "dropout": 0.5}


def build(frozen, encoder=VIT, **fields):
    towers = {"a": parse(TowerConfig, {"encoder": encoder, "frozen": frozen, **fields})}
    return Model(ModelConfig(dim=4, towers=towers)).train().tower("a")


def trained(tower):
    return {name for name, p in tower.named_parameters() if p.requires_grad}


def test_the_first_layers_and_what_comes_before_them():
    everything, tower = trained(build(False)), build(2)
    rest = {name for name in everything if name.startswith("encoder.transformer.blocks.2.")}
    assert trained(tower) == rest | {"encoder.norm.weight", "encoder.norm.bias", "projector.map.weight"}
    assert trained(build(0)) == everything - {
        f"encoder.{name}" for name in ("positions", "special", "patches.weight", "patches.bias")
    }
    blocks = tower.encoder.transformer.blocks
    assert [block.dropout.training for block in blocks] == [False, False, True]
    assert tower.encoder.training
    assert not tower.frozen


def test_the_gradient_is_that_of_the_whole_where_there_is_one():
    torch.manual_seed(0)
    plain = build(False, {**VIT, "dropout": 0.0})
    torch.manual_seed(0)
    tower = build(2, {**VIT, "dropout": 0.0})
    inputs = plain.encoder.collate([plain.encoder.prepare(raw) for raw in plain.encoder.examples(3, 0)])
    for one in (plain, tower):
        one(inputs)[:, 0].sum().backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if name in trained(tower)}
    found = {name: p.grad for name, p in tower.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_patterns_freeze_and_take_out_again():
    tower = build(["encoder.*", "!*.bias", "encoder.norm.*"])
    names = trained(tower)
    assert {n for n in names if n.startswith("encoder.")} == {
        n for n, _ in tower.named_parameters() if n.startswith("encoder.") and n.endswith("bias") and ".norm." not in n
    }
    assert "projector.map.weight" in names
    assert not tower.encoder.norm.training
    assert tower.encoder.transformer.blocks[0].norm1.training


def test_statistics_rest_with_the_weights():
    cnn = {"type": "image-cnn", "size": 8, "widths": [4, 8], "depths": [1, 1], "norm": "batch"}
    tower = build(1, cnn)
    before = {name: value.clone() for name, value in tower.named_buffers()}
    tower(tower.encoder.collate([tower.encoder.prepare(raw) for raw in tower.encoder.examples(4, 0)]))
    moved = {name for name, value in tower.named_buffers() if not torch.equal(value, before[name])}
    assert moved
    assert all(".stages.1." in name for name in moved)


@pytest.mark.parametrize(
    ("frozen", "whole"),
    [(True, True), ("tower", True), (["encoder.*"], True), (["*"], True), (3, False), (["encoder.t*"], False),
     (["encoder.*", "!encoder.norm.*"], False), (["projector.*"], False), (False, False), ([], False)],
)  # fmt: skip
def test_features_are_kept_only_if_all_that_they_come_from_rests(frozen, whole):
    tower = build(frozen)
    assert tower.frozen == whole
    inputs = tower.encoder.collate([tower.encoder.prepare(raw) for raw in tower.encoder.examples(2, 0)])
    features = tower.features(inputs)
    assert features.requires_grad != whole
    if whole:
        assert torch.equal(features, tower.features(inputs))  # no dropout


def test_an_attention_pool_that_trains_keeps_features_from_being_kept():
    assert not build(["encoder.*"], pool="attention").frozen
    assert build(["encoder.*", "pool.*"], pool="attention").frozen


@pytest.mark.parametrize(
    ("frozen", "words"),
    [
        (
            ["encoder.transfomer.*"],
            r"towers\.a: frozen: 'encoder\.transfomer\.\*' matches no .*encoder\.transformer\.\*",
        ),
        (["encoder.norm.*", "!projector.*"], r"'!projector\.\*' takes out what no pattern before it"),
        (4, r"frozen=4: ImageViT has 3 layers"),
    ],
)
def test_what_cannot_be_frozen_is_refused(frozen, words):
    with pytest.raises(ConfigError, match=words):
        build(frozen)


def test_an_encoder_without_layers_has_none_to_count():
    with pytest.raises(ConfigError, match=r"frozen=1: Features has no layers to count; freeze it whole"):
        build(1, {"type": "features"})


@pytest.mark.parametrize("value", [True, False, "tower", 0, 1, 3, ["encoder.*"]])
def test_the_config_says_the_same_after_a_round_trip(value):
    made = parse(TowerConfig, {"encoder": VIT, "frozen": value})
    again = parse(TowerConfig, dump(made)).frozen
    assert (again, type(again)) == (value, type(value))


@pytest.mark.parametrize("value", ["towr", -1, 1.5])
def test_other_values_are_refused(value):
    with pytest.raises(ConfigError, match="frozen"):
        parse(TowerConfig, {"encoder": VIT, "frozen": value})


def test_a_half_frozen_tower_learns_where_a_frozen_one_is_refused():
    chosen = [component("objectives", "masked", field="x")]
    towers = {"a": TowerConfig(encoder=component("encoders", **VIT), frozen=True)}
    with pytest.raises(ConfigError, match="frozen"):
        Root(Model(ModelConfig(dim=4, towers=towers)), chosen, fields={"x": "a"}, views={})
    towers = {"a": TowerConfig(encoder=component("encoders", **VIT), frozen=2)}
    root = Root(Model(ModelConfig(dim=4, towers=towers)), chosen, fields={"x": "a"}, views={})
    encoder = root.model.tower("a").encoder
    inputs = encoder.collate([encoder.prepare(raw) for raw in encoder.examples(4, 0)])
    seeds, here = torch.arange(4), torch.ones(4, dtype=torch.bool)
    root(Batch(ids=list("abcd"), inputs={"x": [inputs]}, present={"x": here}, seeds=seeds))["loss"].backward()
    layers = parameter_layers(encoder)
    moved = {layers[name] for name, p in encoder.named_parameters() if p.grad is not None}
    assert moved == {3, 4}
