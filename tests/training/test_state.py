from __future__ import annotations

import pytest
import torch
from torch import nn

from mmrep.training.checkpoint import Packet
from mmrep.training.errors import ResumeError
from mmrep.training.state import load_module, load_optimizer, module_packet, optimizer_packet


def stored(packet):
    """As it comes back from the disk: no tensor of the original is shared."""
    return Packet({k: v.detach().clone() for k, v in packet.tensors.items()}, packet.data)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def train(module, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(8, 3, generator=generator)).square().mean().backward()
        optimizer.step()


def test_no_prefix_of_a_compiled_part_leaks():
    module = net()
    module[0] = torch.compile(module[0], backend="eager")
    optimizer = torch.optim.AdamW(module.parameters())
    train(module, optimizer, 2)
    assert any("_orig_mod" in name for name in module.state_dict())
    names = [*module_packet(module).tensors, *optimizer_packet(optimizer, module).tensors]
    assert not [name for name in names if "_orig_mod" in name or name.startswith("module.")]
    plain = net()
    load_module(plain, stored(module_packet(module)))
    assert torch.equal(plain[0].weight, module[0].weight)
    load_module(module, stored(module_packet(net())))
    assert torch.equal(module[0].weight, net()[0].weight)


def test_no_prefix_of_a_data_parallel_part_leaks_and_a_part_called_module_keeps_its_name():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(3, 2)

    class Whole(nn.Module):
        def __init__(self, wrapped):
            super().__init__()
            torch.manual_seed(0)
            part = Part()
            self.inner = nn.DataParallel(torch.compile(part, backend="eager")) if wrapped else part

    wrapped, plain = Whole(True), Whole(False)
    assert "inner.module._orig_mod.module.weight" in wrapped.state_dict()
    optimizer = torch.optim.AdamW(wrapped.parameters())
    sum(p.sum() for p in wrapped.parameters()).backward()
    optimizer.step()
    assert set(module_packet(wrapped).tensors) == {"inner.module.weight", "inner.module.bias"}
    assert {name.rpartition("/")[0] for name in optimizer_packet(optimizer, wrapped).tensors} == set(plain.state_dict())
    load_module(plain, stored(module_packet(wrapped)))
    assert torch.equal(plain.inner.module.weight, wrapped.inner.module._orig_mod.module.weight)
    other = torch.optim.AdamW(plain.parameters())
    load_optimizer(other, plain, stored(optimizer_packet(optimizer, wrapped)))
    for p, q in zip(wrapped.parameters(), plain.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], other.state[q]["exp_avg"])
    again = nn.DataParallel(plain)  # the root itself
    assert set(module_packet(again).tensors) == set(plain.state_dict())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_training_goes_on_bitwise(kind, fused):
    options = {"lr": 0.1, "fused": fused} | ({"momentum": 0.9} if kind is torch.optim.SGD else {})
    one, optimizer = (module := net()), kind(module.parameters(), **options)
    train(one, optimizer, 3)
    two, other = (module := net()), kind(module.parameters(), **options)
    load_module(two, stored(module_packet(one)))
    load_optimizer(other, two, stored(optimizer_packet(optimizer, one)))
    train(one, optimizer, 3, seed=1)
    train(two, other, 3, seed=1)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


def test_state_is_found_by_name_not_by_place():
    one = net()
    optimizer = torch.optim.AdamW(one.parameters(), lr=0.1)
    train(one, optimizer, 3)
    two = net()
    groups = [{"params": [two[2].bias, two[0].weight]}, {"params": [two[2].weight, two[0].bias, *two[1].parameters()]}]
    other = torch.optim.AdamW(groups, lr=0.1)
    load_optimizer(other, two, stored(optimizer_packet(optimizer, one)))
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], other.state[q]["exp_avg"])
        assert optimizer.state[p]["step"] == other.state[q]["step"] == 3


def test_moments_of_channels_last_weights_keep_their_strides():
    """A fused kernel walks weights and moments in memory order; moments in another order would be mixed up."""

    def conv():
        torch.manual_seed(0)
        return nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)

    def train(module, optimizer):
        torch.manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            module(torch.randn(2, 3, 5, 5)).square().mean().backward()
            optimizer.step()

    one = conv()
    optimizer = torch.optim.AdamW(one.parameters(), lr=0.1, fused=True)
    train(one, optimizer)
    packet = optimizer_packet(optimizer, one)
    two = conv()
    other = torch.optim.AdamW(two.parameters(), lr=0.1, fused=True)
    load_module(two, stored(module_packet(one)))
    contiguous = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in packet.tensors.items()}
    load_optimizer(other, two, Packet(contiguous, packet.data))
    assert other.state[two.weight]["exp_avg"].stride() == two.weight.stride() == one.weight.stride()
    train(one, optimizer)
    train(two, other)
    assert torch.equal(one.weight, two.weight)


def test_a_parameter_that_never_moved_has_no_state():
    module = net()
    module.extra = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW(module.parameters())
    train(module, optimizer, 1)
    packet = stored(optimizer_packet(optimizer, module))
    assert not [name for name in packet.tensors if name.startswith("extra")]
    load_optimizer(optimizer, module, packet)
    assert module.extra not in optimizer.state


def test_what_does_not_fit_is_refused():
    packet = stored(module_packet(net()))
    with pytest.raises(ResumeError, match=r"0\.weight has shape \[4, 3\].*\[5, 3\]"):
        load_module(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(4), nn.Linear(4, 2)), packet)
    with pytest.raises(ResumeError, match=r"(?s)only in the checkpoint: 2\.bias.*only in this recipe: 3\.bias"):
        load_module(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)), packet)
    module = net()
    optimizer = torch.optim.AdamW(module.parameters())
    train(module, optimizer, 1)
    with pytest.raises(ResumeError, match=r"only in the checkpoint: 2\.bias"):
        load_optimizer(torch.optim.AdamW(module[:2].parameters()), module, stored(optimizer_packet(optimizer, module)))
