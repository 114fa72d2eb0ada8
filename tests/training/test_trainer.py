from __future__ import annotations

import logging
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mmrep.schedules import Schedule
from mmrep.training.contracts import Callback, TrainConfig
from mmrep.training.errors import CheckpointError, NonFiniteLoss, ResumeError
from mmrep.training.trainer import Trainer
from tests.training.toys import ToyLoader, ToyRoot, lines, tensors, toy_trainer


class Recorder(Callback):
    def __init__(self):
        self.events = []

    def on_step_end(self, trainer, step):
        self.events.append(("step", step))
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002

    def on_eval(self, trainer, step):
        self.events.append(("eval", step, trainer.root.training))
        torch.rand(step)
        return {"eval/metric": float(step)}

    def on_save(self, trainer, folder):
        self.events.append(("save", folder.name))
        torch.rand(5)

    def on_fit_end(self, trainer, summary):
        self.events.append(("end", summary["steps"]))


def same(a, b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


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


@pytest.mark.parametrize("cut", range(5, 21))
def test_resume_is_bitwise(tmp_path, cut):
    """Killed after any step (checkpoints fall inside metrics windows and at ends of epochs) and resumed."""
    straight = toy_trainer(tmp_path / "straight", eval_every=5, callbacks=[Recorder()])
    straight.fit()

    class Kill(Callback):
        def on_step_end(self, trainer, step):
            if step == cut:
                raise InterruptedError

    with pytest.raises(InterruptedError):
        toy_trainer(tmp_path / "cut", eval_every=5, callbacks=[Recorder(), Kill()]).fit()
    resumed = toy_trainer(tmp_path / "cut", eval_every=5, callbacks=[Recorder()], root=ToyRoot(seed=9))
    resumed.fit(resume=True)
    same(straight, resumed)
    assert lines(tmp_path / "straight") == lines(tmp_path / "cut")
    assert resumed.loader.served == straight.loader.served[(cut - 1) // 4 * 4 :]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resume_with_other_optimizers(tmp_path, optimizer):
    options = {"optimizer": optimizer, "clip_norm": None, "schedule": Schedule(shape="constant")}
    straight = toy_trainer(tmp_path / "a", optim=options)
    straight.fit()
    toy_trainer(tmp_path / "b", steps=8, optim=options).fit()
    resumed = toy_trainer(tmp_path / "b", root=ToyRoot(seed=9), optim=options)
    resumed.fit(resume=True)
    same(straight, resumed)


def test_watching_does_not_change_the_run(tmp_path):
    alone = toy_trainer(tmp_path / "a")
    alone.fit()
    watched = toy_trainer(tmp_path / "b", callbacks=[Recorder()], eval_every=2, save_every=1)
    watched.fit()
    same(alone, watched)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_equals_a_loop_written_by_hand(optimizer):
    """The slow twin: no Accelerate, no fused kernels, groups and schedule and clipping spelled out."""
    root, loader = ToyRoot(), ToyLoader()
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
    trainer = toy_trainer(None, optim={"optimizer": optimizer})
    trainer.fit()
    for (name, a), b in zip(root.state_dict().items(), trainer.root.state_dict().values(), strict=True):
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


def _nan_part(at):
    def poison(root, batch, fit, other):
        return fit, other * torch.nan if root.calls == at else other

    return poison


def test_a_non_finite_loss_stops_with_step_ids_and_culprit(tmp_path):
    trainer = toy_trainer(tmp_path, root=ToyRoot(poison=_nan_part(7)), save_every=2)
    with pytest.raises(NonFiniteLoss) as caught:
        trainer.fit()
    assert caught.value.step == 7
    assert caught.value.ids == trainer.loader.served[6]
    assert caught.value.culprits == ["other = nan"]
    assert caught.value.checkpoint == tmp_path / "checkpoints" / "step-00000006"
    for text in ("step 7", "other = nan", "step-00000006", ", ".join(trainer.loader.served[6])):
        assert text in str(caught.value)
    before = toy_trainer(None, steps=6, optim={"schedule": trainer.optim.schedule})
    before.total_steps = 20  # the same schedule
    loaded = toy_trainer(tmp_path, steps=6)
    loaded.fit(resume=True)
    assert torch.equal(loaded.root.encode.weight, trainer.root.encode.weight)  # the bad step moved nothing
    assert [row["step"] for row in lines(tmp_path)] == [3, 6]


def test_a_non_finite_gradient_of_a_finite_loss_stops():
    def poison(root, batch, fit, other):
        bad = (root.decode.bias * 0).abs().sqrt().sum()  # value 0, gradient 0 * inf
        return fit, other + bad if root.calls == 3 else other

    root = ToyRoot(poison=poison)
    with pytest.raises(NonFiniteLoss) as caught:
        toy_trainer(None, root=root).fit()
    assert caught.value.step == 3
    assert caught.value.culprits == ["gradient of decode.bias"]
    assert torch.isfinite(root.decode.bias).all()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_on_a_device_that_is_asked_rarely_the_bad_step_is_found_and_moves_nothing(optimizer):
    """As on a GPU: looked at every 5 steps. Later steps run, but step 7 is named and was skipped by the kernel."""
    moves = {}

    def poison(root, batch, fit, other):
        moves[root.calls] = root.encode.weight.detach().clone()
        return fit, other * torch.nan if root.calls == 7 else other

    trainer = toy_trainer(None, root=ToyRoot(poison=poison), log_every=5, save_every=None,
                          optim={"optimizer": optimizer})
    trainer._look_every = 5
    with pytest.raises(NonFiniteLoss) as caught:
        trainer.fit()
    assert trainer.root.calls == 10
    assert caught.value.step == 7
    assert caught.value.ids == trainer.loader.served[6]
    assert caught.value.culprits == ["other = nan"]
    assert torch.equal(moves[7], moves[8])
    assert not torch.equal(moves[6], moves[7])
    assert not torch.equal(moves[8], moves[9])
    assert torch.isfinite(trainer.root.encode.weight).all()


class _Reads(TorchFunctionMode):
    """Counts what makes a GPU wait."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__, torch.Tensor.__bool__,
                    torch.Tensor.__int__, torch.Tensor.numpy, torch.Tensor.cpu}:  # fmt: skip
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_no_reading_of_the_device_between_lines():
    class Quiet(ToyRoot):
        def forward(self, batch):
            self.seen_scales = []
            x = batch.inputs["x"][0]["values"]
            fit = (self.decode(self.norm(self.encode(x))) - x).square().mean()
            return {"loss": fit + self.temperature.log_scale.mean() * 0, "fit": fit}

        def after_optimizer_step(self):
            pass

    reads = []
    for steps in (10, 20):
        options = {"steps": steps, "log_every": steps, "save_every": None}
        trainer = toy_trainer(None, root=Quiet(), loader=ToyLoader(n=400), **options)
        trainer._look_every = steps
        with _Reads() as mode:
            trainer.fit()
        reads.append(len(mode.found))
    assert reads[0] == reads[1] > 0, mode.found


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
    resumed = toy_trainer(tmp_path, loader=ToyLoader(bad={3, 17}), steps=12,
                          on_quarantined=lambda bad, seen: seen_later.append(seen))
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


def test_a_run_is_not_overwritten(tmp_path):
    toy_trainer(tmp_path, steps=8).fit()
    with pytest.raises(ResumeError, match=r"already holds a run up to step 8.*--resume"):
        toy_trainer(tmp_path, steps=8).fit()


def test_resume_of_nothing_starts_anew(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1}\n{"st')  # killed before the first checkpoint
    toy_trainer(tmp_path, steps=6).fit(resume=True)
    assert "starting from the beginning" in caplog.text
    assert [row["step"] for row in lines(tmp_path)] == [3, 6]


def test_resume_of_a_finished_run_does_nothing(tmp_path):
    first = toy_trainer(tmp_path, steps=8)
    first.fit()
    before = lines(tmp_path)
    again = toy_trainer(tmp_path, steps=8, root=ToyRoot(seed=4))
    assert again.fit(resume=True)["steps"] == 8
    same(first, again)
    assert lines(tmp_path) == before
    assert again.root.calls == 0


def test_resume_says_what_was_changed(tmp_path, caplog):
    toy_trainer(tmp_path, steps=4).fit()
    with caplog.at_level(logging.WARNING):
        toy_trainer(tmp_path, steps=8, optim={"lr": 0.5}).fit(resume=True)
    assert "train.steps: 8, was 4" in caplog.text
    assert "optim.lr: 0.5, was 0.02" in caplog.text
    assert "train.seed" not in caplog.text


def test_a_damaged_newest_checkpoint_is_skipped(tmp_path):
    straight = toy_trainer(tmp_path / "a")
    straight.fit()
    toy_trainer(tmp_path / "b").fit()
    (tmp_path / "b/checkpoints/step-00000020/optimizer.safetensors").write_bytes(b"")
    resumed = toy_trainer(tmp_path / "b", root=ToyRoot(seed=9))
    resumed.fit(resume=True)
    assert resumed.root.calls == 4
    same(straight, resumed)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


def test_a_full_disk_stops_the_run_and_it_can_be_resumed(tmp_path, monkeypatch):
    from mmrep.training import checkpoint

    straight = toy_trainer(tmp_path / "a")
    straight.fit()
    original = checkpoint._write

    def full(path, content):
        if "step-00000008" in str(path):
            raise OSError(28, "No space left on device")
        return original(path, content)

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(CheckpointError, match="No space left"):
        toy_trainer(tmp_path / "b").fit()
    monkeypatch.undo()
    resumed = toy_trainer(tmp_path / "b", root=ToyRoot(seed=9))
    resumed.fit(resume=True)
    same(straight, resumed)


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
