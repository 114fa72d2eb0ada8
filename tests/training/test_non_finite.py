from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

from mmrep.training.errors import NonFiniteLoss
from tests.training.toys import ToyLoader, ToyRoot, lines, toy_trainer


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


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_on_a_device_that_is_asked_rarely_the_bad_step_is_found_and_moves_nothing(optimizer, processes):
    """As on a GPU: looked at every 5 steps. Later steps run, but step 7 is named and was skipped by the kernel.

    With two processes that both saw it, the sum of signals is 2."""
    moves = {}

    def poison(root, batch, fit, other):
        moves[root.calls] = root.encode.weight.detach().clone()
        return fit, other * torch.nan if root.calls == 7 else other

    trainer = toy_trainer(
        None, root=ToyRoot(poison=poison), log_every=5, save_every=None, optim={"optimizer": optimizer}
    )
    trainer._look_every = 5
    trainer.accelerator.reduce = lambda tensor, reduction: tensor * processes
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


def _bad_steps(*bad):
    def poison(root, batch, fit, other):
        return fit, other * torch.nan if root.calls in bad else other

    return poison


def test_single_bad_steps_are_skipped_counted_and_logged(tmp_path, caplog):
    """Steps 4 and 9 leave no trace: neither in the optimizer, nor in the metrics."""

    def poison(root, batch, fit, other):
        return (fit * torch.nan, other) if root.calls in (4, 9) else (fit, other)

    trainer = toy_trainer(tmp_path, root=ToyRoot(poison=poison), max_skipped=2)
    summary = trainer.fit()
    assert summary["skipped"] == trainer.counters.skipped == 2
    assert summary["steps"] == 20
    assert int(next(iter(trainer.optimizer.state.values()))["step"]) == 18
    rows = lines(tmp_path)
    assert [row.get("skipped") for row in rows] == [None, 1, 2, 2, 2, 2, 2]
    assert all(value is not None for row in rows for value in row.values())
    assert [row["samples"] for row in rows][:2] == [24, 24]
    for step in (4, 9):
        assert f"step {step} skipped, not finite: fit = nan" in caplog.text
        assert ", ".join(trainer.loader.served[step - 1]) in caplog.text


def test_a_bad_batch_does_not_stay_in_the_running_statistics():
    def poison(root, batch, fit, other):
        return (fit * torch.nan, other) if root.calls == 3 else (fit, other)

    class Spoiled(ToyLoader):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__(), 1):
                if number == 3:
                    batch.inputs["x"][0]["values"] = batch.inputs["x"][0]["values"] * torch.nan
                yield batch

    trainer = toy_trainer(None, root=ToyRoot(poison=poison), loader=Spoiled(), steps=5, max_skipped=1)
    trainer.fit()
    assert trainer.counters.skipped == 1
    assert torch.isfinite(trainer.root.norm.running_mean).all()
    assert int(trainer.root.norm.num_batches_tracked) == 4


def test_one_more_than_allowed_stops_with_the_diagnosis_of_that_step(tmp_path):
    trainer = toy_trainer(tmp_path, root=ToyRoot(poison=_bad_steps(2, 5, 11)), max_skipped=2)
    with pytest.raises(NonFiniteLoss) as caught:
        trainer.fit()
    assert caught.value.step == 11
    assert trainer.counters.skipped == 2


def test_the_count_goes_on_after_a_resume(tmp_path):
    first = toy_trainer(tmp_path, root=ToyRoot(poison=_bad_steps(2, 5)), steps=8, max_skipped=2)
    first.fit()
    with pytest.raises(NonFiniteLoss):
        toy_trainer(tmp_path, root=ToyRoot(poison=_bad_steps(1)), steps=12, max_skipped=2).fit(resume=True)


def test_on_a_device_that_is_asked_rarely_bad_steps_move_nothing_and_are_counted():
    moves = {}

    def poison(root, batch, fit, other):
        moves[root.calls] = root.encode.weight.detach().clone()
        return fit, other * torch.nan if root.calls in (3, 4) else other

    trainer = toy_trainer(None, root=ToyRoot(poison=poison), log_every=5, save_every=None, max_skipped=2)
    trainer._look_every = 5
    trainer.fit()
    assert trainer.counters.skipped == 2
    assert torch.equal(moves[3], moves[5])
    assert not torch.equal(moves[5], moves[6])
