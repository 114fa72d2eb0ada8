"""Fusions: what is absent is not read, they start as the mean, they save, they fill holes, and micro-batches agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import mmrep
from mmrep.config import ConfigError, component
from mmrep.model import FusionConfig, Model, ModelConfig, TowerConfig
from mmrep.registry import UnknownNameError, fusions
from tests import toys  # noqa: F401

NAMES = sorted(fusions.names())
PRESENT = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)


def fusion(name: str, *, stirred: bool = True):
    torch.manual_seed(0)
    built = component("fusions", name).build(8, ("x", "y", "z")).double().eval()
    if stirred:  # some weights start at zero, where much would hold by itself
        for parameter in built.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return built


def values(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(4, 3, 8, generator=generator, dtype=torch.float64), dim=-1)


def model(**by: FusionConfig) -> Model:
    torch.manual_seed(0)
    toy = component("encoders", "toy")
    return Model(ModelConfig(dim=8, towers={"a": TowerConfig(encoder=toy), "b": TowerConfig(encoder=toy)}, fusions=by))


ALL = FusionConfig(of={"x": "a", "y": "b"}, by=component("fusions", "transformer"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trash", [0.0, 3.0, float("nan"), float("inf")])
def test_what_is_absent_is_never_read_and_gets_no_gradient(name, trash):
    built, clean = fusion(name), values()
    dirty = torch.where(PRESENT[..., None], clean, torch.tensor(trash, dtype=torch.float64)).requires_grad_()
    zeros = torch.where(PRESENT[..., None], clean, torch.zeros(1, dtype=torch.float64))
    out = built(dirty, PRESENT)
    torch.testing.assert_close(out, built(zeros, PRESENT))
    out[:3].pow(2).sum().backward()
    assert dirty.grad is not None
    assert bool((dirty.grad[~PRESENT] == 0).all())
    assert bool((dirty.grad[PRESENT] != 0).any(-1).all())
    assert all(bool(p.grad.isfinite().all()) for p in built.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_present_gives_zeros_and_one_member_alone_is_its_own_fusion_at_the_start(name):
    built, given = fusion(name, stirred=False), values()
    out = built(given, PRESENT)
    assert bool((out[3] == 0).all())
    torch.testing.assert_close(out[2], given[2, 1])
    torch.testing.assert_close(out[1], given[1, [0, 2]].mean(0))  # all of them start as the mean
    assert bool((fusion(name)(given, PRESENT)[3] == 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_see_each_other(name):
    built, given = fusion(name), values()
    alone = torch.cat([built(given[i : i + 1], PRESENT[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(built(given, PRESENT), alone)
    assert built(given[:0], PRESENT[:0]).shape == (0, 8)


def test_the_gate_is_the_softmax_of_its_scores_over_what_is_present():
    built, given = fusion("gated"), values()
    out = built(given, PRESENT)
    for i in range(3):
        rows = given[i][PRESENT[i]]
        scores = torch.tanh(rows @ built.hidden.weight.T) @ built.score.weight[0] + built.bias[PRESENT[i]]
        torch.testing.assert_close(out[i], (scores.softmax(0)[:, None] * rows).sum(0))


def test_an_absent_member_takes_no_weight_however_high_its_bias():
    built, given = fusion("gated").float(), values().float()
    with torch.no_grad():
        built.bias.copy_(torch.tensor([0.0, 500.0, 0.0]))
    out = built(given, PRESENT)
    torch.testing.assert_close(out[2], given[2, 1])
    assert out[1].norm() > 0.1  # of this sample the second member is missing


def test_the_transformer_tells_members_apart_and_reads_no_absent_one():
    built, given = fusion("transformer"), values()
    every = torch.ones(4, 3, dtype=torch.bool)
    assert (built(given, every) - built(given[:, [1, 0, 2]], every)).abs().max() > 1e-3
    before = built(given, PRESENT)
    with torch.no_grad():
        built.kinds[0, 1] += torch.arange(8)  # not a constant, which the norm would take out
    after = built(given, PRESENT)
    torch.testing.assert_close(after[1], before[1])  # the second member is missing there, and so is its vector
    assert (after[0] - before[0]).abs().max() > 1e-3


def test_every_weight_of_a_trained_fusion_gets_a_gradient():
    for name in set(NAMES) - {"mean"}:
        built = fusion(name)
        assert list(built.parameters())
        built(values(), PRESENT).mul(values(1)[:, 0]).sum().backward()
        assert all(bool((p.grad != 0).any()) for p in built.parameters()), name


def test_a_model_fuses_encodes_and_reloads(tmp_path):
    built = model(all=ALL, plain=FusionConfig(of={"x": "a", "y": "b"}))
    for parameter in built.fusions.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    built.eval()
    samples = {"x": [[1.0], None, [0.5, -1.0]], "y": [None, [2.0, 1.0], [0.3]]}
    fused = built.encode(samples, fusion="plain")
    assert fused.shape == (3, 8)
    np.testing.assert_allclose(np.linalg.norm(fused, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(fused[0], built.encode([[1.0]], "a")[0], atol=1e-6)
    mean = built.encode([[0.5, -1.0]], "a")[0] + built.encode([[0.3]], "b")[0]
    np.testing.assert_allclose(fused[2], mean / np.linalg.norm(mean), atol=1e-6)
    built.save_pretrained(tmp_path / "m")
    again = mmrep.load(tmp_path / "m")
    np.testing.assert_array_equal(again.encode(samples, fusion="all"), built.encode(samples, fusion="all"))
    assert (again.encode(samples, fusion="all") != fused).any()
    short = built.encode(samples, fusion="plain", truncate_dim=3)
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, rtol=1e-5)


def test_changed_fusion_weights_fail_the_fingerprint(tmp_path):
    from safetensors.torch import load_file, save_file

    built = model(all=FusionConfig(of={"x": "a", "y": "b"}, by=component("fusions", "gated")))
    for parameter in built.fusions.parameters():
        torch.nn.init.normal_(parameter)
    built.save_pretrained(tmp_path / "m")
    weights = load_file(tmp_path / "m/model.safetensors")
    weights["fusions.all.bias"] += torch.tensor([3.0, -3.0])
    save_file(weights, tmp_path / "m/model.safetensors")
    with pytest.raises(ValueError, match="fusion all"):
        mmrep.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("inputs", "fusion", "error", "words"),
    [
        ({"x": [[1.0]]}, "al", UnknownNameError, "no fusion 'al'; did you mean 'all'"),
        ({"x": [[1.0]], "z": [[1.0]]}, "all", ValueError, "no member 'z'"),
        ({"x": [[1.0], None], "y": [[1.0]]}, "all", ValueError, "x 2, y 1"),
        ({"x": [[1.0], None], "y": [[1.0], None]}, "all", ValueError, "sample 1 has none of x, y"),
        ([[1.0]], "all", ValueError, "lists by member"),
    ],
)
def test_what_cannot_be_fused_is_refused_in_words(inputs, fusion, error, words):
    with pytest.raises(error, match=words):
        model(all=ALL).encode(inputs, fusion=fusion)


def test_configs_that_cannot_be_built_are_refused():
    with pytest.raises(ConfigError, match=r"model\.fusions\.all\.of\.x: no tower 'c'"):
        model(all=FusionConfig(of={"x": "c"}))
    with pytest.raises(ConfigError, match=r"model\.fusions\.a: a tower has this name"):
        model(a=FusionConfig(of={"x": "a"}))
    with pytest.raises(ConfigError, match=r"model\.fusions\.all: by: heads=3 does not divide the model's dim 8"):
        model(all=FusionConfig(of={"x": "a"}, by=component("fusions", "transformer", heads=3)))
