"""What a pool leaves out is frozen, and nothing else is."""

from __future__ import annotations

import pytest
import torch

from mmrep._unused import freeze_unused
from mmrep.config import component
from mmrep.model import Model, ModelConfig, TowerConfig
from tests import toys


def model(pool, encoder, frozen=False):
    tower = TowerConfig(encoder=encoder, pool=component("pools", pool), frozen=frozen)
    return Model(ModelConfig(dim=4, towers={"a": tower}))


def names(found):
    return sorted(name for name, p in found.named_parameters() if not p.requires_grad and "temperatures" not in name)


def clip(pool):
    return model(pool, component("encoders", "open-clip-image", model="RN50", size=32))


def test_an_attention_pool_that_is_not_asked_gets_no_gradient_and_is_frozen():
    found = clip("mean")
    frozen = freeze_unused(found)
    assert frozen["a"]
    assert all("attnpool" in name for name in frozen["a"])
    assert names(found) == sorted(f"towers.a.{name}" for name in frozen["a"])
    assert sum("attnpool" in name for name, _ in found.named_parameters()) == len(frozen["a"])


@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_a_tower_that_uses_everything_is_left_alone(pool):
    found = model(pool, component("encoders", "toy"))
    assert freeze_unused(found) == {}
    assert names(found) == []


def test_a_frozen_tower_is_not_run(monkeypatch):
    found = model("mean", component("encoders", "toy"), frozen=True)
    monkeypatch.setattr(toys.ToyEncoder, "examples", None)
    assert freeze_unused(found) == {}


def test_gradients_and_mode_are_as_before():
    found = clip("mean").train()
    statistics = {n: b.clone() for n, b in found.named_buffers()}
    freeze_unused(found)
    assert found.tower("a").training
    assert all(p.grad is None for p in found.parameters())
    assert all(torch.equal(b, statistics[n]) for n, b in found.named_buffers())
