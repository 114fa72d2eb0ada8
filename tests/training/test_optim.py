from __future__ import annotations

import pytest
import torch
from torch import nn

from mmrep.config import ConfigError, component, parse
from mmrep.model import Model, ModelConfig
from mmrep.schedules import Schedule
from mmrep.tower import TowerConfig
from mmrep.training.optim import GroupConfig, OptimConfig, build_optimizer, parameter_groups, rest, set_lr
from tests.training.toys import ToyLoader, ToyRoot, toy_trainer


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


VIT = {"size": 8, "patch": 4, "width": 16, "depth": 2, "heads": 2}


class Run(nn.Module):
    """As the root of a run: a model of two towers, and an objective with weights."""

    def __init__(self, **fields):
        super().__init__()
        towers = {
            "image": TowerConfig(encoder=component("encoders", "image-vit", **VIT), **fields),
            "rows": TowerConfig(encoder=component("encoders", "features")),
        }
        self.model = Model(ModelConfig(dim=4, towers=towers))
        self.head = nn.Linear(4, 4)


def scales(groups):
    return {name: g["lr_scale"] for g in groups for name in g["param_names"]}


def test_layers_move_slower_the_deeper_they_are(caplog):
    found = scales(parameter_groups(Run(), 0.3, layer_decay=0.5))
    image = {n.removeprefix("model.towers.image."): s for n, s in found.items() if ".image." in n}
    assert image.pop("encoder.positions") == image.pop("encoder.patches.weight") == 0.5**3
    assert image.pop("encoder.special") == image.pop("encoder.patches.bias") == 0.5**3
    blocks = {n: s for n, s in image.items() if ".blocks." in n}
    assert {(n.split(".")[3], s) for n, s in blocks.items()} == {("0", 0.5**2), ("1", 0.5)}
    assert len(blocks) == 24
    rest_of_all = {n: s for n, s in found.items() if n.removeprefix("model.towers.image.") not in blocks}
    assert {n for n, s in rest_of_all.items() if s == 1.0} >= {
        "model.towers.image.encoder.norm.weight", "model.towers.image.projector.map.weight", "head.weight",
        "model.towers.rows.encoder.map.weight", "model.temperatures.default.log_scale",
    }  # fmt: skip
    assert "model.towers.rows.encoder has no layers" in caplog.text


def test_decay_and_layers_go_together():
    groups = parameter_groups(Run(), 0.3, layer_decay=0.5)
    keys = [(g["lr_scale"], g["weight_decay"]) for g in groups]
    assert len(set(keys)) == len(keys) == 8
    assert {g["name"] for g in groups} == {"decay", "no_decay"}


def test_layers_below_what_is_frozen_count():
    found = scales(parameter_groups(Run(frozen=1), 0.3, layer_decay=0.5))
    assert {s for n, s in found.items() if ".blocks.1." in n} == {0.5}
    assert not any(".blocks.0." in n for n in found)


def test_without_any_layers_the_decay_is_refused():
    with pytest.raises(ValueError, match=r"layer_decay=0\.5: no encoder that trains has layers"):
        parameter_groups(nn.Linear(2, 2), 0.3, layer_decay=0.5)
    with pytest.raises(ValueError, match="no encoder that trains has layers"):
        parameter_groups(Run(frozen=True), 0.3, layer_decay=0.5)


