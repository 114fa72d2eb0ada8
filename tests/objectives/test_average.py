"""The moving average of weights: its formula, what it leaves alone, putting it in place and back, saving it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmrep.objectives.average import WeightAverage


def network():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    module[2].requires_grad_(False)
    return module


def change(module, step):
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p += torch.full_like(p, 0.1 * step)
        module[1].running_mean += step


def test_it_is_the_recursion_with_a_warmed_up_decay():
    module = network()
    average = WeightAverage(module, 0.9)
    expected, mean = module[0].weight.clone(), module[1].running_mean.clone()
    for t in range(1, 120):
        change(module, t)
        average.update()
        decay = min(0.9, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * module[0].weight
        mean = decay * mean + (1 - decay) * module[1].running_mean
    with average.applied():
        torch.testing.assert_close(module[0].weight, expected)
        torch.testing.assert_close(module[1].running_mean, mean)


def test_the_weights_come_back_even_after_an_error_and_frozen_ones_never_move():
    module = network()
    average = WeightAverage(module, 0.9)
    change(module, 1)
    average.update()
    before = {name: value.clone() for name, value in module.state_dict().items()}

    def fail():
        with average.applied():
            assert not torch.equal(module[0].weight, before["0.weight"])
            assert torch.equal(module[2].weight, before["2.weight"])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_it_is_saved_and_loaded_without_a_second_copy_of_the_weights():
    module = network()
    average = WeightAverage(module, 0.9)
    change(module, 1)
    average.update()
    again = WeightAverage(network(), 0.9)
    again.load_state_dict(average.state_dict())
    assert int(again.updates) == 1
    assert torch.equal(again.average_0, average.average_0)
    assert not any(name.startswith("_of") for name in average.state_dict())
    assert not list(average.parameters())


def test_it_follows_a_module_whose_buffers_are_replaced():
    module = network()
    average = WeightAverage(module, 0.5)
    module[1].running_mean = torch.full((4,), 8.0)
    average.update()
    assert (average.average_5 if hasattr(average, "average_5") else average.average_4).abs().sum() > 0
    with average.applied():
        assert 0 < module[1].running_mean[0].item() < 8


def test_statistics_of_a_norm_without_parameters_are_averaged_too():
    """They belong to the weights before them: averaged weights with the last step's statistics fit badly."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4, affine=False))
    average = WeightAverage(module, 0.9)
    seen = [module[1].running_mean.clone()]
    for _ in range(3):
        module(torch.randn(8, 3) + 5)
        average.update()
        seen.append(module[1].running_mean.clone())
    with average.applied():
        assert not torch.allclose(module[1].running_mean, seen[-1])
        assert module[1].running_mean.abs().sum() > 0
    assert torch.equal(module[1].running_mean, seen[-1])
