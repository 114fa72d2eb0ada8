from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from mmrep.schedules import Schedule
from mmrep.training.contracts import TrainConfig
from mmrep.training.trainer import Trainer
from tests.training.toys import Recorder, ToyLoader, ToyRoot, lines, same, toy_trainer


def test_learns(tmp_path):
    trainer = toy_trainer(tmp_path, steps=60)
    summary = trainer.fit()
    found = lines(tmp_path)
    assert found[-1]["loss"] < 0.5 * found[0]["loss"]
    assert [row["step"] for row in found] == list(range(3, 61, 3))
    assert set(found[0]) == {
        "step", "epoch", "lr", "loss", "fit", "other", "grad_norm", "scale/temperature", "samples"
    }  # fmt: skip
    assert summary["steps"] == 60
    assert summary["checkpoint"].endswith("step-00000060")
    assert summary["precision"] == "no"
    assert not trainer.root.training
    assert trainer.loader.closed


def test_lines_hold_what_was_computed(tmp_path):
    """The means against a record of every forward pass, the schedule and the samples."""
    root = ToyRoot()
    losses = []
    root.register_forward_hook(lambda m, a, out: losses.append(out["loss"].item()))
    trainer = toy_trainer(tmp_path, root=root, steps=8, log_every=4)
    trainer.fit()
    first, second = lines(tmp_path)
    assert first["loss"] == pytest.approx(np.mean(losses[:4]), rel=1e-6)
    assert second["loss"] == pytest.approx(np.mean(losses[4:]), rel=1e-6)
    assert first["samples"] == 32
    assert first["lr"] == trainer.optim.schedule.value(0.02, 3, 8)
    assert first["epoch"] == pytest.approx(4 / 6)
    assert second["scale/temperature"] == pytest.approx(root.temperature.log_scale.exp().item())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_equals_a_loop_written_by_hand(optimizer):
    """The slow twin: no Accelerate, no fused kernels, groups and schedule and clipping spelled out."""
    root, twin, loader = ToyRoot(), ToyRoot(), ToyLoader()
    root.norm = twin.norm = nn.Identity()  # a bias before batch norm has a gradient of noise, which Adam blows up
    torch.manual_seed(3)
    matrices = [root.encode.weight, root.decode.weight]
    rest = [p for p in root.parameters() if not any(p is m for m in matrices)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    hand = (
        torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=False, foreach=False)
        if optimizer == "adamw"
        else torch.optim.SGD(groups, momentum=0.9, fused=False, foreach=False)
    )
    step = 0
    while step < 20:
        generators = torch.get_rng_state()
        iterator = iter(loader)
        batch = next(iterator)
        torch.set_rng_state(generators)
        while batch is not None and step < 20:
            for group in hand.param_groups:
                decayed = 0.02 * (1 + math.cos(math.pi * (step - 3) / 17)) / 2
                group["lr"] = 0.02 * (step + 1) / 3 if step < 3 else decayed
            hand.zero_grad()
            root(batch)["loss"].backward()
            norm = math.sqrt(sum(p.grad.square().sum().item() for p in root.parameters()))
            for p in root.parameters():
                p.grad.mul_(min(1.0, 1.0 / (norm + 1e-6)))
            hand.step()
            root.after_optimizer_step()
            step += 1
            batch = next(iterator, None)
    trainer = toy_trainer(None, root=twin, optim={"optimizer": optimizer})
    trainer.fit()
    for (name, a), b in zip(root.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_when_callbacks_are_called(tmp_path):
    recorder = Recorder()
    toy_trainer(tmp_path, steps=5, save_every=2, eval_every=4, callbacks=[recorder]).fit()
    assert recorder.events == [
        ("step", 1), ("step", 2), ("save", "step-00000002"), ("step", 3),
        ("step", 4), ("eval", 4, False), ("save", "step-00000004"),
        ("step", 5), ("eval", 5, False), ("save", "step-00000005"), ("end", 5),
    ]  # fmt: skip
    assert [row for row in lines(tmp_path) if "eval/metric" in row] == [
        {"step": 4, "epoch": 4 / 6, "eval/metric": 4.0},
        {"step": 5, "epoch": 5 / 6, "eval/metric": 5.0},
    ]


def test_no_intervals(tmp_path):
    recorder = Recorder()
    toy_trainer(tmp_path, steps=5, save_every=None, eval_every=None, callbacks=[recorder]).fit()
    assert [e for e in recorder.events if e[0] in {"save", "eval"}] == [("save", "step-00000005")]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    summary = toy_trainer(None).fit()
    assert summary["checkpoint"] is None
    assert math.isfinite(summary["metrics"]["loss"])
    assert list(tmp_path.iterdir()) == []


def test_the_clamp_comes_after_the_step_and_keeps_the_gradient():
    """A clamp inside forward would kill the gradient of a scale at its bound, which then never comes back."""
    root = ToyRoot()
    with torch.no_grad():
        root.temperature.log_scale.fill_(1.1)  # at the bound
    toy_trainer(None, root=root, steps=20).fit()
    assert root.seen_scales[0] == pytest.approx(math.exp(1.1))
    assert max(root.seen_scales) <= math.exp(1.1) + 1e-6
    assert root.seen_scales[-1] < 2.9

    def outwards(root, batch, fit, other):
        return fit, -root.temperature.log_scale.exp().mean()

    root = ToyRoot(poison=outwards)
    toy_trainer(None, root=root, steps=30).fit()
    assert max(root.seen_scales) <= math.exp(1.1) + 1e-6  # never above the bound in a forward pass
    assert root.temperature.log_scale.item() == pytest.approx(1.1)
    assert root.temperature.log_scale.grad is None


def test_train_mode_respects_frozen_parts():
    class Frozen(ToyRoot):
        def __init__(self):
            super().__init__()
            self.frozen = nn.BatchNorm1d(6)

        def train(self, mode=True):
            super().train(mode)
            if hasattr(self, "frozen"):
                self.frozen.eval()
            return self

        def forward(self, batch):
            assert self.training
            assert self.dropout.training
            assert not self.frozen.training
            self.frozen(batch.inputs["x"][0]["values"] + 5)
            out = super().forward(batch)
            return {**out, "loss": out["loss"] + 0 * self.frozen.weight.sum() + 0 * self.frozen.bias.sum()}

    root = Frozen().eval()
    toy_trainer(None, root=root, steps=8, eval_every=3, callbacks=[Recorder()]).fit()
    assert torch.equal(root.frozen.running_mean, torch.zeros(6))


def test_quarantined_samples_are_reported_with_how_many_were_read(tmp_path):
    calls = []
    loader = ToyLoader(bad={3, 17})
    toy_trainer(tmp_path, loader=loader, steps=6, on_quarantined=lambda bad, seen: calls.append((bad, seen))).fit()
    expected = [row for rows in loader.served for row in rows if row in {"3", "17"}]
    assert [note.id for bad, _ in calls for note in bad] == expected
    for bad, seen in calls:
        step = next(i for i, rows in enumerate(loader.served) if bad[0].id in rows)
        assert seen == 8 * (step + 1)
    seen_later = []
    resumed = toy_trainer(
        tmp_path, loader=ToyLoader(bad={3, 17}), steps=12, on_quarantined=lambda bad, seen: seen_later.append(seen)
    )
    resumed.fit(resume=True)
    assert min(seen_later) > 48


def test_stopping_for_bad_data():
    class TooMany(ValueError):
        pass

    def stop(bad, seen):
        raise TooMany

    with pytest.raises(TooMany):
        toy_trainer(None, loader=ToyLoader(bad=range(50)), on_quarantined=stop).fit()


@pytest.mark.parametrize(("epochs", "steps"), [(1, 6), (2.5, 15), (0.1, 1)])
def test_length_in_epochs(epochs, steps):
    trainer = toy_trainer(None, epochs=epochs)
    summary = trainer.fit()
    assert (summary["steps"], trainer.total_steps) == (steps, steps)
    assert len(trainer.loader.served) == steps


def test_a_stream_in_epochs():
    trainer = toy_trainer(None, loader=ToyLoader(stream=True), epochs=2, optim={"schedule": Schedule(shape="constant")})
    assert trainer.fit()["steps"] == 12
    with pytest.raises(ValueError, match="length of the run"):
        toy_trainer(None, loader=ToyLoader(stream=True), epochs=2)


def test_each_epoch_has_its_order_and_all_samples():
    loader = ToyLoader(n=48)
    toy_trainer(None, loader=loader, epochs=2).fit()
    first, second = ([row for rows in loader.served[i : i + 6] for row in rows] for i in (0, 6))
    assert sorted(first) == sorted(second) == sorted(map(str, range(48)))
    assert first != second


def test_no_data():
    with pytest.raises(ValueError, match="no batch"):
        toy_trainer(None, loader=ToyLoader(n=3), steps=2).fit()


def test_precision(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    dtypes = []
    root = ToyRoot()
    root.encode.register_forward_hook(lambda m, a, out: dtypes.append(out.dtype))
    trainer = toy_trainer(None, root=root, precision="bf16", steps=2)
    assert trainer.fit()["precision"] == "bf16"
    assert set(dtypes) == {torch.bfloat16}
    assert {p.dtype for p in root.parameters()} == {torch.float32}
    assert toy_trainer(None, precision="fp32", steps=2).fit()["precision"] == "no"  # after bf16, in one process
    for fast, name in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr("mmrep.training.engine.has_fast_bf16", lambda fast=fast: fast)
        assert toy_trainer(None, precision="auto", steps=1).fit()["precision"] == name
    if not torch.accelerator.is_available():
        with pytest.raises(ValueError, match="fp16 needs a GPU"):
            toy_trainer(None, precision="fp16")


def test_a_launcher_that_accelerate_does_not_see_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("mmrep.training.engine.Accelerator", lambda **_: type("One", (), {"num_processes": 1})())
    with pytest.raises(ValueError, match="2 processes, but Accelerate runs 1"):
        toy_trainer(None)


def test_length_is_given_once():
    for options in ({}, {"steps": 1, "epochs": 1}):
        with pytest.raises(ValueError, match="exactly one of steps and epochs"):
            TrainConfig(**options)


def test_the_seed_decides():
    a, b, c = (toy_trainer(None, seed=s) for s in (1, 1, 2))
    for trainer in (a, b, c):
        torch.rand(7)
        trainer.fit()
    same(a, b)
    assert not torch.equal(a.root.encode.weight, c.root.encode.weight)


def test_each_step_is_taken_with_its_learning_rate():
    used = []

    class Watch(ToyRoot):
        def after_optimizer_step(self):
            used.append({group["lr"] for group in trainer.optimizer.param_groups})

    trainer = toy_trainer(None, root=Watch(), steps=8)
    trainer.fit()
    assert used == [{trainer.optim.schedule.value(0.02, step, 8)} for step in range(8)]


def test_clipping():
    norms = []

    class Watch(ToyRoot):
        def after_optimizer_step(self):
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]).item())

    toy_trainer(None, root=Watch(), steps=4, optim={"clip_norm": 0.1}).fit()
    assert max(norms) == pytest.approx(0.1, rel=1e-3)
    norms.clear()
    toy_trainer(None, root=Watch(), steps=4, optim={"clip_norm": None}).fit()
    assert min(norms) > 0.2


def test_only_loss_is_read():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, batch):
            return {"loss": self.w.square().sum()}

        def after_optimizer_step(self):
            pass

    root = Bare()
    Trainer(root, ToyLoader(), train=TrainConfig(steps=5, precision="fp32"), optim=toy_trainer(None).optim).fit()
    assert root.w.item() < 1
