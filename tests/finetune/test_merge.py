"""Merging in weight space: formulas, the ends to the bit, what has no mean, and models that do not belong together."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import mmrep
from mmrep.config import ConfigError, component
from mmrep.finetune.merge import add_task_vectors, greedy_soup, interpolate, soup
from mmrep.model import Model, ModelConfig, TowerConfig
from tests.hub.peft_folders import base
from tests.toys import ToyEncoder  # registers it


def model(seed=0, **changes):
    torch.manual_seed(seed)
    encoder = component("encoders", "toy", **changes)
    projector = component("projectors", "linear", standardize=True)
    towers = {"a": TowerConfig(encoder=encoder), "b": TowerConfig(encoder=encoder, projector=projector)}
    return Model(ModelConfig(dim=4, towers=towers)).eval()


def moved(base, seed, scale=0.3):
    """As after some fine-tuning."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(base)
    with torch.no_grad():
        for p in other.parameters():
            p += scale * torch.randn(p.shape, generator=generator)
    return other


def vector(m):
    return nn.utils.parameters_to_vector(m.parameters()).detach()


INPUTS = ToyEncoder.examples(model().tower("a").encoder, 5, 3)


def test_interpolation_is_the_weighted_sum_and_gives_both_ends_to_the_bit():
    a = model()
    b = moved(a, 1)
    torch.testing.assert_close(vector(interpolate(a, b, 0.3)), 0.7 * vector(a) + 0.3 * vector(b))
    assert torch.equal(vector(interpolate(a, b, 0)), vector(a))
    assert torch.equal(vector(interpolate(a, b, 1)), vector(b))
    assert not torch.equal(vector(a), vector(b))
    torch.testing.assert_close(vector(interpolate(a, b, 1.5)), 1.5 * vector(b) - 0.5 * vector(a))


def test_a_soup_is_the_mean_and_weights_are_shares():
    models = [model(), *(moved(model(), i) for i in (1, 2))]
    torch.testing.assert_close(vector(soup(models)), torch.stack([vector(m) for m in models]).mean(0))
    expected = (vector(models[0]) + 3 * vector(models[2])) / 4
    torch.testing.assert_close(vector(soup(models, [2, 0, 6])), expected)
    with pytest.raises(ConfigError, match="3 models with 2 weights"):
        soup(models, [1, 1])


def test_task_vectors_add_to_the_base_and_a_negative_one_takes_away():
    base = model()
    tuned = [moved(base, 1), moved(base, 2)]
    zero, one, two = vector(base), vector(tuned[0]), vector(tuned[1])
    found = vector(add_task_vectors(base, tuned, [0.5, -0.8]))
    torch.testing.assert_close(found, zero + 0.5 * (one - zero) - 0.8 * (two - zero))
    with pytest.raises(ConfigError, match="1 for 2 models"):
        add_task_vectors(base, tuned, [0.5])


def test_the_greedy_soup_takes_what_helps_and_leaves_what_hurts():
    base = model()
    goal = vector(base)

    def score(m):
        return -float((vector(m) - goal).norm())

    good = moved(base, 1, 0.1)
    mirror = copy.deepcopy(base)
    with torch.no_grad():
        for p, q, r in zip(mirror.parameters(), good.parameters(), base.parameters(), strict=True):
            p.copy_(2.2 * r - 1.2 * q)  # on the other side of the goal, a little further away
    bad = moved(base, 3, 2.0)
    found, kept = greedy_soup([bad, mirror, good], score)
    assert kept == [2, 1]  # the best first; the bad one is left out
    torch.testing.assert_close(vector(found), (vector(good) + vector(mirror)) / 2)


def test_counters_have_no_mean_and_statistics_are_told(caplog):
    a, b = model(), moved(model(), 1)
    for m, count, var in ((a, 3, 1.0), (b, 8, 3.0)):
        for name, buffer in m.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.fill_(count)
            if name.endswith("running_var"):
                buffer.fill_(var)
    with caplog.at_level(logging.WARNING):
        merged = interpolate(a, b, 0.5)
    buffers = dict(merged.named_buffers())
    name = next(n for n in buffers if n.endswith("num_batches_tracked"))
    assert buffers[name].item() == 8
    assert buffers[name].dtype == torch.long
    assert buffers[name.replace("num_batches_tracked", "running_var")].eq(2).all()
    assert "running statistics are averaged" in caplog.text


def with_table(values):
    m = model()
    m.tower("a").register_buffer("table", torch.tensor(values))
    return m


def test_what_cannot_be_merged_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"towers\.a\.encoder\.width: 8 in the first, 12 in model 1"):
        interpolate(model(), model(width=12), 0.5)
    with pytest.raises(ConfigError, match=r"towers\.a\.table: an integer buffer .*other values in model 1"):
        interpolate(with_table([1, 2]), with_table([1, 3]), 0.5)
    interpolate(with_table([1, 2]), with_table([1, 2]), 0.5)
    with pytest.raises(ConfigError, match=r"towers\.a\.table: shape \[2\] in the first, \[3\] in model 2"):
        soup([with_table([1, 2]), with_table([1, 2]), with_table([1, 2, 3])])
    encoder = component("encoders", "toy")
    other = Model(ModelConfig(dim=4, towers={"a": TowerConfig(encoder=encoder), "bb": TowerConfig(encoder=encoder)}))
    with pytest.raises(ConfigError, match="the first has 'b' and model 1 has not; did you mean 'bb'"):
        interpolate(model(), other, 0.5)


def test_another_vocabulary_of_the_same_size_is_refused():
    def with_words(words):
        m = model()
        m.tower("a").encoder.save_files = lambda folder: (folder / "words.txt").write_text(words)
        return m

    with pytest.raises(ConfigError, match=r"towers\.a: .*other files"):
        interpolate(with_words("red blue"), with_words("blue red"), 0.5)
    interpolate(with_words("red blue"), with_words("red blue"), 0.5)


def test_where_a_tokenizer_came_from_and_how_it_was_called_last_do_not_matter():
    def with_config(text):
        m = model()
        m.tower("a").encoder.save_files = lambda folder: (folder / "tokenizer.json").write_text(text)
        return m

    interpolate(with_config('{"name_or_path": "x", "v": 1}'), with_config('{"v": 1, "truncation": {"n": 3}}'), 0.5)
    with pytest.raises(ConfigError, match="other files"):
        interpolate(with_config('{"v": 1}'), with_config('{"v": 2}'), 0.5)


def test_a_merged_model_is_a_saved_model_like_any_other(tmp_path):
    a = model()
    merged = interpolate(a, moved(a, 1), 0.5)
    merged.save_pretrained(tmp_path / "m")
    again = mmrep.load(tmp_path / "m")  # checks the fingerprint
    assert (again.encode(INPUTS, "b") == merged.encode(INPUTS, "b")).all()
    assert (again.encode(INPUTS, "b") != a.encode(INPUTS, "b")).any()


def test_a_checkpoint_and_a_model_saved_from_it_can_be_merged(tmp_path):
    """How a tokenizer was asked for is in its files, and says nothing about what it does."""
    checkpoint = mmrep.load(base("bert", tmp_path / "bert"))
    checkpoint.save_pretrained(tmp_path / "saved")
    merged = soup([checkpoint, mmrep.load(tmp_path / "saved")])
    torch.testing.assert_close(vector(merged), vector(checkpoint))
