"""Step and the contrastive objective: pairs, missing fields, negatives, temperatures, refusal at build time."""

from __future__ import annotations

import pytest
import torch

from mmrep.config import ConfigError, component
from mmrep.data.batch import Batch
from mmrep.embed.memo import Memo, content_key
from mmrep.model import Model, ModelConfig, TemperatureConfig, TowerConfig
from mmrep.objectives.root import Root
from mmrep.registry import UnknownNameError
from mmrep.step import Step
from mmrep.views.view import View
from mmrep.world import LocalWorld
from tests import toys

FIELDS = {"x": "a", "y": "b", "z": "b"}


def build(objectives=None, frozen=False, views=None, **temperature):
    torch.manual_seed(0)
    towers = {
        "a": TowerConfig(encoder=component("encoders", "toy")),
        "b": TowerConfig(encoder=component("encoders", "toy"), frozen=frozen),
    }
    config = ModelConfig(dim=5, towers=towers, temperatures={"default": TemperatureConfig(scale=5.0, **temperature)})
    chosen = objectives or [contrastive([{"between": ["x", "y"]}])]
    return Root(Model(config), chosen, fields=FIELDS, views=views or {})


def contrastive(pairs, **fields):
    return component("objectives", "contrastive", pairs=pairs, **fields)


def batch(n=4, *, missing=(), group=None, seed=0, memo=(), encoder=None):
    generator = torch.Generator().manual_seed(seed)
    encoder = encoder or toys.ToyEncoder(toys.ToyConfig())
    raw = {f: [torch.randn(1 + i % 3, generator=generator).tolist() for i in range(n)] for f in FIELDS}
    present = {f: torch.tensor([(f, i) not in missing for i in range(n)]) for f in FIELDS}
    prepared = {f: [encoder.prepare(v) for i, v in enumerate(vs) if present[f][i]] for f, vs in raw.items()}
    return Batch(
        ids=[str(i) for i in range(n)],
        inputs={f: [encoder.collate(items)] for f, items in prepared.items() if items and f not in memo},
        present=present,
        seeds=torch.arange(n),
        group=group,
        items={f: prepared[f] for f in memo},
        keys={f: [content_key(i) for i in prepared[f]] for f in memo},
    )


def step_of(root, b):
    return Step(root.model, b, fields=root.fields, views=root.views, world=LocalWorld(), memo=root.memo)


