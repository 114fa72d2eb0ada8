"""The collapse watch: what it measures, that it stays silent on healthy towers, and speaks once on dead ones."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from mmrep.collapse import CollapseConfig, CollapseWatch, measure
from mmrep.training.errors import CollapseError


def sphere(n, d, seed=0):
    return torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def watch(embeddings, steps, plateaus=None, **changes):
    """Run the watch over ``steps`` looks; ``embeddings(step)`` is what the root has seen."""
    root = SimpleNamespace(seen={}, plateaus={})
    said = []
    metrics = SimpleNamespace(add=lambda values, samples: said.append({k: float(v) for k, v in values.items()}))
    trainer = SimpleNamespace(metrics=metrics, is_main=True, last_checkpoint="checkpoints/step-00000400")
    callback = CollapseWatch(CollapseConfig(**{"every": 10, "after": 0, "patience": 3, **changes}), root)
    for step in range(1, steps + 1):
        root.seen = {"image": embeddings(step)}
        root.plateaus = {} if plateaus is None else {"dino": torch.tensor(plateaus(step))}
        callback.on_step_end(trainer, step)
    return said


def test_spread_is_one_on_the_sphere_and_zero_at_a_point():
    spread, rank = measure(sphere(2000, 32))
    assert spread == pytest.approx(1, abs=0.02)
    assert 28 < rank <= 32
    assert measure(sphere(1, 32).expand(50, -1)) == (pytest.approx(0, abs=1e-6), 0.0)


def test_spread_is_that_of_unit_vectors_whatever_their_length():
    points = sphere(500, 8)
    lengths = torch.linspace(1, 100, 500)[:, None]
    assert measure(points * lengths)[0] == pytest.approx(measure(points)[0], rel=1e-5)
    assert measure(points)[0] == pytest.approx(float(points.std(0).mean()) * math.sqrt(8), rel=1e-5)


def test_few_directions_have_a_small_rank_though_they_spread():
    line = torch.linspace(-1, 1, 100)[:, None] * sphere(1, 32)
    spread, rank = measure(line + 1e-6 * sphere(100, 32))
    assert spread > 0.5
    assert rank < 1.1


def test_healthy_towers_are_logged_and_not_talked_about(caplog):
    said = watch(lambda step: sphere(64, 16, step), 50)
    assert len(said) == 5
    assert set(said[0]) == {"spread/image", "rank/image"}
    assert not caplog.text


def dead(step):
    return sphere(1, 16).expand(64, -1) + 1e-4 * sphere(64, 16, step)


def test_a_dead_tower_is_told_once_after_patience(caplog):
    watch(dead, 20)
    assert not caplog.text
    watch(dead, 80)
    assert caplog.text.count("have collapsed") == 1
    assert "step 30" in caplog.text
    assert "'image'" in caplog.text


def test_one_bad_look_between_good_ones_is_forgiven(caplog):
    watch(lambda step: dead(step) if step % 30 else sphere(64, 16, step), 200)
    assert not caplog.text


def test_the_first_steps_are_not_judged(caplog):
    watch(dead, 100, after=80)
    assert not caplog.text


def test_stop_ends_the_run_and_names_the_checkpoint():
    with pytest.raises(CollapseError, match="step-00000400"):
        watch(dead, 30, stop=True)


def test_a_field_that_nobody_has_is_passed_over():
    assert watch(lambda step: torch.zeros(0, 16), 20) == []


def healthy(step):
    return sphere(64, 16, step)


def test_a_loss_that_stays_at_log_k_is_told_once(caplog):
    watch(healthy, 20, plateaus=lambda step: 1.0)
    assert not caplog.text
    watch(healthy, 80, plateaus=lambda step: 0.9999)
    assert caplog.text.count("of log K") == 1
    assert "'dino'" in caplog.text


def test_a_loss_below_log_k_is_fine(caplog):
    watch(healthy, 80, plateaus=lambda step: 0.95 if step % 30 else 1.0)
    assert not caplog.text


def test_a_run_stops_at_a_plateau_if_asked():
    with pytest.raises(CollapseError, match="of log K"):
        watch(healthy, 80, plateaus=lambda step: 1.0, stop=True)