def test_a_group_has_its_own_rate_decay_and_beginning_and_the_first_match_counts():
    groups = [
        GroupConfig(match="*.blocks.1.*", lr=3.0, weight_decay=0.7),
        GroupConfig(match=["model.towers.image.*", "head.bias"], begin=0.5),
    ]
    found = parameter_groups(Run(), 0.3, layer_decay=0.5, groups=groups)
    placed = [n for g in found for n in g["param_names"]]
    assert len(placed) == len(set(placed)) == len(list(Run().named_parameters()))
    by_name = {n: g for g in found for n in g["param_names"]}
    first = by_name["model.towers.image.encoder.transformer.blocks.1.attention.qkv.weight"]
    assert (first["lr_scale"], first["weight_decay"], first["begin"]) == (1.5, 0.7, 0.0)
    bias = by_name["model.towers.image.encoder.transformer.blocks.1.attention.qkv.bias"]
    assert (bias["lr_scale"], bias["weight_decay"]) == (1.5, 0.0)
    second = by_name["model.towers.image.encoder.transformer.blocks.0.attention.qkv.weight"]
    assert (second["lr_scale"], second["weight_decay"], second["begin"]) == (0.25, 0.3, 0.5)
    assert by_name["head.bias"]["begin"] == 0.5
    assert by_name["head.weight"]["begin"] == 0.0


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ([["*.imge.*"]], r"optim\.groups\[0\]\.match: '\*\.imge\.\*' matches no trainable parameter"),
        ([["haed.*"]], r"groups\[0\]\.match: 'haed\.\*' matches no trainable parameter; did you mean 'head\.\*'"),
        ([["head.*"], ["head.bias"]], r"groups\[1\]\.match: all that 'head\.bias' matches belongs to an earlier group"),
    ],
)
def test_a_pattern_that_chooses_nothing_is_refused(patterns, words):
    with pytest.raises(ValueError, match=words):
        parameter_groups(Run(), 0.3, groups=[GroupConfig(match=match) for match in patterns])


def test_groups_are_read_from_plain_data():
    config = parse(OptimConfig, {"groups": [{"match": "a.*", "lr": "1e-1"}, {"match": ["b"], "begin": 0.25}]})
    assert [(g.patterns, g.lr, g.begin) for g in config.groups] == [(["a.*"], 0.1, 0.0), (["b"], 1.0, 0.25)]
    with pytest.raises(ConfigError, match=r"groups\[0\]\.begin"):
        parse(OptimConfig, {"groups": [{"match": "a", "begin": 1.0}]})


def test_a_group_that_has_not_begun_neither_moves_nor_counts_nor_remembers():
    def run(steps, **group):
        root, seen = ToyRoot(), []
        start = {n: p.detach().clone() for n, p in root.named_parameters()}
        optim = {"groups": [GroupConfig(match="encode.*", **group)], "clip_norm": None}
        trainer = toy_trainer(root=root, optim=optim, steps=10)
        move = trainer._prepared.step
        trainer._prepared.step = lambda: (seen.append(bool(trainer.optimizer.state.get(root.encode.weight))), move())
        trainer.total_steps = steps
        trainer.metrics.add = lambda report, n: norms.append(report["grad_norm"].item())
        norms = []
        trainer.metrics.flush = lambda *args: None
        trainer._state.save = lambda *args, **options: None
        trainer.fit()
        moved = {n for n, p in root.named_parameters() if not torch.equal(p, start[n])}
        return moved, seen, norms

    moved, seen, norms = run(10, begin=0.35)
    assert seen == [False] * 5 + [True] * 5  # steps 0 to 3 rest; before its first step it remembers nothing
    assert "encode.weight" in moved
    all_of_it = run(10)[2]
    assert norms[0] < all_of_it[0]
    optimizer = build_optimizer(nn.Linear(2, 2), OptimConfig(groups=[GroupConfig(match="bias", begin=0.5)]))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    rest(optimizer, 0.5)
    assert all(p.grad is not None for g in optimizer.param_groups for p in g["params"])
    rest(optimizer, 0.49)
    assert [[p.grad is None for p in g["params"]] for g in optimizer.param_groups] == [[True], [False]]


def test_a_beginning_needs_an_end():
    with pytest.raises(ValueError, match="begin"):
        toy_trainer(loader=ToyLoader(stream=True), epochs=1.0,
                    optim={"groups": [GroupConfig(match="encode.*", begin=0.5)],
                           "schedule": Schedule(shape="constant")})  # fmt: skip
