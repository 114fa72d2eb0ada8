"""Towers, temperatures, encode: order, modality, options, frozen parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmrep.config import ConfigError, component, parse
from mmrep.encoder import BadSampleError
from mmrep.model import Model, ModelConfig, Temperature, TemperatureConfig, TowerConfig
from mmrep.registry import UnknownNameError
from tests import toys


def tower(**fields) -> TowerConfig:
    return TowerConfig(encoder=component("encoders", "toy", **fields))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model(ModelConfig(dim=6, towers={"a": tower(), "b": tower(width=4)})).eval()


VALUES = [[1.0], [0.5, -1.0, 2.0], [0.1, 0.2], [3.0] * 4]


def test_encode_gives_unit_float32_numpy_in_the_callers_order(model):
    out = model.encode(VALUES, "a")
    assert isinstance(out, np.ndarray)
    assert out.shape == (4, 6)
    assert out.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), 1, rtol=1e-5)
    for row, value in zip(out, VALUES, strict=True):
        np.testing.assert_allclose(row, model.encode([value], "a")[0], rtol=1e-5, atol=1e-6)


def test_order_is_kept_for_any_batch_size(model):
    whole = model.encode(VALUES * 5, "a", batch_size=64)
    np.testing.assert_allclose(model.encode(VALUES * 5, "a", batch_size=3), whole, rtol=1e-5, atol=1e-6)


def test_a_dict_gives_a_dict(model):
    out = model.encode({"a": VALUES, "b": VALUES[:2]})
    assert {k: v.shape for k, v in out.items()} == {"a": (4, 6), "b": (2, 6)}


def test_one_string_like_value_gives_one_vector():
    class Words(toys.ToyEncoder):
        def prepare(self, raw, *, view=None, seed=0):
            return super().prepare([float(len(raw))])

    made = Model(ModelConfig(dim=6, towers={"a": tower()})).eval()
    made.tower("a").encoder.__class__ = Words
    assert made.encode("hello").shape == (6,)
    assert made.encode(["hello"]).shape == (1, 6)


def test_an_empty_list_gives_no_rows(model):
    assert model.encode([], "a").shape == (0, 6)


def test_the_modality_is_never_guessed(model):
    with pytest.raises(ValueError, match=r"reads a, b: say which, as encode\(\.\.\., modality='a'\)"):
        model.encode(VALUES)


def test_an_unknown_modality_has_a_near_match_and_a_shared_one_is_refused(model):
    with pytest.raises(UnknownNameError, match="no tower or modality 'imgae'"):
        model.encode(VALUES, "imgae")
    with pytest.raises(UnknownNameError, match="towers a, b all read 'numbers'"):
        model.encode(VALUES, "numbers")


def test_a_bad_value_is_named_by_position(model):
    with pytest.raises(BadSampleError, match="item 1 of the numbers inputs: empty list"):
        model.encode([[1.0], []], "a")


def test_truncation_normalises_again(model):
    out = model.encode(VALUES, "a", truncate_dim=3)
    full = model.encode(VALUES, "a")[:, :3]
    np.testing.assert_allclose(out, full / np.linalg.norm(full, axis=1, keepdims=True), rtol=1e-5)
    with pytest.raises(ValueError, match="between 1 and the model's 6"):
        model.encode(VALUES, "a", truncate_dim=7)


def test_normalisation_can_be_turned_off(model):
    raw = model.encode(VALUES, "a", normalize_embeddings=False)
    assert not np.allclose(np.linalg.norm(raw, axis=1), 1, atol=1e-3)


def test_encode_leaves_the_training_mode_as_it_was(model):
    model.train()
    model.encode(VALUES, "a")
    assert model.training
    assert model.tower("a").encoder.training


def test_an_unknown_precision_has_a_near_match(model):
    with pytest.raises(ValueError, match="did you mean 'int8'"):
        model.encode(VALUES, "a", precision="int9")


def test_modalities_and_supports(model):
    assert model.modalities == ["numbers"]
    assert model.supports("numbers")
    assert model.supports("a")
    assert not model.supports("image")


def test_similarity_is_the_cosine(model):
    s = model.similarity(np.array([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(s, torch.full((2, 1), 0.5**0.5))


def test_a_frozen_encoder_stays_in_eval_mode_and_gets_no_gradient():
    config = TowerConfig(encoder=component("encoders", "toy", dropout=0.5), frozen=True)
    made = Model(ModelConfig(dim=6, towers={"a": config})).train()
    t = made.tower("a")
    assert not t.encoder.training
    assert t.projector.training
    assert not any(p.requires_grad for p in t.encoder.parameters())
    assert all(p.requires_grad for p in t.projector.parameters())


def test_a_wrong_part_is_refused_with_its_tower():
    wrong = TowerConfig(encoder=component("encoders", "toy", width=4), projector=component("projectors", "identity"))
    with pytest.raises(ConfigError, match=r"model\.towers\.a: projector 'identity'"):
        Model(ModelConfig(dim=6, towers={"a": wrong}))


def test_a_projector_in_the_place_of_a_pool_is_refused():
    with pytest.raises(ConfigError, match=r"towers\.a\.pool\.type: unknown pool 'linear'"):
        parse(ModelConfig, {"dim": 2, "towers": {"a": {"encoder": "toy", "pool": "linear"}}})


# cross-modal.md 3.4


def test_3_4a_the_bound_is_applied_after_the_step_and_keeps_the_gradient_alive():
    t = Temperature(TemperatureConfig(scale=100.0, max_scale=100.0))
    t.scale.sum().backward()
    assert t.log_scale.grad.abs().item() > 1
    with torch.no_grad():
        t.log_scale += 1
    assert t.scale.item() > 200
    t.clamp_()
    assert t.scale.item() == pytest.approx(100, rel=1e-5)


def test_3_4b_a_start_or_checkpoint_above_the_bound_is_not_cut():
    t = Temperature(TemperatureConfig(scale=112.33, max_scale=100.0))
    t.clamp_()
    assert t.scale.item() == pytest.approx(112.33, rel=1e-5)
    loaded = Temperature(TemperatureConfig(scale=10.0, max_scale=100.0))
    loaded.load_state_dict(t.state_dict())
    loaded.clamp_()
    assert loaded.scale.item() == pytest.approx(112.33, rel=1e-5)


def test_3_4c_the_scale_stays_fp32_when_the_model_is_cast_to_bf16(model):
    model.to(torch.bfloat16)
    t = model.temperatures["default"]
    assert t.log_scale.dtype == torch.float32
    assert model.tower("a").projector.map.weight.dtype == torch.bfloat16
    before = t.log_scale.item()
    with torch.no_grad():
        t.log_scale -= 5e-4
    assert t.log_scale.item() != before


def test_3_4e_the_scale_has_a_dimension_to_shard_and_a_0d_one_still_loads():
    t = Temperature(TemperatureConfig())
    assert t.log_scale.shape == (1,)
    t.load_state_dict({"log_scale": torch.tensor(1.5)})
    assert t.log_scale.item() == 1.5


def test_a_lower_bound_holds_too():
    t = Temperature(TemperatureConfig(scale=10.0, min_scale=5.0))
    with torch.no_grad():
        t.log_scale.fill_(0.0)
    t.clamp_()
    assert t.scale.item() == pytest.approx(5, rel=1e-5)


def test_a_fixed_temperature_is_no_trainable_parameter():
    t = Temperature(TemperatureConfig(learned=False, bias=-10.0))
    assert not any(p.requires_grad for p in t.parameters())
