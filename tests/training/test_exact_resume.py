"""The trainer with the real root and the real loader: towers with dropout, a frozen tower's memo, InfoNCE, workers."""

from __future__ import annotations

import pytest
import torch

from mmrep.config import component
from mmrep.data.loader import BatchLoader
from mmrep.data.reader import Reader
from mmrep.data.records import Records
from mmrep.embed.memo import Memo
from mmrep.embed.store import FeatureStore
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.root import Root
from mmrep.schedules import Schedule
from mmrep.training.contracts import Callback, TrainConfig
from mmrep.training.optim import GroupConfig, OptimConfig
from mmrep.training.trainer import Trainer
from tests import toys  # noqa: F401
from tests.training.toys import lines, tensors


def build(folder, *, workers=0, seed=0, callbacks=(), steps=12, adapter=None, **optim):
    generator = torch.Generator().manual_seed(1)
    columns = {name: [torch.randn(1 + i % 3, generator=generator).tolist() for i in range(21)] for name in "xy"}
    columns["x"][4] = None  # missing
    columns["y"][9] = "broken"
    columns["id"] = [f"s{i}" for i in range(21)]
    towers = {
        "a": TowerConfig(encoder=component("encoders", "toy", dropout=0.2), adapter=adapter),
        "b": TowerConfig(encoder=component("encoders", "toy"), frozen=True),
    }
    torch.manual_seed(seed)
    model = Model(ModelConfig(dim=5, towers=towers))
    fields = {"x": "a", "y": "b"}
    chosen = [component("objectives", "contrastive", pairs=[{"between": ["x", "y"]}])]
    reader = Reader({f: model.tower(t).encoder for f, t in fields.items()}, memoised={"y"})
    loader = BatchLoader(Records.from_lists(**columns), reader, batch_size=4, workers=workers, seed=2)
    return Trainer(
        Root(model, chosen, fields=fields, views={}, memo=Memo(store=FeatureStore(folder / "features"))), loader,
        train=TrainConfig(steps=steps, precision="fp32", log_every=2, save_every=3),
        optim=OptimConfig(lr=0.01, schedule=Schedule(warmup=2), **optim), folder=folder, callbacks=callbacks,
    )  # fmt: skip


class Kill(Callback):
    def __init__(self, at):
        self.at = at

    def on_step_end(self, trainer, step):
        if step == self.at:
            raise InterruptedError


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    trainer = build(folder)
    trainer.fit()
    return trainer, folder


@pytest.mark.parametrize(("workers", "cut"), [(0, 5), (0, 7), (0, 11), (2, 8)])
def test_resume_is_bitwise(tmp_path, straight, workers, cut):
    first, folder = straight
    with pytest.raises(InterruptedError):
        build(tmp_path, workers=workers, callbacks=[Kill(cut)]).fit()
    resumed = build(tmp_path, workers=workers, seed=9)
    resumed.fit(resume=True)
    a, b = tensors(first), tensors(resumed)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert lines(tmp_path) == lines(folder)


@pytest.mark.parametrize("cut", [4, 8])  # resumed at step 3, before the group begins, and at step 6, after
def test_groups_of_learning_rates_that_begin_later_resume_bitwise(tmp_path, cut):
    group = GroupConfig(match="model.towers.a.encoder.*", lr=0.5, begin=0.4)
    optim = {"layer_decay": 0.5, "groups": [group]}
    (first := build(tmp_path / "first", **optim)).fit()
    with pytest.raises(InterruptedError):
        build(tmp_path / "second", callbacks=[Kill(cut)], **optim).fit()
    resumed = build(tmp_path / "second", seed=9, **optim)
    resumed.fit(resume=True)
    a, b = tensors(first), tensors(resumed)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_an_adapter_with_dropout_resumes_bitwise(tmp_path):
    adapter = component("adapters", "lora", rank=2, dropout=0.3, dora=True, also=["embed.*"])
    (first := build(tmp_path / "first", adapter=adapter)).fit()
    with pytest.raises(InterruptedError):
        build(tmp_path / "second", callbacks=[Kill(7)], adapter=adapter).fit()
    resumed = build(tmp_path / "second", seed=9, adapter=adapter)
    resumed.fit(resume=True)
    a, b = tensors(first), tensors(resumed)
    assert a.keys() == b.keys()
    assert any(".lora_magnitude_vector." in name for name in a)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_lines_name_objectives_and_temperatures(straight):
    last = lines(straight[1])[-1]
    assert {"loss", "contrastive/loss", "contrastive/x-y", "scale/default", "grad_norm", "lr"} <= set(last)
    assert last["loss"] == pytest.approx(last["contrastive/loss"])
