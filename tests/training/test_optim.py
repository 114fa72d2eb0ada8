from __future__ import annotations

import pytest
import torch
from torch import nn

from mmrep.training.optim import OptimConfig, build_optimizer, parameter_groups, set_lr


class Tables(nn.Module):
    """As an encoder: position tables declared, one of them by pattern; one name declared that does not exist."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(5, 4))
        self.blocks = nn.ModuleList([nn.ParameterDict({"relative_table": nn.Parameter(torch.randn(3, 4))})])
        self.linear = nn.Linear(4, 4)

    def no_weight_decay(self):
        return {"positions", "blocks.*.relative_table", "cls_token"}


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.tables = Tables()
        self.norm1 = nn.LayerNorm([3, 4])  # its gain has two dimensions
        self.batch = nn.BatchNorm2d(4)
        self.group = nn.GroupNorm(2, 4)
        self.rms = nn.RMSNorm([3, 4])
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(()))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.bnb_ln_bias_mixer = nn.Linear(4, 4)  # a name that substring rules trip over
        self.words = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.words.weight


DECAYED = {"tables.linear.weight", "bnb_ln_bias_mixer.weight", "words.weight"}


def test_who_decays():
    module = Everything()
    groups = {g["name"]: g for g in parameter_groups(module, 0.3)}
    assert set(groups["decay"]["param_names"]) == DECAYED
    assert groups["decay"]["weight_decay"] == 0.3
    assert groups["no_decay"]["weight_decay"] == 0.0
    declared = {"tables.positions", "tables.blocks.0.relative_table"}
    assert declared | {"norm1.weight", "rms.weight", "log_scale", "bias"} <= set(groups["no_decay"]["param_names"])


def test_every_trainable_parameter_is_in_exactly_one_group():
    module = Everything()
    placed = [id(p) for g in parameter_groups(module, 0.3) for p in g["params"]]
    assert len(placed) == len(set(placed))
    assert set(placed) == {id(p) for p in module.parameters() if p.requires_grad}
    assert id(module.frozen.weight) not in placed
    assert placed.count(id(module.words.weight)) == 1


def test_a_tied_parameter_does_not_decay_if_one_owner_says_so():
    module = nn.ModuleDict({"a": nn.Linear(4, 5, bias=False), "tables": Tables()})
    module["a"].weight = module["tables"].positions  # the owner that declares it comes second
    groups = {g["name"]: g for g in parameter_groups(module, 0.3)}
    assert "a.weight" in groups["no_decay"]["param_names"]


def test_named_by_the_user():
    module = Everything()
    groups = {g["name"]: g for g in parameter_groups(module, 0.3, ["words.*", "tables.linear.weight"])}
    assert set(groups["decay"]["param_names"]) == DECAYED - {"words.weight", "tables.linear.weight"}
    with pytest.raises(ValueError, match=r"'wrods.weight' matches no trainable parameter.*words\.weight"):
        parameter_groups(module, 0.3, ["wrods.weight"])


def test_nothing_to_train():
    with pytest.raises(ValueError, match="frozen"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_decay_moves_matrices_only(name):
    torch.manual_seed(0)
    module = Everything()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    optimizer = build_optimizer(module, OptimConfig(optimizer=name, lr=0.1, weight_decay=0.5))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert moved == DECAYED


def test_options_reach_torch():
    optimizer = build_optimizer(nn.Linear(2, 2), OptimConfig(lr=0.1, betas=(0.8, 0.9), eps=1e-5, weight_decay=0))
    assert isinstance(optimizer, torch.optim.AdamW)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["fused"]) == ((0.8, 0.9), 1e-5, True)
    sgd = build_optimizer(nn.Linear(2, 2), OptimConfig(optimizer="sgd", momentum=0.7))
    assert sgd.param_groups[0]["momentum"] == 0.7


def test_set_lr_keeps_the_scale_of_a_group():
    optimizer = build_optimizer(nn.Linear(2, 2), OptimConfig())
    optimizer.param_groups[1]["lr_scale"] = 0.1
    set_lr(optimizer, 2.0)
    assert [g["lr"] for g in optimizer.param_groups] == [2.0, 0.2]
