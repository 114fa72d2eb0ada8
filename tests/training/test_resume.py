from __future__ import annotations

import logging

import pytest

from mmrep.schedules import Schedule
from mmrep.training.contracts import Callback
from mmrep.training.errors import ResumeError
from tests.training.toys import Recorder, ToyRoot, lines, same, toy_trainer


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
