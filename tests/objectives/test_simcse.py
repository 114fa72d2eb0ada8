"""Two readings of one value, of which dropout makes two views: unsupervised SimCSE."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mmrep.config import component
from mmrep.model import Model, ModelConfig, TemperatureConfig, TowerConfig
from mmrep.objectives.root import Root
from tests.objectives import ssl_toys

N = 6


def test_dropout_alone_makes_two_views_and_the_loss_is_info_nce_between_them():
    torch.manual_seed(0)
    tower = TowerConfig(encoder=component("encoders", "toy-ssl", dropout=0.3))
    scale = {"default": TemperatureConfig(scale=20, learned=False)}
    model = Model(ModelConfig(dim=5, towers={"a": tower}, temperatures=scale))
    chosen = component(
        "objectives", "contrastive", pairs=[{"between": ["x", "x"], "views": [0, 1]}], use_group=False,
        loss={"type": "info-nce", "symmetric": False},
    )  # fmt: skip
    root = Root(model, [chosen], fields={"x": "a"}, views={}).train()
    batch = ssl_toys.batch(range(N), views=1)
    batch.inputs["x"] = [batch.inputs["x"][0]] * 2  # the same reading twice
    torch.manual_seed(7)
    loss = root(batch)["loss"]
    torch.manual_seed(7)
    first, second = (model.tower("a")(batch.inputs["x"][0]) for _ in range(2))
    assert (first - second).norm(dim=1).mean() > 0.05
    terms = [-F.log_softmax(torch.stack([20 * first[i] @ second[j] for j in range(N)]), 0)[i] for i in range(N)]
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(loss, expected)
    parameters = list(model.tower("a").parameters())
    for a, b in zip(*(torch.autograd.grad(x, parameters) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(a, b)