def plain(a, b, scale):
    logits = scale * a @ b.T
    target = torch.arange(len(a))
    return (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2


def test_one_pair_is_the_clip_loss_of_the_towers_embeddings():
    root, b = build(), batch()
    model = root.model
    expected = plain(model.tower("a")(b.inputs["x"][0]), model.tower("b")(b.inputs["y"][0]), 5.0)
    torch.testing.assert_close(root(b)["loss"], expected)


def test_pairs_add_up_with_their_weights_and_parts_are_named():
    one = build([contrastive([{"between": ["x", "y"]}])])(batch())["loss"]
    two = build([contrastive([{"between": ["x", "z"]}])])(batch())["loss"]
    both = build([contrastive([{"between": ["x", "y"], "weight": 2.0}, {"between": ["x", "z"]}], weight=0.5)])(batch())
    torch.testing.assert_close(both["loss"], 0.5 * (2 * one + two))
    assert set(both) == {"loss", "contrastive/loss", "contrastive/x-y", "contrastive/x-z"}


def test_a_sample_that_lacks_a_field_is_neither_anchor_nor_negative():
    root = build()
    holes = root(batch(5, missing={("y", 1), ("x", 3)}))["loss"]
    full = batch(5)
    model, keep = root.model, [0, 2, 4]
    expected = plain(model.tower("a")(full.inputs["x"][0])[keep], model.tower("b")(full.inputs["y"][0])[keep], 5.0)
    torch.testing.assert_close(holes, expected)


def test_a_field_absent_from_the_whole_batch_gives_zero_loss_and_a_gradient_path_to_every_parameter():
    root = build()
    root.train()
    out = root(batch(3, missing={("y", i) for i in range(3)}))
    out["loss"].backward()
    assert out["loss"].item() == 0
    for name, p in root.named_parameters():
        assert p.grad is not None, name
        assert not p.grad.any(), name


def test_extra_negatives_make_the_task_harder_only_for_the_first_field():
    pair = {"between": ["x", "y"], "negatives": "z"}
    root, b = build([contrastive([pair])]), batch()
    model = root.model
    x, y, z = (model.tower(FIELDS[f])(b.inputs[f][0]) for f in "xyz")
    rows = torch.nn.functional.cross_entropy(5 * x @ torch.cat([y, z]).T, torch.arange(4))
    columns = torch.nn.functional.cross_entropy(5 * y @ x.T, torch.arange(4))
    torch.testing.assert_close(root(b)["loss"], (rows + columns) / 2)


def test_groups_make_multi_positives_and_can_be_turned_off():
    b = batch(4, group=torch.tensor([1, 1, 2, 3]))
    alone = build([contrastive([{"between": ["x", "y"]}], use_group=False)])(b)["loss"]
    torch.testing.assert_close(alone, build()(batch(4))["loss"])
    assert not torch.allclose(build()(b)["loss"], alone)


def test_a_frozen_tower_is_encoded_once_for_each_content_and_equals_the_plain_path():
    calls = []
    root, plain_root = build(frozen=True), build(frozen=True)
    encoder = root.model.tower("b").encoder
    original = encoder.forward
    encoder.forward = lambda inputs: (calls.append(len(inputs["values"])), original(inputs))[1]
    first = root(batch(memo=("y",)))["loss"]
    again = root(batch(memo=("y",)))["loss"]
    assert calls == [4]
    torch.testing.assert_close(first, plain_root(batch())["loss"])
    torch.testing.assert_close(first, again)


def test_the_memo_works_without_room_to_keep_anything():
    root = build(frozen=True)
    root.memo = Memo(max_bytes=0)
    torch.testing.assert_close(root(batch(memo=("y",)))["loss"], build(frozen=True)(batch())["loss"])


def test_content_keys_differ_with_value_shape_and_name():
    keys = {
        content_key({"v": torch.tensor([1.0, 2.0])}), content_key({"v": torch.tensor([1.0, 3.0])}),
        content_key({"v": torch.tensor([[1.0, 2.0]])}), content_key({"w": torch.tensor([1.0, 2.0])}),
        content_key({"v": torch.tensor([1, 2])}),
    }  # fmt: skip
    assert len(keys) == 5
    assert content_key({"v": torch.tensor([1.0, 2.0])}) in keys


class Shift(View):
    def batch(self, inputs, seeds):
        amount = (seeds % 7).float()[:, None]
        return {**inputs, "values": inputs["values"] + amount * inputs["valid"]}, {"amount": amount}


def test_views_act_on_the_device_with_the_seeds_of_the_rows_that_are_present():
    root = build(views={"x": [Shift(None)]})
    whole, holes = step_of(root, batch(4)), step_of(root, batch(4, missing={("x", 1)}))
    keep = [0, 2, 3]
    torch.testing.assert_close(holes.params("x")["amount"], whole.params("x")["amount"][keep])
    torch.testing.assert_close(holes.embedding("x")[keep], whole.embedding("x")[keep])
    assert not holes.embedding("x")[1].any()


def test_parameters_drawn_in_the_reader_stand_beside_those_of_the_device():
    root = build(views={"x": [Shift(None)]})
    drawn = batch(4)
    drawn.params = {"x": [{"box": torch.arange(4.0), "amount": torch.zeros(4)}], "y": [{"box": torch.ones(4)}]}
    step = step_of(root, drawn)
    assert torch.equal(step.params("x")["box"], torch.arange(4.0))
    assert torch.equal(step.params("x")["amount"], step_of(root, batch(4)).params("x")["amount"])
    assert torch.equal(step.params("y")["box"], torch.ones(4))  # a field without a view on the device
    assert step_of(root, batch(4)).params("y") == {}


def test_what_is_asked_twice_is_computed_once():
    step = step_of(build(), batch())
    assert step.embedding("x") is step.embedding("x")
    assert step.encoding("x") is step.encoding("x")


def test_temperature_gets_its_gradient_and_its_bound_after_the_step():
    root = build(max_scale=5.0)
    root(batch())["loss"].backward()
    t = root.model.temperatures["default"]
    assert t.log_scale.grad.abs() > 0
    with torch.no_grad():
        t.log_scale += 2
    root.after_optimizer_step()
    assert t.scale.item() == pytest.approx(5.0, rel=1e-5)


def test_two_objectives_of_one_type_have_two_names():
    pair = [{"between": ["x", "y"]}]
    out = build([contrastive(pair), contrastive(pair, weight=0.0)])(batch())
    assert {"contrastive/loss", "contrastive-1/loss"} <= set(out)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ({"between": ["x", "yy"]}, "unknown field 'yy'; did you mean 'y'"),
        ({"between": ["x", "y"], "negatives": "q"}, "unknown field 'q'"),
        ({"between": ["x", "y"], "temperature": "defualt"}, "unknown 'defualt'; did you mean 'default'"),
    ],
)
def test_a_wrong_pair_is_refused_at_build_time(pair, message):
    with pytest.raises(ConfigError, match=message):
        build([contrastive([pair])])


def test_1076_a_bias_that_no_loss_uses_is_refused_because_ddp_would_hang():
    with pytest.raises(ConfigError, match="'info-nce' does not use a bias"):
        build(bias=-10.0)
    with pytest.raises(ConfigError, match="'siglip' needs a bias"):
        build([contrastive([{"between": ["x", "y"]}], loss={"type": "siglip"})])
    assert build([contrastive([{"between": ["x", "y"]}], loss="siglip")], bias=-10.0)(batch())["loss"] > 0


def test_an_unknown_field_asked_of_a_step_has_a_near_match():
    with pytest.raises(UnknownNameError, match="unknown field 'xx'; did you mean 'x'"):
        step_of(build(), batch()).embedding("xx")


def test_soft_targets_come_from_the_features_of_a_frozen_tower():
    pair = {"between": ["x", "y"], "soft": "y"}
    root, b = build([contrastive([pair])], frozen=True), batch(5, missing={("y", 2)})
    x, y = (step_of(root, b).embedding(f) for f in "xy")
    features = torch.zeros(5, 8)
    features[[0, 1, 3, 4]] = root.model.tower("b").features(b.inputs["y"][0]).detach()
    from mmrep.losses.infonce import info_nce

    expected = info_nce(x, y, scale=5.0, soft=features, valid=b.present["y"])
    torch.testing.assert_close(root(b)["loss"], expected)
    memoised = batch(5, missing={("y", 2)}, memo=("y",))
    torch.testing.assert_close(root(memoised)["loss"], expected)


def test_soft_targets_of_a_moving_tower_or_another_loss_are_refused():
    pair = {"between": ["x", "y"], "soft": "y"}
    with pytest.raises(ConfigError, match="must be frozen"):
        build([contrastive([pair])])
    with pytest.raises(ConfigError, match="takes no soft targets"):
        build([contrastive([pair], loss="siglip")], frozen=True, bias=-10.0)
