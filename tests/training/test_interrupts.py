"""Runs that are killed, for real: other processes, real signals."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmrep.training import checkpoint
from mmrep.training.contracts import Callback
from mmrep.training.guard import Interrupts
from tests.training.toys import lines, tensors, toy_trainer

ROOT = Path(__file__).parents[2]


def start(folder, steps):
    # as many threads as here: another number sums in another order, which is no longer bitwise
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.training.toys", str(folder), str(steps)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_steps(folder, n, process):
    for _ in range(6000):
        if (found := checkpoint.steps(folder / "checkpoints")) and found[-1] >= n:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    pytest.fail("the run makes no progress")


def killed(folder, steps, goals, seed=0):
    """Start a run and kill it some random moments after it saved each of ``goals``; then finish it here."""
    generator = random.Random(seed)
    for goal in goals:
        process = start(folder, steps)
        try:
            wait_for_steps(folder, goal, process)
            time.sleep(generator.random() * 0.1)
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            process.communicate()
        assert checkpoint.latest(folder / "checkpoints") is not None
    resumed = toy_trainer(folder, steps=steps, save_every=2, keep=2)
    resumed.fit(resume=True)
    assert resumed.root.calls < steps
    return resumed


@pytest.mark.parametrize("goals", [[30], pytest.param(list(range(5, 205, 10)), marks=pytest.mark.slow)])
def test_kill_9_and_resume_is_bitwise(tmp_path, goals):
    """Killed at random moments of a run that saves every second step, so also in the midst of saving."""
    steps = 300 if len(goals) > 1 else 100
    straight = toy_trainer(tmp_path / "straight", steps=steps, save_every=None)
    straight.fit()
    resumed = killed(tmp_path / "killed", steps, goals)
    a, b = tensors(straight), tensors(resumed)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert lines(tmp_path / "straight") == lines(tmp_path / "killed")


def test_ctrl_c_saves_and_leaves(tmp_path):
    process = start(tmp_path, 100_000)
    try:
        wait_for_steps(tmp_path, 4, process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    # python ends itself with SIGINT after a KeyboardInterrupt that nobody caught: a shell shows 130
    assert process.returncode == -signal.SIGINT
    assert "saving, then stopping" in errors
    newest = checkpoint.steps(tmp_path / "checkpoints")[-1]
    assert checkpoint.latest(tmp_path / "checkpoints") == checkpoint.path_of(tmp_path / "checkpoints", newest)


class _SignalAt(Callback):
    def __init__(self, at, number=signal.SIGINT):
        self.at, self.number = at, number

    def on_step_end(self, trainer, step):
        if step == self.at:
            os.kill(os.getpid(), self.number)


def test_an_interrupted_run_goes_on_bitwise(tmp_path):
    straight = toy_trainer(tmp_path / "a")
    straight.fit()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        toy_trainer(tmp_path / "b", callbacks=[_SignalAt(9)], save_every=None).fit()
    assert signal.getsignal(signal.SIGINT) is before
    assert [p.name for p in (tmp_path / "b/checkpoints").iterdir()] == ["step-00000010"]  # the step under way ends
    resumed = toy_trainer(tmp_path / "b")
    resumed.fit(resume=True)
    a, b = tensors(straight), tensors(resumed)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


def test_sigterm_ends_with_143(tmp_path):
    with pytest.raises(SystemExit) as caught:
        toy_trainer(tmp_path, callbacks=[_SignalAt(5, signal.SIGTERM)]).fit()
    assert caught.value.code == 143
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-00000006"


def test_a_second_ctrl_c_stops_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
            assert interrupts.requested
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_loader_worker_leaves_ctrl_c_to_its_parent():
    """Workers are forked with the handler in place, and a terminal sends Ctrl-C to them as well."""
    for number, status in ((signal.SIGINT, 0), (signal.SIGTERM, 143)):
        with Interrupts() as interrupts:
            worker = os.fork()
            if worker == 0:
                os.kill(os.getpid(), number)
                os._exit(1 if interrupts.requested else 0)
            assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == status
            assert not interrupts.requested
